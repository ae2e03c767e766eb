"""A tool call has a module of its own, which costs the processes of environments nothing to import.

What a policy writes goes on to environments, to engines and into the log only as `call_of` lets it pass:
text that UTF-8 can write, and arguments that are JSON of limited depth. So nothing of it is an error there.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

MAX_DEPTH = 100
"""Deepest nesting of a call's arguments. Of what is some hundred deep, pickle and json make an error."""

MAX_BITS = 14_000
"""Largest integer of a call's arguments, in bits: Python writes no more than 4,300 digits."""


class Call(NamedTuple):
    """A Call is one tool call that the model has written."""

    name: str
    arguments: dict[str, Any]
    error: str | None = None
    """What is wrong with it, for the model to read; None: it can be made."""


def call_of(name: str, arguments: Any, error: str | None = None) -> Call:
    """Return a call whose texts are well formed; where its arguments cannot go on, it says so.

    Args:
        name: of the tool.
        arguments: what a parser has made of them.
        error: what is wrong already.
    """
    name, error = well_formed(name), error and well_formed(error)
    if error is not None:
        return Call(name, {}, error)
    if not isinstance(arguments, dict):
        return Call(name, {}, "the arguments are not an object")
    try:
        return Call(name, _plain(arguments, 0))
    except ValueError as wrong:
        return Call(name, {}, f"the arguments {wrong}")


HALVES = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs. JSON can spell one alone; neither Arrow nor a tokenizer can hold it."""


def well_formed(text: str) -> str:
    """Return a text with U+FFFD in place of each half of a surrogate pair that stands alone."""
    return HALVES.sub("\ufffd", text)


def _plain(value: Any, depth: int) -> Any:
    """Return a copy of JSON data with well-formed texts; raise ValueError for what is none."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError(f"hold an integer of {value.bit_length()} bits; at most {MAX_BITS} can be read")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if depth >= MAX_DEPTH:
        raise ValueError(f"are nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {well_formed(name): _plain(entry, depth + 1) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, depth + 1) for entry in value]
    raise ValueError(f"hold a value of Python's type {type(value).__name__}, and JSON has none such")
