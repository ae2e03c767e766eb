"""A delta is what changed between two versions of the weights: the words that are new, and their places.

One step of training at a small learning rate leaves most of the bfloat16 words of a model as they are,
because it moves a weight by less than half of the distance to its neighbour. The delta of two arrays of bytes
is exact: applied to the first it gives the second, bit for bit, whatever the bytes mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16] | npt.NDArray[np.uint8]

BLOCK = 1 << 16
"""Words in a block, whose places in it need 16 bits: a changed word of 16 bits costs 32 bits in a delta."""

TASK_BLOCKS = 32
"""Blocks that are one thread's at a time."""


class Delta(NamedTuple):
    """A Delta holds the words of one array that have changed, in the order of their places."""

    counts: npt.NDArray[np.uint32]
    """Number of changed words in each block."""
    places: npt.NDArray[np.uint16]
    """Place of each changed word in its block."""
    words: Words
    """The new words."""

    @property
    def nbytes(self) -> int:
        """The size of the delta, in bytes."""
        return self.counts.nbytes + self.places.nbytes + self.words.nbytes


Word = np.dtype[Any]
"""The type of a word: uint16, or uint8 where something has an odd number of bytes."""


def take_changes(
    old: Bytes, new: Bytes, word: Word, at: int = 0, threads: ThreadPoolExecutor | None = None
) -> Delta:
    """Make `old` equal to `new`, and return the delta of that.

    A block is compared and written while it is in the processor's cache.

    Args:
        old: the bytes before, which are changed in place; they may be a part of a larger array.
        new: the bytes after.
        word: the type of a word.
        at: the place of the first word in the larger array. The delta counts by its blocks, from the one that
            this word is in.
        threads: share the work.
    """
    before, after = old.view(word), new.view(word)
    blocks = range(at // BLOCK, _num_blocks(at + len(before)) if len(before) else at // BLOCK)

    def of_task(begin: int) -> list[tuple[npt.NDArray[np.uint16], Words]]:
        return [
            _take_block(before, after, max(0, block * BLOCK - at), (block + 1) * BLOCK - at, at)
            for block in blocks[begin : begin + TASK_BLOCKS]
        ]

    begins = range(0, len(blocks), TASK_BLOCKS)
    tasks = map(of_task, begins) if threads is None or len(begins) < 2 else threads.map(of_task, begins)
    found = [(np.empty(0, np.uint16), np.empty(0, word)), *(one for task in tasks for one in task)]
    places, words = (np.concatenate([one[i] for one in found]) for i in (0, 1))
    return Delta(np.array([len(one[0]) for one in found[1:]], np.uint32), places, words)


def _take_block(
    before: Words, after: Words, begin: int, end: int, at: int
) -> tuple[npt.NDArray[np.uint16], Words]:
    """Make one block's words equal; return those that were not, after their places in the block."""
    old, new = before[begin:end], after[begin:end]
    found = np.flatnonzero(old != new)
    words = new[found]
    if len(found) < len(old) // 4:
        old[found] = words
    else:
        np.copyto(old, new)
    return (found + (at + begin) % BLOCK).astype(np.uint16), words


def join_deltas(parts: Iterable[tuple[int, Delta]], word: Word, num_bytes: int) -> Delta:
    """Join the deltas of parts of an array into one of the whole.

    Args:
        parts: the place of each part's first word, in order, and its delta (`take_changes`).
        word: the type of a word.
        num_bytes: of the whole array.
    """
    counts = np.zeros(_num_blocks(num_bytes // word.itemsize), np.uint32)
    places, words = [np.empty(0, np.uint16)], [np.empty(0, word)]
    for at, delta in parts:
        first = at // BLOCK
        counts[first : first + len(delta.counts)] += delta.counts
        places.append(delta.places)
        words.append(delta.words)
    return Delta(counts, np.concatenate(places), np.concatenate(words))


def apply_delta(data: Bytes, delta: Delta) -> None:
    """Write a delta's words into the array that the delta was made for, in place.

    Raises:
        ValueError: the delta was made for an array of another size.
    """
    counts, places, new = delta
    if data.nbytes % new.itemsize or len(counts) != _num_blocks(data.nbytes // new.itemsize):
        raise ValueError(f"a delta of {len(counts)} blocks does not fit {data.nbytes} bytes of weights")
    words, begin = data.view(new.dtype), 0
    for block in np.flatnonzero(counts):
        end = begin + int(counts[block])
        words[block * BLOCK : (block + 1) * BLOCK][places[begin:end].astype(np.intp)] = new[begin:end]
        begin = end


def _num_blocks(num_words: int) -> int:
    return -(-num_words // BLOCK)
