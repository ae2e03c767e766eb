"""A completion of several turns is split into what the policy wrote and what its environment wrote.

The tokens say which is which (`trained_tokens`), and the run's tokenizer what they are. They are shown with
their special tokens: that is what the model read.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gvpo_ray.observe.report.reading import Run, config_of

Decode = Callable[[list[int]], str]
"""Token ids -> their text, with special tokens."""

CALL = re.compile(r"(<tool_call>.*?</tool_call>|<function=.*?</function>)", re.DOTALL)
"""What a call of a tool looks like in the text of most families of models."""


@dataclass(frozen=True)
class Turn:
    """A Turn is a part of a completion that one side wrote, or a call of a tool in it."""

    kind: str
    """trained (the policy wrote it), call (a part of that which calls a tool) or read (all else)."""
    text: str
    note: str
    """Who wrote it, and how many tokens it has; "": it goes on with the turn before it."""


def turns_of(ids: Sequence[int], mask: Sequence[bool] | None, decode: Decode | None) -> list[Turn]:
    """Split a completion at the borders of what the policy sampled, and there at calls of tools.

    Args:
        ids: the completion's tokens.
        mask: whether the policy sampled each of them; None: all.
        decode: the run's tokenizer; None: there is none.

    Returns:
        The turns in their order; [] where the policy sampled all tokens, or the tokens cannot be read.
    """
    if mask is None or all(mask) or decode is None:
        return []
    turns = []
    for is_trained, run in itertools.groupby(zip(mask, ids, strict=True), key=lambda pair: pair[0]):
        tokens = [token for _, token in run]
        text = decode(tokens)
        note = f"{'policy, trained' if is_trained else 'environment, read'}: {len(tokens)} tokens"
        # a pattern in parentheses is kept by split: every second part is a call
        parts = [(i, part) for i, part in enumerate(CALL.split(text) if is_trained else [text])]
        for i, part in [(i, part) for i, part in parts if part.strip()] or parts[:1]:
            turns.append(Turn("call" if i % 2 else "trained" if is_trained else "read", part, note))
            note = ""
    return turns


def share_trained(mask: Sequence[bool] | None) -> str:
    """Say how many tokens of a completion are trained, where not all are; else ""."""
    return "" if mask is None or all(mask) else f"{sum(mask)} of {len(mask)} tokens trained"


def decoder_of(run: Run) -> Decode | None:
    """Return what turns a run's tokens into text: its newest checkpoint's tokenizer, else that of its model.

    None: there is none that can be read here.
    """
    checkpoints = (run.path / "checkpoints").glob("step-*")
    newest = max(checkpoints, key=lambda path: _number(path.name), default=None)
    section = config_of(run).get("model")
    path = section.get("path") if isinstance(section, Mapping) else None
    for folder in (newest, Path(path) if isinstance(path, str) else None):
        if folder is not None and (tokenizer := _tokenizer(folder / "tokenizer.json")) is not None:
            return functools.partial(tokenizer.decode, skip_special_tokens=False)
    return None


def _number(name: str) -> int:
    digits = name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def _tokenizer(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # tokenizers raises Exception itself, and a page without turns is better than none
        return None
