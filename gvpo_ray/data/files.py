"""Data sets are read here: files in the forms that people have, folders, and names on the Hugging Face hub.

`datasets` reads what is a data set by itself (hub names, folders, `save_to_disk`, Arrow files). JSON, CSV and
Parquet files are read directly, so that a message can name the line, a column may mix types as JSON does, and
golds such as "007" stay text.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gvpo_ray.config.base import TASKSET, ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.data.hub import hub
from gvpo_ray.data.tasksets import read_tasks

Columns = dict[str, pa.ChunkedArray | list[Any]]
"""The columns of a data set as it was read; JSON may mix types within a column, which Arrow cannot hold."""

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
FILE_SUFFIXES = (".parquet", *TEXT_SUFFIXES, ".arrow")
DEFAULT_SPLIT = "train"
"""The value of `split` where a config does not say it."""

COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")
"""Suffixes behind that of a text file, such as data.jsonl.gz."""

SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}\.")
"""Name of a shard of a data set, such as train-00000-of-00002.parquet."""


def read(config: PromptsConfig, key: str) -> Columns:
    """Read a whole data set, or the slice of its rows that `split` asks for.

    Args:
        config: `path` is a file, a folder, a glob, a name on the hub, or a list of these, whose rows follow
            each other. `split` chooses a split where the data has splits, and may end in a slice as in
            `datasets`: "train[:100]", "train[10%:20%]".
        key: where `config` stands in the run's config, for messages.

    Returns:
        The columns, all of one length. A column that only some files or rows have is null in the others.

    Raises:
        ConfigError: one line that names the key, the file, and the line (from 1) or row (from 0).
    """
    given = [config.path] if isinstance(config.path, str) else config.path
    if given[0].startswith(TASKSET):
        _refuse_subset(given[0], config, key)
        if _wanted(config) != DEFAULT_SPLIT:
            raise ConfigError(f"{key}.split: a task set has train and its slices alone; see {key}.taskset")
        return _sliced(dict(read_tasks(config, key)), config.split, key)
    parts = [_read_one(path, config, key) for path in given]
    return parts[0] if len(parts) == 1 else _joined(parts)


def _read_one(path: str, config: PromptsConfig, key: str) -> Columns:
    """Read one entry of prompts.path; a slice counts the rows of this entry."""
    place = Path(path).expanduser()
    if place.is_dir() and ((place / "state.json").exists() or (place / "dataset_dict.json").exists()):
        return _read_saved(place, config, key)
    if not place.exists() and any(letter in path for letter in "*?["):
        files = sorted(Path(name) for name in glob.glob(str(place), recursive=True))
        if not files:
            raise ConfigError(f"{key}.path: no file matches {path}")
    elif place.is_dir() and (kind := kind_of(place)) is not None:
        files = _parts(place, kind)
        if not files:
            raise ConfigError(f"{key}.path: {path} is a folder without {kind} files")
    elif place.is_file() or kind_of(place) is not None:
        files = [place]
    else:
        with hub(f"{key}.path", path, "dataset"):
            return _read_set(path, config, key)
    _refuse_subset(path, config, key)
    files, split = _of_split(path, files, config, key)
    shown = path if files == [place] else None
    parts = [read_file(file, f"{key}.path: {shown or file}", split) for file in files]
    return _sliced(parts[0] if len(parts) == 1 else _joined(parts), config.split, key)


def _parts(folder: Path, kind: str) -> list[Path]:
    """Return the data files below a folder that Spark or Dask wrote, in the order of their names.

    Files and folders whose names begin with a dot or an underscore are their writers' own (_SUCCESS).
    """
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and kind_of(file) == kind
        and not any(part[0] in "._" for part in file.relative_to(folder).parts)
    )


def _refuse_subset(path: str, config: PromptsConfig, key: str) -> None:
    if config.subset is not None:
        raise ConfigError(f"{key}.subset: {path} has no subsets; only a data set of the hub or a folder has")


def _wanted(config: PromptsConfig) -> str:
    """Return the name of the split that a config asks for, without its slice."""
    return config.split.partition("[")[0]


def _of_split(path: str, files: list[Path], config: PromptsConfig, key: str) -> tuple[list[Path], str | None]:
    """Return the shards of the wanted split, if all names say which split they belong to; else all files.

    Also returned is the split that is to be looked for in the files; None: the names have said it. Files of
    one split are read whatever it is, unless the config says another than the default.
    """
    wanted, names = _wanted(config), [SHARD.match(file.name) for file in files]
    splits = {name["split"] for name in names if name}
    if None in names or (len(splits) == 1 and wanted == DEFAULT_SPLIT):
        return files, wanted
    if wanted not in splits:
        raise ConfigError(
            f"{key}.split: the files of {path} are of the split{'s' * (len(splits) > 1)} "
            f"{', '.join(sorted(splits))}, not {wanted}"
        )
    return [file for file, name in zip(files, names, strict=True) if name and name["split"] == wanted], None


def kind_of(path: Path) -> str | None:
    """Return the suffix that says how a file is read, without that of a compression; None: no data file."""
    name = path.name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    suffixes = TEXT_SUFFIXES if compression else FILE_SUFFIXES
    return next((suffix for suffix in suffixes if name.endswith(suffix + compression)), None)


def read_file(path: Path, where: str, split: str | None = None) -> Columns:
    """Read one file.

    Args:
        path: the file.
        where: starts messages, such as "prompts.path: FILE".
        split: the split to read, where the file is one JSON object of splits; None: whatever there is.

    Raises:
        ConfigError: it cannot be read, or has no such split; no other file than such an object has splits.
    """
    kind = kind_of(path)
    if not path.is_file():
        raise ConfigError(f"{where.replace(': ', ': no file ', 1)}")
    if kind is None:
        raise ConfigError(
            f"{where}: a data file ends in {', '.join(FILE_SUFFIXES)} (text: also {', '.join(COMPRESSIONS)})"
        )
    if split not in (None, DEFAULT_SPLIT) and kind not in (".json", ".jsonl"):
        raise _no_split(where, split)
    try:
        if kind == ".parquet":
            _refuse_twice(pq.read_schema(path).names, where)
            return _columns(pq.read_table(path))
        if kind == ".arrow":
            with quiet_datasets() as datasets:
                return _columns(datasets.Dataset.from_file(str(path)).data.table)
        with pa.input_stream(str(path), compression="detect") as stream:
            content = stream.read()
    except (pa.ArrowException, OSError) as error:
        if not isinstance(error, OSError):
            raise ConfigError(f"{where} is not {kind[1:].title()}: {one_line(error)}") from error
        raise ConfigError(f"{where} cannot be read: {error.strerror or one_line(error)}") from error
    content = _utf8(content, where)
    return _from_rows(
        parse_json(content, where, split) if kind in (".jsonl", ".json") else _parse_csv(content, kind, where)
    )


def _refuse_twice(names: Sequence[str], where: str) -> None:
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ConfigError(f"{where}: two columns are called {twice[0]!r}")


def _no_split(where: str, split: str | None, splits: Iterable[str] = ()) -> ConfigError:
    has = f"it has {', '.join(splits)}" if splits else "name the file of that split in path"
    return ConfigError(f"{where.replace('.path: ', '.split: ', 1)} has no split {split}; {has}")


def _utf8(content: bytes, where: str) -> bytes:
    """Return the content without a byte order mark; refuse UTF-16 and UTF-32, which look like broken JSON."""
    encoding = json.detect_encoding(content[:4])
    if not encoding.startswith("utf-8"):
        raise ConfigError(
            f"{where} is not UTF-8 but looks like {encoding[:6].upper()}: save it as UTF-8 "
            f"(iconv -f {encoding[:6]} -t utf-8)"
        )
    return content.removeprefix(b"\xef\xbb\xbf")


def parse_json(content: bytes, where: str, split: str | None = None) -> list[dict[str, Any]]:
    """Parse JSON in the forms of data files: lines, one array, pretty-printed values, an object of rows.

    An object with one list of objects (`{"version": 1, "data": [...]}`) holds these rows; an object of lists
    of one length holds columns, and one of several splits the rows of each. A row that is itself a list is a
    conversation: {"messages": row}.

    Args:
        content: UTF-8 text.
        where: starts messages.
        split: the split that is wanted; None: whatever there is.

    Raises:
        ConfigError: something is not JSON, or not a row; the message names the line. There is no such split.
    """
    values: list[tuple[int, Any]] = []
    begin = content.lstrip()[:1]
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if begin == b"[" or (lines and not _is_json(lines[0][1])):
        values = _consecutive(content, where)
        if len(values) == 1 and isinstance(values[0][1], list):
            values = [(values[0][0], row) for row in values[0][1]]
    else:
        for number, line in lines:
            try:
                values.append((number, json.loads(line)))
            except UnicodeDecodeError as error:
                raise ConfigError(f"{where}: line {number} is not JSON: it is not UTF-8") from error
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where}: line {number} is not JSON: {one_line(error)}") from error
    if len(values) == 1 and isinstance(values[0][1], dict):
        return _unwrapped(values[0][1], where, split)
    if split not in (None, DEFAULT_SPLIT):
        raise _no_split(where, split)
    rows = []
    for i, (number, value) in enumerate(values):
        if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
            value = {"messages": value}
        if not isinstance(value, dict):
            place = f"line {number}" if number != values[0][0] or i == 0 else f"row {i}"
            raise ConfigError(f"{where}: {place} is not a JSON object, one per line")
        rows.append(value)
    return rows


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _consecutive(content: bytes, where: str) -> list[tuple[int, Any]]:
    """Parse JSON values that follow each other, each over several lines; return them with their lines."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{where}: line {line} is not JSON: it is not UTF-8") from error
    decoder, values, at, line = json.JSONDecoder(), [], 0, 1
    while (begin := _skip_space(text, at)) < len(text):
        line += text.count("\n", at, begin)
        try:
            value, at = decoder.raw_decode(text, begin)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: line {error.lineno} is not JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits; lists within lists
            raise ConfigError(f"{where}: line {line} is not JSON: {one_line(error)}") from error
        values.append((line, value))
        line += text.count("\n", begin, at)
    return values


def _skip_space(text: str, at: int) -> int:
    match = re.compile(r"\s*").match(text, at)
    assert match is not None
    return match.end()


WRAPPERS = ("data", "rows", "examples", "instances")
"""Keys under which a JSON object may hold the rows of a data set."""

SPLITS = ("train", "test", "validation", "valid", "val", "dev")
"""Keys under which a JSON object may hold the rows of a split."""


def _unwrapped(value: dict[str, Any], where: str, split: str | None) -> list[dict[str, Any]]:
    """Return the rows that one JSON object holds; it may be a single row."""
    lists = [entry for entry in value.values() if isinstance(entry, list)]
    held: dict[str, list[dict[str, Any]]] = {
        name: rows
        for name, rows in value.items()
        if name in (*WRAPPERS, *SPLITS, split)
        and isinstance(rows, list)
        and rows
        and all(isinstance(row, dict) for row in rows)
    }
    splits = [name for name in held if name not in WRAPPERS]
    if split in splits:
        return held[split]
    if split not in (None, DEFAULT_SPLIT) or (split is not None and len(splits) > 1):
        raise _no_split(where, split, splits)
    if held:
        return next(iter(held.values()))
    has_messages = any(entry and isinstance(entry[0], dict) for entry in lists)
    if len(lists) == len(value) > 1 and len({len(entries) for entries in lists}) == 1 and not has_messages:
        return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]
    return [value]


def _parse_csv(content: bytes, kind: str, where: str) -> list[dict[str, Any]]:
    """Parse CSV or TSV with a header; every cell is text, as it stands in the file.

    A row of more or fewer cells than the header is refused: its cells may be in the wrong columns.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{where} is not UTF-8 in line {line}") from error
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ",", strict=True)
    try:
        names = next((cells for cells in lines if cells), [])
        _refuse_twice(names, where)
        rows = []
        for cells in lines:
            if cells and len(cells) != len(names):
                raise ConfigError(
                    f"{where}: line {lines.line_num} has {len(cells)} cells, and the header has "
                    f"{len(names)}: quote cells with a comma or a line break"
                )
            if cells:
                rows.append(dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise ConfigError(f"{where} is not {kind[1:].upper()}: line {lines.line_num}: {error}") from error
    return rows


def _read_saved(path: Path, config: PromptsConfig, key: str) -> Columns:
    """Read a folder that `save_to_disk` of `datasets` wrote."""
    _refuse_subset(str(path), config, key)
    with quiet_datasets() as datasets:
        try:
            data = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{key}.path: {path} cannot be read: {one_line(error)}") from error
        if isinstance(data, datasets.DatasetDict):
            if _wanted(config) not in data:
                raise _no_split(f"{key}.split: {path}", _wanted(config), data)
            data = data[_wanted(config)]
        elif _wanted(config) not in (DEFAULT_SPLIT, str(data.split)):
            raise _no_split(f"{key}.split: {path}", _wanted(config))
        return _sliced(_columns(data.with_format("arrow")[:]), config.split, key)


def _read_set(path: str, config: PromptsConfig, key: str) -> Columns:
    """Load a data set by its name on the Hugging Face hub, or from a folder of data files."""
    with quiet_datasets() as datasets:
        try:
            data = datasets.load_dataset(path, config.subset, split=config.split)
        except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
            what = (
                f"subset {config.subset}, split {config.split}" if config.subset else f"split {config.split}"
            )
            raise ConfigError(
                f"{key}.path: {path} is no file, and no data set that loads ({what}): {one_line(error)}"
            ) from error
        return _columns(data.with_format("arrow")[:])


@contextlib.contextmanager
def quiet_datasets() -> Iterator[Any]:
    """Give the module `datasets`, without its progress bars and notes among this program's lines."""
    import datasets  # type: ignore[import-untyped]  # takes a second to import, and files do not need it

    had_bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def _sliced(data: Columns, split: str, key: str) -> Columns:
    """Return the rows that the slice of a split asks for, such as those of "train[10:20]"."""
    if "[" not in split:
        return data
    from datasets import ReadInstruction

    num_rows, name = len(next(iter(data.values()), [])), split.partition("[")[0]
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({name: num_rows})
    except (ValueError, AssertionError, KeyError) as error:
        raise ConfigError(
            f"{key}.split: {split!r} is no slice of {num_rows} rows, such as train[:100] or train[10%:20%]"
        ) from error
    rows = slice(part.from_, part.to)
    return {name: values[rows] for name, values in data.items()}


def _columns(table: pa.Table) -> Columns:
    return dict(zip(table.column_names, table.columns, strict=True))


def as_rows(data: Columns) -> list[dict[str, Any]]:
    """Return the rows of a data set as Python objects."""
    columns = [to_list(values) for values in data.values()]
    return [dict(zip(data, row, strict=True)) for row in zip(*columns, strict=True)]


def _from_rows(rows: Sequence[dict[str, Any]]) -> Columns:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _joined(parts: Sequence[Columns]) -> Columns:
    """Put the rows of several files one behind the other."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    sizes = [len(next(iter(part.values()), [])) for part in parts]
    joined: Columns = {}
    for name in names:
        pieces: list[Any] = [part.get(name, [None] * size) for part, size in zip(parts, sizes, strict=True)]
        types = {piece.type if isinstance(piece, pa.ChunkedArray) else None for piece in pieces}
        if len(types) == 1 and None not in types:
            joined[name] = pa.chunked_array([chunk for piece in pieces for chunk in piece.chunks], *types)
        else:
            joined[name] = [value for piece in pieces for value in to_list(piece)]
    return joined


def to_list(values: pa.ChunkedArray | list[Any]) -> list[Any]:
    """Return a column's values as Python objects."""
    return values.to_pylist() if isinstance(values, pa.ChunkedArray) else values


def one_line(error: Exception) -> str:
    """Return the message of an error as one line."""
    return " ".join(str(error).split()) or type(error).__name__
