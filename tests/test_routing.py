"""Router replay: a mixture of experts computes with the experts that are given, and its own gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_families import EXPERTS, ROWS, folder_of
from transformers import AutoModelForCausalLM

from gvpo_ray import groups
from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.learner.families import MIXTURES
from gvpo_ray.learner.policy import Policy

LAYERS, CHOSEN, NUM = 2, EXPERTS["num_experts_per_tok"], EXPERTS["num_experts"]


def policy_of(path: Path, **learner: Any) -> Policy:
    return Policy(ModelConfig(path=str(path)), LearnerConfig(backend="ddp", **learner), path)


def chosen_for(row: dict[str, Any], rng: np.random.Generator) -> list[np.ndarray]:
    """Random experts of all tokens that an engine reads; a prompt has the same for all completions."""

    def draw(num: int) -> np.ndarray:
        return rng.random((num, LAYERS, NUM)).argsort(-1)[..., :CHOSEN]

    prompt = draw(len(row["prompt_ids"]))
    return [np.concatenate([prompt, draw(len(ids) - 1)]) for ids in row["completion_ids"]]


def with_experts(row: dict[str, Any], chosen: list[np.ndarray]) -> dict[str, Any]:
    return {**row, "group_id": 0, "routed_experts": [groups.experts_entry(one, NUM) for one in chosen]}


def plainly(model: Any, ids: list[int], experts: np.ndarray) -> torch.Tensor:
    """Log-probs of each token but the first, by the model's own layers, with experts put in."""
    layers = model.get_decoder().layers

    def block(index: int, moe: Any) -> Any:
        router = next(one for one in moe.modules() if type(one).__name__.endswith("TopKRouter"))
        usual = router.forward

        def forward(hidden: torch.Tensor) -> Any:
            logits, _, _ = usual(hidden)
            places = torch.tensor(experts[:, index])
            gates = logits.float().softmax(-1).gather(1, places)
            if model.config.model_type == "mixtral" or model.config.norm_topk_prob:
                gates = gates / gates.sum(-1, keepdim=True)
            return logits, gates, places

        router.forward = forward
        return router, usual

    changed = [block(i, layer.mlp) for i, layer in enumerate(layers)]
    tokens = torch.tensor([ids])
    logits = model(tokens[:, :-1], use_cache=False).logits[0]
    for router, usual in changed:
        router.forward = usual
    return logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("packing", [True, False])
def test_log_probs_and_gradients_are_those_of_a_plain_forward_pass_with_the_engines_experts(
    tmp_path: Path, family: str, packing: bool
) -> None:
    path = folder_of(tmp_path, family)
    policy = policy_of(path, packing=packing)
    rng = np.random.default_rng(0)
    chosen = [chosen_for(row, rng) for row in ROWS]
    rows = [with_experts(row, of_row) for row, of_row in zip(ROWS, chosen, strict=True)]
    whole: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    want = torch.stack(
        [
            plainly(whole, row["prompt_ids"] + ids, experts)[len(row["prompt_ids"]) - 1 :].sum()
            for row, of_row in zip(ROWS, chosen, strict=True)
            for ids, experts in zip(row["completion_ids"], of_row, strict=True)
        ]
    )
    ours = policy.logprobs(rows)
    torch.testing.assert_close(ours, want.double(), rtol=0, atol=1e-3)
    assert (policy.logprobs(ROWS) - ours).abs().max() > 0.1  # these are not what the routers choose
    assert policy.packs == packing
    weights = torch.tensor([0.3, -1.0, 0.7, 0.2, -0.2])
    (want * weights).sum().backward()
    (ours * weights.double()).sum().backward()
    gradients = dict(policy._module.model.named_parameters())
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-3, atol=1e-3)
    routers = [name for name in gradients if name.endswith("gate.weight")]
    assert len(routers) >= LAYERS and all(gradients[name].grad.abs().max() > 1e-3 for name in routers)


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "native"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_experts_are_computed_in_the_type_of_the_passes_and_their_gradients_kept_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, dtype: Any
) -> None:
    """Torch's autocast does not know their product, and transformers takes it in the type of the weights."""
    seen: list[torch.dtype] = []
    usual = torch.nn.functional.grouped_mm

    def product(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = usual(*args, **kwargs)
        seen.append(result.dtype)
        return result

    path = folder_of(tmp_path, "qwen3_moe")
    exact = policy_of(path)
    exact.logprobs(ROWS).sum().backward()
    want = {name: one.grad for name, one in exact._module.named_parameters() if "experts" in name}
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", product)
    config = LearnerConfig(backend=backend, gradient_checkpointing=True)
    policy = Policy(ModelConfig(path=str(path), dtype=dtype), config, path)
    policy.backward(policy.logprobs(ROWS).sum(), True)
    assert set(seen) == {getattr(torch, dtype)} and len(seen) >= 4 * LAYERS  # and again in the backward pass
    got = {name: one.grad for name, one in policy._module.named_parameters() if "experts" in name}
    assert got.keys() == want.keys() and len(got) == 2 * LAYERS
    for name, gradient in got.items():
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        error = float((whole - want[name]).norm() / want[name].norm())
        assert whole.dtype == torch.float32 and error < (0.05 if dtype == "bfloat16" else 1e-5), (name, error)


@pytest.mark.parametrize("size", [8, 16, 12, 20])
def test_a_product_of_experts_that_bfloat16_cannot_take_is_taken_as_before(size: int) -> None:
    """Torch's kernel of it wants rows of 16 bytes: eight numbers of bfloat16, four of float32."""
    left, right = torch.randn(6, 16), torch.randn(2, 16, size)
    ends = torch.tensor([4, 6], dtype=torch.int32)
    plain = torch.nn.functional.grouped_mm(left, right, offs=ends)
    with torch.autocast("cpu", torch.bfloat16):
        cast = torch.nn.functional.grouped_mm(left, right, offs=ends)
    assert plain.dtype == torch.float32
    assert cast.dtype == (torch.bfloat16 if size % 8 == 0 else torch.float32)
    torch.testing.assert_close(cast.float(), plain, rtol=0.02, atol=0.1)


def test_routers_choose_themselves_where_nothing_is_known(tmp_path: Path) -> None:
    """As with a group of an older log, a hole, and tokens at the end that an entry lacks."""
    policy = policy_of(folder_of(tmp_path, "qwen3_moe"))
    free = policy.logprobs(ROWS[:1])
    row = ROWS[0]
    (first, second, third) = chosen_for(row, np.random.default_rng(1))
    nothing = {**row, "group_id": 0, "routed_experts": None}
    assert torch.equal(policy.logprobs([nothing]), free)
    unknown = with_experts(row, [np.full_like(one, -1) for one in (first, second, third)])
    assert torch.equal(policy.logprobs([unknown]), free)
    num = len(row["prompt_ids"])
    of_second = np.full_like(second, -1)
    of_second[num:] = second[num:]
    part = with_experts(row, [first[:0], of_second, third[:0]])
    got = policy.logprobs([{**part, "routed_experts": [None, part["routed_experts"][1], None]}])
    assert torch.equal(got[[0, 2]], free[[0, 2]]) and (got[1] - free[1]).abs() > 1e-3


def test_neither_packing_nor_passes_nor_recomputed_layers_change_what_replay_gives(tmp_path: Path) -> None:
    path = folder_of(tmp_path, "qwen3_moe")
    rng = np.random.default_rng(2)
    rows = [with_experts(row, chosen_for(row, rng)) for row in ROWS]
    # the engine read the prompt again, with other experts, for a completion that is first in its pass
    other = with_experts(ROWS[0], chosen_for(ROWS[0], rng))
    rows[0]["routed_experts"][1] = other["routed_experts"][1]
    results = []
    for packing, recompute in ((True, False), (False, False), (True, True)):
        policy = policy_of(path, packing=packing, gradient_checkpointing=recompute)
        parts = [groups.only(rows[0], [1]), groups.only(rows[0], [0, 2]), rows[1]]
        whole = policy.logprobs(rows)
        again = torch.cat([policy.logprobs([part]) for part in parts])[[1, 0, 2, 3, 4]]
        torch.testing.assert_close(again, whole, rtol=0, atol=1e-4)
        whole.sum().backward()
        results.append((whole.detach(), [p.grad.clone() for p in policy._module.parameters()]))
    for logprobs, gradients in results[1:]:
        torch.testing.assert_close(logprobs, results[0][0], rtol=0, atol=1e-4)
        for ours, theirs in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_prompts_experts_are_those_of_the_first_completion_that_knows_them(tmp_path: Path) -> None:
    """The first one found most of the prompt in the prefix cache; the other may be in another pass."""
    policy = policy_of(folder_of(tmp_path, "qwen3_moe"))
    row, chosen = ROWS[0], chosen_for(ROWS[0], np.random.default_rng(4))
    want = policy.logprobs([with_experts(row, chosen)])
    cached = [one.copy() for one in chosen]
    for one in (cached[0], cached[2]):
        one[: len(row["prompt_ids"]) - 1] = -1
    got = with_experts(row, cached)
    assert torch.equal(policy.logprobs([got]), want)
    again = torch.cat([policy.logprobs([groups.only(got, [i])]) for i in range(3)])
    torch.testing.assert_close(again, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_completion_does_not_move_the_experts_of_the_next_one(tmp_path: Path, packed: bool) -> None:
    replay: Any = policy_of(folder_of(tmp_path, "qwen3_moe")).routers
    row = {"group_id": 7, "prompt_ids": [3, 4], "completion_ids": [[], [5, 6, 7]]}
    (chosen,) = chosen_for({**row, "completion_ids": [[5, 6, 7]]}, np.random.default_rng(5))
    row["routed_experts"] = [None, groups.experts_entry(chosen, NUM)]
    shape = (1, 4) if packed else (2, 5)
    found = replay.experts([row], {"input_ids": torch.zeros(shape, dtype=torch.long)}, packed)
    of_second = found.transpose(0, 1)[0 if packed else 5 :][:4]
    assert of_second.tolist() == chosen.tolist()


def test_an_entry_with_more_tokens_than_there_are_is_refused_with_the_group(tmp_path: Path) -> None:
    policy = policy_of(folder_of(tmp_path, "mixtral"))
    num = len(ROWS[0]["prompt_ids"]) + len(ROWS[0]["completion_ids"][0])
    entries = [groups.experts_entry(np.zeros((num + more, LAYERS, CHOSEN)), NUM) for more in (0, 1)]
    policy.logprobs([{**ROWS[0], "group_id": 7, "routed_experts": [entries[0], None, None]}])
    with pytest.raises(
        groups.GroupError, match=f"group 7: routed_experts has {num + 1} tokens .* {num} with"
    ):
        policy.logprobs([{**ROWS[0], "group_id": 7, "routed_experts": [entries[1], None, None]}])


def test_replay_can_be_switched_off_and_a_run_says_which(tmp_path: Path) -> None:
    path = folder_of(tmp_path, "mixtral")
    row = with_experts(ROWS[0], chosen_for(ROWS[0], np.random.default_rng(3)))
    off = Policy(ModelConfig(path=str(path), router_replay=False), LearnerConfig(backend="ddp"), path)
    assert torch.equal(off.logprobs([row]), off.logprobs(ROWS[:1]))
    assert "experts chosen by the learner, without an auxiliary loss" in off.computes
    assert "experts chosen by the engine, where it has said so" in policy_of(path).computes
    dense = tiny.make_model(tmp_path / "dense")
    assert "experts" not in policy_of(dense).computes


def test_experts_of_another_model_are_refused_with_the_group(tmp_path: Path) -> None:
    policy = policy_of(folder_of(tmp_path, "mixtral"))
    for entry in (b"\x00\x01\x00", bytes([0, 1, 0, NUM])):
        row = {**ROWS[0], "group_id": 7, "routed_experts": [entry, None, None]}
        with pytest.raises(
            groups.GroupError, match="group 7: routed_experts is not of a model with 2 layers"
        ):
            policy.logprobs([row])


@pytest.mark.parametrize("num_experts", [2, 255, 256, 512])
def test_an_entry_holds_every_expert_and_what_is_not_known(num_experts: int) -> None:
    experts = np.array([[[0, num_experts - 1]], [[-1, 1]]])
    entry = groups.experts_entry(experts, num_experts)
    found = groups.experts_of(entry, (1, 2), num_experts)
    assert found is not None and found.tolist() == experts.tolist()
    assert len(entry) == 4 * (1 if num_experts < 256 else 2)
