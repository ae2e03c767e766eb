"""Data sets (Parquet, JSONL, Hugging Face) become prompt rows of the group table.

A prompt set is fixed when it is made: it holds the rows that fit, in the file's order, templated and
tokenised. `group(id)` is then a pure function of the seed and the id. So a restarted run asks for the same
prompts again and no position has to be saved.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import numbers
from collections.abc import Collection, Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.data.rendering import renderer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FILE_SUFFIXES = (".parquet", ".jsonl", ".json")

Columns = dict[str, pa.ChunkedArray | list[Any]]
"""The columns of a data set as it was read; JSON may mix types within a column, which Arrow cannot hold."""


class PromptSet:
    """A prompt set holds the problems of one data set.

    Args:
        config: the section of the config; `config.limit` cuts before anything else does.
        tokenizer: the model's tokenizer; its chat template is used where the config has no `template`.
        name: the `dataset` column of the rows.
        max_tokens: tokens that the context leaves for a prompt; the smaller of it and `config.max_tokens`
            holds.
        seed: decides the order of each epoch.
        key: where `config` stands in the run's config, for messages: "prompts", "evaluation.sets.heldout".

    Attributes:
        num_rows: rows read.
        num_too_long: rows left out because their prompt is longer than the limit (it is never cut).
        longest: tokens of the longest prompt read, including prompts that are left out.

    Raises:
        ConfigError: one line that names the key, and the row or line where there is one.
    """

    def __init__(
        self,
        config: PromptsConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        max_tokens: int | None,
        seed: int = 0,
        key: str = "prompts",
    ) -> None:
        rows = load_rows(config, {"prompt": config.prompt_column, "answer": config.answer_column}, key)
        rendered = renderer_of(config, tokenizer, key).render(rows.to_pylist())
        lengths = np.array([len(ids) for ids, _ in rendered])
        if not lengths.all():
            raise ConfigError(
                f"{key}.path: {config.path}: row {int(np.argmin(lengths))}: the prompt has no tokens"
            )
        limit = min((n for n in (config.max_tokens, max_tokens) if n is not None), default=None)
        keep = np.arange(len(lengths)) if limit is None else np.flatnonzero(lengths <= limit)
        self.num_rows = len(lengths)
        self.num_too_long = len(lengths) - len(keep)
        self.longest = int(lengths.max())
        if not len(keep):
            found = f"all {len(lengths)} prompts are longer (the shortest has {lengths.min()} tokens)"
            if limit == config.max_tokens:
                raise ConfigError(f"{key}.max_tokens: {limit} tokens are too few: {found}")
            raise ConfigError(
                f"{key}.path: {config.path}: the context leaves {limit} tokens for a prompt, and {found}; "
                "lower sampling.max_tokens or raise model.max_length"
            )
        self._table = groups.table(
            {
                "group_id": i,
                "prompt": prompt,
                "answer": answer,
                "dataset": name,
                "prompt_ids": rendered[row].prompt_ids,
                **rendered[row].extras,
            }
            for i, (row, prompt, answer) in enumerate(
                zip(
                    keep,
                    rows["prompt"].take(keep).to_pylist(),
                    rows["answer"].take(keep).to_pylist(),
                    strict=True,
                )
            )
        )
        self._order = EpochOrder(len(self), seed, config.shuffle)

    def __len__(self) -> int:
        """Return the number of prompts in one epoch."""
        return int(self._table.num_rows)

    def group(self, group_id: int) -> pa.Table:
        """Return the prompt of a group as one row (groups.PROMPT_COLUMNS), by the seed and the id alone.

        Ids count through the epochs: id // N is the epoch, id % N the place in that epoch's order.
        """
        return groups.with_columns(self._table.slice(self._order.row(group_id), 1), group_id=[group_id])

    def all(self, limit: int | None = None) -> pa.Table:
        """Return the first `limit` prompts (None: all) in the file's order, with group_id 0, 1, 2, …."""
        return self._table.slice(0, limit)

    def digest(self) -> str:
        """Return the SHA-256 of the problems and answers in use, in the file's order.

        Other data have another digest.
        """
        content = hashlib.sha256()
        for prompt, answer in zip(
            self._table["prompt"].to_pylist(), self._table["answer"].to_pylist(), strict=True
        ):
            content.update(json.dumps([prompt, answer]).encode())
        return content.hexdigest()


class EpochOrder:
    """An EpochOrder is a row order over epochs: each epoch visits every row once.

    Args:
        num: number of rows.
        seed: decides each epoch's permutation, together with the epoch's number.
        shuffle: reshuffle per epoch; otherwise rows keep the file's order.
    """

    def __init__(self, num: int, seed: int, shuffle: bool) -> None:
        self._num = num
        self._seed = seed
        self._shuffle = shuffle
        self._epochs: dict[int, np.ndarray] = {}

    def row(self, number: int) -> int:
        """Return the row of this number, a pure function of the number and the seed.

        Numbers count through the epochs.
        """
        epoch, place = divmod(number, self._num)
        if not self._shuffle:
            return place
        if epoch not in self._epochs:  # the last two are kept: numbers near a border alternate between epochs
            self._epochs = dict(list(self._epochs.items())[-1:])
            self._epochs[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self._num)
        return int(self._epochs[epoch][place])


def load_rows(config: PromptsConfig, columns: Mapping[str, str], key: str) -> pa.Table:
    """Read the named columns of a data set as text.

    Args:
        config: says where the data is; `limit` takes the first so many rows.
        columns: name in the result -> column in the data, such as {"prompt": "question", "answer": "gold"}.
        key: where `config` stands in the run's config, for messages.

    Returns:
        A table of string columns, in the order of `columns`, without nulls; numbers have become text.

    Raises:
        ConfigError: the file or data set is absent, not readable or empty, lacks a column, or has an entry
            that is neither text nor a number.
    """
    data = load_columns(config, columns, key)
    texts = {
        name: [
            as_text(value, f"{key}.path: {config.path}: row {i}: {columns[name]}")
            for i, value in enumerate(values)
        ]
        for name, values in data.items()
    }
    return pa.table(texts, schema=pa.schema([(name, pa.string()) for name in columns]))


def load_columns(
    config: PromptsConfig, columns: Mapping[str, str], key: str, optional: Collection[str] = ()
) -> dict[str, list[Any]]:
    """Read the named columns of a data set as load_rows does, but with the values as they are.

    The result lacks those columns of `optional` that the data lacks.
    """
    data = _read(config, key)
    if not data or not len(next(iter(data.values()))):
        raise ConfigError(f"{key}.path: {config.path} has no rows")
    columns = {name: column for name, column in columns.items() if column in data or name not in optional}
    for name, column in columns.items():
        if column not in data:
            near = difflib.get_close_matches(column, data, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            # A column that is not the section's own (the solution of a warm start) is named by its role.
            field = (
                f"{key}.{name}_column" if f"{name}_column" in type(config).model_fields else f"{key} ({name})"
            )
            raise ConfigError(
                f"{field}: {config.path} has no column {column!r}; it has {', '.join(data)}{hint}"
            )
    cut = {name: data[column][: config.limit] for name, column in columns.items()}
    return {
        name: values.to_pylist() if isinstance(values, pa.ChunkedArray) else values
        for name, values in cut.items()
    }


def as_text(value: Any, where: str) -> str:
    """Return a text or a number as text.

    Raises:
        ConfigError: the value is neither; `where` starts the message.
    """
    if isinstance(value, str):
        try:
            value.encode()
        # JSON can spell half a surrogate pair; neither Arrow nor a tokenizer can hold it
        except UnicodeEncodeError as error:
            raise ConfigError(f"{where} is not valid Unicode text ({error.reason})") from error
        return value
    is_number = isinstance(value, (numbers.Real, Decimal)) and not isinstance(value, bool)
    if is_number and not math.isnan(value):
        return str(value)
    found = "empty (null)" if value is None or is_number else f"{type(value).__name__}, not text or a number"
    raise ConfigError(f"{where} is {found}")


def _read(config: PromptsConfig, key: str) -> Columns:
    """Read the whole data set; all columns have one length.

    In messages rows count from 0, lines from 1.
    """
    path = Path(config.path).expanduser()
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES and not path.is_file():
        return _read_hub(config, key)
    if not path.exists():
        raise ConfigError(f"{key}.path: no file {config.path}")
    if suffix not in FILE_SUFFIXES:
        raise ConfigError(f"{key}.path: {config.path}: a data file ends in {', '.join(FILE_SUFFIXES)}")
    files = [path] if path.is_file() else _parts(path, suffix)
    if not files:
        raise ConfigError(f"{key}.path: {config.path} is a folder without {suffix} files")
    try:
        if suffix == ".parquet":
            parts = [pq.read_table(file) for file in files]
            # a column that is empty in one part has no type there
            table = pa.concat_tables(parts, promote_options="permissive")
            return dict(zip(table.column_names, table.columns, strict=True))
        lines = [(str(file), file.read_bytes().split(b"\n")) for file in files]
    except pa.ArrowException as error:
        if isinstance(error, OSError):
            raise _unreadable(error, config, key) from error
        raise ConfigError(f"{key}.path: {config.path} is not Parquet: {_one_line(error)}") from error
    except OSError as error:
        raise _unreadable(error, config, key) from error
    return _parse_lines([(config.path, lines[0][1])] if path.is_file() else lines, key)


def _parts(folder: Path, suffix: str) -> list[Path]:
    """Return the data files below a folder that Spark or Dask wrote, in the order of their names.

    Files and folders whose names begin with a dot or an underscore are their writers' own (_SUCCESS).
    """
    return sorted(
        file
        for file in folder.rglob(f"*{suffix}")
        if file.is_file() and not any(part[0] in "._" for part in file.relative_to(folder).parts)
    )


def _unreadable(error: OSError, config: PromptsConfig, key: str) -> ConfigError:
    return ConfigError(f"{key}.path: {config.path} cannot be read: {error.strerror or _one_line(error)}")


def _parse_lines(files: list[tuple[str, list[bytes]]], key: str) -> Columns:
    """Parse JSON objects, one per line, of files given by name; blank lines are skipped.

    A key that only some lines have is null in the others.
    """
    records: list[dict[str, Any]] = []
    for path, number, line in ((path, *each) for path, lines in files for each in enumerate(lines, start=1)):
        if not line.strip():
            continue
        where = f"{key}.path: {path}: line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
            raise ConfigError(f"{where} is not JSON: {_one_line(error)}") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{where} is not a JSON object, one per line")
        records.append(record)
    names = list(dict.fromkeys(name for record in records for name in record))
    return {name: [record.get(name) for record in records] for name in names}


def _read_hub(config: PromptsConfig, key: str) -> Columns:
    """Load a data set by its name on the Hugging Face hub, or from a folder of data files."""
    import datasets  # type: ignore[import-untyped]  # takes a second to import, and files do not need it

    try:
        data = datasets.load_dataset(config.path, config.subset, split=config.split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        what = f"subset {config.subset}, split {config.split}" if config.subset else f"split {config.split}"
        raise ConfigError(
            f"{key}.path: {config.path} is no file, and no data set that loads ({what}): {_one_line(error)}"
        ) from error
    table = data.with_format("arrow")[:]
    return dict(zip(table.column_names, table.columns, strict=True))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
