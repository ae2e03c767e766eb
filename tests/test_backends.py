"""Every backend against one rank, at sizes on both sides of the thresholds in its way: ZeRO-3 leaves whole
what has less than 1e5 weights, and a head is cut into chunks.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import learners
import pytest
import tiny
import torch
import torch.distributed as dist
from learners import BACKENDS, settings
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.learner import head
from gvpo_ray.learner.backends.deepspeed import rebuild_rotary
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import train_step

VOCABULARY, HIDDEN = 2048, 64
PERSISTENCE_THRESHOLD = 100_000
"""stage3_param_persistence_threshold of DeepSpeed: ZeRO-3 gathers only what is larger."""


def large_model(folder: Path, tie: bool) -> Path:
    """A model whose head and MLP are above ZeRO-3's threshold, and whose attention is below it."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tiny.make_model(folder)  # for its tokenizer
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=1600,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=tie,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
        model = Qwen2ForCausalLM(config)
        sizes = {
            name: parameter.numel() for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        assert (
            sizes["lm_head.weight"] > PERSISTENCE_THRESHOLD > sizes["model.layers.0.self_attn.q_proj.weight"]
        )
        assert sizes["model.layers.0.mlp.up_proj.weight"] > PERSISTENCE_THRESHOLD
        model.save_pretrained(folder)
    if dist.is_initialized():
        dist.barrier()
    return folder


def group(group_id: int, lengths: list[int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(group_id)
    ids = [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in [5, *lengths]]
    rewards = tuple(float(i % 2) for i in range(len(lengths)))
    columns = {
        "prompt_ids": ids[0],
        "completion_ids": ids[1:],
        "sampling_logprobs": [[-7.5] * length for length in lengths],
    }
    return tiny.make_group(group_id, rewards, 0, **columns)


def ragged(step: int) -> list[dict[str, Any]]:
    """Groups that give two and three ranks different numbers of passes, and passes of 1 to 3 head chunks."""
    return [
        group(10 * step + i, lengths)
        for i, lengths in enumerate([[40, 6], [9, 9, 9], [20, 5], [3, 12], [1, 2]])
    ]


def load(path: Path, backend: str, zero_stage: int, dtype: str = "float32", **options: Any) -> Policy:
    given = settings(backend=backend, zero_stage=zero_stage, micro_batch_tokens=60, **options).learner
    return Policy(ModelConfig(path=str(path), dtype=dtype), given, path)


def two_steps(folder: Path, backend: str, zero_stage: int, tie: bool, **options: Any) -> dict[str, Any]:
    path = large_model(folder / "model", tie)
    usual = head.ELEMENTS["cpu"]
    head.ELEMENTS["cpu"] = 16 * VOCABULARY
    try:
        policy = load(path, backend, zero_stage, **options)
        given = settings(folder, backend=backend, zero_stage=zero_stage, micro_batch_tokens=60, **options)
        start = learners.weights(policy)
        norms = [float(train_step(policy, ragged(step), given)["grad_norm"]) for step in range(2)]
        end = learners.weights(policy)
    finally:
        head.ELEMENTS["cpu"] = usual
    return {"norms": norms, "moved": {name: end[name] - start[name] for name in start}}


def frequencies(folder: Path, backend: str, zero_stage: int) -> dict[str, Any]:
    """inv_freq of a model in bfloat16, and log-probs up to a late position."""
    policy = load(large_model(folder / "model", False), backend, zero_stage, "bfloat16")
    got = policy._module.model.model.rotary_emb.inv_freq
    want = 10_000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    (late,) = policy.token_logprobs([group(7, [400])])
    return {"dtype": got.dtype, "error": float(((got.double() - want) / want).abs().max()), "late": late}


def small_gradients(folder: Path, backend: str, zero_stage: int, **options: Any) -> dict[str, Any]:
    """Norms of a gradient g, and of g with 0.0018 g added 10 times, each of which bfloat16 would lose: it is
    less than half of the distance to the next number, which is at least 2^-8 of a number.
    """
    policy = load(large_model(folder / "model", False), backend, zero_stage, "bfloat16", **options)
    rows, norms = [group(1, [8, 8])], []
    for factors in ([1.0], [1.0] + [0.0018] * 10):
        for i, factor in enumerate(factors):
            is_last = i == len(factors) - 1
            logprobs = policy.logprobs(rows, is_last)
            policy.backward((logprobs[0] - logprobs[1]) * factor, is_last)
        norms.append(policy.update(0.0))
    return {"norms": norms}


def sharded_gradients(folder: Path) -> dict[str, Any]:
    """Gradients that FSDP holds between two passes of an update, and parameters: (all, this rank's part)."""
    policy = load(large_model(folder / "model", False), "fsdp", 0)
    sizes = []
    for is_last in (False, True):
        policy.backward(policy.logprobs([group(1, [8, 8])], is_last).sum(), is_last)
        held = [p for p in policy._module.parameters() if p.grad is not None]
        sizes.append((sum(p.numel() for p in held), sum(p.grad.to_local().numel() for p in held)))
    return {"sizes": sizes}


CASES = {
    f"two steps {backend} {stage}{', tied' * tie}": functools.partial(
        two_steps, backend=backend, zero_stage=stage, tie=tie
    )
    for backend, stage in BACKENDS
    for tie in (False, True)
}
SHARED_WEIGHTS = [("deepspeed", 1), ("deepspeed", 3), ("fsdp", 0)]
ON_3 = {(backend, stage): (backend, stage) in SHARED_WEIGHTS for backend, stage in BACKENDS}
"""Whether the model of three ranks is tied: two ranks have both kinds."""
CASES_ON_3 = {
    name: CASES[name]
    for name in (f"two steps {backend} {stage}{', tied' * tie}" for (backend, stage), tie in ON_3.items())
}
CASES |= {
    f"frequencies {backend} {stage}": functools.partial(frequencies, backend=backend, zero_stage=stage)
    for backend, stage in BACKENDS
}
CASES |= {
    f"small gradients {backend} {stage}": functools.partial(
        small_gradients, backend=backend, zero_stage=stage
    )
    for backend, stage in BACKENDS
}
CASES["sharded gradients"] = sharded_gradients


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Any]]:
    """The steps of one rank without a process group, by whether the model is tied."""
    folder = tmp_path_factory.mktemp("alone")
    return {tie: two_steps(folder / str(tie), "ddp", 0, tie) for tie in (False, True)}


@pytest.mark.parametrize(
    "world_size, backend, zero_stage, tie",
    [
        *((2, *backend, tie) for backend in BACKENDS for tie in (False, True)),
        *((3, *backend, tie) for backend, tie in ON_3.items()),
    ],
)
def test_ragged_passes_through_a_large_head_are_one_ranks_on_every_backend(
    on_ranks: Any, alone: Any, world_size: int, backend: str, zero_stage: int, tie: bool
) -> None:
    want = alone[tie]
    assert min(want["norms"]) > 0.01
    for result in on_ranks(world_size, f"two steps {backend} {zero_stage}{', tied' * tie}"):
        assert result["norms"] == pytest.approx(want["norms"], rel=1e-4)
        for name, moved in want["moved"].items():
            assert moved.norm() > 0 and (result["moved"][name] - moved).norm() < 0.01 * moved.norm(), name


@pytest.mark.parametrize("backend, zero_stage", BACKENDS)
def test_rotary_frequencies_are_float32_on_every_backend_in_bfloat16(
    on_ranks: Any, backend: str, zero_stage: int
) -> None:
    """In bfloat16 they would be 4e-3 wrong, and log-probs at position 400 by a nat."""
    (want, _) = on_ranks(2, "frequencies ddp 0")
    for result in on_ranks(2, f"frequencies {backend} {zero_stage}"):
        assert result["dtype"] == torch.float32 and result["error"] < 1e-6
        assert (result["late"] - want["late"]).square().mean().sqrt() < 0.1


def test_a_rounded_rotary_embedding_that_cannot_be_made_again_is_refused_by_name() -> None:
    class OddRotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", torch.ones(4, dtype=torch.bfloat16), persistent=False)

    with pytest.raises(ValueError, match=r"OddRotary.*inv_freq.*zero_stage: 2"):
        rebuild_rotary(nn.Sequential(OddRotary()))


@pytest.mark.parametrize("backend, zero_stage", BACKENDS)
def test_gradients_are_added_up_in_float32_on_every_backend_in_bfloat16(
    on_ranks: Any, backend: str, zero_stage: int
) -> None:
    for result in on_ranks(2, f"small gradients {backend} {zero_stage}"):
        once, more = result["norms"]
        assert once > 0 and more / once == pytest.approx(1.018, abs=0.002)


def test_fsdp_keeps_gradients_in_shards_between_passes(on_ranks: Any) -> None:
    results = on_ranks(2, "sharded gradients")
    for i in range(2):
        (whole, _), _ = (result["sizes"][i] for result in results)
        assert whole > 500_000
        assert sum(result["sizes"][i][1] for result in results) == whole


def test_a_learner_with_more_than_one_gpu_is_refused_in_one_line() -> None:
    run = {"run_dir": "r", "num_steps": 1, "groups_per_step": 4}
    given = {**run, "model": {"path": "m"}, "prompts": {"path": "p"}, "learner": {"num_gpus": 2}}
    with pytest.raises(ConfigError, match=r"learner\.num_gpus.*one GPU, not 2.*num_workers"):
        GVPOConfig.from_dict(given)
