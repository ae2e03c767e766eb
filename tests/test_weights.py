"""The weight wire: shards that hold what was sent, shared memory that is gone afterwards, and who is asked
what over NCCL.
"""

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from gvpo_ray.weights.transfer import DTYPES, ObjectPublisher, merge, shards

# ----------------------------------------------------------------------------------------------------- shards


def named(*sizes: int, dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.Tensor]]:
    return [(f"layer.{i}", torch.arange(size).to(dtype) + 100 * i) for i, size in enumerate(sizes)]


def from_bytes(data: Any) -> dict[str, torch.Tensor]:
    return load(bytes(data))


def sizes_of(data: list[Any]) -> list[dict[str, int]]:
    return [{name: tensor.numel() for name, tensor in from_bytes(shard).items()} for shard in data]


def test_a_shard_holds_as_many_tensors_as_fit_and_one_that_never_fits_alone():
    # 40 bytes to a shard, 4 bytes to a number
    data = list(shards(named(4, 6, 1, 30, 10, 0, 1), torch.float32, max_bytes=40))
    assert sizes_of(data) == [
        {"layer.0": 4, "layer.1": 6},
        {"layer.2": 1},
        {"layer.3": 30},
        {"layer.4": 10, "layer.5": 0},
        {"layer.6": 1},
    ]


def test_shards_come_one_at_a_time_and_gather_no_more_than_they_need():
    gathered = []

    def gather():
        for name, tensor in named(10, 10, 10):
            gathered.append(name)
            yield name, tensor

    stream = shards(gather(), torch.float32, max_bytes=40)
    assert gathered == []
    next(stream)
    assert gathered == ["layer.0", "layer.1"]  # the second showed that the first shard is full


def test_shards_hold_the_tensors_in_the_dtype_that_was_asked_for():
    tensors = [
        *named(3, 5, dtype=torch.float32),
        ("ids", torch.tensor([1, 2**40])),
        ("rng", torch.arange(3, dtype=torch.uint8)),  # which must not shift the words of others
        *((str(kind), torch.ones(2, 2, dtype=kind)) for kind in DTYPES if not kind.is_floating_point),
    ]
    tensors[0] = ("layer.0", torch.tensor([1.0, 1 / 3, -1e30]))
    for dtype in (torch.float32, torch.bfloat16):
        got = {name: tensor for shard in shards(tensors, dtype) for name, tensor in from_bytes(shard).items()}
        for name, tensor in tensors:
            want = tensor.to(dtype) if tensor.is_floating_point() else tensor
            assert got[name].dtype == want.dtype and torch.equal(got[name], want)


def test_tied_tensors_are_sent_under_each_of_their_names_and_views_as_they_look():
    tied = torch.arange(6.0).reshape(2, 3)
    got = from_bytes(next(shards([("embed", tied), ("head", tied), ("transposed", tied.T)], torch.float32)))
    assert (
        torch.equal(got["embed"], tied)
        and torch.equal(got["head"], tied)
        and torch.equal(got["transposed"], tied.T)
    )


def test_no_tensors_are_no_shards():
    assert list(shards([], torch.float32)) == []


def test_only_the_sender_puts_and_every_rank_gathers():
    gathered = []

    def gather():
        for name, tensor in named(2, 3):
            gathered.append(name)
            yield name, tensor

    put: list[Any] = []
    sender = ObjectPublisher(lambda array: put.append(array) or len(put), torch.bfloat16, is_sender=True)
    answer = sender.publish(1, gather())
    assert answer is not None and put[0].dtype == np.uint8
    assert (answer["shards"], answer["deltas"]) == ([1], [])
    assert answer["size"] == answer["bytes"] == put[0].nbytes and "changed" not in answer
    assert from_bytes(put[0].tobytes())["layer.1"].tolist() == [100, 101, 102]
    assert ObjectPublisher(put.append, torch.bfloat16, is_sender=False).publish(1, gather()) is None
    assert gathered == ["layer.0", "layer.1"] * 2 and len(put) == 1


# --------------------------------------------------------------------------------------------------- adapters


def adapter(layer: str, inputs: int, outputs: int, rank: int = 2) -> dict[str, torch.Tensor]:
    sizes = {"A": (rank, inputs), "B": (outputs, rank)}
    return {
        f"base_model.model.{layer}.lora_{x}.weight": torch.randn(size, dtype=torch.bfloat16)
        for x, size in sizes.items()
    }


def test_an_adapter_is_added_to_its_layers_in_float32_and_rounded_once():
    base = {"q.weight": torch.randn(4, 6), "q.bias": torch.randn(4), "k.weight": torch.randn(2, 6)}
    base = {name: tensor.bfloat16() for name, tensor in base.items()}
    before = {name: tensor.clone() for name, tensor in base.items()}
    tensors = adapter("q", 6, 4)
    a, b = (tensors[f"base_model.model.q.lora_{x}.weight"].double() for x in "AB")
    for dtype in (torch.float32, torch.bfloat16):
        merged = dict(merge(base.items(), tensors, 1.5, dtype, torch.device("cpu")))
        want = base["q.weight"].double() + 1.5 * b @ a
        assert merged["q.weight"].dtype == dtype
        assert torch.allclose(
            merged["q.weight"].double(), want, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )
        assert (
            merged["q.bias"] is base["q.bias"]
            and merged["k.weight"] is base["k.weight"]
            and list(merged) == list(base)
        )
    assert all(torch.equal(base[name], before[name]) for name in base)


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        (adapter("q", 6, 5), r"q\.weight is \[4, 6\], but .*q\.lora_B\.weight': \[5, 2\]"),
        (adapter("q", 7, 4), r"q\.weight is \[4, 6\], but .*q\.lora_A\.weight': \[2, 7\]"),
        # it would have been broadcast
        (adapter("q", 6, 1), r"q\.weight is \[4, 6\], but .*q\.lora_B\.weight': \[1, 2\]"),
        (
            adapter("q", 6, 4) | adapter("x.1.q", 6, 4),
            r"no layer for base_model\.model\.x\.1\.q\.lora_A\.weight, .* \(2 in all\)",
        ),
        (dict(list(adapter("q", 6, 4).items())[:1]), r"has base_model\.model\.q\.lora_A\.weight or .* alone"),
        (
            {"base_model.model.q.lora_magnitude_vector": torch.ones(4)},
            r"no layer for base_model\.model\.q\.lora_magnitude_vector",
        ),
    ],
)
def test_a_tensor_of_an_adapter_that_does_not_fit_is_named(tensors, error):
    with pytest.raises(ValueError, match=error):
        dict(
            merge(
                [("q.weight", torch.zeros(4, 6)), ("q.bias", torch.zeros(4))],
                tensors,
                1.0,
                torch.float32,
                torch.device("cpu"),
            )
        )
