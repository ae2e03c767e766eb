"""Context parallel without ranks: threads of this process exchange the parts of a packed sequence."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import float64, make_group, make_model
from transformers import AutoModelForCausalLM

from gvpo_ray.learner import context, packing
from gvpo_ray.learner.context import Context
from gvpo_ray.learner.logprobs import CompletionLogprobs


class Ranks:
    """The few functions of torch.distributed that a Context calls, for `size` threads that meet."""

    def __init__(self, size: int) -> None:
        self.size, self.own, self._meet = size, threading.local(), threading.Barrier(size, timeout=60)
        self._given: list[torch.Tensor] = [torch.zeros(0)] * size

    def get_rank(self) -> int:
        return int(self.own.rank)

    def get_world_size(self) -> int:
        return self.size

    def new_group(self, ranks: list[int], timeout: object) -> list[int]:
        return ranks

    def _all(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._given[self.own.rank] = tensor.clone()
        self._meet.wait()
        given = list(self._given)
        self._meet.wait()
        return given

    def all_to_all_single(self, received: torch.Tensor, parts: torch.Tensor, group: list[int]) -> None:
        given, mine = self._all(parts), group.index(self.own.rank)
        received.copy_(torch.stack([given[rank][mine] for rank in group]))

    def all_reduce(self, tensor: torch.Tensor, group: list[int]) -> None:
        given = self._all(tensor)
        tensor.copy_(torch.stack([given[rank] for rank in group]).sum(0))


def rows_of(kind: str) -> list[dict[str, Any]]:
    if kind == "nothing":  # what a rank without groups passes: fewer tokens than ranks
        return [{"prompt_ids": [0], "completion_ids": [[0]]}]
    return [make_group(3, (1.0, 0.0, 0.5)), make_group(5, (0.0, 1.0)), make_group(9, (1.0, 0.0, 0.0, 1.0))]


def module_of(path: Path, checkpoints: bool) -> CompletionLogprobs:
    model = float64(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64))
    model.set_attn_implementation(packing.NAME)  # type: ignore[operator]
    module = CompletionLogprobs(model)
    if checkpoints:
        module.checkpoint_activations()
    return module


def gradients(module: CompletionLogprobs, rows: list[dict[str, Any]], of: Context | None) -> dict[str, Any]:
    """Log-probs of a pass, the gradients of a loss that mixes them, and bytes kept for the backward pass."""
    inputs, lengths = packing.pack(rows, "cpu", False, of)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = module(**inputs)
    assert len(logprobs) == sum(lengths)
    (logprobs.sum().square() + logprobs.square().sum()).backward()
    return {
        "logprobs": logprobs.detach(),
        "gradients": {name: p.grad for name, p in module.named_parameters()},
        "kept": sum(kept.values()),
    }


def on_threads(
    path: Path, kind: str, size: int, monkeypatch: pytest.MonkeyPatch, checkpoints: bool = False
) -> list[dict[str, Any]]:
    ranks = Ranks(size)
    monkeypatch.setattr(context, "dist", ranks)
    modules = [module_of(path, checkpoints) for _ in range(size)]  # threads cannot load at the same time

    def run(rank: int) -> dict[str, Any]:
        ranks.own.rank = rank
        return gradients(modules[rank], rows_of(kind), Context(size, 1))

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


@pytest.mark.parametrize(
    "kind, size, checkpoints",
    [("groups", 2, False), ("groups", 4, False), ("groups", 2, True), ("nothing", 2, False)],
)
def test_a_split_pass_has_the_log_probs_and_the_gradients_of_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size: int, checkpoints: bool
) -> None:
    """Of 4 heads and 2 key-value heads; on 4 ranks these are repeated. The ranks' gradients add up."""
    path = make_model(tmp_path)
    whole = gradients(module_of(path, checkpoints), rows_of(kind), None)
    results = on_threads(path, kind, size, monkeypatch, checkpoints)
    for result in results:
        assert (result["logprobs"] - whole["logprobs"]).abs().max() < 1e-12
    for name, want in whole["gradients"].items():
        parts = [result["gradients"][name] for result in results]
        assert (torch.stack(parts).sum(0) - want).abs().max() < 1e-10 * (1 + want.abs().max()), name
        if kind == "groups":
            assert all(part.norm() > 0 for part in parts) or "bias" in name, name


def test_ranks_of_a_sequence_are_in_steps_of_those_that_split_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 ranks, of which 2 have the same tokens and 2 split a sequence: 0 and 2, 1 and 3, 4 and 6, 5 and 7."""
    ranks = Ranks(8)
    monkeypatch.setattr(context, "dist", ranks)
    found = []
    for ranks.own.rank in range(8):
        made = Context(2, 2)
        found.append((made.rank, made.group))
    assert [rank for rank, _ in found] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [group for _, group in found] == [[0, 2], [1, 3], [0, 2], [1, 3], [4, 6], [5, 7], [4, 6], [5, 7]]


def test_what_a_rank_keeps_for_the_backward_pass_falls_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model(tmp_path)
    whole = gradients(module_of(path, False), rows_of("groups"), None)["kept"]
    shares = []
    for size in (2, 4):
        results = on_threads(path, "groups", size, monkeypatch)
        shares.append(max(result["kept"] for result in results) / whole)
    assert shares[0] < 0.55 and shares[1] < 0.35


def test_heads_that_ranks_cannot_share_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(3)
    monkeypatch.setattr(context, "dist", ranks)
    ranks.own.rank = 0
    states = [torch.zeros(1, heads, 5, 8) for heads in (4, 2, 2)]
    with pytest.raises(ValueError, match="its 4 heads cannot be shared out to 3 ranks"):
        Context(3, 1).by_heads(*states)
