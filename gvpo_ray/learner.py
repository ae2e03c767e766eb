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
from gvpo_ray.config import CheckpointConfig, LearnerConfig, LossConfig
from gvpo_ray.losses.gvpo import finish, gvpo_loss
from gvpo_ray.metrics import batch_metrics, mean
from gvpo_ray.policy import Policy, Row, prune_checkpoints, sequence_sums

NUM_PROBES, PROBE_TOKENS = 4, 256
"""Sequences, and tokens of each, on which engines compare their log-probs with the learner's."""


class NonFiniteGradient(RuntimeError):
    """The gradient of a step is not a number: the first cause is in that step's batch or in the learning rate."""


class Buffer(Protocol):
    """GroupBuffer as the learner sees it: calls that wait."""

    def order(self, step: int, saved: bool) -> str: ...
    def batch(self, step: int) -> pa.Table | None: ...
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


def learn(
    policy: Policy,
    buffer: Buffer,
    publisher: Publisher,
    settings: Settings,
    on_checkpoint: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> None:
    """Train until the buffer says stop.

    Waits for the buffer's orders (woken by the driver's allow and save) and batches (woken by finished groups); only rank 0 talks
    back. `on_checkpoint(metrics)` is called on every rank after each checkpoint that was due.
    """
    if settings.loss.reference == "initial" and policy.reference is None:
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
        publish(policy, buffer, publisher, settings, rows, metrics, times={"wait": got - asked, "train": trained - got, "since": asked})
        saved = policy.step % settings.checkpoint.every == 0 or policy.step == settings.last_step
        if saved:
            save(policy, buffer, settings)
            on_checkpoint({"step": policy.step, **metrics})


def train_step(policy: Policy, batch: Sequence[Row], settings: Settings) -> dict[str, float]:
    """One GVPO step (Algorithm 1): fix the reference, then one update per mini-batch. Every rank has the whole batch."""
    version = policy.step
    every = settings.loss.reference_every
    if every and (version % every == 0 or policy.reference is None):
        policy.refresh_reference()
    rows = [row for row in map(groups.trainable, batch) if row is not None]
    mini_batches = [part for part in _cut(rows, settings.learner.num_mini_batches) if part]
    plans = [_plan(policy, mini_batch, settings.learner.micro_batch_tokens) for mini_batch in mini_batches]
    references = _reference_pass(policy, mini_batches, plans, version, settings.loss.reference)
    sums: dict[str, torch.Tensor] = {}
    norms = []
    learning_rate = _learning_rate(settings.learner, version, settings.num_steps)
    for mini_batch, plan, reference in zip(mini_batches, plans, references, strict=True):
        for i, (micro, given) in enumerate(zip(plan, reference, strict=True)):
            is_last = i == len(plan) - 1
            logprobs = policy.logprobs(micro or [_NOTHING], is_last)
            if not micro:  # this rank has fewer groups than another: it takes part in the collectives, and adds nothing
                policy.backward(logprobs.sum() * 0, is_last)
                continue
            fixed = torch.where(given.isnan(), logprobs.detach(), given)
            rewards = torch.tensor([reward for row in micro for reward in row["rewards"]], dtype=torch.float64, device=policy.device)
            ids = torch.tensor([j for j, row in enumerate(micro) for _ in row["rewards"]], device=policy.device)
            loss, stats = gvpo_loss(logprobs, fixed, rewards, ids, settings.loss.beta, num_groups=len(mini_batch))
            policy.backward(loss, is_last)
            sums = {name: sums.get(name, 0) + value for name, value in stats.items()}
        norm = policy.update(learning_rate)
        if not norm < float("inf"):
            raise NonFiniteGradient(f"step {version + 1}: the gradient's norm is {norm} (groups {[row['group_id'] for row in mini_batch]})")
        norms.append(norm)
    policy.step += 1
    return {
        **batch_metrics(batch, version),
        **finish(_sum_over_ranks(sums, policy)),
        "tokens/trained": float(sum(len(ids) for row in rows for ids in row["completion_ids"])),
        "grad_norm": mean(norms),
        "learning_rate": learning_rate,
        "updates": float(policy.num_updates),
    }


_NOTHING: Row = {"prompt_ids": [0], "completion_ids": [[0]]}


def _cut(rows: Sequence[Row], num_parts: int) -> list[list[Row]]:
    """Near-equal runs in order of arrival."""
    bounds = [round(i * len(rows) / num_parts) for i in range(num_parts + 1)]
    return [list(rows[a:b]) for a, b in itertools.pairwise(bounds)]


def _plan(policy: Policy, mini_batch: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """This rank's micro-batches. Every rank knows the whole batch, so they agree on the number without a word; short ones get empty ones."""
    plans = []
    for part in groups.split_by_tokens(mini_batch, policy.world_size):
        mine = [mini_batch[i] for i in part]
        plans.append([[mine[i] for i in micro] for micro in groups.micro_batches(mine, max_tokens, policy.packs)])
    longest = max(map(len, plans))
    mine = plans[policy.rank]
    return mine + [[] for _ in range(longest - len(mine))]


def _own_references(row: Row, version: int, reference: str) -> list[float | None]:
    """The reference that each completion brings along; None: the policy at the start of the step.

    Under `behaviour` a completion wholly sampled by that very policy takes the learner's own pass (log-ratio exactly 0); an older or
    mixed one its engine's log-probs, exact also when weights changed in mid-completion; a foreign one the policy it meets.
    """
    own: list[float | None] = []
    for oldest, newest, logprobs in zip(row["version_min"], row["version_max"], row["sampling_logprobs"], strict=True):
        is_older = oldest is not None and logprobs is not None and not oldest == newest == version
        own.append(math.fsum(logprobs) if reference == "behaviour" and is_older else None)
    return own


def _reference_pass(
    policy: Policy, mini_batches: Sequence[Sequence[Row]], plans: Sequence[Sequence[Sequence[Row]]], version: int, reference: str
) -> list[list[torch.Tensor]]:
    """Reference log-probs of every micro-batch of a step, float64 [completions], once per completion and reference version.

    nan: the policy at the start of the step, and no pass is needed for it, because that is the policy of the completion's own forward
    pass, whose log-probs become the reference (so the log-ratio there is exactly 0). That holds in the first mini-batch, before any
    update; the others need a pass of their own, unless every completion, on every rank, brings its reference along.
    """
    if reference not in ("behaviour", "previous"):  # a model of its own
        return [[_pass(policy, micro, reference=True) if micro else torch.empty(0) for micro in plan] for plan in plans]
    references = []
    for i, (mini_batch, plan) in enumerate(zip(mini_batches, plans, strict=True)):
        is_needed = i > 0 and any(value is None for row in mini_batch for value in _own_references(row, version, reference))
        given = []
        for micro in plan:
            known = [value for row in micro for value in _own_references(row, version, reference)]
            values = torch.tensor([float("nan") if v is None else v for v in known], dtype=torch.float64, device=policy.device)
            if is_needed:  # with sharded parameters a pass is a collective: a rank with nothing to ask takes part
                passed = _pass(policy, micro or [_NOTHING])
                values = torch.where(values.isnan(), passed, values) if micro else values
            given.append(values)
        references.append(given)
    return references


def _pass(policy: Policy, rows: Sequence[Row], reference: bool = False) -> torch.Tensor:
    tokens = policy.token_logprobs(rows, reference)
    return sequence_sums(torch.cat(tokens), [len(t) for t in tokens])


def _learning_rate(config: LearnerConfig, version: int, num_steps: int) -> float:
    """Of the step that starts from `version`: linear warm-up, then the schedule down to zero after the last step."""
    if version < config.warmup_steps:
        return config.learning_rate * (version + 1) / (config.warmup_steps + 1)
    progress = (version - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))}
    return config.learning_rate * factor[config.schedule]


def _sum_over_ranks(sums: dict[str, torch.Tensor], policy: Policy) -> dict[str, float]:
    """The one scalar reduction of a step. A rank without a group has no sums of its own."""
    _, zeros = gvpo_loss(*(torch.zeros(0) for _ in range(3)), torch.zeros(0, dtype=torch.long), beta=1.0, num_groups=1)
    values = torch.stack([sums.get(name, zero.to(policy.device)).double() for name, zero in zeros.items()])
    if policy.world_size > 1:
        dist.all_reduce(values)
    return dict(zip(zeros, values.tolist(), strict=True))


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
    buffer.published(policy.step, {**(weights or {}), "probe": probe}, metrics)


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
