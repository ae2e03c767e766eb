"""`train_step` is one step of training: Algorithm 1 of the GVPO paper on one page."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gvpo_ray import groups
from gvpo_ray.config.learner import CheckpointConfig, LearnerConfig
from gvpo_ray.config.loss import LossConfig, LossOptions
from gvpo_ray.errors import GvpoError
from gvpo_ray.groups import Row
from gvpo_ray.learner.balance import Balance, balance_of
from gvpo_ray.learner.examples import Examples
from gvpo_ray.learner.logprobs import trained_tokens
from gvpo_ray.learner.microbatches import NOTHING, Plan, one_ahead, plan_passes, rows_of_ranks
from gvpo_ray.learner.objective import Objective, gradient_weights_of_parts
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.references import (
    ReferenceLogprobs,
    attach_references,
    check_given_references,
    check_sampling_logprobs,
    measure_passes,
    score_with_reference,
)
from gvpo_ray.learner.routing import Load
from gvpo_ray.losses.batch import Total
from gvpo_ray.losses.stale_data import adapted_beta, damping
from gvpo_ray.observe.metrics import batch_metrics, mean


class NonFiniteGradient(GvpoError, RuntimeError):
    """The gradient was not finite too often in a row; suspect the named groups, or the learning rate."""


@dataclass
class Settings:
    """Settings are the parts of the config that the learner needs."""

    run_dir: str
    num_steps: int
    """The length of the learning rate's schedule, in steps."""
    last_step: int
    """The step after which nothing is left to train; it gets a checkpoint."""
    loss: LossConfig
    learner: LearnerConfig
    checkpoint: CheckpointConfig
    model_path: str
    parity_every: int
    seed: int = 0
    probes: Sequence[list[int]] = ()
    """Token ids of the sequences on which engines are compared with the learner before the first step."""
    reports_references: bool = False
    """Whether completions are replayed, so that the buffer stores the reference model's log-probs of them."""


def train_step(
    policy: Policy, batch: Sequence[dict[str, Any]], settings: Settings, examples: Examples | None = None
) -> dict[str, Any]:
    """Train one step of GVPO (Algorithm 1), or of another objective. Every rank.

    Args:
        policy: this rank's part of the policy, updated in place.
        batch: the groups of all ranks. Where the reference is a model of its own, the rows that this rank
            trains get `reference_logprobs`, with None for a completion that is not trained.
        settings: the parts of the config that the learner needs.
        examples: is shown what this rank trains.

    Returns:
        The step's metrics, the same on every rank.

    Raises:
        GroupError: the log-probs of an engine are not finite numbers.
        NonFiniteGradient: the gradient was not finite too often in a row.
    """
    check_sampling_logprobs(batch)
    refresh_reference(policy, settings.loss)
    updates = plan_updates(policy, batch, settings)
    step = Step(policy, settings, examples)
    loads = policy.aux_loss_coefficient > 0
    for update in updates:
        passes = one_ahead(lambda forward: policy.lay_out(forward.rows, loads), step.forward_passes(update))
        for forward, laid_out in passes:
            logprobs = policy.forward(laid_out, forward.is_last)
            policy.backward(step.loss_of(forward, logprobs, laid_out[0].get("load")), forward.is_last)
        step.apply(update)
    return step.finish(batch, updates)


def refresh_reference(policy: Policy, loss: LossOptions) -> None:
    """Copy the policy to the reference model in the steps where `loss.reference: every N` asks for it."""
    every = loss.reference_every
    if every and (policy.step % every == 0 or not policy.reference.exists):
        policy.reference.refresh(policy.step)


@dataclass
class Update:
    """An Update is one optimizer update: a mini-batch and this rank's passes through it."""

    rows: Sequence[Row]
    """The groups of the mini-batch, of all ranks."""
    plan: Plan
    """This rank's passes."""
    measured: list[ReferenceLogprobs]
    """The sampler's and the reference's log-probs of each pass."""

    @property
    def total(self) -> Total:
        """Return what the update holds, on all ranks."""
        tokens = [len(places) for row in self.rows for places in trained_tokens(row)]
        return Total(len(self.rows), len(tokens), sum(tokens))


def plan_updates(policy: Policy, batch: Sequence[dict[str, Any]], settings: Settings) -> list[Update]:
    """Split the trainable groups into mini-batches and passes, and get what they are compared with."""
    loss, max_tokens = settings.loss, settings.learner.micro_batch_tokens
    trained = [row for row in (groups.trainable(row, loss.least) for row in batch) if row is not None]
    if not loss.trains_equal_rewards:
        trained = [row for row in trained if len(set(row["rewards"])) > 1]
    mini_batches = [part for part in _cut(trained, settings.learner.num_mini_batches) if part]
    if num := loss.num_weak_negatives:  # before the groups are dealt to ranks, whose number changes nothing
        mini_batches = [
            groups.with_weak_negatives(rows, num, settings.seed, policy.max_length) for rows in mini_batches
        ]
    dealt = [rows_of_ranks(policy, rows, max_tokens) for rows in mini_batches]
    if loss.reference_model is not None:
        check_given_references(trained)
    if loss.caches_reference:
        for ranks in dealt:
            score_with_reference(policy, ranks, max_tokens)
        attach_references(policy, batch, dealt)
    plans = [plan_passes(policy, ranks, max_tokens) for ranks in dealt]
    return [
        Update(rows, plan, measure_passes(policy, rows, plan, loss, settings.model_path, is_first=i == 0))
        for i, (rows, plan) in enumerate(zip(mini_batches, plans, strict=True))
    ]


@dataclass
class Forward:
    """A Forward is one forward pass with gradients."""

    rows: list[Row]
    """The groups of the pass: first parts of groups that are larger than a pass, then whole groups."""
    num_parts: int
    """The number of those parts."""
    measured: ReferenceLogprobs
    """The sampler's and the reference's log-probs of the same tokens."""
    total: Total
    """What the update holds, on all ranks."""
    is_last: bool
    """Whether this is the update's last pass."""
    gradient_weights: Tensor
    """d loss / d log-prob of the parts' tokens, which is known beforehand; as long as these are many."""


class Step:
    """A Step holds the objective, beta and learning rate of one step, and adds up its statistics."""

    def __init__(self, policy: Policy, settings: Settings, examples: Examples | None = None) -> None:
        loss = settings.loss
        adapted = policy.beta if loss.adapts_beta else None
        self._policy, self._settings, self._examples = policy, settings, examples
        beta = loss.start_beta if adapted is None else adapted
        self._objective = Objective(loss, beta, policy.step, policy.mismatch)
        self._learning_rate = learning_rate_at(settings.learner, policy.step, settings.num_steps)
        self._nothing = self._objective.of_nothing(policy.device)
        self._sums = dict.fromkeys(self._nothing, 0.0)
        self._sums_of_update: list[dict[str, Tensor]] = []
        self._norms: list[float] = []
        self._dampings: list[float] = []
        self._num_skipped = 0
        self._balance: Balance | None = None
        self._aux_losses: list[float] = []

    def forward_passes(self, update: Update) -> Iterator[Forward]:
        """Yield the passes of an update; before that, groups that are split have passes without gradients."""
        plan, total = update.plan, update.total
        weights, self._sums_of_update = gradient_weights_of_parts(
            self._policy, plan, update.measured, self._objective, total, self._examples
        )
        self._balance = balance_of(self._policy, plan)
        for i, (rows, parts) in enumerate(zip(plan.passes, plan.parts, strict=True)):
            yield Forward(
                rows=rows or [NOTHING],
                num_parts=sum(not plan.is_whole(part) for part in parts),
                measured=update.measured[i],
                total=total,
                is_last=i == len(plan.passes) - 1,
                gradient_weights=weights[i],
            )

    def loss_of(self, forward: Forward, logprobs: Tensor, load: Load | None = None) -> Tensor:
        """Return this pass's share of the update's loss, and keep its statistics.

        Args:
            forward: the pass.
            logprobs: [T] its token log-probs, with gradients.
            load: what the routers said in the pass, where there is an auxiliary loss.
        """
        if forward.rows == [NOTHING]:  # this rank has no groups left, and takes part in the collectives
            return logprobs.sum() * 0
        num = len(forward.gradient_weights)
        loss = (forward.gradient_weights * logprobs[:num]).sum()
        if whole := forward.rows[forward.num_parts :]:
            measured = forward.measured.between(num, len(logprobs))
            of_whole = logprobs[num:]
            share, sums = self._objective(of_whole, measured, whole, forward.total)
            if self._examples is not None:  # backends' hooks are on `logprobs`, which this does not reach
                (gradient,) = torch.autograd.grad(share, of_whole, retain_graph=True)
                self._examples.add(whole, of_whole, measured, gradient)
            self._sums_of_update.append(sums)
            loss = loss + share
        if self._balance is not None and load is not None:
            loss = loss + self._balance.share(load)
        return loss

    def apply(self, update: Update) -> None:
        """Make the optimizer update, damped where the options say so; skip a gradient that is not finite.

        Raises:
            NonFiniteGradient: more than `max_skipped_updates` in a row were skipped.
        """
        policy, settings = self._policy, self._settings
        sums = _sum_over_ranks(
            {
                name: value + sum(of_pass[name] for of_pass in self._sums_of_update)
                for name, value in self._nothing.items()
            },
            policy,
        )
        aux_loss = None if self._balance is None else self._balance.value(policy)
        factor = damping(sums) if settings.loss.is_damped else 1.0
        norm = policy.update(self._learning_rate * factor)
        if norm < float("inf"):
            self._norms.append(norm)
            self._dampings.append(factor)
            self._aux_losses += [] if aux_loss is None else [aux_loss]
            self._sums = {name: value + sums[name] for name, value in self._sums.items()}
            return
        self._num_skipped += 1
        if policy.num_skipped > settings.learner.max_skipped_updates:
            raise NonFiniteGradient(
                f"step {policy.step + 1}: the gradient's norm is {norm}, for the {policy.num_skipped}. time "
                f"in a row (groups {[row['group_id'] for row in update.rows]})"
            )

    def finish(self, batch: Sequence[Row], updates: Sequence[Update]) -> dict[str, Any]:
        """Count the step, adapt beta for the next one, and return the step's metrics."""
        policy, version, beta = self._policy, self._policy.step, self._objective.beta
        policy.step += 1
        statistics = self._objective.finish(self._sums)
        policy.mismatch = policy.mismatch.plus(self._sums)
        if self._settings.loss.adapts_beta:
            policy.beta = adapted_beta(
                beta, statistics["gvpo/reward_var"], statistics["gvpo/implicit_reward_var"]
            )
        return {
            **batch_metrics(batch, version, self._settings.loss.least),
            **statistics,
            "tokens/trained": float(sum(update.total.tokens for update in updates)),
            "grad_norm": mean(self._norms),
            "learning_rate": self._learning_rate,
            "updates": float(policy.num_updates),
            "updates/skipped": float(self._num_skipped),
            "gvpo/beta": beta,
            "gvpo/damping": mean(self._dampings),
            **({"experts/aux_loss": mean(self._aux_losses)} if self._aux_losses else {}),
        }


def _cut(rows: Sequence[dict[str, Any]], num_parts: int) -> list[list[dict[str, Any]]]:
    """Split the rows, in order of arrival, into parts of nearly equal numbers; a part may be empty."""
    bounds = [round(i * len(rows) / num_parts) for i in range(num_parts + 1)]
    return [list(rows[a:b]) for a, b in itertools.pairwise(bounds)]


def learning_rate_at(config: LearnerConfig, version: int, num_steps: int) -> float:
    """Return the learning rate of the step that starts from `version`: linear warm-up, then the schedule.

    The schedules `linear` and `cosine` reach zero after the last step.
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


def _sum_over_ranks(sums: dict[str, Tensor], policy: Policy) -> dict[str, float]:
    """Add up scalars over the ranks, in one reduction. Every rank."""
    values = torch.stack([value.double() for value in sums.values()])
    if policy.data_size > 1:
        dist.all_reduce(values)
        values /= policy.num_copies  # each of which has added the same
    return dict(zip(sums, values.tolist(), strict=True))
