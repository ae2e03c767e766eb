"""The learner's loop is what every Ray Train worker runs.

    while the buffer commands it: batch(step) → train_step → publish → now and then a checkpoint

Weights that go through Ray's object store are sent by a thread while the next step trains, and so are
checkpoints written.

Its result is a pure function of the initial weights and the ordered log of groups. The loop waits for the
buffer's answers; the algorithm is step.train_step.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import torch

from gvpo_ray import groups
from gvpo_ray.buffer.states import Command
from gvpo_ray.config.engines import NUM_PROBES, PROBE_TOKENS
from gvpo_ray.groups import Row
from gvpo_ray.learner.behind import Behind, beside
from gvpo_ray.learner.checkpoints import prune_checkpoints
from gvpo_ray.learner.examples import Examples
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import Settings, train_step
from gvpo_ray.observe.computes import write_computes
from gvpo_ray.observe.token_examples import stays, write_examples

Answer = TypeVar("Answer")


class Buffer(Protocol):
    """The learner calls the buffer's actor by these methods, which wait for the answer."""

    def learner_started(self, step: int) -> None:
        """Tell the buffer that the learner is there and has finished `step` steps."""
        ...

    def next_command(self, step: int, saved: bool) -> Command:
        """Wait for the next command: train `step`, save a checkpoint of step - 1, or stop.

        saved: whether step - 1 has a checkpoint.
        """
        ...

    def batch(self, step: int) -> pa.Table | None:
        """Wait for the groups of `step`; None: the run has ended."""
        ...

    def report_references(self, version: int, references: dict[int, list[float | None]]) -> None:
        """Tell the buffer log pi_ref of completions, by group id, from this version of the reference."""
        ...

    def published(self, version: int, weights: Any, metrics: dict[str, Any] | None) -> None:
        """Tell the buffer where the weights of `version` are, and the metrics of the step that made them.

        weights: None while they are on their way; a second call tells where they are.
        """
        ...

    def saved(self, step: int) -> None:
        """Tell the buffer that `step` has a checkpoint."""
        ...


class Publisher(Protocol):
    """A publisher is the learner's end of weights/transfer.py."""

    def publish(self, version: int, named_tensors: Any) -> dict[str, Any] | None:
        """Send the weights; every rank calls this, and rank 0 returns where they are."""
        ...


def learn(
    policy: Policy,
    buffer: Buffer,
    publisher: Publisher,
    settings: Settings,
    on_checkpoint: Callable[[dict[str, Any]], None] = lambda metrics: None,
    behind: Behind | None = None,
) -> None:
    """Train until the buffer says stop.

    The loop waits for the buffer's commands, which the driver's `permit` and `save` cause, and for batches,
    which finished groups complete. Rank 0 reports for all ranks; only the reference model's log-probs are
    reported by each rank, for its own groups.

    Args:
        policy: this rank's part of the policy.
        buffer: gives commands and batches.
        publisher: sends the weights to the engines.
        settings: the parts of the config that the learner needs.
        on_checkpoint: called on every rank with the step's metrics, after each checkpoint that was due.
        behind: lets a step publish its weights while the next one trains; None: they are published first.
    """

    def ask(question: Callable[[], Answer]) -> Answer:
        return beside(question, policy.saving, None if behind is None else behind.sending)

    if policy.rank == 0:
        write_computes(settings.run_dir, policy.computes)
        buffer.learner_started(policy.step)
    if settings.loss.reference == "initial" and not policy.reference.exists:
        policy.reference.load(settings.model_path)
    rows: list[dict[str, Any]] = []
    publish(policy, buffer, publisher, settings, rows, metrics=None, behind=behind)
    saved = policy.step > 0
    stall: float | None = None
    while True:
        command = ask(functools.partial(buffer.next_command, policy.step + 1, saved))
        if command is Command.STOP:
            break
        if command is Command.SAVE:
            stall = save(policy, buffer, settings, waits=True)
            saved = True
            continue
        asked = time.perf_counter()
        table = ask(functools.partial(buffer.batch, policy.step + 1))
        if table is None:
            break
        got = time.perf_counter()
        rows = list(groups.rows(groups.validate(table, groups.LOGGED_COLUMNS)))
        is_due = is_checkpoint_due(policy.step + 1, settings)
        shows = policy.rank == 0 and (is_due or stays(policy.step + 1))
        examples = Examples() if shows else None
        metrics = train_step(policy, rows, settings, examples)
        trained = time.perf_counter()
        if stall is not None:
            metrics["time/checkpoint"] = stall
        if examples is not None:
            write_examples(settings.run_dir, policy.step, examples.chosen())
        is_first = policy.rank % policy.num_copies == 0  # of the ranks that have the same groups
        if settings.reports_references and settings.loss.caches_reference and is_first:
            references = {
                row["group_id"]: row["reference_logprobs"] for row in rows if "reference_logprobs" in row
            }
            buffer.report_references(policy.reference.version, references)
        publish(
            policy,
            buffer,
            publisher,
            settings,
            rows,
            metrics,
            times={"wait": got - asked, "train": trained - got, "since": asked},
            behind=behind,
        )
        saved = is_due
        stall = save(policy, buffer, settings) if saved else None
        if saved:
            on_checkpoint({"step": policy.step, **metrics})
    if behind is not None:
        behind.finish()
    policy.finish_saving()


def is_checkpoint_due(step: int, settings: Settings) -> bool:
    """Return whether a step gets a checkpoint without being asked."""
    return step % settings.checkpoint.every == 0 or step == settings.last_step


def publish(
    policy: Policy,
    buffer: Buffer,
    publisher: Publisher,
    settings: Settings,
    rows: Sequence[Row],
    metrics: dict[str, Any] | None,
    times: dict[str, float] | None = None,
    behind: Behind | None = None,
) -> None:
    """Send the weights of this step to the engines, and its metrics to the driver; every rank calls this.

    Every `parity_every` steps, log-probs go with the weights, by which the engines check them.

    Args:
        policy: this rank's part of the policy.
        buffer: is told where the weights are.
        publisher: sends the weights.
        settings: the parts of the config that the learner needs.
        rows: the step's groups; empty before the first step.
        metrics: the step's metrics; None before the first step.
        times: `wait` and `train`, seconds of the step, and `since`, when the step began (perf_counter).
        behind: as in `learn`. The driver then has the metrics before the weights are there, and what the
            sending took goes with the next step's.
    """
    started = time.perf_counter()
    first = metrics is None
    probe = (
        probe_logprobs(policy, rows, settings.probes)
        if first or (settings.parity_every and policy.step % settings.parity_every == 0)
        else None
    )
    version = policy.step
    adapter = {} if policy.adapter is None else {"adapter": policy.adapter}

    def of_driver(measured: dict[str, float]) -> dict[str, Any] | None:
        """Return the metrics that go to the driver."""
        if metrics is None or times is None:
            return None
        now = time.perf_counter()
        return {
            **metrics,
            "time/step": now - times["since"],
            "time/wait_for_groups": times["wait"],
            "time/train": times["train"],
            "time/publish": now - started,
            **measured,
        }

    if behind is None:
        weights = publisher.publish(version, policy.named_tensors())
        if policy.rank == 0:
            where = {**(weights or {}), **adapter, "probe": probe}
            buffer.published(version, where, of_driver(_of_weights(weights)))
        return

    def send(named_tensors: Any) -> None:
        begun = time.perf_counter()
        weights = publisher.publish(version, named_tensors) or {}
        buffer.published(version, {**weights, **adapter, "probe": probe}, None)
        behind.measured = {**_of_weights(weights), "time/publish_behind": time.perf_counter() - begun}

    def copied() -> None:
        # Before the weights are sent: a buffer that is restarted then finds the metrics on its disk.
        if metrics is not None:
            buffer.published(version, None, of_driver(measured))

    behind.finish()
    measured = behind.measured  # of the version before
    behind.start(policy.named_tensors(), send, copied)


def _of_weights(weights: dict[str, Any] | None) -> dict[str, float]:
    """Return the metrics of a published version."""
    names = ("bytes", "changed")  # the first version changes nothing
    return {f"weights/{name}": float(weights[name]) for name in names if weights and name in weights}


def probe_logprobs(policy: Policy, rows: Sequence[Row], first: Sequence[list[int]] = ()) -> dict[str, Any]:
    """Return a few sequences, `ids`, with the learner's `logprobs` of all but their first token.

    The sequences are from the last batch; before the first one they are `first`, or of random tokens where
    that is empty. Every rank calls this.
    """
    if rows:
        sequences = [
            (row["prompt_ids"] + row["completion_ids"][0])[:PROBE_TOKENS] for row in rows[:NUM_PROBES]
        ]
    elif first:
        sequences = [*first]
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


def save(policy: Policy, buffer: Buffer, settings: Settings, waits: bool = False) -> float:
    """Write checkpoints/step-N; every rank calls this.

    A thread ends that, removes old checkpoints and tells the buffer; what it fails with is raised by the next
    question to the buffer.

    Args:
        policy: this rank's part of the policy.
        buffer: is told once the checkpoint is on the disk.
        settings: the parts of the config that the learner needs.
        waits: return only after that.

    Returns:
        The seconds for which this held training up.
    """
    begun, step = time.perf_counter(), policy.step

    def written() -> None:
        prune_checkpoints(settings.run_dir, settings.checkpoint.keep)
        buffer.saved(step)

    policy.begin_saving(Path(settings.run_dir) / "checkpoints" / f"step-{step}", written)
    if waits:
        policy.finish_saving()
    return time.perf_counter() - begun
