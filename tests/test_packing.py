"""Group-packed forward against each completion by itself, for several architectures, and what cannot be
packed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import learners
import pytest
import torch
from tiny import float64, make_group, make_model
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
from gvpo_ray.learner import packing
from gvpo_ray.learner.logprobs import CompletionLogprobs, padded_inputs
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import train_step

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


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention through Dynamo and AOTAutograd as on a GPU; only the kernels are not Triton's."""
    from torch.nn.attention import flex_attention as flex

    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)  # it refuses gradients on a CPU
    compiled = torch.compile(flex.flex_attention, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(packing, "_flex_attention", lambda: compiled)
    torch._dynamo.reset()
    # torch's config forgets a key that a patch of another test has deleted, until it is set
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True, raising=False)
    yield


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_block_mask_of_flex_attention_says_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, without gradients, in float64."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(packing, "_flex_attention", lambda: flex_attention)
    torch.manual_seed(0)
    model = float64(AutoModelForCausalLM.from_config(ARCHITECTURES[name])).requires_grad_(False)
    model.set_attn_implementation(packing.NAME)
    rows = _groups()
    inputs, _ = packing.pack(rows, "cpu", flex=True)
    got, want = _logprobs(model, inputs), _logprobs(model, packing.pack(rows, "cpu")[0])
    windows = set(inputs["layout"].block_masks)
    assert windows and (windows != {packing.ALL}) == ("window" in name)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 256, 257, 300, 1000])
def test_the_blocks_of_the_mask_are_those_of_create_block_mask(num_tokens: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    rows = [
        {
            "prompt_ids": [5] * (1 + num_tokens // 3),
            "completion_ids": [[6] * (1 + num_tokens // 3), [7] * (1 + num_tokens // 3)],
        }
    ]
    layout = packing.pack(rows, "cpu", flex=True)[0]["layout"]
    size = layout.owners.shape[1]
    assert size % packing.BLOCK == 0 and size >= packing.LEAST
    for window in (None, 7, 200):
        ours = layout.block_mask(window)
        theirs = create_block_mask(ours.mask_mod, None, None, size, size, device="cpu")
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.components
def test_attention_is_compiled_a_few_times_whatever_the_passes(flex_on_cpu: None) -> None:
    """Below and above one and two blocks, one token, with and without gradients, checkpointed or not, in a
    layer without a window and in one with; and each pass is right.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.manual_seed(0)
    architecture = ARCHITECTURES["qwen2, a window of 4 in the second layer"]
    model = AutoModelForCausalLM.from_config(architecture).eval()
    module = CompletionLogprobs(model)
    kinds = [
        [(4, [3, 1, 5])],
        [(1, [1])],
        [(10, [60, 70, 120])],
        [(64, [65, 129])],
        [(100, [30, 77])],
        [(9, [90] * 9)],
        [(20, [1]), (7, [200])],
    ]
    for i in range(40):
        rows = [
            {
                "prompt_ids": [(i + j) % 64 for j in range(p + i)],
                "completion_ids": [[(3 * j + c) % 64 for j in range(c)] for c in cs],
            }
            for p, cs in kinds[i % 7]
        ]
        if i % 2:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        for part in module.modules():
            part.training = getattr(part, "gradient_checkpointing", False)
        results = []
        for how, inputs in (
            (packing.NAME, packing.pack(rows, "cpu", flex=True)[0]),
            ("sdpa", padded_inputs(rows, "cpu")[0]),
        ):
            model.set_attn_implementation(how)
            model.zero_grad()
            with torch.set_grad_enabled(i % 3 != 0):
                out = module(**inputs)
            if i % 3 != 0:
                out.double().sum().backward()
            results.append(
                [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            )
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert 0 < len(_debug_get_cache_entry_list(flex_attention.__code__)) <= 6
    assert not _debug_get_cache_entry_list(create_block_mask.__code__)


@pytest.mark.components
def test_a_kernel_that_is_wrong_is_found(flex_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _groups()
    for dtype in (torch.float32, torch.bfloat16):
        packing.check_kernel(ARCHITECTURES["qwen2"], rows, torch.device("cpu"), dtype)
    right = packing._flex_attention()
    monkeypatch.setattr(
        packing,
        "_flex_attention",
        lambda: lambda q, k, v, **options: right(q, k, 2 * v - v.detach(), **options),
    )
    with pytest.raises(RuntimeError, match="value's gradient differs"):
        packing.check_kernel(ARCHITECTURES["qwen2"], rows, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(
        packing, "_flex_attention", lambda: lambda q, k, v, **options: 1.1 * right(q, k, v, **options)
    )
    with pytest.raises(RuntimeError, match="FlexAttention's output differs"):
        packing.check_kernel(ARCHITECTURES["qwen2"], rows, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_attention_with_terms_that_packing_does_not_know_is_refused(name: str) -> None:
    inputs, _ = packing.pack(_groups(), "cpu")
    states = torch.zeros(1, 4, len(inputs["layout"].place), 8)
    with pytest.raises(ValueError, match=name):
        packing.packed_attention(
            nn.Module(), states, states, states, None, layout=inputs["layout"], **{name: 1.0}
        )


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
    tmp_path: Path, config: PretrainedConfig
) -> None:
    make_model(tmp_path)  # for its tokenizer
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded = _policy(tmp_path)
    assert loaded.packs != ("cannot be packed by groups" in loaded.computes)
    torch.testing.assert_close(
        loaded.logprobs(_groups()), _policy(tmp_path, packing=False).logprobs(_groups()), rtol=0, atol=1e-4
    )


# --------------------------------------------------------------------------------- which tokens are trained


def masked(group_id: int, masks: list[list[int]] | None) -> dict[str, Any]:
    """A group with a mask of trained tokens per completion, as long as it."""
    row = make_group(group_id)
    if masks is None:
        return row
    lengths = [len(ids) for ids in row["completion_ids"]]
    marks = [[t in mask for t in range(n)] for mask, n in zip(masks, lengths, strict=True)]
    return {**row, "trained_tokens": marks}


MASKED = [masked(1, [[0, 2], [1], []]), masked(2, None), masked(3, [[0], [0, 1, 2], [1, 2]])]


@pytest.mark.parametrize("packing_on", [True, False])
def test_tokens_that_are_not_trained_are_read_and_count_neither_in_sums_nor_in_gradients(
    tmp_path: Path, packing_on: bool
) -> None:
    """As a plain loop that takes every sequence by itself and picks its trained tokens."""
    path = make_model(tmp_path)
    policy = Policy(ModelConfig(path=str(path)), LearnerConfig(backend="ddp", packing=packing_on), path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens, sums = [], []
    for row in MASKED:
        masks = row.get("trained_tokens") or [[True] * len(ids) for ids in row["completion_ids"]]
        for ids, mask in zip(row["completion_ids"], masks, strict=True):
            whole = torch.tensor([row["prompt_ids"] + ids])
            every = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None]).squeeze(1)
            tokens.append(every[len(row["prompt_ids"]) - 1 :][torch.tensor(mask)])
            sums.append(tokens[-1].double().sum())
    got = policy.token_logprobs(MASKED)
    assert [len(own) for own in got] == [2, 1, 0, *map(len, MASKED[1]["completion_ids"]), 1, 3, 2]
    for ours, theirs in zip(got, tokens, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-5)
    factors = torch.arange(1.0, 10.0, dtype=torch.float64)
    ours = policy.logprobs(MASKED)
    torch.testing.assert_close(ours.detach(), torch.stack(sums).detach(), rtol=0, atol=1e-4)
    (ours * factors).sum().backward()
    (torch.stack(sums) * factors).sum().backward()
    theirs = dict(model.named_parameters())
    for name, parameter in policy._module.model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-4)


def test_a_step_trains_the_trained_tokens_alone_and_its_log_ratios_start_at_zero(tmp_path: Path) -> None:
    """What the engine said of tokens that are not trained is not looked at; fresh groups, stale and foreign
    ones.
    """
    path = make_model(tmp_path / "model")
    moved = []
    for wrong in (0.0, 50.0):  # what stands at places that are not trained
        policy = learners.load(path, learners.settings(tmp_path))
        rows = [masked(4, [[0, 2], [1], [0]]), masked(5, [[1], [0], [0, 1]]), masked(6, None)]
        rows[1] |= {"version_min": [-1] * 3, "version_max": [-1] * 3}
        for row in rows:
            masks = row.get("trained_tokens")
            if masks:
                row["sampling_logprobs"] = [
                    [value - wrong * (not is_trained) for value, is_trained in zip(*pair, strict=True)]
                    for pair in zip(row["sampling_logprobs"], masks, strict=True)
                ]
        metrics = train_step(policy, rows[:1], learners.settings(tmp_path))
        assert metrics["gvpo/implicit_reward_var"] == 0 and metrics["grad_norm"] > 0
        policy.step = 0
        train_step(policy, rows, learners.settings(tmp_path, num_mini_batches=3, micro_batch_tokens=20))
        moved.append(learners.weights(policy))
    assert learners.same(*moved)


def test_a_mask_of_another_length_than_its_completion_is_an_error() -> None:
    row = {"prompt_ids": [5], "completion_ids": [[7, 8]], "trained_tokens": [[True]]}
    for lay_out in (lambda: packing.pack([row], "cpu"), lambda: padded_inputs([row], "cpu")):
        with pytest.raises(ValueError, match="shorter"):
            lay_out()
