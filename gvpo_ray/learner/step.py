"""One step of training: references → mini-batches: forward, loss, backward, update. `train_step` is the
algorithm.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gvpo_ray import groups
from gvpo_ray.config.learner import CheckpointConfig, LearnerConfig
from gvpo_ray.config.loss import LossConfig
from gvpo_ray.groups import Row
from gvpo_ray.learner.objective import Objective, pulls_of
from gvpo_ray.learner.passes import NOTHING, plan_passes, shares_of
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.references import Fixed, pass_reference_model, reference_passes
from gvpo_ray.losses.stale_data import damping, steered
from gvpo_ray.observe.metrics import batch_metrics, mean


class NonFiniteGradient(RuntimeError):
    """The gradient is not a number, time and again: the first cause is in those groups or in the learning
    rate.
    """


@dataclass
class Settings:
    """The parts of the config that the learner needs."""

    run_dir: str
    num_steps: int
    """Of the learning rate's schedule."""
    last_step: int
    """After which there is nothing left to train: it gets a checkpoint."""
    loss: LossConfig
    learner: LearnerConfig
    checkpoint: CheckpointConfig
    model_path: str
    parity_every: int
    reports_residuals: bool = False
    """Whether somebody replays completions and chooses them by what a step learned of them."""


def train_step(policy: Policy, batch: Sequence[Row], settings: Settings) -> dict[str, Any]:
    """One step of the objective (GVPO: Algorithm 1): fix the references, then one update per mini-batch.
    Every rank has the whole batch.

    The rows that this rank trained get `residuals`, and where the reference is a model of its own
    `reference_logprobs`: per completion, None for one that was left out.
    """
    version, loss = policy.step, settings.loss
    every = loss.reference_every
    if every and (version % every == 0 or not policy.has_reference):
        policy.refresh_reference()
    pairs = [(row, trained) for row in batch if (trained := groups.trainable(row)) is not None]
    if loss.drop_equal_rewards:
        pairs = [(row, trained) for row, trained in pairs if len(set(trained["rewards"])) > 1]
    rows = [trained for _, trained in pairs]
    mini_batches = [part for part in _cut(rows, settings.learner.num_mini_batches) if part]
    if loss.asks_reference_model_for_sums:
        for mini_batch in mini_batches:
            pass_reference_model(policy, mini_batch, settings.learner.micro_batch_tokens)
    plans = [
        plan_passes(policy, shares_of(policy, mini_batch), settings.learner.micro_batch_tokens)
        for mini_batch in mini_batches
    ]
    references = reference_passes(policy, mini_batches, plans, loss, settings.model_path)
    beta = (
        policy.beta
        if loss.steers_beta and policy.beta is not None
        else loss.beta_at(version, settings.num_steps)
    )
    objective = Objective(loss, beta, version)
    nothing: dict[str, torch.Tensor] = objective(
        torch.zeros(0, device=policy.device), Fixed.of_nothing(policy), [], num_groups=1
    )[1]
    sums = dict.fromkeys(nothing, 0.0)
    norms, dampings, num_skipped = [], [], 0
    learning_rate = _learning_rate(settings.learner, version, settings.num_steps)
    for mini_batch, plan, fixed in zip(mini_batches, plans, references, strict=True):
        pulls, parts_sums = pulls_of(policy, plan, fixed, objective, len(mini_batch))
        added = [*parts_sums]
        for i, micro in enumerate(plan.passes):
            is_last = i == len(plan.passes) - 1
            logprobs, _ = policy.forward(micro or [NOTHING], is_last)
            # this rank has fewer passes than another: it takes part in the collectives, and adds nothing
            if not micro:
                value = logprobs.sum() * 0
            elif i in pulls:  # a part of a group
                value = (pulls[i] * logprobs).sum()
            else:
                value, stats = objective(logprobs, fixed[i], micro, num_groups=len(mini_batch))
                added.append(stats)
            policy.backward(value, is_last)
        of_update = _sum_over_ranks(
            {name: value + sum(stats[name] for stats in added) for name, value in nothing.items()}, policy
        )
        damped = damping(of_update) if loss.is_damped else 1.0
        norm = policy.update(learning_rate * damped)
        if norm < float("inf"):
            norms.append(norm)
            dampings.append(damped)
            sums = {name: value + of_update[name] for name, value in sums.items()}
            continue
        num_skipped += 1
        for row in mini_batch:  # which may not be numbers, and were not trained on
            objective.residuals.pop(row["group_id"], None)
        if policy.num_skipped > settings.learner.max_skipped_updates:
            raise NonFiniteGradient(
                f"step {version + 1}: the gradient's norm is {norm}, for the {policy.num_skipped}. time in a "
                f"row (groups {[row['group_id'] for row in mini_batch]})"
            )
    policy.step += 1
    learned_of_all = objective.finish(sums)
    if loss.steers_beta:
        policy.beta = steered(
            beta, learned_of_all["gvpo/reward_var"], learned_of_all["gvpo/implicit_reward_var"]
        )
    for row, trained in pairs:
        which = groups.trainable_completions(row)
        learned = {"residuals": objective.residuals.get(row["group_id"])}
        if loss.asks_reference_model_for_sums:
            learned |= {name: trained.get(name) for name in groups.REFERENCE_COLUMNS}
        for name, values in learned.items():
            if values is not None and row["group_id"] in objective.residuals:
                known = dict(zip(which, values, strict=True))
                row[name] = [known.get(i) for i in range(len(row["rewards"]))]
    return {
        **batch_metrics(batch, version),
        **learned_of_all,
        "tokens/trained": float(sum(len(ids) for row in rows for ids in row["completion_ids"])),
        "grad_norm": mean(norms),
        "learning_rate": learning_rate,
        "updates": float(policy.num_updates),
        "updates/skipped": float(num_skipped),
        "gvpo/beta": objective.beta,
        "gvpo/damping": mean(dampings),
    }


def _cut(rows: Sequence[Row], num_parts: int) -> list[list[Row]]:
    """Near-equal runs in order of arrival."""
    bounds = [round(i * len(rows) / num_parts) for i in range(num_parts + 1)]
    return [list(rows[a:b]) for a, b in itertools.pairwise(bounds)]


def _learning_rate(config: LearnerConfig, version: int, num_steps: int) -> float:
    """Of the step that starts from `version`: linear warm-up, then the schedule down to zero after the last
    step.
    """
    if version < config.warmup_steps:
        return config.learning_rate * (version + 1) / (config.warmup_steps + 1)
    progress = (version - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi)))),
    }
    return config.learning_rate * factor[config.schedule]


def _sum_over_ranks(sums: dict[str, torch.Tensor], policy: Policy) -> dict[str, float]:
    """One reduction of scalars, before each update."""
    values = torch.stack([value.double() for value in sums.values()])
    if policy.data_size > 1:
        dist.all_reduce(values)
    return dict(zip(sums, values.tolist(), strict=True))
