"""The learner's loop: what every Ray Train worker runs. A pure function of (initial weights, ordered log of
groups).

    while the buffer orders it: batch(step) → train_step → publish → now and then a checkpoint

The loop waits for the buffer, and is woken by it; the algorithm is step.train_step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch

from gvpo_ray import groups
from gvpo_ray.groups import Row
from gvpo_ray.learner.checkpoints import prune_checkpoints
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import Settings, train_step

NUM_PROBES, PROBE_TOKENS = 4, 256
"""Sequences, and tokens of each, on which engines compare their log-probs with the learner's."""


class Buffer(Protocol):
    """GroupBuffer as the learner sees it: calls that wait."""

    def learner_started(self, step: int) -> None: ...
    def next_command(self, step: int, saved: bool) -> str: ...
    def batch(self, step: int) -> pa.Table | None: ...
    def report_references(self, version: int, references: dict[int, list[float | None]]) -> None: ...
    def published(self, version: int, weights: Any, metrics: dict[str, Any] | None) -> None: ...
    def saved(self, step: int) -> None: ...


class Publisher(Protocol):
    """The learner's end of weights/transfer.py."""

    def publish(self, version: int, named_tensors: Any) -> dict[str, Any] | None: ...


def learn(
    policy: Policy,
    buffer: Buffer,
    publisher: Publisher,
    settings: Settings,
    on_checkpoint: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> None:
    """Train until the buffer says stop.

    Waits for the buffer's commands (woken by the driver's permit and save) and batches (woken by finished
    groups). Rank 0 talks back for all, but for what the reference model said of single completions: that each
    rank tells of its own groups. `on_checkpoint(metrics)` is called on every rank after each checkpoint that
    was due.
    """
    if policy.rank == 0:
        buffer.learner_started(policy.step)
    if settings.loss.reference == "initial" and not policy.has_reference:
        policy.load_reference(settings.model_path)
    rows: list[Row] = []
    publish(policy, buffer, publisher, settings, rows, metrics=None)
    saved = policy.step > 0
    while (command := buffer.next_command(policy.step + 1, saved)) != "stop":
        if command == "save":
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
        if settings.reports_references and settings.loss.caches_reference:
            references = {
                row["group_id"]: row["reference_logprobs"] for row in rows if "reference_logprobs" in row
            }
            buffer.report_references(policy.reference_version, references)
        publish(
            policy,
            buffer,
            publisher,
            settings,
            rows,
            metrics,
            times={"wait": got - asked, "train": trained - got, "since": asked},
        )
        saved = policy.step % settings.checkpoint.every == 0 or policy.step == settings.last_step
        if saved:
            save(policy, buffer, settings)
            on_checkpoint({"step": policy.step, **metrics})


def publish(
    policy: Policy,
    buffer: Buffer,
    publisher: Publisher,
    settings: Settings,
    rows: Sequence[Row],
    metrics: dict[str, Any] | None,
    times: dict[str, float] | None = None,
) -> None:
    """Hand the weights of this step to the engines, now and then with log-probs to check them by, and its
    metrics to the driver.
    """
    started = time.perf_counter()
    first = metrics is None
    probe = (
        probe_logprobs(policy, rows)
        if first or (settings.parity_every and policy.step % settings.parity_every == 0)
        else None
    )
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
    """A few sequences (of the last batch; before the first, random tokens) with the learner's log-probs of
    all but the first token.
    """
    if rows:
        sequences = [
            (row["prompt_ids"] + row["completion_ids"][0])[:PROBE_TOKENS] for row in rows[:NUM_PROBES]
        ]
    else:
        generator = torch.Generator().manual_seed(0)
        length = min(32, policy.max_length - 1)
        sequences = [
            torch.randint(policy.vocab_size, (length,), generator=generator).tolist()
            for _ in range(NUM_PROBES)
        ]
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
