"""Group-packed forward against each completion by itself, for several architectures, and what cannot be
packed.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import float64, make_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.learner import logprobs as logprobs_module
from gvpo_ray.learner import packing
from gvpo_ray.learner.logprobs import CompletionLogprobs, padded_inputs
from gvpo_ray.learner.policy import Policy

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2),
    "qwen2, a window of 4 in the second layer": Qwen2Config(
        **SHAPE, num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=1),
    "mistral, a window of 6": MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=6),
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16),
}


def _groups() -> list[dict[str, Any]]:
    rng = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(64) for _ in range(n)]

    shapes = [(5, [3, 1, 7]), (12, [1, 1]), (1, [4] * 6), (9, [20, 2, 2, 8]), (3, [1])]
    return [
        {"prompt_ids": tokens(prompt), "completion_ids": [tokens(n) for n in sizes]}
        for prompt, sizes in shapes
    ]


def _logprobs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    logprobs: Tensor = CompletionLogprobs(model)(**inputs)
    return logprobs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_groups_have_the_logprobs_and_gradients_of_each_completion_by_itself(name: str) -> None:
    torch.manual_seed(0)
    model = float64(AutoModelForCausalLM.from_config(ARCHITECTURES[name]))
    rows = _groups()
    alone = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": [ids]}
        for row in rows
        for ids in row["completion_ids"]
    ]
    want = torch.cat([_logprobs(model, padded_inputs([row], "cpu")[0]) for row in alone])
    seed = torch.randn_like(want)
    (want * seed).sum().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation(packing.NAME)
    inputs, lengths = packing.pack(rows, "cpu")
    assert lengths == [len(ids) for row in rows for ids in row["completion_ids"]]
    assert inputs["input_ids"].shape == (
        1,
        sum(len(row["prompt_ids"]) + sum(len(ids) - 1 for ids in row["completion_ids"]) for row in rows),
    )
    got = _logprobs(model, inputs)
    (got * seed).sum().backward()
    # Rotary angles are in float32 in both, from the same positions: they cancel.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert want.min() < -5
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[key], rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_block_mask_of_flex_attention_says_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, without gradients: what a CPU can run of it."""
    from torch.nn.attention import flex_attention
    from transformers.integrations import flex_attention as integration

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(
        integration,
        "compile_friendly_flex_attention",
        lambda *a, training, **k: flex_attention.flex_attention(*a, **k),
    )
    torch.manual_seed(0)
    model = float64(AutoModelForCausalLM.from_config(ARCHITECTURES[name])).requires_grad_(False)
    model.set_attn_implementation(packing.NAME)
    rows = _groups()
    inputs, _ = packing.pack(rows, "cpu", flex=True)
    got, want = _logprobs(model, inputs), _logprobs(model, packing.pack(rows, "cpu")[0])
    windows = {window for window in inputs["layout"].block_masks}
    assert windows and (windows != {None}) == ("window" in name)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_a_completion_does_not_see_its_neighbours() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["qwen2"]).eval()
    model.set_attn_implementation(packing.NAME)
    rows = _groups()
    before = _logprobs(model, packing.pack(rows, "cpu")[0])
    rows[0]["completion_ids"][1:] = [[63], [62] * 7]  # the others of its group
    rows[1]["prompt_ids"] = [61] * 12  # and the next group
    after = _logprobs(model, packing.pack(rows, "cpu")[0])
    assert torch.equal(before[:3], after[:3]) and torch.equal(before[13:], after[13:])
    assert not torch.isclose(before[3:13], after[3:13]).any()


def test_the_head_in_chunks_gives_the_same_and_keeps_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = float64(AutoModelForCausalLM.from_config(ARCHITECTURES["qwen2"]))
    inputs, _ = padded_inputs(_groups(), "cpu")
    results = []
    for elements in (1 << 24, 64 * 5):  # all at once, and 5 tokens at a time
        monkeypatch.setattr(logprobs_module, "HEAD_ELEMENTS", {"cpu": elements})
        saved: list[int] = []

        def note(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel() if tensor.shape[-1:] == (64,) else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logprobs = _logprobs(model, inputs)
        logprobs.sum().backward()
        results.append((logprobs.detach(), [p.grad.clone() for p in model.parameters()], max(saved)))
        model.zero_grad()
    (whole, whole_gradients, whole_saved), (chunked, chunked_gradients, chunked_saved) = results
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)
    for got, want in zip(chunked_gradients, whole_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert chunked_saved < whole_saved == len(whole) * 64


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradient_is_tried_on_heads_like_the_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = packing.pack(_groups(), "cpu")[0]["layout"]
    seen = []
    usual = packing.scaled_dot_product_attention
    monkeypatch.setattr(
        packing, "scaled_dot_product_attention", lambda q, *a, **k: seen.append(q.shape) or usual(q, *a, **k)
    )
    packing.try_gradient(ARCHITECTURES[name], layout, torch.float32)
    assert {(shape[1], shape[3]) for shape in seen} == {(4, 16 if name == "qwen3" else 8)}
    monkeypatch.setattr(
        packing, "scaled_dot_product_attention", lambda q, *a, **k: usual(q, *a, **k) * float("inf")
    )
    with pytest.raises(RuntimeError, match="not finite"):
        packing.try_gradient(ARCHITECTURES[name], layout, torch.float32)


def _policy(folder: Path, **learner: Any) -> Policy:
    return Policy(ModelConfig(path=str(folder)), LearnerConfig(**{"backend": "ddp", **learner}), folder)


def test_a_policy_packs_what_it_can_and_has_the_same_logprobs_when_told_not_to(tmp_path: Path) -> None:
    make_model(tmp_path)
    rows = [
        {
            **row,
            "prompt_ids": [i % 40 for i in row["prompt_ids"]],
            "completion_ids": [[i % 40 for i in ids] for ids in row["completion_ids"]],
        }
        for row in _groups()
    ]
    packed, padded = _policy(tmp_path), _policy(tmp_path, packing=False)
    assert packed.packs and not padded.packs
    torch.testing.assert_close(packed.logprobs(rows), padded.logprobs(rows), rtol=0, atol=1e-5)
    for policy_ in (packed, padded):
        own = policy_.logprobs(rows).detach()
        again = torch.stack([tokens.double().sum() for tokens in policy_.token_logprobs(rows)])
        assert torch.equal(own, again)  # the reference pass and the training pass: a log-ratio of exactly 0


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(
            **SHAPE,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=30.0,
            attn_logit_softcapping=0.5,
        ),
        GPTNeoXConfig(**{**SHAPE, "rotary_pct": 0.25}),
    ],
    ids=["gemma2", "gpt_neox"],
)
def test_what_cannot_be_packed_says_so_and_is_padded_and_what_can_is_right(
    tmp_path: Path, config: PretrainedConfig, caplog: pytest.LogCaptureFixture
) -> None:
    make_model(tmp_path)  # for its tokenizer
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded = _policy(tmp_path)
    assert loaded.packs != ("cannot be packed by groups" in caplog.text)
    torch.testing.assert_close(
        loaded.logprobs(_groups()), _policy(tmp_path, packing=False).logprobs(_groups()), rtol=0, atol=1e-4
    )
