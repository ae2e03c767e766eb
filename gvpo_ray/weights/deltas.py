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

CHUNK_BYTES, TASK_BYTES = 1 << 18, 1 << 22
"""Bytes that are compared at once, so that what is between comparison and selection stays in the cache; and
bytes that are one thread's at a time, many chunks."""


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


def changed_words(
    old: Bytes, new: Bytes, word: Word, threads: ThreadPoolExecutor | None = None
) -> npt.NDArray[np.int64]:
    """Return the places, in order, at which the words of two arrays of equal length differ.

    Args:
        old: the bytes before.
        new: the bytes after.
        word: the type of a word.
        threads: share the work.
    """

    def of_task(begin: int) -> list[npt.NDArray[np.int64]]:
        end = min(begin + TASK_BYTES, len(old))
        return [
            _changed(old[i : min(i + CHUNK_BYTES, end)], new[i : min(i + CHUNK_BYTES, end)], word)
            + i // word.itemsize
            for i in range(begin, end, CHUNK_BYTES)
        ]

    begins = range(0, len(old), TASK_BYTES)
    tasks = map(of_task, begins) if threads is None or len(begins) < 2 else threads.map(of_task, begins)
    return np.concatenate([np.empty(0, np.int64), *(found for task in tasks for found in task)])


def _changed(old: Bytes, new: Bytes, word: Word) -> npt.NDArray[np.int64]:
    whole, size, per_eight = len(old) // 8 * 8, word.itemsize, 8 // word.itemsize
    # eight bytes at once: most of them are equal
    differ = old[:whole].view(np.uint64) ^ new[:whole].view(np.uint64)
    eights = np.flatnonzero(differ != 0)
    inside = np.flatnonzero(differ[eights].view(word) != 0)
    places = eights[inside // per_eight] * per_eight + inside % per_eight
    rest = np.flatnonzero(old[whole:].view(word) != new[whole:].view(word)) + whole // size
    return np.concatenate([places, rest]) if len(rest) else places


def make_delta(parts: Iterable[tuple[npt.NDArray[np.int64], Words]], word: Word, num_bytes: int) -> Delta:
    """Make the delta of an array from the words that changed.

    Args:
        parts: places, and the new words there; the places are in order, over all parts, and none comes twice.
        word: the type of a word.
        num_bytes: of the whole array.
    """
    parts = [(np.empty(0, np.int64), np.empty(0, word)), *parts]
    places, words = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    counts = np.bincount(places // BLOCK, minlength=_num_blocks(num_bytes // word.itemsize))
    return Delta(counts.astype(np.uint32), (places % BLOCK).astype(np.uint16), words)


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
        words[block * BLOCK : (block + 1) * BLOCK][places[begin:end]] = new[begin:end]
        begin = end


def _num_blocks(num_words: int) -> int:
    return -(-num_words // BLOCK)
