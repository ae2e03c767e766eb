"""A learner's step: GVPO against a loop that anyone can read, the same on every number of ranks, and its
options.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import (
    BACKENDS,
    LEARNING_RATE,
    Recorder,
    difference,
    load,
    mixed_batch,
    same,
    settings,
    shared_model,
    weights,
    with_loss,
)
from oracle import weighted_squared_loss, weights_floor_and_damping, with_likelihood_floor
from tiny import make_group, make_model
from transformers import AutoModelForCausalLM

from gvpo_ray import groups
from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.loss import loss_config
from gvpo_ray.learner.checkpoints import latest_checkpoint
from gvpo_ray.learner.loop import learn
from gvpo_ray.learner.step import NonFiniteGradient, Settings, learning_rate_at, train_step
from gvpo_ray.losses.stale_data import adapted_beta
from gvpo_ray.weights.transfer import ObjectPublisher

# ---------------------------------------------------------------------- one step, and what must not change it


def plain_loop(path: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Two steps of Algorithm 1 with nothing but transformers, the squared loss, autograd, clipping and AdamW;
    `behaviour` reference.

    Returns the weights and each step's mean gradient norm.
    """
    model, first = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def logprob(row, i, model=model):
        prompt, ids = row["prompt_ids"], row["completion_ids"][i]
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).double().sum()

    def reference(row, i, version):
        oldest, newest = row["version_min"][i], row["version_max"][i]
        if oldest is None or oldest == newest == version:
            with torch.no_grad():
                return logprob(row, i, first if oldest is None else model)
        return torch.tensor(row["sampling_logprobs"][i], dtype=torch.float64).sum()

    norms = []
    for step in (1, 2):
        samples = []  # per group: [(row, i, reference, reward)]
        for row in mixed_batch(step):
            kept = [
                (row, i, reference(row, i, step - 1), r)
                for i, r in enumerate(row["rewards"])
                if r is not None
            ]
            if len(kept) > 1:
                samples.append(kept)
        assert len(samples) == 6
        total = 0.0
        for group in (samples[:3], samples[3:]):
            flat = [(g, *sample) for g, part in enumerate(group) for sample in part]
            logprobs = torch.stack([logprob(row, i) for _, row, i, _, _ in flat])
            log_ratios = iter((logprobs.detach() - torch.stack([ref for *_, ref, _ in flat])).tolist())
            of_groups = [
                ([reward for *_, reward in part], [next(log_ratios) for _ in part]) for part in group
            ]
            counts, floor, damped = weights_floor_and_damping(of_groups, beta=0.1)
            loss = weighted_squared_loss(
                logprobs,
                torch.stack([ref for *_, ref, _ in flat]),
                torch.tensor([reward for *_, reward in flat]),
                torch.tensor([g for g, *_ in flat]),
                beta=0.1,
                weights=counts,
            )
            optimizer.zero_grad()
            with_likelihood_floor(loss, logprobs, floor).backward()
            total += float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * damped
            optimizer.step()
        norms.append(total / 2)
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}, norms


ONE_FILE = Path(__file__).parents[1] / "jobs" / "gvpo_in_one_file.py"


def one_file() -> Any:
    spec = importlib.util.spec_from_file_location("gvpo_in_one_file", ONE_FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def paper_in_one_file(path: Path, num_steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Steps on mixed_batch by jobs/gvpo_in_one_file.py: the weights, and each step's mean gradient norm."""
    one = one_file()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    norms = []
    for step in range(1, num_steps + 1):
        samples = []
        for row in filter(None, map(groups.trainable, mixed_batch(step))):
            given = (row["prompt_ids"], row["completion_ids"])
            with torch.no_grad():
                references = one.sequence_logprobs(model, *given)
            samples.append(one.Group(*given, row["rewards"], references))
        assert len(samples) == 6
        norms.append(sum(one.train_on(model, optimizer, part) for part in (samples[:3], samples[3:])) / 2)
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}, norms


def paper_steps(folder: Path, backend: str = "ddp", zero_stage: int = 0) -> dict[str, Any]:
    given = settings(
        folder, backend=backend, zero_stage=zero_stage, num_mini_batches=2, micro_batch_tokens=40
    )
    given = with_loss(given, preset="paper")
    policy = load(shared_model(folder), given)
    metrics = [train_step(policy, mixed_batch(step), given) for step in (1, 2, 3)]
    return {"weights": weights(policy), "metrics": metrics}


def two_steps(folder: Path, backend: str, zero_stage: int, micro_batch_tokens: int) -> dict[str, Any]:
    given = settings(
        folder,
        backend=backend,
        zero_stage=zero_stage,
        micro_batch_tokens=micro_batch_tokens,
        num_mini_batches=2,
    )
    policy = load(shared_model(folder), given)
    metrics = [train_step(policy, mixed_batch(step), given) for step in (1, 2)]
    return {"weights": weights(policy), "metrics": metrics, "counts": (policy.step, policy.num_updates)}


def few_groups(folder: Path, backend: str, zero_stage: int) -> dict[str, Any]:
    """One group for all ranks, then none that can be trained on, then one again, then one that is not a
    number.
    """
    given = settings(
        folder,
        backend=backend,
        zero_stage=zero_stage,
        num_mini_batches=4,
        micro_batch_tokens=1,
        max_skipped_updates=1,
    )
    policy = load(shared_model(folder), given)
    train_step(policy, [make_group(1)], given)
    before = weights(policy)
    metrics = train_step(policy, [make_group(2, (None, 1.0)), make_group(3, (None, None))], given)
    unchanged = same(weights(policy), before)
    train_step(policy, [make_group(4, version=2), make_group(5, (None, None))], given)
    result = {
        "weights": weights(policy),
        "unchanged": unchanged,
        "counts": (policy.step, policy.num_updates),
        "metrics": metrics,
    }
    bad = make_group(77, (math.inf, 0.0))
    result["skipped"] = [
        train_step(policy, [bad], given),
        same(weights(policy), result["weights"]),
        policy.num_updates,
    ]
    train_step(policy, [make_group(6, version=policy.step), bad], given)  # in a row is what counts
    other = load(folder / "model", given)
    for group in (1, 4, 6):  # what was trained on, without what was skipped
        train_step(other, [make_group(group, version=other.step)], given)
    result["as if it had not been"] = difference(weights(policy), weights(other))
    try:
        train_step(policy, [bad], given)
    except NonFiniteGradient as error:
        return {**result, "error": str(error)}
    return {**result, "error": "none was raised"}


def test_the_micro_batches_of_the_step_are_uneven():
    rows = [row for row in map(groups.trainable, mixed_batch(1)) if row]
    ((*passes,),) = groups.cut_into_passes([rows[:3]], 40)
    assert sorted(len(parts) for parts in passes) == [1, 2]  # so that a mean of means is not the mean


def learn_on_ranks(folder: Path) -> dict[str, Any]:
    given = settings(folder, backend="deepspeed", zero_stage=3, num_mini_batches=3, num_steps=2)
    policy = load(shared_model(folder), given)
    buffer, sent, stepped = Recorder(2), [], []
    learn(
        policy,
        buffer,
        ObjectPublisher(sent.append, torch.float32, is_sender=policy.rank == 0),
        given,
        lambda m: stepped.append(m["step"]),
    )
    return {
        "told": buffer.told,
        "sent": len(sent),
        "stepped": stepped,
        "weights": weights(policy),
        "checkpoint": latest_checkpoint(folder),
    }


CASES = {
    f"two steps {backend} {stage} 40": functools.partial(
        two_steps, backend=backend, zero_stage=stage, micro_batch_tokens=40
    )
    for backend, stage in BACKENDS
}
CASES |= {
    f"two steps ddp 0 {tokens}": functools.partial(
        two_steps, backend="ddp", zero_stage=0, micro_batch_tokens=tokens
    )
    for tokens in (1, 100_000)
}
CASES |= {
    f"few groups {backend} {stage}": functools.partial(few_groups, backend=backend, zero_stage=stage)
    for backend, stage in BACKENDS
}
CASES |= {"paper ddp": paper_steps}
CASES |= {"paper zero 3": functools.partial(paper_steps, backend="deepspeed", zero_stage=3)}
FEW_ON_1 = [("ddp", 0), ("deepspeed", 3)]  # a step without an update is made by all ranks or by none
CASES_ON_1 = {
    name: case
    for name, case in CASES.items()
    if "few groups" not in name or name in [f"few groups {backend} {stage}" for backend, stage in FEW_ON_1]
}
CASES |= {"learn": learn_on_ranks}


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory) -> tuple[dict[str, torch.Tensor], list[float]]:
    return plain_loop(make_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("two steps")])
def test_a_step_is_the_plain_loop_on_every_rank_backend_and_micro_batch(on_ranks, by_hand, world_size, case):
    # The gradients differ by float32 rounding, some 1e-7 of them. Adam divides by their size, so where a
    # gradient is itself next to nothing the rounding may decide up to a whole step of 1e-3 per update; there
    # are four. Measured: below 7e-6 in one weight of 1536 and below 1e-6 in the others; they moved by 4e-3.
    # Clipping and Adam both hide a wrong denominator: the norm does not.
    want, norms = by_hand
    for result in on_ranks(world_size, case):
        assert result["counts"] == (2, 4)
        assert [metrics["grad_norm"] for metrics in result["metrics"]] == pytest.approx(norms, rel=1e-5)
        assert result["weights"].keys() == want.keys()
        for name, tensor in result["weights"].items():
            torch.testing.assert_close(tensor, want[name], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def by_one_file(tmp_path_factory) -> tuple[dict[str, torch.Tensor], list[float]]:
    return paper_in_one_file(make_model(tmp_path_factory.mktemp("model")), num_steps=3)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("paper")])
def test_the_paper_preset_is_the_page_without_a_system_over_three_steps_of_data_of_any_age(
    on_ranks, by_one_file, world_size, case
):
    want, norms = by_one_file
    for result in on_ranks(world_size, case):
        assert [metrics["grad_norm"] for metrics in result["metrics"]] == pytest.approx(norms, rel=1e-5)
        for metrics in result["metrics"]:
            assert (metrics["gvpo/beta"], metrics["gvpo/damping"]) == (0.1, 1.0)
            assert (metrics["gvpo/effective_share"], metrics["gvpo/likelihood_floor"]) == (1.0, 1.0)
        for name, tensor in result["weights"].items():
            torch.testing.assert_close(tensor, want[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("two steps")])
def test_metrics_do_not_depend_on_ranks_backend_and_micro_batches(on_ranks, case):
    def added_up(metrics: dict[str, Any]) -> dict[str, Any]:
        # Log-probabilities are float32, some 1e-6 of them rounding, and D is a tenth of a nat: their
        # correlation knows no more than 1e-5. So here it is compared as what was added up, a covariance;
        # itself it is in float64, to 1e-8 (test_spread).
        spread = math.sqrt(metrics["gvpo/reward_var"] * metrics["gvpo/implicit_reward_var"])
        return {**metrics, "gvpo/reward_correlation": metrics["gvpo/reward_correlation"] * spread}

    reference = on_ranks(1, "two steps ddp 0 40")[0]["metrics"]
    for world_size in (1, 2):
        for result in on_ranks(world_size, case):  # every rank has them
            for got, want in zip(result["metrics"], reference, strict=True):
                assert added_up(got) == pytest.approx(added_up(want), rel=1e-4, abs=1e-6)
    assert (
        reference[0]["gvpo/num_groups"] == 6
        and reference[0]["groups/untrainable"] == 2
        and reference[1]["policy/log_ratio_rms"] > 1
    )


@pytest.mark.parametrize("backend, zero_stage", BACKENDS)
def test_ranks_without_a_group_take_part_and_a_batch_without_one_is_a_step_without_an_update(
    on_ranks, backend, zero_stage
):
    one = on_ranks(1, "few groups ddp 0")[0]
    for result in on_ranks(2, f"few groups {backend} {zero_stage}"):
        assert result["unchanged"] and result["counts"] == (3, 2)
        metrics = result["metrics"]
        assert (
            metrics["loss"],
            metrics["grad_norm"],
            metrics["tokens/trained"],
            metrics["gvpo/num_groups"],
        ) == (0, 0, 0, 0)
        assert metrics["groups/untrainable"] == 2 and metrics["reward/mean"] == 1
        for name, tensor in result["weights"].items():
            torch.testing.assert_close(tensor, one["weights"][name], rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "world_size, backend, zero_stage",
    [*((1, *backend) for backend in FEW_ON_1), *((2, *backend) for backend in BACKENDS)],
)
def test_an_update_whose_gradient_is_not_a_number_is_skipped_and_too_many_in_a_row_stop_the_run(
    on_ranks, world_size, backend, zero_stage
):
    for result in on_ranks(world_size, f"few groups {backend} {zero_stage}"):
        metrics, unchanged, num_updates = result["skipped"]
        assert unchanged and num_updates == 2 and metrics["updates/skipped"] == 1
        assert all(
            math.isfinite(value) for name, value in metrics.items() if not name.startswith("reward/")
        ), metrics
        assert result["as if it had not been"] < 5e-6
        assert "step 6" in result["error"] and "77" in result["error"]


def test_all_ranks_learn_and_rank_0_speaks(on_ranks):
    first, second = on_ranks(2, "learn")
    assert [entry[:2] for entry in first["told"]] == [
        ("started", 0),
        ("published", 0),
        ("published", 1),
        ("published", 2),
        ("saved", 2),
    ]
    assert first["sent"] > 0 and second["told"] == [] and second["sent"] == 0
    assert first["stepped"] == second["stepped"] == [2]
    assert same(first["weights"], second["weights"]) and first["checkpoint"][0] == 2


# --------------------------------------------------------------------------------- what a step sets by itself


@pytest.mark.components
@pytest.mark.parametrize("reference", ["behaviour", "initial"])
def test_the_step_after_old_data_is_as_long_as_the_rewards_explain_the_residuals(tmp_path, reference):
    """The first update of Adam is the learning rate's length, whatever the gradient is."""
    given = settings(tmp_path, reference, num_steps=9)
    make_model(tmp_path / "model")

    def first_update(row: dict[str, Any], given: Settings) -> tuple[dict[str, Any], float]:
        policy = load(given.model_path, given)
        if reference == "initial":
            policy.reference.load(given.model_path)
        before, policy.step = weights(policy), 3
        metrics = train_step(policy, [row], given)
        return metrics, max(
            float((after - before[name]).abs().max()) for name, after in weights(policy).items()
        )

    fresh, old = (make_group(1, (1.0, 0.0, 0.0, 1.0), version=version) for version in (3, 0))
    metrics, length = first_update(fresh, given)
    assert metrics["gvpo/damping"] == 1.0 and length == pytest.approx(LEARNING_RATE, rel=0.01)
    metrics, length = first_update(old, given)
    assert (0.01 < metrics["gvpo/damping"] < 0.99) == (reference == "behaviour")
    assert length == pytest.approx(LEARNING_RATE * metrics["gvpo/damping"], rel=0.01)
    free = dataclasses.replace(given, loss=loss_config(beta=0.1, reference=reference, damped=False))
    assert first_update(old, free)[1] == pytest.approx(LEARNING_RATE, rel=0.01)


def test_beta_is_adapted_to_half_the_rewards_spread_and_no_further():
    assert adapted_beta(0.1, 0.25, 0.0625) == 0.1  # sd(beta D) is half of sd(R)
    assert adapted_beta(0.1, 0.25, 1e-12) == pytest.approx(0.1 * math.exp(0.1), rel=1e-4)
    assert adapted_beta(0.1, 0.25, 0.25) == pytest.approx(0.1 * math.exp(-0.1))  # twice as much as wanted
    assert adapted_beta(0.1, 0.25, 100.0) == pytest.approx(0.1 * math.exp(-0.2))
    assert (adapted_beta(1.0, 0.25, 1e-12), adapted_beta(0.01, 0.25, 1.0)) == (1.0, 0.01)
    assert (adapted_beta(0.1, 0.0, 1.0), adapted_beta(0.1, 0.25, 0.0)) == (0.1, 0.1)


@pytest.mark.parametrize("reference", ["behaviour", "initial"])
def test_an_adapted_beta_follows_what_a_step_saw_and_outlives_the_process(tmp_path, reference):
    given = dataclasses.replace(
        settings(tmp_path, reference, num_mini_batches=2), loss=loss_config(reference=reference)
    )
    make_model(tmp_path / "model")
    policy = load(given.model_path, given)
    if reference == "initial":
        policy.reference.load(given.model_path)
    first, second = (train_step(policy, [make_group(i), make_group(9 + i)], given) for i in (1, 2))
    assert first["gvpo/beta"] == 0.1
    if reference == "initial":
        assert second["gvpo/beta"] == 0.1 and policy.beta is None
        return
    assert (
        second["gvpo/beta"]
        == adapted_beta(0.1, first["gvpo/reward_var"], first["gvpo/implicit_reward_var"])
        != 0.1
    )
    policy.save(tmp_path / "checkpoints" / "step-2")
    again = load(tmp_path / "checkpoints" / "step-2", given)
    assert again.beta == policy.beta != second["gvpo/beta"]
    third = [train_step(one, [make_group(3, version=0)], given) for one in (policy, again)]
    assert third[0] == third[1]
    assert same(weights(policy), weights(again))


def test_an_objective_may_leave_groups_of_equal_rewards_out_of_the_update_and_its_denominator(tmp_path):
    make_model(tmp_path / "model")
    equal, differ = (
        make_group(1, (1.0, 1.0, 1.0)),
        [make_group(2, (1.0, 0.0)), make_group(3, (0.0, 0.5, None))],
    )
    found = []
    for batch in ([equal, *differ], differ, [equal]):
        given = with_loss(settings(tmp_path), objective="dapo")
        policy = load(tmp_path / "model", given)
        first = weights(policy)
        line = train_step(policy, [dict(row) for row in batch], given)
        found.append((weights(policy), line["tokens/trained"], line["updates"]))
    tokens = sum(
        len(ids)
        for row in differ
        for ids, x in zip(row["completion_ids"], row["rewards"], strict=True)
        if x is not None
    )
    assert same(found[0][0], found[1][0]) and not same(found[0][0], first)
    assert [one[1:] for one in found] == [(tokens, 1), (tokens, 1), (0, 0)] and same(found[2][0], first)


def test_the_gradient_is_clipped_and_its_norm_reported_before(tmp_path):
    given = [settings(tmp_path, max_grad_norm=norm) for norm in (1e-9, 1e9)]
    make_model(tmp_path / "model")
    metrics = [train_step(load(one.model_path, one), [make_group(1)], one) for one in given]
    assert metrics[0]["grad_norm"] == metrics[1]["grad_norm"] > 1e-3


def test_the_learning_rate_warms_up_and_falls_to_zero_after_the_last_step():
    def rates(schedule, warmup_steps):
        config = LearnerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=warmup_steps)
        return [learning_rate_at(config, version, 6) for version in range(7)]

    assert rates("constant", 0) == [1.0] * 7
    assert rates("linear", 2) == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0])
    assert rates("cosine", 2) == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0], abs=1e-6
    )
