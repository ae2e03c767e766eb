"""An entry of `routed_experts` holds the experts that an engine chose for the tokens of one completion.

It is an array [tokens, layers, experts per token] of bytes, or of two bytes for 256 experts and more, for all
tokens that the engine has read: those of the prompt first, then those of the completion but for its last one.
Its largest number stands for an expert that is not known; tokens at the end may be missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def _type_of(num_experts: int) -> np.dtype[Any]:
    return np.dtype(np.uint8 if num_experts < 256 else np.uint16)


def experts_entry(experts: np.ndarray, num_experts: int) -> bytes:
    """Return an entry.

    Args:
        experts: [tokens, layers, experts per token]; below 0: not known.
        num_experts: of a layer.
    """
    kind = _type_of(num_experts)
    return np.where(experts < 0, np.iinfo(kind).max, experts).astype(kind).tobytes()


def experts_of(entry: bytes | None, shape: tuple[int, int], num_experts: int) -> np.ndarray | None:
    """Return what an entry holds, [tokens, layers, experts per token], with -1 for what is not known.

    Args:
        entry: null: no tokens.
        shape: layers, and experts per token.
        num_experts: of a layer.

    Returns:
        The array; None: the entry is not of such a model.
    """
    kind = _type_of(num_experts)
    found = np.frombuffer(entry or b"", kind)
    if found.size % (shape[0] * shape[1]):
        return None
    unknown = found == np.iinfo(kind).max
    if (found[~unknown] >= num_experts).any():
        return None
    return np.where(unknown, -1, found.astype(np.int16)).reshape(-1, *shape)


def merged_experts(
    entries: Iterable[bytes | None], num_tokens: int, shape: tuple[int, int], num_experts: int
) -> np.ndarray | None:
    """Return the experts of what several completions begin with: per token the first that are known.

    An engine that finds tokens in its prefix cache does not say what it had chosen for them, and another
    completion of the group may.

    Args:
        entries: of the completions, in order.
        num_tokens: the tokens that all of them begin with.
        shape: layers, and experts per token.
        num_experts: of a layer.

    Returns:
        [num_tokens, layers, experts per token] as from `experts_of`; None: an entry is not of such a model.
    """
    num_bytes = num_tokens * shape[0] * shape[1] * _type_of(num_experts).itemsize
    merged = np.full((num_tokens, *shape), -1, np.int16)
    for entry in filter(None, entries):
        missing = np.asarray((merged < 0).all((1, 2)))
        if not missing.any():
            break
        found = experts_of(entry[:num_bytes], shape, num_experts)
        if found is None:
            return None
        missing = missing[: len(found)]
        merged[: len(found)][missing] = found[missing]
    return merged
