"""What engine and learner differ by from rounding alone chooses nothing; what is more than that does."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from learners import load, settings
from tiny import make_group, make_model

from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.learner.mismatch import Mismatch
from gvpo_ray.learner.objective import Objective
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.references import ReferenceLogprobs, TokenLogprobs
from gvpo_ray.learner.step import train_step
from gvpo_ray.losses.batch import Total
from gvpo_ray.losses.stale_data import importance_weights, likelihood_floor
from gvpo_ray.losses.stale_data import objective as gvpo
from gvpo_ray.observe.advice import ParityNoise
from gvpo_ray.run.inputs import Inputs


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    path = make_model(tmp_path / "model")
    return load(path, settings(tmp_path))


def test_rounding_alone_does_not_choose_among_long_completions_and_a_policy_that_has_moved_does() -> None:
    """The audit's simulation: at 8,192 tokens a quarter of a group counted, from rounding alone."""
    generator = torch.Generator().manual_seed(0)
    k, num_groups = 8, 400
    ids = torch.arange(num_groups).repeat_interleave(k)
    rewards = (torch.rand(len(ids), generator=generator) < 0.5).double()
    zeros = torch.zeros(len(ids), dtype=torch.float64)

    def shares(ratios):
        weights = importance_weights(ratios, zeros, ids)
        effective = weights.view(-1, k).sum(1) ** 2 / weights.view(-1, k).square().sum(1) / k
        return float(effective.mean()), float(likelihood_floor(ratios, zeros, rewards, ids).mean())

    for rms in (0.0222, 0.0393):
        mismatch = Mismatch(1e5, -(rms**2) / 2 * 1e5, rms**2 * 1e5)
        for length in (256, 2048, 8192):
            lengths = torch.randint(length // 2, length * 3 // 2, zeros.shape, generator=generator).double()
            noise = torch.randn(zeros.shape, generator=generator, dtype=torch.float64)
            ratios = noise * rms * lengths.sqrt() - lengths * rms**2 / 2
            effective, floor = shares(mismatch.beyond(ratios, lengths))
            assert effective > 0.97 and floor > 0.995
            if (rms, length) == (0.0393, 8192):
                assert shares(ratios)[0] < 0.3  # without that
            # what the policy has really lost shows, less the band
            drift = torch.where(torch.arange(len(ids)) % 2 == 0, -5.0 * rms * lengths.sqrt(), 0.0)
            found = mismatch.beyond(ratios + drift, lengths)[::2] / (rms * lengths.sqrt())[::2]
            assert float(found.mean()) == pytest.approx(-3, abs=0.1)


@pytest.mark.parametrize(("rms", "is_rounding"), [(0.0, 0), (9e-4, 0), (1.1e-3, 1), (0.29, 1), (0.31, 0)])
def test_only_a_difference_of_the_size_of_rounding_is_taken_for_rounding(
    rms: float, is_rounding: int
) -> None:
    assert Mismatch(10.0, 0.0, 10 * rms**2).is_rounding == bool(is_rounding)
    assert not Mismatch().is_rounding


def test_ratios_to_engines_are_banded_and_those_to_the_learners_own_passes_are_not(
    tmp_path: Path, policy: Policy
) -> None:
    loss = settings(tmp_path).loss
    rows = [make_group(1, (0.0, 1.0), version=2), make_group(2, (0.0, 1.0), version=3)]
    for row in rows:
        row["prompt_ids"], row["completion_ids"] = [5], [[6] * 16, [7] * 4]
        row["sampling_logprobs"] = [[-1.1] * 16, [-1.1] * 4]
    logprobs = torch.full((40,), -1.0)
    # engines by 0.1 nats a token lower, or 1.6 and 0.4 in all: beyond 2 deviations of 0.08 sqrt(L) + 0.01 L
    sampler = TokenLogprobs(torch.full((40,), -1.1, dtype=torch.float64), torch.zeros(40, dtype=torch.bool))
    seen = []

    def objective(mismatch):
        found = Objective(loss, 0.1, 3, mismatch)
        found._loss = lambda batch, options: (
            seen.append(batch.logprob_sums - batch.sampler_sums) or gvpo(batch, options)
        )
        found(logprobs, ReferenceLogprobs(sampler, sampler), rows, Total(2, 4, 40))
        return seen[-1].tolist()

    assert objective(Mismatch()) == pytest.approx([1.6, 0.4, 1.6, 0.4], abs=1e-5)
    measured = Mismatch(100.0, 1.0, 100 * (0.08**2 + 0.01**2))
    banded = 1.6 - 0.16 - 2 * 0.08 * 4, 0.4 - 0.04 - 2 * 0.08 * 2
    assert objective(measured) == pytest.approx([*banded, 1.6, 0.4], abs=1e-5)


def test_what_is_measured_of_rounding_adds_up_over_steps_and_outlives_the_process(
    tmp_path: Path, policy: Policy
) -> None:
    given = settings(tmp_path, num_steps=9)
    found = Mismatch()
    for version in range(2):
        row = make_group(version, version=version)
        logprobs = [tokens.tolist() for tokens in policy.token_logprobs([row])]
        row["sampling_logprobs"] = [[value - 0.01 for value in values] for values in logprobs]
        train_step(policy, [row], given)
        number = sum(map(len, logprobs))
        found = Mismatch(found.count + number, found.total + 0.01 * number, found.square + 1e-4 * number)
        assert [*dataclasses.astuple(policy.mismatch)] == pytest.approx(
            [*dataclasses.astuple(found)], rel=1e-4
        )
    policy.save(tmp_path / "checkpoints" / "step-2")
    again = load(tmp_path / "checkpoints" / "step-2", given)
    assert again.mismatch == policy.mismatch and again.mismatch.is_rounding


# ------------------------------------------------------------------------------- what an engine may differ by


@pytest.mark.parametrize("lost", [math.inf, math.nan])
def test_a_token_without_any_probability_is_no_rounding_and_leaves_no_trace(lost: float) -> None:
    measured = Mismatch(100.0, 1.0, 0.5)
    step = {"mismatch_count": 10.0, "mismatch": -lost, "mismatch_square": lost}
    assert measured.plus(step) == measured
    step = {"mismatch_count": 10.0, "mismatch": -0.5, "mismatch_square": 0.25}
    assert measured.plus(step) == Mismatch(110.0, 0.5, 0.75)


def config(model: str = "bfloat16", **engines: Any) -> GVPOConfig:
    run = {"run_dir": "r", "num_steps": 1, "groups_per_step": 4, "prompts": {"path": "p"}}
    return GVPOConfig.from_dict({**run, "model": {"path": "m", "dtype": model}, "engines": engines})


@pytest.mark.parametrize(
    ("model", "engines", "noise", "limit"),
    [
        ("float32", {}, 1e-3, 1e-3),
        ("float32", {"dtype": "bfloat16"}, 0.1, 0.3),
        ("bfloat16", {}, 0.1, 0.3),
        ("bfloat16", {"dtype": "float32"}, 0.1, 0.3),
        ("float32", {"vllm": {"dtype": "bfloat16"}}, 0.1, 0.3),
        ("bfloat16", {"vllm": {"dtype": "float32"}}, 0.1, 0.3),
        ("bfloat16", {"num_gpus": 1, "quantization": "fp8"}, 0.3, 0.9),
        ("bfloat16", {"vllm": {"quantization": "fp8"}}, 0.3, 0.9),
        ("bfloat16", {"parity_tolerance": 0.05}, 0.1, 0.05),
    ],
)
def test_what_rounding_explains_is_said_and_only_what_it_cannot_stops_a_run(
    model: str, engines: dict[str, Any], noise: float, limit: float
) -> None:
    given = config(model, **engines)
    assert (given.engines.parity_noise(model), given.engines.parity_limit(model)) == pytest.approx(
        (noise, limit)
    )
    judge = ParityNoise(given).judge
    assert judge({}) is None and judge({"weights/parity_mean": noise}) is None
    said = judge({"weights/parity_mean": 1.01 * noise})
    assert said is not None and f"rounding should ({noise:g})" in said
    assert judge({"weights/parity_mean": 1.01 * noise}) is None  # once


class Prompts:
    """Two prompts of 3 and 5 tokens, in turns."""

    def __len__(self) -> int:
        return 2

    def group(self, group_id: int) -> pa.Table:
        return pa.table({"prompt_ids": [[[1, 2, 3], [4, 5, 6, 7, 8]][group_id % 2]]})


@pytest.mark.parametrize(("max_length", "size"), [(5, 4), (257, 256), (258, 256), (4096, 256)])
def test_the_first_check_of_an_engine_is_on_at_least_256_tokens_of_the_runs_own_data(
    max_length: int, size: int
) -> None:
    inputs: Any = Inputs.__new__(Inputs)
    inputs.prompts, inputs.max_length = Prompts(), max_length
    probes = inputs.probes()
    assert [*map(len, probes)] == [size] * 4
    assert [*probes[0], *probes[1]][:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    inputs.prompts = None
    assert inputs.probes() == []
