"""Values travel between processes as JSON data, out of which only Python's own types are made anew."""

from __future__ import annotations

import collections
import contextlib
import datetime
import itertools
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_ITEMS = 100_000
"""Number of items that are read of an iterator that a program returns."""


class UnsendableError(BaseException):
    """A value cannot be made anew in another process; no assert may take this for the program's error."""


_COLLECTIONS: dict[str, Callable[..., Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
    "iterator": iter,
}
_TEXTS: dict[str, Callable[[str], Any]] = {
    "Decimal": Decimal,
    "Fraction": Fraction,
    "date": datetime.date.fromisoformat,
    "datetime": datetime.datetime.fromisoformat,
    "time": datetime.time.fromisoformat,
    "int": lambda text: int(text, 16),
}
_MAX_BITS = 10_000
"""Bits of an integer beyond which JSON's decimal digits are refused, or slow, on the other side."""


class Named(tuple[Any, ...]):
    """A Named is a namedtuple of the other process: its values, and the object there for all else.

    Args:
        names: names of the values.
        values: the values.
        origin: what stands for the object.
    """

    def __new__(cls, names: list[str], values: list[Any], origin: Any) -> Named:
        """Make the tuple."""
        made = super().__new__(cls, values)
        made.__dict__.update({**dict(zip(names, values, strict=True)), "_origin": origin})
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_origin"], name)


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """Return a value as JSON data: numbers, texts and lists as they are, others as {type: content}.

    Subclasses become what they derive from, numpy's arrays lists, and iterators end after MAX_ITEMS.

    Args:
        value: the value.
        keep: called with an object that is no data; it returns the number that stands for the object.
    """
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return {"int": hex(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, (bytes, bytearray)):
        name = "bytes" if isinstance(value, bytes) else "bytearray"
        return {name: bytes(value).decode("latin-1")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [[encode(name, keep), encode(entry, keep)] for name, entry in value.items()]}
    if isinstance(value, (list, type({}.keys()), type({}.values()), type({}.items()))):
        return [encode(entry, keep) for entry in list(value)]
    if type(value) is Named:
        return {"object": keep(value.__dict__["_origin"])}
    if isinstance(value, tuple) and isinstance(fields := getattr(value, "_fields", None), tuple):
        with contextlib.suppress(UnsendableError):  # the tests' own, which is a tuple to the program
            number = keep(value)
            return {"named": [[*map(str, fields)], [encode(entry, keep) for entry in value], number]}
    for name in ("tuple", "set", "frozenset", "deque"):
        if isinstance(value, _COLLECTIONS[name]):  # type: ignore[arg-type]
            return {name: [encode(entry, keep) for entry in value]}
    if isinstance(value, (range, slice)):
        return {type(value).__name__: [value.start, value.stop, value.step]}
    if isinstance(value, Iterator):
        entries: Iterator[Any] = itertools.islice(value, MAX_ITEMS)
        return {"iterator": [encode(entry, keep) for entry in entries]}
    if type(value) in (Decimal, Fraction):
        return {type(value).__name__: str(value)}
    if type(value) in (datetime.date, datetime.datetime, datetime.time):
        return {type(value).__name__: value.isoformat()}
    if type(value) is datetime.timedelta:
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), keep)
    return {"object": keep(value)}


def decode(data: Any, object_of: Callable[[int], Any]) -> Any:
    """Return the value that `encode` made data of.

    Raises:
        ValueError, TypeError, KeyError: the data is of no such form.
    """
    if isinstance(data, list):
        return [decode(entry, object_of) for entry in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "object":
        return object_of(content)
    if kind == "dict":
        return {decode(name, object_of): decode(entry, object_of) for name, entry in content}
    if kind == "named":
        names, values, number = content
        return Named(names, [decode(entry, object_of) for entry in values], object_of(number))
    if kind == "timedelta":
        return datetime.timedelta(*content)
    if kind in ("bytes", "bytearray"):
        return (bytes if kind == "bytes" else bytearray)(content.encode("latin-1"))
    if kind == "complex":
        return complex(*content)
    if kind in ("range", "slice"):
        return (range if kind == "range" else slice)(*content)
    if kind in _TEXTS:
        return _TEXTS[kind](content)
    return _COLLECTIONS[kind]([decode(entry, object_of) for entry in content])
