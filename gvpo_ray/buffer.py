"""The group buffer: where finished groups wait for the learner. The staleness dial and the durable log live here.

    rollout loop   start() ── may the next group start? ──► put(group) ── to the log, then to whoever waits
    learner        order(step) ── train, save or stop? ──► batch(step) ──► published(version, weights, metrics)
    engines        weights(newer_than)
    driver         allow(step) · trained(step) · save() · close(error)

A plain class with async methods on one event loop; controller.py makes it an actor. Steps count from 1: step s trains the
s-th batch and makes version s of the weights; version 0 is what the run started from.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from gvpo_ray import groups


def read_assignments(path: Path) -> tuple[dict[int, tuple[int, int]], int]:
    """Rows [begin, end) of each step in an assignments.jsonl, and the bytes of its whole lines: a killed writer may leave a torn one."""
    assigned, num_bytes = {}, 0
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            entry = json.loads(line)
            assigned[entry["step"]] = (entry["begin"], entry["end"])
            num_bytes += len(line)
    return assigned, num_bytes


class GroupLog:
    """Durable record of a run's groups, in order of arrival, and of which step trains which of them.

    `NNNNN.arrow`: Arrow IPC streams, one record batch per group, a new segment per process (a stream cannot be reopened).
    `assignments.jsonl`: `{"step": s, "begin": a, "end": b}`, rows [a, b) of the log are the batch of step s.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index: list[tuple[Path, int]] = []  # row -> (segment, position)
        self.group_ids: list[int] = []
        for segment in sorted(self.folder.glob("*.arrow")):
            for i, batch in enumerate(groups.read_batches(segment, is_log=True)):
                self._index.append((segment, i))
                self.group_ids.append(batch.column("group_id")[0].as_py())
        self._assignments = self.folder / "assignments.jsonl"
        self.assigned: dict[int, tuple[int, int]] = {}
        if self._assignments.exists():
            self.assigned, num_bytes = read_assignments(self._assignments)
            os.truncate(self._assignments, num_bytes)  # a torn last line was never answered, and the next one must not run into it
        self._segment: Path | None = None
        self._file: Any = None
        self._writer: Any = None

    def __len__(self) -> int:
        return len(self._index)

    @property
    def end(self) -> int:
        """First row that no step has been given."""
        return max((end for _, end in self.assigned.values()), default=0)

    def append(self, group: pa.Table) -> None:
        """Write one group. It survives the death of this process; of the machine, from the next assign() on."""
        if self._writer is None:
            number = int(max((p.stem for p in self.folder.glob("*.arrow")), default="-1")) + 1
            self._segment = self.folder / f"{number:05d}.arrow"
            self._file = open(self._segment, "xb", buffering=0)  # noqa: SIM115 - lives as long as the log
            self._writer = pa.ipc.new_stream(self._file, group.schema)
            self._position = 0
        try:
            self._writer.write_batch(group.combine_chunks().to_batches()[0])
        except OSError:
            self._writer = None  # half a group may be in this segment (disk full): what comes after it could not be read
            raise
        assert self._segment is not None
        self._index.append((self._segment, self._position))
        self._position += 1
        self.group_ids.append(group.column("group_id")[0].as_py())

    def assign(self, step: int, begin: int, end: int) -> None:
        """Give rows [begin, end) to a step, on disk before it returns."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        with open(self._assignments, "a") as file:
            file.write(json.dumps({"step": step, "begin": begin, "end": end}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.assigned[step] = (begin, end)

    def read(self, begin: int, end: int) -> pa.Table:
        """Rows [begin, end) from disk."""
        wanted = self._index[begin:end]
        segments = {path: groups.read_batches(path, is_log=True) for path in {path for path, _ in wanted}}
        return pa.Table.from_batches([segments[path][i] for path, i in wanted], schema=groups.empty().schema)


class Quarantine:
    """Prompts on which every check hit its limit: sampled once, and never again. One JSON object per line, so that a person can look.

    Their groups are in the log too, without a reward and with the reasons.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._keys = {_key(entry) for entry in self.entries()}

    def __len__(self) -> int:
        return len(self._keys)

    def entries(self) -> list[dict[str, str]]:
        """{"dataset", "prompt", "answer"} of each, in the order in which they came."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]  # a killed writer may leave a torn one

    def holds(self, prompt: pa.Table) -> bool:
        return bool(self._keys) and _key(next(groups.rows(prompt))) in self._keys

    def add(self, prompt: pa.Table) -> None:
        row = next(groups.rows(prompt))
        if _key(row) not in self._keys:
            self._keys.add(_key(row))
            with open(self.path, "a") as file:
                file.write(json.dumps({name: row[name] for name in ("dataset", "prompt", "answer")}) + "\n")


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["dataset"], row["prompt"], row["answer"]


class GroupBuffer:
    """See the module. `max_staleness` None: unbounded. A log with groups in it is taken up where it stands."""

    def __init__(self, folder: str | Path, groups_per_step: int, num_steps: int, max_staleness: int | None, version: int = 0) -> None:
        self.log = GroupLog(folder)
        self.groups_per_step = groups_per_step
        self.num_steps = num_steps
        self.max_staleness = max_staleness
        self.version = version
        self._finished = set(self.log.group_ids)
        self._running: set[int] = set()
        self._skipped: set[int] = set()
        self._next_id = 0
        self._waiting: dict[int, pa.Table] = {}  # rows of the log, in memory until their step is trained
        self._references: dict[int, tuple[int, list[float | None]]] = {}  # of groups that may be asked for again
        self._weights: Any = None
        self._metrics: dict[int, dict[str, Any]] = {}
        self._orders: dict[tuple[int, bool], str] = {}
        self._allowed = 0
        self._saved_step = version if version > 0 else -1  # a run that is taken up starts from a checkpoint
        self._save_wanted = -1  # version of which, or of a newer one, save() waits for a checkpoint
        self._closed = False
        self.error: str | None = None
        # One condition per kind of news: with hundreds of free slots waiting to start, a finished group must not wake them all.
        self._new_version, self._new_group, self._new_order = (asyncio.Condition() for _ in range(3))

    # --- rollout ---------------------------------------------------------------------------------------------------

    def _may_start(self) -> bool:
        started = len(self._finished) + len(self._running)
        if started >= self.num_steps * self.groups_per_step:
            return False
        return self.max_staleness is None or started // self.groups_per_step <= self.version + self.max_staleness

    async def start(self) -> tuple[int, int] | None:
        """Wait until the dial lets a group start.

        Returns:
            (group id, oldest version of the weights that may begin it), or None when the run is over. The bound on the
            version is the dial again, seen from the engine: one that still holds older weights waits for newer ones.
        """
        async with self._new_version:
            await self._new_version.wait_for(lambda: self._closed or self._may_start())
            if self._closed:
                return None
            started = len(self._finished) + len(self._running)
            while self._next_id in self._finished or self._next_id in self._running or self._next_id in self._skipped:
                self._next_id += 1
            self._running.add(self._next_id)
            oldest = 0 if self.max_staleness is None else max(0, started // self.groups_per_step - self.max_staleness)
            # After a resume the log can be ahead of the weights: never ask for a version that is not there.
            return self._next_id, min(oldest, self.version)

    async def skip(self, group_id: int) -> None:
        """A started group that will not be sampled: another one starts in its place."""
        async with self._new_version:
            self._running.discard(group_id)
            self._skipped.add(group_id)
            self._new_version.notify_all()

    async def put(self, group: pa.Table) -> bool:
        """Take one finished group: to the log first, then to whoever waits. A group that is already there is not taken twice.

        Returns:
            Whether every check of it hit its limit: the prompt is not worth another try.
        """
        group = groups.validate(group, groups.LOGGED_COLUMNS).select(list(groups.LOGGED_COLUMNS))
        group_id = group.column("group_id")[0].as_py()
        self._running.discard(group_id)
        if group_id in self._finished:
            return False
        row = len(self.log)
        self.log.append(group)
        self._finished.add(group_id)
        self._waiting[row] = group
        async with self._new_group:
            self._new_group.notify_all()
        return groups.all_cut_off(group)

    # --- learner ---------------------------------------------------------------------------------------------------

    def _must_save(self) -> bool:
        return self._saved_step < self._save_wanted

    async def order(self, step: int, saved: bool = False) -> str:
        """What the learner does next: "train" step `step`, "save" a checkpoint of step - 1, or "stop".

        Waits for allow(), save() or close(). `saved`: a checkpoint of step - 1 exists. Every rank gets the same answer to the
        same question, whenever it asks.
        """
        key = (step, saved)
        async with self._new_order:
            if saved and self._saved_step < step - 1:  # a learner that died before it could say so, and is back from there
                self._saved_step = step - 1
                self._new_order.notify_all()
            await self._new_order.wait_for(
                lambda: self._closed or key in self._orders or (self._must_save() and not saved) or step <= self._allowed
            )
            if key not in self._orders:
                if self._closed:
                    return "stop"
                self._orders[key] = "save" if self._must_save() and not saved else "train"
            return self._orders[key]

    async def batch(self, step: int) -> pa.Table | None:
        """The groups of a step, in order of arrival; waits for them. Asked again, by any rank or after a restart: the same rows.

        The assignment is in the log before it is answered. None: the run was closed.
        """
        async with self._new_group:
            if step not in self.log.assigned:
                begin = self.log.end
                end = begin + self.groups_per_step
                await self._new_group.wait_for(lambda: self._closed or step in self.log.assigned or len(self.log) >= end)
                if step not in self.log.assigned:
                    if self._closed:
                        return None
                    self.log.assign(step, begin, end)
            begin, end = self.log.assigned[step]
        for row in [row for row in self._waiting if row < begin]:
            del self._waiting[row]  # trained: from now on the log alone has it
        if all(row in self._waiting for row in range(begin, end)):
            return self._with_references(pa.concat_tables([self._waiting[row] for row in range(begin, end)]))
        return self._with_references(self.log.read(begin, end))

    async def referenced(self, version: int, logprobs: Mapping[int, list[float | None]]) -> None:
        """The learner has passed these groups (id -> one number per completion) through the reference model of `version`."""
        self._references |= {group_id: (version, values) for group_id, values in logprobs.items()}

    def _with_references(self, batch: pa.Table) -> pa.Table:
        known = [self._references.get(group_id) for group_id in batch.column("group_id").to_pylist()]
        if not any(known):
            return batch
        return groups.with_columns(
            batch,
            reference_logprobs=[entry and entry[1] for entry in known],
            reference_versions=[entry and [None if value is None else entry[0] for value in entry[1]] for entry in known],
        )

    async def published(self, version: int, weights: Any, metrics: dict[str, Any] | None = None) -> None:
        """The learner has made `version`: opens the dial, tells the engines where the weights are and the driver how it went."""
        async with self._new_version:
            self.version = version
            self._weights = weights
            if metrics is not None:
                self._metrics[version] = metrics
            self._new_version.notify_all()

    async def saved(self, step: int) -> None:
        """The learner has written a checkpoint."""
        async with self._new_order:
            self._saved_step = step
            self._new_order.notify_all()
        over = set(self.log.group_ids[: self.log.assigned.get(step, (0, 0))[1]])  # a learner that dies comes back to the steps after this one
        self._references = {group_id: entry for group_id, entry in self._references.items() if group_id not in over}

    # --- engines ---------------------------------------------------------------------------------------------------

    async def weights(self, newer_than: int) -> tuple[int, Any] | None:
        """The newest weights, once they are newer: (version, where). None: the run was closed."""
        async with self._new_version:
            await self._new_version.wait_for(lambda: self._closed or (self._weights is not None and self.version > newer_than))
            return None if self._closed else (self.version, self._weights)

    # --- driver ----------------------------------------------------------------------------------------------------

    async def allow(self, step: int) -> None:
        """Let the learner train up to and with this step."""
        async with self._new_order:
            self._allowed = max(self._allowed, step)
            self._new_order.notify_all()

    async def trained(self, step: int) -> dict[str, Any] | None:
        """Metrics of a step, once it is trained. None: the run was closed before."""
        async with self._new_version:
            await self._new_version.wait_for(lambda: self._closed or step in self._metrics)
            for old in [s for s in self._metrics if s < step]:
                del self._metrics[old]
            return self._metrics.get(step)

    async def save(self) -> int | None:
        """A checkpoint of the newest version, written now unless there is one; its step. None: the run was closed before."""
        async with self._new_order:
            wanted = self._save_wanted = self.version
            self._new_order.notify_all()
            await self._new_order.wait_for(lambda: self._closed or self._saved_step >= wanted)
            return self._saved_step if self._saved_step >= wanted else None

    async def close(self, error: str | None = None) -> None:
        """End the run: everybody who waits is told. The first error is the one that is kept."""
        self.error = self.error or error
        self._closed = True
        for condition in (self._new_version, self._new_group, self._new_order):
            async with condition:
                condition.notify_all()

    async def status(self) -> dict[str, Any]:
        """Counts for the driver's progress line and for whoever asks why nothing moves."""
        return {
            "version": self.version,
            "groups_finished": len(self._finished),
            "groups_running": len(self._running),
            "groups_waiting": len(self.log) - self.log.end,
            "oldest_running": min(self._running, default=None),
        }
