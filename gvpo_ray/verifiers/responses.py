"""Files of responses are read row by row, as this or another system wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gvpo_ray.config.base import ConfigError
from gvpo_ray.data.columns import ABSENT, golds, value_at
from gvpo_ray.data.files import FILE_SUFFIXES, as_rows, kind_of, parse_json, read_file
from gvpo_ray.data.layouts import VERDICT
from gvpo_ray.data.messages import as_messages, as_prompt, is_messages, split_answer
from gvpo_ray.errors import GvpoError
from gvpo_ray.sandbox.adapters import MATCH

RESPONSES = (
    "response",
    "prediction",
    "completion",
    "output",
    "generation",
    "gen",
    "generated_text",
    "messages",
)
"""Columns that hold the response; the first one that a row has is read. Lists of messages end with it."""

GOLDS = (
    *("gold", "answer", "ground_truth", "gts", "expected_answer", "target", "solution"),
    *("reward_model.ground_truth", "reward_spec.ground_truth", "final_answer", VERDICT),
)
"""Columns, or paths into them, that hold the gold answer; the first one that a row has is read."""

PROMPTS = ("prompt", "input", "question", "problem")
"""Columns that hold the prompt, which no row needs."""

LABELS = ("expected", "label_correct")
"""Columns that say whether the response is correct; the first one that a row has is read. Reward functions do
not see them."""

PARQUET_ROWS = 1024
"""Number of rows in one row group of a Parquet file."""

Fields = dict[str, Any]


class MalformedRow(GvpoError, ValueError):
    """A row cannot be scored; the message says why, with its line."""


class NoColumn(MalformedRow):
    """A row has no response, or no place for a gold answer."""


class Names(NamedTuple):
    """Names holds the columns, or paths, that the user named; None: the usual names."""

    response_column: str | None = None
    gold_column: str | None = None

    def of(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the paths at which response and gold are looked for."""
        response, gold = self
        return (response,) if response else RESPONSES, (gold,) if gold else GOLDS

    def complaint(self) -> str:
        """Describe a file in which no row can be scored."""
        responses, answers = (" or ".join(paths) for paths in self.of())
        return (
            f"no row has one of {responses} and one of {answers}: name them with --response-column and "
            "--gold-column"
        )


class Response(NamedTuple):
    """A Response is a row that can be scored."""

    prompt: str
    response: str
    columns: Fields
    """Arguments of the reward functions, one value each."""


def read_row(row: Fields, names: Names, line: int) -> Response:
    """Return the prompt, the response and the further columns of a row.

    Raises:
        MalformedRow: it has no response, no place for a gold answer, or one that is no text or number.
    """
    responses, answers = names.of()
    path = _first(row, responses, line)
    given = value_at(row, path)
    prompt: Any = next((row[name] for name in PROMPTS if is_given(row.get(name)) and name != path), "")
    try:
        if is_messages(given):
            earlier, last = split_answer(as_messages(given, path))
            if last is None:
                raise MalformedRow(f"line {line}: {path} does not end with a message of the assistant")
            response, prompt = last["content"], prompt or as_prompt(earlier)
        elif isinstance(given, bool) or not isinstance(given, (str, int, float)):
            raise MalformedRow(f"line {line}: {path} is {type(given).__name__}, not text")
        else:
            response = str(given)
        if is_messages(prompt):
            prompt = as_prompt(as_messages(prompt, "prompt"))
        gold = _first(row, answers, line, may_be_empty=True)
        texts = golds(_decoded_messages(value_at(row, gold)), f"line {line}: {gold}")
    except ConfigError as error:
        message = str(error)
        raise MalformedRow(message if message.startswith("line ") else f"line {line}: {message}") from error
    hidden = ("prompt", "prompts", "completions", path, *LABELS)
    columns = {name: value for name, value in row.items() if name not in hidden}
    # without a gold in its place the reward functions say so themselves
    columns |= {"answer": texts if len(texts) > 1 else "".join(texts)}
    columns |= {"finish_reasons": row.get("finish_reason")} | ({MATCH: "any"} if len(texts) > 1 else {})
    return Response(str(prompt), response, columns)


def _first(row: Fields, paths: tuple[str, ...], line: int, may_be_empty: bool = False) -> str:
    """Return the first path at which a row has a value; with `may_be_empty`, else one that is empty."""
    there = [path for path in paths if value_at(row, path) is not ABSENT]
    if len(paths) > 1:  # nobody has named the column: true or false is no gold
        there = [path for path in there if path != VERDICT or not isinstance(value_at(row, path), bool)]
    # beside a gold, also an empty one, a label says whether the response is right
    full = [path for path in there if is_given(value_at(row, path)) and (path != VERDICT or path == there[0])]
    if full or (may_be_empty and there):
        return (full or there)[0]
    raise NoColumn(f"line {line}: no {' or '.join(paths)}")


def is_given(value: Any) -> bool:
    """Return whether an entry is neither null nor NaN, which pandas writes where a column has none."""
    return value is not None and value == value


def _decoded_messages(value: Any) -> Any:
    return as_messages(value, "gold")[-1]["content"] if is_messages(value) else value


def first_columns(source: str, names: Names) -> dict[str, list[str]] | None:
    """Return the columns that reward functions get of the first row that can be scored; None: of no row."""
    for line, row in rows_of(source):
        if not isinstance(row, MalformedRow):
            try:
                return {"INPUT": list(read_row(row, names, line).columns)}
            except MalformedRow:
                continue
    return None


def rows_of(source: str) -> Iterator[tuple[int, Fields | MalformedRow]]:
    """Yield (line, row) of a file; lines are counted from 1, and blank ones are skipped.

    For other files than .jsonl, the number of the row takes the line's place.
    """
    if source.endswith(".parquet"):
        yield from _rows_of_parquet(source)
    elif _has_lines(source):
        with open(source, "rb") as file:
            for number, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError) as error:
                    yield number, MalformedRow(f"line {number}: not JSON: {error}")
                    continue
                yield (
                    number,
                    row if isinstance(row, dict) else MalformedRow(f"line {number}: not a JSON object"),
                )
    else:
        yield from enumerate(as_rows(read_file(Path(source), f"INPUT: {source}")), start=1)


def _has_lines(source: str) -> bool:
    """Return whether a file is JSON lines, and is read a line at a time.

    Some files of that name hold an array or pretty-printed values, or are UTF-16: they are read whole, as any
    data file, which also says what is wrong with them. One line that is broken is only a malformed row.
    """
    if not source.endswith(".jsonl"):
        return False
    with open(source, "rb") as file:
        first = next((text for text in file if text.strip()), b"")
    if not json.detect_encoding(first[:4]).startswith("utf-8"):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        pass
    try:
        parse_json(Path(source).read_bytes(), source)
    except ConfigError:
        return True
    return False


def _rows_of_parquet(source: str) -> Iterator[tuple[int, Fields]]:
    number = 0
    for batch in pq.ParquetFile(source).iter_batches(PARQUET_ROWS):
        # As bytes, because a file's text may not be UTF-8; the bytes that are not become question marks.
        texts = [
            pa.types.is_string(field.type) or pa.types.is_large_string(field.type) for field in batch.schema
        ]
        columns = [
            column.cast(pa.large_binary()) if is_text else column
            for column, is_text in zip(batch.columns, texts, strict=True)
        ]
        for values in zip(*(column.to_pylist() for column in columns), strict=True):
            number += 1
            yield number, dict(zip(batch.schema.names, map(_decoded, values, texts), strict=True))


def _decoded(value: Any, is_text: bool) -> Any:
    return value.decode("utf-8", "replace") if is_text and value is not None else value


def count_rows(source: str) -> int:
    """Return the number of rows of the input; raise ConfigError if it cannot be read or has none."""
    try:
        if kind_of(Path(source)) is None:
            raise ConfigError(f"INPUT: {source} must end in {', '.join(FILE_SUFFIXES)}")
        if source.endswith(".parquet"):
            num_rows = int(pq.ParquetFile(source).metadata.num_rows)
        elif _has_lines(source):
            with open(source, "rb") as file:
                num_rows = sum(bool(text.strip()) for text in file)
        else:
            num_rows = sum(1 for _ in rows_of(source))
    except pa.ArrowInvalid as error:
        raise ConfigError(f"INPUT: {source} is not Parquet: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise ConfigError(f"INPUT: {source}: {error.strerror or error}") from error
    if not num_rows:
        raise ConfigError(f"INPUT: {source} has no rows")
    return num_rows
