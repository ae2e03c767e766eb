"""The auxiliary loss of mixtures of experts is transformers' own, of a whole update at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_families import ROWS, folder_of
from test_routing import CHOSEN, LAYERS, NUM, chosen_for, with_experts
from test_spread import Float64Policy, three_steps
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.groups import Part
from gvpo_ray.learner.balance import balance_of
from gvpo_ray.learner.families import MIXTURES, check_trainable
from gvpo_ray.learner.microbatches import Plan
from gvpo_ray.learner.policy import Policy

COEFFICIENT = 0.25


def mixture(path: Path, family: str) -> Path:
    folder_of(path, family)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"router_aux_loss_coef": COEFFICIENT})
    (path / "config.json").write_text(text, encoding="utf-8")
    return path


def policy_of(path: Path, **learner: Any) -> Policy:
    model = ModelConfig(path=str(path), router_aux_loss=True).model_copy(update={"dtype": "float64"})
    return Float64Policy(model, LearnerConfig(backend="ddp", **learner), path)


def of_update(policy: Policy, rows: list[dict[str, Any]], cut: list[list[Part]]) -> tuple[float, list[Any]]:
    """The auxiliary loss and its gradients, from passes that are cut as given."""
    plan = Plan(rows, cut, [])
    balance = balance_of(policy, plan)
    assert balance is not None
    for parameter in policy._module.parameters():
        parameter.grad = None
    for of_pass in plan.passes:
        laid_out = policy.lay_out(of_pass, loads=True)
        logprobs = policy.forward(laid_out)
        policy.backward(logprobs.sum() * 0 + balance.share(laid_out[0]["load"]), is_last=True)
    return balance.value(policy), [p.grad.clone() for p in policy._module.parameters()]


WHOLE = [[Part(0, range(3)), Part(1, range(2))]]
CUT = [[Part(0, [1]), Part(1, range(2))], [Part(0, [0, 2])]]


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("packing", [True, False])
def test_it_is_transformers_own_of_all_completions_with_their_prompts(
    tmp_path: Path, family: str, packing: bool
) -> None:
    """transformers adds up in float32, and Mixtral's router rounds its logits to that."""
    path = mixture(tmp_path, family)
    policy = policy_of(path, packing=packing)
    value, gradients = of_update(policy, ROWS, CUT)
    assert policy.packs == packing
    whole: Any = tiny.float64(AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager"))
    sequences = [row["prompt_ids"] + ids[:-1] for row in ROWS for ids in row["completion_ids"]]
    logits = [whole(torch.tensor([ids]), output_router_logits=True).router_logits for ids in sequences]
    want = load_balancing_loss_func(tuple(map(torch.cat, zip(*logits, strict=True))), NUM, CHOSEN)
    assert value == pytest.approx(want.item(), rel=1e-6)
    assert value > CHOSEN * 1.001  # what an even load would give
    (COEFFICIENT * want).backward()
    found = dict(zip((name for name, _ in policy._module.model.named_parameters()), gradients, strict=True))
    for name, parameter in whole.named_parameters():
        theirs = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], theirs, rtol=1e-5, atol=1e-7)
    assert found["model.layers.0.mlp.gate.weight"].abs().max() > 1e-4


def test_with_replay_the_load_is_what_engines_chose_and_the_probabilities_are_live(tmp_path: Path) -> None:
    path = mixture(tmp_path, "qwen3_moe")
    rng = np.random.default_rng(0)
    chosen = [chosen_for(row, rng) for row in ROWS]
    rows = [with_experts(row, one) for row, one in zip(ROWS, chosen, strict=True)]
    policy = policy_of(path)
    value, _ = of_update(policy, rows, WHOLE)
    counts, summed, num = np.zeros(NUM), np.zeros(NUM), 0
    for row, of_row in zip(rows, chosen, strict=True):
        for i, experts in enumerate(of_row):  # each completion alone, with its prompt
            counts += np.bincount(experts.ravel(), minlength=NUM)
            one = {**row, "completion_ids": row["completion_ids"][i : i + 1]}
            load = policy.loads([{**one, "routed_experts": row["routed_experts"][i : i + 1]}])
            assert load.chosen.tolist() == np.bincount(experts.ravel(), minlength=NUM).tolist()
            summed += load.probabilities.numpy()
            num += LAYERS * len(experts)
    assert value == pytest.approx(NUM * (counts / num) @ (summed / num), rel=1e-12)
    free, _ = of_update(policy, ROWS, WHOLE)
    assert abs(free - value) > 1e-2


@pytest.mark.parametrize("known", ["all", "some", "none"])
def test_neither_cuts_nor_packing_nor_recomputed_layers_change_it(tmp_path: Path, known: str) -> None:
    path = mixture(tmp_path, "qwen3_moe")
    rng = np.random.default_rng(1)
    rows = [with_experts(row, chosen_for(row, rng)) for row in ROWS]
    if known == "some":  # the prompt's are those of the first completion
        rows[0]["routed_experts"][1] = None
    elif known == "none":
        rows = [{**row, "group_id": 0} for row in ROWS]
    want = of_update(policy_of(path), rows, WHOLE)
    for learner, cut in (
        ({}, CUT),
        ({"packing": False}, WHOLE),
        ({"packing": False}, CUT),
        ({"gradient_checkpointing": True}, CUT),
    ):
        policy = policy_of(path, **learner)
        assert (policy.routers.chosen(rows) is None) == (known != "all")
        value, gradients = of_update(policy, rows, cut)
        assert value == pytest.approx(want[0], rel=1e-12)
        for ours, theirs in zip(gradients, want[1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_steps_with_it_are_the_same_however_they_are_cut_and_not_those_without(tmp_path: Path) -> None:
    results = [
        three_steps(tmp_path / str(i), mixture="qwen3_moe", few=True, **options)
        for i, options in enumerate(
            (
                {"aux": True},
                {"aux": True, "micro_batch_tokens": 40, "gradient_checkpointing": True},
                {"aux": True, "packing": False, "micro_batch_tokens": 1},
                {},
            )
        )
    ]
    want, *others, without = results
    assert all(metrics["experts/aux_loss"] > 2 for metrics in want["metrics"])
    assert not any("experts/aux_loss" in metrics for metrics in without["metrics"])
    for other in others:
        for name, weight in want["weights"].items():
            torch.testing.assert_close(other["weights"][name], weight, rtol=0, atol=1e-9)
        for ours, theirs in zip(other["metrics"], want["metrics"], strict=True):
            assert ours["experts/aux_loss"] == pytest.approx(theirs["experts/aux_loss"], rel=1e-9)
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-8)
    moved = [(without["weights"][name] - weight).abs().max() for name, weight in want["weights"].items()]
    assert max(moved) > 1e-4


def test_a_model_without_it_is_refused_by_name_and_a_run_says_whether_there_is_one(tmp_path: Path) -> None:
    dense = tiny.make_model(tmp_path / "dense")
    check_trainable(ModelConfig(path=str(dense)))
    with pytest.raises(ConfigError, match=r"model.router_aux_loss: .*dense \(qwen2\) has no auxiliary loss"):
        check_trainable(ModelConfig(path=str(dense), router_aux_loss=True))
    path = mixture(tmp_path / "mixture", "mixtral")
    check_trainable(ModelConfig(path=str(path), router_aux_loss=True))
    assert "where it has said so, with 0.25 x the auxiliary loss" in policy_of(path).computes
    config = json.loads((path / "config.json").read_text(encoding="utf-8")) | {"router_aux_loss_coef": 0.0}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match="or no router_aux_loss_coef"):
        check_trainable(ModelConfig(path=str(path), router_aux_loss=True))
