"""The learner: what every Ray Train worker runs. A pure function of (initial weights, ordered log of groups).

    while the buffer orders it: batch(step) → reference → mini-batches: forward, GVPO loss, backward, update → publish

The algorithm is `train_step`; the loop around it waits for the buffer and is woken by it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
import torch.distributed as dist

from gvpo_ray import groups
from gvpo_ray.config.run import CheckpointConfig, LearnerConfig, LossConfig
from gvpo_ray.learner.checkpoints import prune_checkpoints
from gvpo_ray.learner.objective import Objective, pulls_of
from gvpo_ray.learner.passes import NOTHING, Fixed, pass_reference_model, plan_passes, reference_passes, shares_of
from gvpo_ray.learner.policy import Policy, Row
from gvpo_ray.losses.gvpo import damping
from gvpo_ray.observe.metrics import batch_metrics, mean

NUM_PROBES, PROBE_TOKENS = 4, 256
"""Sequences, and tokens of each, on which engines compare their log-probs with the learner's."""


class NonFiniteGradient(RuntimeError):
    """The gradient is not a number, time and again: the first cause is in those groups or in the learning rate."""


class Buffer(Protocol):
    """GroupBuffer as the learner sees it: calls that wait."""

    def learner_started(self, step: int) -> None: ...
    def order(self, step: int, saved: bool) -> str: ...
    def batch(self, step: int) -> pa.Table | None: ...
    def learned(self, version: int, references: dict[int, list[float | None]], residuals: dict[int, list[float | None]]) -> None: ...
    def published(self, version: int, weights: Any, metrics: dict[str, Any] | None) -> None: ...
    def saved(self, step: int) -> None: ...


class Publisher(Protocol):
    """The learner's end of weights.py."""

    def publish(self, version: int, named_tensors: Any) -> dict[str, Any] | None: ...


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


def learn(
    policy: Policy,
    buffer: Buffer,
    publisher: Publisher,
    settings: Settings,
    on_checkpoint: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> None:
    """Train until the buffer says stop.

    Waits for the buffer's orders (woken by the driver's allow and save) and batches (woken by finished groups). Rank 0 talks back for all,
    but for what was learned of single completions: that each rank tells of its own groups. `on_checkpoint(metrics)` is called on every rank
    after each checkpoint that was due.
    """
    if policy.rank == 0:
        buffer.learner_started(policy.step)
    if settings.loss.reference == "initial" and not policy.has_reference:
        policy.load_reference(settings.model_path)
    rows: list[Row] = []
    publish(policy, buffer, publisher, settings, rows, metrics=None)
    saved = policy.step > 0
    while (order := buffer.order(policy.step + 1, saved)) != "stop":
        if order == "save":
            save(policy, buffer, settings)
            saved = True
            continue
        asked = time.perf_counter()
        table = buffer.batch(policy.step + 1)
        if table is None:
            break
        got = time.perf_counter()
        rows = list(groups.rows(groups.validate(table, groups.LOGGED_COLUMNS)))
        metrics = train_step(policy, rows, settings)
        trained = time.perf_counter()
        if settings.reports_residuals:
            own = [row for row in rows if "residuals" in row]
            references = {row["group_id"]: row["reference_logprobs"] for row in own if settings.loss.asks_reference_model_for_sums}
            buffer.learned(policy.reference_version, references, {row["group_id"]: row["residuals"] for row in own})
        publish(policy, buffer, publisher, settings, rows, metrics, times={"wait": got - asked, "train": trained - got, "since": asked})
        saved = policy.step % settings.checkpoint.every == 0 or policy.step == settings.last_step
        if saved:
            save(policy, buffer, settings)
            on_checkpoint({"step": policy.step, **metrics})


def train_step(policy: Policy, batch: Sequence[Row], settings: Settings) -> dict[str, Any]:
    """One step of the objective (GVPO: Algorithm 1): fix the references, then one update per mini-batch. Every rank has the whole batch.

    The rows that this rank trained get `residuals`, and where the reference is a model of its own `reference_logprobs`: per completion, None
    for one that was left out.
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
    plans = [plan_passes(policy, shares_of(policy, mini_batch), settings.learner.micro_batch_tokens) for mini_batch in mini_batches]
    references = reference_passes(policy, mini_batches, plans, loss, settings.model_path)
    beta = policy.beta if loss.steers_beta and policy.beta is not None else loss.beta_at(version, settings.num_steps)
    objective = Objective(loss, beta, version)
    nothing: dict[str, torch.Tensor] = objective(torch.zeros(0, device=policy.device), Fixed.of_nothing(policy), [], num_groups=1)[1]
    sums = dict.fromkeys(nothing, 0.0)
    norms, dampings, num_skipped = [], [], 0
    learning_rate = _learning_rate(settings.learner, version, settings.num_steps)
    for mini_batch, plan, fixed in zip(mini_batches, plans, references, strict=True):
        pulls, parts_sums = pulls_of(policy, plan, fixed, objective, len(mini_batch))
        added = [*parts_sums]
        for i, micro in enumerate(plan.passes):
            is_last = i == len(plan.passes) - 1
            logprobs, _ = policy.forward(micro or [NOTHING], is_last)
            if not micro:  # this rank has fewer passes than another: it takes part in the collectives, and adds nothing
                value = logprobs.sum() * 0
            elif i in pulls:  # a part of a group
                value = (pulls[i] * logprobs).sum()
            else:
                value, stats = objective(logprobs, fixed[i], micro, num_groups=len(mini_batch))
                added.append(stats)
            policy.backward(value, is_last)
        of_update = _sum_over_ranks({name: value + sum(stats[name] for stats in added) for name, value in nothing.items()}, policy)
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
                f"step {version + 1}: the gradient's norm is {norm}, for the {policy.num_skipped}. time in a row "
                f"(groups {[row['group_id'] for row in mini_batch]})"
            )
    policy.step += 1
    learned_of_all = objective.finish(sums)
    if loss.steers_beta:
        policy.beta = steered(beta, learned_of_all["gvpo/reward_var"], learned_of_all["gvpo/implicit_reward_var"])
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


WANTED_SPREAD, STEER_BY, BETAS = 0.5, 0.1, (0.01, 1.0)


def steered(beta: float, reward_var: float, implicit_reward_var: float) -> float:
    """loss.beta: auto. beta of the next step, from what the last one saw.

    At the optimum of a generation of data beta D is R. While beta D varies half as much, the rewards still lead, and a policy that has gone
    elsewhere is called back. Where it varies more, most of what is learned is to go back, and beta falls; where less, as on fresh data,
    nothing holds the policy, and beta grows. By a tenth a step, so that it is slower than the data is old.
    """
    if reward_var <= 0 or implicit_reward_var <= 0:
        return beta  # nothing that it could be compared with
    missing = 1 - math.sqrt(implicit_reward_var / reward_var) / WANTED_SPREAD
    return min(BETAS[1], max(BETAS[0], beta * math.exp(STEER_BY * max(-2.0, missing))))


def _cut(rows: Sequence[Row], num_parts: int) -> list[list[Row]]:
    """Near-equal runs in order of arrival."""
    bounds = [round(i * len(rows) / num_parts) for i in range(num_parts + 1)]
    return [list(rows[a:b]) for a, b in itertools.pairwise(bounds)]


def _learning_rate(config: LearnerConfig, version: int, num_steps: int) -> float:
    """Of the step that starts from `version`: linear warm-up, then the schedule down to zero after the last step."""
    if version < config.warmup_steps:
        return config.learning_rate * (version + 1) / (config.warmup_steps + 1)
    progress = (version - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))}
    return config.learning_rate * factor[config.schedule]


def _sum_over_ranks(sums: dict[str, torch.Tensor], policy: Policy) -> dict[str, float]:
    """One reduction of scalars, before each update."""
    values = torch.stack([value.double() for value in sums.values()])
    if policy.world_size > 1:
        dist.all_reduce(values)
    return dict(zip(sums, values.tolist(), strict=True))


def publish(
    policy: Policy,
    buffer: Buffer,
    publisher: Publisher,
    settings: Settings,
    rows: Sequence[Row],
    metrics: dict[str, Any] | None,
    times: dict[str, float] | None = None,
) -> None:
    """Hand the weights of this step to the engines, now and then with log-probs to check them by, and its metrics to the driver."""
    started = time.perf_counter()
    first = metrics is None
    probe = probe_logprobs(policy, rows) if first or (settings.parity_every and policy.step % settings.parity_every == 0) else None
    weights = publisher.publish(policy.step, policy.named_tensors())
    if policy.rank != 0:
        return
    if metrics is not None and times is not None and weights is not None:
        now = time.perf_counter()
        metrics = {
            **metrics,
            "time/step": now - times["since"],
            "time/wait_for_groups": times["wait"],
            "time/train": times["train"],
            "time/publish": now - started,
            "weights/bytes": float(weights["bytes"]),
        }
    adapter = {} if policy.adapter is None else {"adapter": policy.adapter}
    buffer.published(policy.step, {**(weights or {}), **adapter, "probe": probe}, metrics)


def probe_logprobs(policy: Policy, rows: Sequence[Row]) -> dict[str, Any]:
    """A few sequences (of the last batch; before the first, random tokens) with the learner's log-probs of all but the first token."""
    if rows:
        sequences = [(row["prompt_ids"] + row["completion_ids"][0])[:PROBE_TOKENS] for row in rows[:NUM_PROBES]]
    else:
        generator = torch.Generator().manual_seed(0)
        length = min(32, policy.max_length - 1)
        sequences = [torch.randint(policy.vocab_size, (length,), generator=generator).tolist() for _ in range(NUM_PROBES)]
    probes = [{"prompt_ids": ids[:1], "completion_ids": [ids[1:]]} for ids in sequences if len(ids) > 1]
    return {
        "ids": [probe["prompt_ids"] + probe["completion_ids"][0] for probe in probes],
        "logprobs": [tokens.tolist() for tokens in policy.token_logprobs(probes)],
    }


def save(policy: Policy, buffer: Buffer, settings: Settings) -> None:
    """Write checkpoints/step-N and keep the last few."""
    policy.save(Path(settings.run_dir) / "checkpoints" / f"step-{policy.step}")
    if policy.rank == 0:
        prune_checkpoints(settings.run_dir, settings.checkpoint.keep)
        buffer.saved(policy.step)
