"""Deltas of weights are exact, at sizes on both sides of every block, chunk and word."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from gvpo_ray.weights import deltas
from gvpo_ray.weights.deltas import BLOCK, apply_delta, changed_words, make_delta

U8, U16 = np.dtype(np.uint8), np.dtype(np.uint16)


@pytest.mark.parametrize(
    "size", [0, 1, 2, 6, 7, 8, 9, 10, 62, 63, 64, 65, 66, 126, 127, 128, 129, 130, 256, 258, 1000]
)
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_changed_words_are_those_that_differ(
    size: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas, "CHUNK_BYTES", 64)
    monkeypatch.setattr(deltas, "TASK_BYTES", 128)
    random = np.random.default_rng(size)
    old = random.integers(256, size=size, dtype=np.uint8)
    new = np.where(random.random(size) < share, old + 1, old).astype(np.uint8)
    for word in [U8] + [U16] * (size % 2 == 0):
        n = word.itemsize
        want = [i for i in range(size // n) if [*old[n * i : n * i + n]] != [*new[n * i : n * i + n]]]
        assert changed_words(old, new, word).tolist() == want
        with ThreadPoolExecutor(2) as threads:
            assert changed_words(old, new, word, threads).tolist() == want


SIZES = [(1, U8), (2, U16), (BLOCK - 1, U8), (BLOCK, U8), (BLOCK + 1, U8), (2 * BLOCK - 2, U16)]


@pytest.mark.parametrize(("size", "word"), [*SIZES, (2 * BLOCK, U16), (2 * BLOCK + 2, U16), (6 * BLOCK, U16)])
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_a_delta_makes_the_old_bytes_the_new_ones(size: int, word: np.dtype, share: float) -> None:
    random = np.random.default_rng(0)
    old = random.integers(256, size=size, dtype=np.uint8)
    new = np.where(random.random(size) < share, random.integers(256, size=size), old).astype(np.uint8)
    places = changed_words(old, new, word)
    delta = make_delta(
        [(places[:5], new.view(word)[places[:5]]), (places[5:], new.view(word)[places[5:]])], word, size
    )
    # 4 bytes for each word of 16 bits, and 4 for each block
    assert delta.nbytes == len(places) * (2 + word.itemsize) + 4 * -(-size // word.itemsize // BLOCK)
    apply_delta(old, delta)
    assert old.tobytes() == new.tobytes()


def test_signs_of_zero_and_payloads_of_nan_are_words_like_others() -> None:
    old = torch.tensor([0.0, 1.0, float("nan"), 2.0], dtype=torch.bfloat16)
    new = torch.tensor([-0.0, 1.0, float("nan"), 2.0], dtype=torch.bfloat16)
    new.view(torch.int16)[2] += 1
    before, after = (tensor.view(torch.uint8).numpy() for tensor in (old, new))
    assert changed_words(before, after, U16).tolist() == [0, 2]


def test_a_delta_of_other_weights_is_refused() -> None:
    delta = make_delta([(np.array([BLOCK]), np.zeros(1, np.uint16))], U16, 4 * BLOCK)
    for size in (2 * BLOCK, 4 * BLOCK + 2, 4 * BLOCK - 1):  # too small, too large, half a word
        with pytest.raises(ValueError, match="does not fit"):
            apply_delta(np.zeros(size, np.uint8), delta)
