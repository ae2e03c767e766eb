"""What completions are measured against, and what the reference model says of each: by hand, on every number
of ranks and size of a pass.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import Recorder, difference, load, same, settings, shared_model, weights, with_loss
from tiny import make_group, make_model, table
from transformers import AutoModelForCausalLM

from gvpo_ray import groups
from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.loss import loss_config
from gvpo_ray.learner.loop import learn
from gvpo_ray.learner.microbatches import one_ahead, plan_passes
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import Settings, train_step
from gvpo_ray.weights.transfer import ObjectPublisher


def aged_batch() -> list[dict[str, Any]]:
    """Of the step from version 7: fresh, stale, mixed and foreign completions, one left out, and a group that
    cannot be trained on.
    """
    return [
        make_group(1, (1.0, 0.0, 0.5), 7),
        make_group(2, (0.0, 1.0), 4),
        make_group(3, (0.25, None, 1.0, 0.0, 0.5), 7, version_min=[0, 0, 6, 7, 3]),
        make_group(4, (1.0, 1.0, 0.0, 0.0), None),
        make_group(5, (None, 1.0), 7),
        make_group(6, (0.0, 0.75), 6, version_min=[6, None], version_max=[6, None]),
    ]


def residuals_by_hand(path: Path, beta: float = 0.1) -> dict[int, list[float | None]]:
    """(R - mean_s R) - beta (D - mean_s D) of aged_batch before any update, with nothing but transformers;
    `behaviour` reference.
    """
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), {}
    for row in aged_batch():
        kept = [i for i, reward in enumerate(row["rewards"]) if reward is not None]
        if len(kept) < 2:
            continue
        log_ratios, rewards = [], [row["rewards"][i] for i in kept]
        for i in kept:
            prompt, ids = row["prompt_ids"], row["completion_ids"][i]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            own = float(torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).double().sum())
            is_own = row["version_min"][i] is None or row["version_min"][i] == row["version_max"][i] == 7
            log_ratios.append(0.0 if is_own else own - sum(row["sampling_logprobs"][i]))
        ratios = [min(1.0, math.exp(log_ratio)) for log_ratio in log_ratios]

        def mean(values: list[float], ratios: list[float] = ratios) -> float:
            return sum(ratio * value for ratio, value in zip(ratios, values, strict=True)) / sum(ratios)

        residuals = iter(
            (reward - mean(rewards)) - beta * (log_ratio - mean(log_ratios))
            for reward, log_ratio in zip(rewards, log_ratios, strict=True)
        )
        found[row["group_id"]] = [None if reward is None else next(residuals) for reward in row["rewards"]]
    return found


class Aged(Recorder):
    def batch(self, step: int) -> Any:
        return table(*aged_batch())


def told(folder: Path, micro_batch_tokens: int, packing: bool = True) -> dict[str, Any]:
    given = settings(folder, num_steps=8, micro_batch_tokens=micro_batch_tokens, packing=packing)
    policy = load(shared_model(folder), given)
    policy.step, buffer, lines = 7, Aged(8), []
    learn(
        policy,
        buffer,
        ObjectPublisher(copy.deepcopy, torch.float32, is_sender=policy.rank == 0),
        dataclasses.replace(given, reports_references=True),
        lines.append,
    )
    return {
        "learned": [entry[1:] for entry in buffer.told if entry[0] == "learned"],
        "metrics": lines[0],
    }


def told_of_a_model(folder: Path) -> list[tuple[Any, ...]]:
    class Fewer(Recorder):
        """In the second step one group can be trained on: with two ranks one of them has nothing to tell."""

        def batch(self, step: int) -> Any:
            return table(*(aged_batch() if step == 1 else [make_group(31), make_group(32, (None, 1.0))]))

    given = dataclasses.replace(
        settings(folder, "initial", num_steps=2, micro_batch_tokens=40), reports_references=True
    )
    policy, buffer = load(shared_model(folder), given), Fewer(2)
    learn(policy, buffer, ObjectPublisher(copy.deepcopy, torch.float32, is_sender=policy.rank == 0), given)
    return buffer.told


def replayed_batch(known: dict[int, list[float]]) -> list[dict[str, Any]]:
    """Every other completion comes again, with what the reference model said of it; one group is wholly known
    and one has no columns.
    """
    rows = [make_group(i, (1.0, 0.0, 0.5, None, 0.25), version=0) for i in range(3)] + [
        make_group(3, (1.0, 0.0))
    ]
    for row in rows[:3]:
        i = row["group_id"]
        row["reference_logprobs"] = [
            x if j % 2 == 0 or i == 2 else None for j, x in enumerate(known.get(i, [None] * 5))
        ]
        row["reference_versions"] = [None if x is None else 0 for x in row["reference_logprobs"]]
    return rows


def asked_of_the_reference(folder: Path, micro_batch_tokens: int) -> dict[str, Any]:
    """Completions and passes of the reference model on this rank, and the result, of a step in which some
    come again and of one with none.
    """
    given = settings(
        folder, "initial", num_steps=9, num_mini_batches=2, micro_batch_tokens=micro_batch_tokens
    )
    path, result = shared_model(folder), {}
    start = load(path, given)
    with torch.no_grad():
        known = {i: [float(x) for x in start.logprobs([make_group(i, (1.0,) * 5)])] for i in range(3)}
    for name, brought in (("some", known), ("none", {}), ("some again", known)):
        policy, asked = load(path, given), []
        policy.reference.load(path)
        train_step(policy, [make_group(9), make_group(10)], given)  # away from the reference
        usual = policy.token_logprobs

        def count(rows: Any, reference: bool = False, usual: Any = usual, asked: list[Any] = asked) -> Any:
            if reference:
                asked.append(
                    [ids for row in rows for ids in row["completion_ids"] if row["prompt_ids"] != [0]]
                )
            return usual(rows, reference)

        policy.token_logprobs = count
        metrics = train_step(policy, replayed_batch(brought), given)
        result[name] = {"asked": asked, "metrics": metrics, "weights": weights(policy)}
    return result


CASES = {f"told {tokens}": functools.partial(told, micro_batch_tokens=tokens) for tokens in (1, 20, 100_000)}
CASES |= {"told padded": functools.partial(told, micro_batch_tokens=60, packing=False)}
CASES |= {"told of a model": told_of_a_model}
CASES |= {
    f"asked {tokens}": functools.partial(asked_of_the_reference, micro_batch_tokens=tokens)
    for tokens in (1, 40)
}


# ------------------------------------------------------------------------------------------------- references


@pytest.mark.parametrize("reference", ["previous", "behaviour", "initial", "every: 1", "every: 3"])
def test_the_log_ratio_of_a_synchronous_first_mini_batch_is_exactly_zero(tmp_path, policy, reference):
    given = settings(tmp_path, reference, micro_batch_tokens=80)
    policy.reference.load(given.model_path) if reference == "initial" else None
    metrics = train_step(policy, [make_group(i, version=0) for i in range(5)], given)
    assert metrics["policy/log_ratio_rms"] == 0.0 and metrics["policy/kl_ref"] == 0.0
    assert (
        metrics["gvpo/residual_var"] == pytest.approx(metrics["gvpo/reward_var"]) and metrics["grad_norm"] > 0
    )


@pytest.mark.parametrize("reference", ["previous", "behaviour"])
def test_later_mini_batches_are_measured_against_the_start_of_the_step(tmp_path, policy, reference):
    given = settings(tmp_path, reference, num_mini_batches=2, micro_batch_tokens=1)
    rows = [make_group(i) for i in range(4)]
    start = policy.logprobs(rows[2:]).detach()
    other = load(given.model_path, given)
    train_step(other, rows[:2], settings(tmp_path, reference))  # the first half, alone
    expected = (other.logprobs(rows[2:]).detach() - start).square().sum()
    metrics = train_step(policy, rows, given)
    assert (
        metrics["policy/log_ratio_rms"] == pytest.approx(math.sqrt(expected / 12), rel=1e-4) and expected > 0
    )


def test_a_fresh_completion_counts_its_ratio_to_the_start_of_the_step_whatever_the_reference(
    tmp_path,
):
    make_model(tmp_path / "model")
    rows, share = [make_group(i) for i in range(4)], {}
    for reference in ("behaviour", "previous", "initial", "every: 3"):
        given = settings(tmp_path, reference, num_mini_batches=2)
        policy = load(given.model_path, given)
        policy.reference.load(given.model_path) if reference == "initial" else None
        share[reference] = train_step(policy, rows, given)["gvpo/effective_share"]
    assert share["behaviour"] < 1 and set(share.values()) == {share["behaviour"]}


def test_previous_is_the_start_of_the_step_whatever_the_age_of_the_data(tmp_path, policy):
    policy.step = 9
    rows = [make_group(1, version=0), make_group(2, version=None), make_group(3, version=9)]
    assert (
        train_step(policy, rows, settings(tmp_path, "previous", num_steps=20))["policy/log_ratio_rms"] == 0.0
    )


def test_behaviour_is_the_engine_for_old_completions_the_policy_for_fresh_and_the_first_for_foreign_ones(
    tmp_path, policy
):
    first = load(tmp_path / "model", settings(tmp_path))
    train_step(policy, [make_group(9)], settings(tmp_path))
    assert not policy.reference.exists  # a second copy of the weights, which only foreign data asks for
    policy.step = 3
    row = make_group(5, (1.0, 0.0, 0.5, 0.25), version_min=[3, 2, 1, None], version_max=[3, 3, 1, None])
    row["sampling_logprobs"][3] = None
    own, foreign = policy.logprobs([row]).detach(), first.logprobs([row]).detach()[3]
    references = [own[0], *(sum(values) for values in row["sampling_logprobs"][1:3]), foreign]
    ratios = [float(a - b) for a, b in zip(own, references, strict=True)]
    assert ratios[0] == 0 != ratios[3]
    metrics = train_step(policy, [row], settings(tmp_path, "behaviour", num_steps=9))
    assert metrics["policy/log_ratio_rms"] == pytest.approx(
        math.sqrt(sum(ratio**2 for ratio in ratios) / 4), rel=1e-6
    )
    assert metrics["policy/kl_ref"] == pytest.approx(-sum(ratios) / 4, rel=1e-6)
    assert (
        metrics["staleness/max"] == 2
        and metrics["staleness/mean"] == pytest.approx((0 + 1 + 2) / 3)
        and policy.reference.exists
    )


def test_initial_stays_where_it_was(tmp_path, policy):
    given = settings(tmp_path, "initial", num_steps=2)
    policy.reference.load(given.model_path)
    row = make_group(1)
    start = policy.logprobs([row]).detach()
    train_step(policy, [row], given)
    expected = (policy.logprobs([row]).detach() - start).square().mean().sqrt()
    assert train_step(policy, [row], given)["policy/log_ratio_rms"] == pytest.approx(
        float(expected), rel=1e-9
    )


def test_every_n_refreshes_every_n_steps_also_across_a_resume(tmp_path, policy):
    given = settings(tmp_path, "every: 2", num_steps=9)
    at_zero = []
    for step in range(1, 7):
        at_zero.append(train_step(policy, [make_group(step)], given)["policy/log_ratio_rms"] == 0.0)
        if step == 3:  # the reference is one update behind
            policy.save(tmp_path / "step-3")
            policy = load(tmp_path / "step-3", given)
    assert at_zero == [True, False, True, False, True, False]


@pytest.mark.parametrize("reference", ["initial", "every: 3"])
def test_a_reference_models_logprobs_follow_a_completion_while_that_model_is_current(
    tmp_path, policy, reference
):
    given = settings(tmp_path, reference, num_steps=9, num_mini_batches=2, micro_batch_tokens=60)
    if reference == "initial":
        policy.reference.load(given.model_path)
    first = [make_group(1, (1.0, None, 0.5, 0.0)), make_group(2)]
    train_step(policy, first, given)
    assert [value is None for value in first[0]["reference_logprobs"]] == [False, True, False, False]
    with policy.reference.computes():
        want = sum(float(tokens.double().sum()) for tokens in policy.token_logprobs([make_group(2)]))
    assert sum(first[1]["reference_logprobs"]) == pytest.approx(want, rel=1e-6)
    passes = []
    usual = policy.token_logprobs
    policy.token_logprobs = lambda rows, reference=False: passes.append(len(rows)) or usual(rows, reference)
    assert first[0]["reference_versions"] == [0, None, 0, 0]
    again = [dict(row) for row in first]
    other = load(given.model_path, given)
    if reference == "initial":
        other.reference.load(given.model_path)
    metrics = train_step(policy, again, given)
    assert passes == []  # a completion that comes again costs nothing
    train_step(other, [make_group(1, (1.0, None, 0.5, 0.0)), make_group(2)], given)
    want_metrics = train_step(other, [make_group(1, (1.0, None, 0.5, 0.0)), make_group(2)], given)
    assert metrics == want_metrics and same(weights(policy), weights(other))
    train_step(policy, [make_group(3), *again], given)
    assert passes == [1]  # that of the group that is new
    if reference == "every: 3":
        train_step(policy, again, given)  # by now the reference is another one
        assert len(passes) > 1 and again[0]["reference_logprobs"] != first[0]["reference_logprobs"]


def test_equal_rewards_weigh_nothing_at_the_reference_and_pull_towards_it_elsewhere(tmp_path, policy):
    before = weights(policy)
    given = settings(tmp_path, "behaviour", num_steps=9)
    metrics = train_step(policy, [make_group(1, (1.0, 1.0, 1.0))], given)
    assert metrics["grad_norm"] == 0.0 and metrics["gvpo/num_groups"] == 1 and same(weights(policy), before)
    old = make_group(1, (1.0, 1.0, 1.0), version=0)  # now one version old: the engine's log-probs
    metrics = train_step(policy, [old], given)
    # alone they say not where to go
    assert metrics["grad_norm"] > 0 and metrics["gvpo/damping"] == 0 and same(weights(policy), before)
    free = dataclasses.replace(given, loss=loss_config(beta=0.1, damped=False))
    metrics = train_step(policy, [old], free)
    assert metrics["grad_norm"] > 0 and not same(weights(policy), before) and metrics["gvpo/reward_var"] == 0


# ----------------------------------------------------------------------------- what the objective makes of it


def test_a_kl_term_asks_the_reference_model_once_for_every_token(tmp_path, policy):
    given = with_loss(
        settings(tmp_path, num_steps=9), objective="grpo", kl_coefficient=0.1, reference="every: 9"
    )
    train_step(policy, [make_group(1, version=None)], given)
    passes = []
    usual = policy.token_logprobs
    policy.token_logprobs = lambda rows, reference=False: passes.append(reference) or usual(rows, reference)
    metrics = train_step(policy, [make_group(1, version=None)], given)
    assert passes == [True] and metrics["policy/kl_ref"] != 0


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo"])
def test_clipping_is_counted_and_what_gvpo_reports_is_there_for_every_objective(tmp_path, policy, objective):
    rows = [make_group(1, version=0)]
    policy.step = 1  # by log-probs that the engine gave: ratios far from 1
    metrics = train_step(policy, rows, with_loss(settings(tmp_path, num_steps=9), objective=objective))
    assert (
        0 < metrics["policy/clipped"] < 1
        and metrics["gvpo/residual_var"] > 0
        and metrics["policy/kl_ref"] != 0
    )


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo"])
def test_old_data_can_be_taken_for_new(tmp_path, objective):
    make_model(tmp_path / "model")
    given = with_loss(settings(tmp_path, num_steps=9), objective=objective, old_policy="previous")
    as_new, new, corrected = (load(given.model_path, given) for _ in range(3))
    for policy in (as_new, new, corrected):
        policy.step = 1
    metrics = train_step(as_new, [make_group(i, version=0) for i in range(3)], given)
    assert metrics["policy/kl_ref"] != 0  # what gvpo reports is of the policy that sampled
    train_step(new, [make_group(i, version=1) for i in range(3)], given)
    train_step(corrected, [make_group(i, version=0) for i in range(3)], with_loss(given, objective=objective))
    assert same(weights(as_new), weights(new)) and not same(weights(as_new), weights(corrected))


def test_a_group_that_is_larger_than_a_pass_costs_one_pass_more_for_each_part(tmp_path, policy):
    given = settings(tmp_path, micro_batch_tokens=20)
    row = make_group(1, tuple(float(i % 2) for i in range(8)))
    passes = {True: 0, False: 0}

    def count(*_: Any) -> None:
        passes[torch.is_grad_enabled()] += 1

    policy._module.register_forward_pre_hook(count)
    ((*parts,),) = groups.cut_into_passes([[row]], 20)
    num_parts = len(parts)
    train_step(policy, [row], given)
    assert num_parts > 1 and passes == {True: num_parts, False: num_parts}
    train_step(
        policy,
        [make_group(2, version=1)],
        dataclasses.replace(given, learner=LearnerConfig(backend="ddp", num_mini_batches=1)),
    )
    assert passes == {True: num_parts + 1, False: num_parts}  # a group that fits: one pass


# ------------------------------------------------------------------- what the reference says of completions


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", ["told 1", "told 20", "told 100000", "told padded"])
def test_the_variance_of_residuals_by_staleness_is_the_mean_of_their_squares_however_they_are_spread(
    on_ranks, tmp_path, world_size, case
):
    # by (group, completion) of aged_batch, at version 7; what has no reward or is in a group without another
    # one is in none
    members = {
        "0": [(1, 0), (1, 1), (1, 2), (3, 3)],
        "1": [(3, 2), (6, 0)],
        "4": [(2, 0), (2, 1), (3, 4)],
        "8": [(3, 0)],
        "external": [(4, 0), (4, 1), (4, 2), (4, 3), (6, 1)],
    }
    by_hand = residuals_by_hand(make_model(tmp_path / "model"))
    want = {
        f"gvpo/residual_var/{age}": sum(by_hand[g][i] ** 2 for g, i in which) / len(which)
        for age, which in members.items()
    }
    alone = on_ranks(1, "told 1")[0]["metrics"]
    for result in on_ranks(world_size, case):
        assert result["learned"] == []  # there is no reference model to tell of
        got = {
            name: value for name, value in result["metrics"].items() if name.startswith("gvpo/residual_var/")
        }
        assert got == pytest.approx(want, rel=1e-5)
        if case == "told 1":  # a completion a pass: the same passes on every number of ranks
            assert got == pytest.approx({name: alone[name] for name in got}, rel=1e-9)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", ["asked 1", "asked 40"])
def test_a_completion_that_comes_with_what_the_reference_said_costs_no_pass_of_it(on_ranks, world_size, case):
    # of groups 0 and 1 the completions 0, 2 and 4 are known (3 has no reward): 1 is asked; of group 2 none;
    # of group 3 both
    results = on_ranks(world_size, case)
    first, second, _, whole = replayed_batch({})
    want = sorted([first["completion_ids"][1], second["completion_ids"][1], *whole["completion_ids"]])
    assert sorted(ids for result in results for micro in result["some"]["asked"] for ids in micro) == want
    assert sum(len(micro) for result in results for micro in result["none"]["asked"]) == 14
    assert len({len(result["some"]["asked"]) for result in results}) == 1  # every rank makes as many passes
    for result in results:
        some, none, again = (result[name] for name in ("some", "none", "some again"))
        assert some["metrics"]["policy/log_ratio_rms"] > 0
        assert some["metrics"]["loss"] == pytest.approx(none["metrics"]["loss"], rel=1e-6)
        assert again["metrics"] == some["metrics"] and same(again["weights"], some["weights"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_rank_tells_once_a_step_what_the_reference_model_knows_of_its_own_groups(on_ranks, world_size):
    results = on_ranks(world_size, "told of a model")
    assert [entry[0] for entry in results[0]] == [
        "started",
        "published",
        "learned",
        "published",
        "learned",
        "published",
        "saved",
    ]
    assert all([entry[0] for entry in told] == ["learned", "learned"] for told in results[1:])
    first, second = zip(
        *([entry[1:] for entry in told if entry[0] == "learned"] for told in results), strict=True
    )
    alone = [entry[1:] for entry in on_ranks(1, "told of a model")[0] if entry[0] == "learned"]
    wanted = [
        {row["group_id"]: row["rewards"] for row in aged_batch() if groups.trainable(row)},
        {31: [1.0, 0.0, 0.5]},
    ]
    for by_rank, want, one in zip((first, second), wanted, alone, strict=True):
        # each group by one rank
        assert sorted(i for _, references in by_rank for i in references) == sorted(want)
        for version, references in by_rank:
            assert version == 0
            for i, values in references.items():
                assert [x is None for x in values] == [reward is None for reward in want[i]]
                assert values == [None if x is None else pytest.approx(x, rel=1e-6) for x in one[1][i]]
    assert sorted(len(references) for _, references in second) == [0, 1][2 - world_size :]


def another_reference(folder: Path, **options: Any) -> tuple[Settings, Policy]:
    """The reference is a model of its own, so that no log-ratio is 0."""
    given = settings(folder, "initial", num_steps=9, **options)
    policy = load(make_model(folder / "model"), given)
    policy.reference.load(make_model(folder / "reference", seed=1))
    return given, policy


@pytest.mark.parametrize(
    "options", [{}, {"micro_batch_tokens": 20}, {"packing": False, "micro_batch_tokens": 60}], ids=str
)
def test_the_reference_model_by_hand_and_none_where_there_is_no_reward_or_no_token(tmp_path, options):
    given, policy = another_reference(tmp_path, **options)
    row = make_group(1, (1.0, None, 0.0, 0.5, 0.25), version=0)
    row["completion_ids"][3] = row["sampling_logprobs"][3] = []
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        for name in ("model", "reference")
    ]

    def logprob(model: Any, i: int) -> float:
        prompt, ids = row["prompt_ids"], row["completion_ids"][i]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return float(torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).double().sum())

    log_ratios = {i: logprob(models[0], i) - logprob(models[1], i) for i in (0, 2, 4)}
    mean = sum(log_ratios.values()) / 3
    want = [(row["rewards"][i] - 1.25 / 3) - 0.1 * (log_ratios[i] - mean) for i in (0, 2, 4)]
    references = [logprob(models[1], i) for i in (0, 2, 4)]
    metrics = train_step(policy, [row], given)
    assert [row["reference_logprobs"][i] for i in (0, 2, 4)] == pytest.approx(references, rel=1e-6)
    assert row["reference_logprobs"][1] is row["reference_logprobs"][3] is None and row[
        "reference_versions"
    ] == [0, None, 0, None, 0]
    # 1/(m - 1), in each group
    assert metrics["gvpo/residual_var"] == pytest.approx(sum(x * x for x in want) / 2, rel=1e-5)
    # 1/number of completions
    assert metrics["gvpo/residual_var/0"] == pytest.approx(sum(x * x for x in want) / 3, rel=1e-5)
    assert [name for name in metrics if name.startswith("gvpo/residual_var/")] == ["gvpo/residual_var/0"]
    assert max(abs(0.1 * (x - mean)) for x in log_ratios.values()) > 0.1


def tokens_asked_of_the_reference(policy: Policy) -> list[int]:
    """Filled by the passes to come: lengths of the completions."""
    asked: list[int] = []
    usual = policy.token_logprobs

    def count(rows: Any, reference: bool = False) -> Any:
        asked.extend(len(ids) for row in rows for ids in row["completion_ids"] if reference)
        return usual(rows, reference)

    policy.token_logprobs = count
    return asked


@pytest.mark.parametrize(
    "options", [{}, {"micro_batch_tokens": 1}, {"packing": False, "micro_batch_tokens": 60}], ids=str
)
def test_what_an_older_reference_said_is_asked_anew_and_what_the_current_one_said_is_taken(tmp_path, options):
    losses, asked = {}, {}
    for name in ("all computed", "older and unknown ones computed", "one that is wrong"):
        given, policy = another_reference(tmp_path / name, **options)
        policy.reference.version = 3
        row, other = make_group(1, (1.0, 0.0, 0.5, 0.25, None), version=0), make_group(2)
        if name != "all computed":
            right = [tokens.double().sum().item() for tokens in policy.token_logprobs([row], reference=True)]
            if name == "one that is wrong":
                right[0] -= 1
            row["sources"] = ["replay"] * 4 + ["policy"]
            row["reference_logprobs"], row["reference_versions"] = (
                [right[0], -7.0, None, right[3], None],
                [3, 2, None, 3, None],
            )
        asked[name] = tokens_asked_of_the_reference(policy)
        losses[name] = train_step(policy, [row, other], given)["loss"]
        assert row["reference_versions"] == [3, 3, 3, 3, None] and row["reference_logprobs"][1] != -7.0
    lengths, others = (
        [len(ids) for ids in row["completion_ids"]],
        [len(ids) for ids in other["completion_ids"]],
    )
    assert sum(asked["all computed"]) == sum(lengths[:4]) + sum(others)
    assert sum(asked["older and unknown ones computed"]) == lengths[1] + lengths[2] + sum(others)
    assert losses["older and unknown ones computed"] == pytest.approx(losses["all computed"], rel=1e-6)
    assert abs(losses["one that is wrong"] / losses["all computed"] - 1) > 1e-3  # it is taken as it came


@pytest.mark.parametrize("values", ["absent", None, [None] * 3], ids=str)
def test_columns_without_a_reference_are_as_none_at_all(tmp_path, values):
    given = settings(tmp_path, "initial")
    policy = load(make_model(tmp_path / "model"), given)
    policy.reference.load(given.model_path)
    columns = {} if values == "absent" else dict.fromkeys(groups.REFERENCE_COLUMNS, values)
    row = make_group(1, (1.0, None, 0.0), **columns)
    assert train_step(policy, [row], given)["policy/log_ratio_rms"] == 0
    assert [value is None for value in row["reference_logprobs"]] == [False, True, False]
    assert row["reference_versions"] == [0, None, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("version", [0, 3])
def test_engine_logprobs_that_are_not_numbers_stop_the_step_and_name_the_group(
    tmp_path, policy, value, version
):
    row = make_group(17, version=version)
    row["sampling_logprobs"][1][0] = value
    policy.step, before = 3, weights(policy)
    with pytest.raises(groups.GroupError, match=rf"group 17: sampling_logprobs\[1\] has {value} for token 0"):
        train_step(policy, [make_group(1), row], settings(tmp_path, num_steps=9))
    assert same(weights(policy), before)


# -------------------------------------------------------------------------------------------- one pass ahead


def test_the_next_pass_is_laid_out_while_one_computes() -> None:
    began = {number: threading.Event() for number in range(3)}

    def work(number: int) -> int:
        began[number].set()
        return 10 * number

    seen = []
    for number, result in one_ahead(work, range(3)):
        # only a thread sets it: the consumer is here
        assert all(began[later].wait(60) for later in range(number, min(3, number + 2)))
        seen.append((number, result))
    assert seen == [(0, 0), (1, 10), (2, 20)] and list(one_ahead(work, [])) == []


def test_what_fails_in_laying_out_a_pass_is_raised_where_that_pass_is_due() -> None:
    passes = one_ahead(lambda number: 1 // number, [1, 0, 1])
    assert next(passes) == (1, 1)
    with pytest.raises(ZeroDivisionError):
        next(passes)


def test_parts_of_a_large_group_share_a_pass_with_whole_groups_and_come_first(tmp_path, policy):
    given = settings(tmp_path, micro_batch_tokens=40)
    large, small = make_group(1, tuple(float(i % 2) for i in range(12))), make_group(2, (1.0, 0.0))
    plan = plan_passes(policy, [[small, large]], 40)
    assert any(len(parts) == 2 and parts[0].row == 1 and parts[1].row == 0 for parts in plan.parts)
    assert {part.row for parts in plan.before for part in parts} == {1}
    whole = load(given.model_path, given)
    want = train_step(whole, [small, large], settings(tmp_path, micro_batch_tokens=10_000))
    got = train_step(policy, [small, large], given)
    assert got == pytest.approx(want, rel=1e-5, abs=1e-7)
    assert difference(weights(policy), weights(whole)) < 1e-5


# ----------------------------------------------------------------------- engines' log-probs and the learner's


@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 10_000])
def test_the_mismatch_is_that_of_the_current_policys_tokens_at_the_weights_that_sampled_them(
    tmp_path, policy, micro_batch_tokens
):
    given = settings(tmp_path, num_steps=9, num_mini_batches=2, micro_batch_tokens=micro_batch_tokens)
    policy.step = 3
    # the last is in the second mini-batch, which an update precedes
    rows = [
        make_group(1, version=3),
        make_group(2, version=2),
        make_group(3, version=None),
        make_group(4, version=3),
    ]
    own = [rows[0], rows[3]]
    learner = torch.cat(policy.token_logprobs(own)).double()
    noise = torch.linspace(-0.25, 0.5, len(learner), dtype=torch.float64)
    engine = iter((learner - noise).tolist())
    for row in own:
        row["sampling_logprobs"] = [[next(engine) for _ in ids] for ids in row["completion_ids"]]
    metrics = train_step(policy, rows, given)
    assert metrics["policy/mismatch_mean"] == pytest.approx(float(noise.mean()), abs=1e-6)
    assert metrics["policy/mismatch_rms"] == pytest.approx(float(noise.square().mean().sqrt()), abs=1e-6)


def test_there_is_no_mismatch_where_the_current_policy_wrote_nothing(tmp_path, policy):
    policy.step = 3
    metrics = train_step(policy, [make_group(1, version=2)], settings(tmp_path, num_steps=9))
    assert not any(name.startswith("policy/mismatch") for name in metrics)
