"""Deltas of weights are exact, at sizes on both sides of every block, chunk and word."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from gvpo_ray.weights import deltas
from gvpo_ray.weights.deltas import BLOCK, Delta, apply_delta, join_deltas, take_changes

U8, U16 = np.dtype(np.uint8), np.dtype(np.uint16)


@pytest.mark.parametrize("size", [0, 1, 2, 6, 16, 30, 32, 34, 62, 64, 66, 126, 128, 130, 256, 258, 1000])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.24, 0.26, 1.0])
def test_changes_are_the_words_that_differ_wherever_an_array_begins(
    size: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas, "BLOCK", 16)
    monkeypatch.setattr(deltas, "TASK_BLOCKS", 2)
    random = np.random.default_rng(size)
    old = random.integers(256, size=size, dtype=np.uint8)
    new = np.where(random.random(size) < share, old + 1, old).astype(np.uint8)
    for word in [U8] + [U16] * (size % 2 == 0):
        n = word.itemsize
        want = [i for i in range(size // n) if [*old[n * i : n * i + n]] != [*new[n * i : n * i + n]]]
        for at in (0, 1, 15, 16, 17):
            for threads in (None, ThreadPoolExecutor(2)):
                changed = old.copy()
                counts, places, words = take_changes(changed, new, word, at, threads)
                assert changed.tobytes() == new.tobytes()
                blocks = np.repeat(np.arange(len(counts)) + at // 16, counts)
                assert (16 * blocks + places - at).tolist() == want
                assert words.tolist() == new.view(word)[want].tolist()


SIZES = [(1, U8), (2, U16), (BLOCK - 1, U8), (BLOCK, U8), (BLOCK + 1, U8), (2 * BLOCK - 2, U16)]


@pytest.mark.parametrize(("size", "word"), [*SIZES, (2 * BLOCK, U16), (2 * BLOCK + 2, U16), (6 * BLOCK, U16)])
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_a_delta_makes_the_old_bytes_the_new_ones(size: int, word: np.dtype, share: float) -> None:
    random = np.random.default_rng(0)
    old = random.integers(256, size=size, dtype=np.uint8)
    new = np.where(random.random(size) < share, random.integers(256, size=size), old).astype(np.uint8)
    num = size // word.itemsize
    parts = []
    for begin, end in ((0, num // 3), (num // 3, num)):  # two tensors, which may share a block
        of_part = slice(begin * word.itemsize, end * word.itemsize)
        parts.append((begin, take_changes(old[of_part].copy(), new[of_part], word, begin)))
    delta = join_deltas(parts, word, size)
    # 4 bytes for each word of 16 bits, and 4 for each block
    changed = int((old.view(word) != new.view(word)).sum())
    assert delta.nbytes == changed * (2 + word.itemsize) + 4 * -(-size // word.itemsize // BLOCK)
    apply_delta(old, delta)
    assert old.tobytes() == new.tobytes()


def test_signs_of_zero_and_payloads_of_nan_are_words_like_others() -> None:
    old = torch.tensor([0.0, 1.0, float("nan"), 2.0], dtype=torch.bfloat16)
    new = torch.tensor([-0.0, 1.0, float("nan"), 2.0], dtype=torch.bfloat16)
    new.view(torch.int16)[2] += 1
    before, after = (tensor.view(torch.uint8).numpy() for tensor in (old, new))
    assert take_changes(before.copy(), after, U16).places.tolist() == [0, 2]


def test_a_delta_of_other_weights_is_refused() -> None:
    delta = Delta(np.array([0, 1], np.uint32), np.zeros(1, np.uint16), np.zeros(1, np.uint16))
    for size in (2 * BLOCK, 4 * BLOCK + 2, 4 * BLOCK - 1):  # too small, too large, half a word
        with pytest.raises(ValueError, match="does not fit"):
            apply_delta(np.zeros(size, np.uint8), delta)
