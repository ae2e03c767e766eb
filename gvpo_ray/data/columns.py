"""Columns of a data set are found by path, filled into templates, read as golds, and carried as JSON.

A path is a column's name or goes on into it: `reward_model.ground_truth`, `answers[0]`, `prompt[-1]`.
"""

from __future__ import annotations

import base64
import datetime
import difflib
import json
import math
import numbers
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from gvpo_ray.config.base import ConfigError
from gvpo_ray.data.files import Columns, to_list

ABSENT = object()
"""The value at a path that does not exist in a row."""

SAMPLED_ROWS = 100
"""Rows from which a message takes the paths that a data set has."""

ROWS_AT_ONCE = 1000
"""Rows that become Python objects at a time while a value is looked for."""

FIELD = re.compile(r"\{([A-Za-z_][\w.\[\]-]*)\}")
"""A field of a template over columns, such as {question} or {choices[0]}; other braces are text."""


# --------------------------------------------------------------------------------------------------- by path


def steps(path: str) -> list[str | int]:
    """Split a path into its steps: "a.b[0]" is ["a", "b", 0]."""
    found: list[str | int] = []
    for name, index in re.findall(r"([^.\[\]]+)|\[(-?\d+)\]", path):
        found.append(name if name else int(index))
    return found


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """Return the value at a path of a row, ABSENT where the row has no such place.

    A column whose name is the whole path wins, because names may have dots. Text that holds a JSON object or
    list is read where the path goes on into it, as many Parquet files store nested fields.
    """
    if path in row:
        return row[path]
    value: Any = row
    for step in steps(path):
        if isinstance(value, str) and value[:1] in ("{", "["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return ABSENT
        if isinstance(step, str) and isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(step, int) and isinstance(value, Sequence) and not isinstance(value, str):
            if not -len(value) <= step < len(value):
                return ABSENT
            value = value[step]
        else:
            return ABSENT
    return value


def column_of(data: Columns, path: str) -> str | None:
    """Return the column that a path begins in; None: the data has no such column."""
    if path in data:
        return path
    first = next(iter(steps(path)), None)
    return first if isinstance(first, str) and first in data else None


def values(data: Columns, path: str) -> list[Any]:
    """Return the values at a path in all rows, None where a row has no such place."""
    column = column_of(data, path)
    if column is None:
        return [None] * len(next(iter(data.values()), []))
    entries = to_list(data[column])
    if column == path:
        return entries
    found = (value_at({column: entry}, path) for entry in entries)
    return [None if value is ABSENT else value for value in found]


def sample(data: Columns) -> list[dict[str, Any]]:
    """Return the first rows of a data set as Python objects, to show what it is like."""
    cut = {name: to_list(column[:SAMPLED_ROWS]) for name, column in data.items()}
    return [dict(zip(cut, row, strict=True)) for row in zip(*cut.values(), strict=True)]


def present(data: Columns, path: str) -> Iterator[Any]:
    """Yield the values at a path, without those rows that have none; all rows are looked at."""
    column = column_of(data, path)
    entries = [] if column is None else data[column]
    for begin in range(0, len(entries), ROWS_AT_ONCE):
        for entry in to_list(entries[begin : begin + ROWS_AT_ONCE]):
            value = value_at({str(column): entry}, path)
            if value is not ABSENT and value is not None:
                yield value


def has(data: Columns, path: str) -> bool:
    """Return whether some row has a value at a path."""
    return next(present(data, path), None) is not None


def paths(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the paths that these rows have: columns first, then what is in them."""
    found: dict[str, None] = {}
    for row in rows:
        for name, value in row.items():
            _add_paths(found, name, value)
    return sorted(found, key=lambda path: len(steps(path)))


def _add_paths(found: dict[str, None], path: str, value: Any, depth: int = 0) -> None:
    found[path] = None
    if depth > 3:
        return
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _add_paths(found, f"{path}.{name}", inner, depth + 1)
    elif isinstance(value, list) and value:
        _add_paths(found, f"{path}[0]", value[0], depth + 1)


def missing(data: Columns, path: str) -> str:
    """Describe a path that a data set lacks: what it has, and the nearest right path."""
    rows = sample(data)
    known = paths(rows)
    # A path ending as the wanted one does is nearer than one that is spelt alike: the column was renamed.
    last = steps(path)[-1:] or [path]
    ending = [one for one in known if len(steps(one)) > 1 and steps(one)[-1:] == last]
    near = difflib.get_close_matches(path, known, n=1) or ending
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"has no column {path!r}; it has {', '.join(data)}{hint}"


# -------------------------------------------------------------------------------------------------- templates


def fields(template: str) -> list[str]:
    """Return the paths in the fields of a template over columns."""
    return FIELD.findall(template)


def fill(template: str, row: Mapping[str, Any], where: str) -> str:
    """Fill a template over columns, such as "{question} (A) {choices[0]}", for one row.

    A field that the row does not have is empty if other rows may have it, such as the fifth choice.

    Raises:
        ConfigError: a field is neither text, a number nor a boolean; `where` starts the message.
    """

    def text(match: re.Match[str]) -> str:
        value = value_at(row, match[1])
        if value is ABSENT or value is None:
            return ""
        return str(value) if isinstance(value, bool) else as_text(value, f"{where}: {match[1]}")

    return FIELD.sub(text, template)


# ------------------------------------------------------------------------------------------------------ texts


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


def golds(value: Any, where: str) -> list[str]:
    """Return the gold answers of a row as texts; none where the entry is empty, and then the row has no gold.

    A gold is a text, a number or a boolean (True or False), or a list of these.

    Raises:
        ConfigError: the value is something else; `where` starts the message.
    """
    if isinstance(value, (list, tuple)):
        return [gold for i, entry in enumerate(value) for gold in golds(entry, f"{where}[{i}]")]
    if isinstance(value, bool):
        return [str(value)]
    if value is None or (isinstance(value, (float, Decimal)) and math.isnan(value)):
        return []
    if isinstance(value, Mapping):
        inner = ", ".join(f"{where.rsplit(': ', 1)[-1]}.{name}" for name in value)
        raise ConfigError(f"{where} has fields of its own: name one of them ({inner})")
    text = as_text(value, where)
    return [text] if text.strip() else []


# ------------------------------------------------------------------------------------------------------- JSON


def as_json(value: Any) -> str:
    """Return a value of a data set as JSON text; bytes are base64."""
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    return value.tolist() if hasattr(value, "tolist") else str(value)
