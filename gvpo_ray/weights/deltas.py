"""A delta is what changed between two versions of the weights: the words that are new, and their places.

One step of training at a small learning rate leaves most of the bfloat16 words of a model as they are,
because it moves a weight by less than half of the distance to its neighbour. The delta of two arrays of bytes
is exact: applied to the first it gives the second, bit for bit, whatever the bytes mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16] | npt.NDArray[np.uint8]

BLOCK = 1 << 16
"""Words in a block, whose places in it need 16 bits: a changed word of 16 bits costs 32 bits in a delta."""

CHUNK_BYTES = 1 << 20
"""Bytes that are compared at once, so that what is between comparison and selection stays in the cache."""


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


def changed_words(old: Bytes, new: Bytes, word: Word) -> npt.NDArray[np.int64]:
    """Return the places, in order, at which the words of two arrays of equal length differ."""
    found = [np.empty(0, np.int64)]
    per_eight, size = 8 // word.itemsize, word.itemsize
    for begin in range(0, len(old), CHUNK_BYTES):
        before, after = old[begin : begin + CHUNK_BYTES], new[begin : begin + CHUNK_BYTES]
        whole = len(before) // 8 * 8
        # eight bytes at once: most of them are equal
        eights = np.flatnonzero(before[:whole].view(np.uint64) != after[:whole].view(np.uint64))
        places = (per_eight * eights[:, None] + np.arange(per_eight)).ravel()
        places = np.concatenate([places, np.arange(whole // size, len(before) // size)])
        is_new = before.view(word)[places] != after.view(word)[places]
        found.append(places[is_new] + begin // size)
    return np.concatenate(found)


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
