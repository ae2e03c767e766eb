"""A tool call has a module of its own, which costs the processes of environments nothing to import."""

from __future__ import annotations

from typing import Any, NamedTuple


class Call(NamedTuple):
    """A Call is one tool call that the model has written."""

    name: str
    arguments: dict[str, Any]
    error: str | None = None
    """What is wrong with it, for the model to read; None: it can be made."""
