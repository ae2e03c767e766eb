"""The group buffer: where finished groups wait for the learner. The staleness dial, the durable log and replay live here.

    rollout loop   start(num) ── may the next groups start? ──► history(prompt, num) ──► put(group) ── to the log
    learner        order(step) ── train, save or stop? ──► batch(step) ──► published(version, weights, metrics) · learned(…)
    engines        weights(newer_than)
    driver         allow(step) · trained(step) · save() · reconnect(…) · status() · close(error)

A plain class with async methods on one event loop; controller.py makes it an actor. Steps count from 1: step s trains the
s-th batch and makes version s of the weights; version 0 is what the run started from.

Groups are in the log alone, and the page cache is the memory: however many wait, the buffer does not grow with their tokens.
What it knows it rebuilds from the log, but for what `reconnect` tells and what the learner publishes next.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import math
import os
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.config import ReplayConfig
from gvpo_ray.metrics import append_line, read_lines

LOCK_WAIT_S = 60.0
"""How long a new buffer waits for the one before it, whose process may still be going down."""

STEPS = "steps.jsonl"
"""Beside the log: each step's metrics, for a driver that was killed before it could write them."""

ORDERS = "orders.jsonl"
"""In the log's folder: what this process of the driver has ordered so far. The driver begins a new one."""

RESTARTS = "learner_restarts.jsonl"
"""In the log's folder: each time that the learner was started again, from which step and why."""

MAX_LEARNER_DEATHS = 3
"""In a row, without a step between them: the next attempt would end like them."""


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
    In memory is where each row begins, so that any row is read without those before it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.group_ids: list[int] = []
        self._segments: list[tuple[Path, pa.Schema]] = []
        self._places = array("q"), array("q")  # of each row: its segment, and the byte of it at which the row begins
        for segment in sorted(self.folder.glob("*.arrow")):
            self._scan(segment)
        self._assignments = self.folder / "assignments.jsonl"
        self.assigned: dict[int, tuple[int, int]] = {}
        if self._assignments.exists():
            self.assigned, num_bytes = read_assignments(self._assignments)
            os.truncate(self._assignments, num_bytes)  # a torn last line was never answered, and the next one must not run into it
        self._file: Any = None

    def __len__(self) -> int:
        return len(self.group_ids)

    @property
    def end(self) -> int:
        """First row that no step has been given."""
        return max((end for _, end in self.assigned.values()), default=0)

    def _scan(self, segment: Path) -> None:
        """Find the rows of a segment, up to the last whole one: a killed writer leaves a torn one, or not even a head."""
        if segment.stat().st_size == 0:
            return
        with pa.memory_map(str(segment)) as source:
            try:
                schema = pa.ipc.read_schema(source)
                self._segments.append((segment, schema))
                while True:
                    begin = source.tell()
                    batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)
                    self._add(begin, batch.column("group_id")[0].as_py())
            except (pa.ArrowInvalid, OSError, EOFError):
                pass

    def _add(self, begin: int, group_id: int) -> None:
        for column, value in zip(self._places, (len(self._segments) - 1, begin), strict=True):
            column.append(value)
        self.group_ids.append(group_id)

    def append(self, group: pa.Table) -> None:
        """Write one group. It survives the death of this process; of the machine, from the next assign() on."""
        batch = groups.log_columns(group).combine_chunks().to_batches()[0]
        if self._file is None:
            number = int(max((p.stem for p in self.folder.glob("*.arrow")), default="-1")) + 1
            segment = self.folder / f"{number:05d}.arrow"
            self._file = open(segment, "xb", buffering=0)  # noqa: SIM115 - lives as long as the log
            self._segments.append((segment, groups.SCHEMA))
            self._write(groups.SCHEMA.serialize())
        begin = self._file.tell()
        self._write(batch.serialize())
        self._add(begin, batch.column("group_id")[0].as_py())

    def _write(self, message: pa.Buffer) -> None:
        left = memoryview(message)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._file = None  # half a group may be in this segment (disk full): what comes after it could not be read
            raise

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
        return self.rows(range(begin, end))

    def rows(self, indices: Sequence[int]) -> pa.Table:
        """These rows from disk, in this order."""
        numbers, begins = self._places
        sources = {number: pa.memory_map(str(self._segments[number][0])) for number in {numbers[row] for row in indices}}
        tables = []
        for row in indices:
            source = sources[numbers[row]]
            source.seek(begins[row])
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), self._segments[numbers[row]][1])
            tables.append(groups.log_columns(pa.Table.from_batches([batch])))
        return pa.concat_tables(tables) if tables else groups.empty(groups.LOG_COLUMNS)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


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
        return read_lines(self.path)

    def holds(self, prompt: pa.Table) -> bool:
        return bool(self._keys) and _key_of(prompt) in self._keys

    def add(self, prompt: pa.Table) -> None:
        row = next(groups.rows(prompt))
        if _key(row) not in self._keys:
            self._keys.add(_key(row))
            append_line(self.path, {name: row[name] for name in _KEY_COLUMNS})


def steps_metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """Step -> its metrics, as the learner told them last."""
    return {entry["step"]: entry["metrics"] for entry in read_lines(folder / STEPS)}


_KEY_COLUMNS = ("dataset", "prompt", "answer")


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in _KEY_COLUMNS)


def _key_of(group: pa.Table) -> tuple[str, ...]:
    return _key(next(groups.rows(group.select(list(_KEY_COLUMNS)))))


@dataclass(slots=True)
class _Logged:
    """A row of the log, and what the learner said of its completions last (nan: not trained on)."""

    row: int
    key: int
    version: int | None = None  # of the references
    references: array[float] | None = None
    residuals: array[float] | None = None


class History:
    """Which rows of the log have completions of a prompt that may be replayed; the completions themselves are in the log alone."""

    def __init__(self, log: GroupLog, replay: ReplayConfig, seed: int, version: int) -> None:
        self._log, self._replay, self._seed = log, replay, seed
        self._rows: dict[int, _Logged] = {}  # by group id, in order of arrival
        self._copies: dict[int, list[tuple[int, int]]] = {}  # group id -> (group id, index) of the completions that it begins with
        self._by_prompt: dict[int, list[int]] = {}  # hash of the prompt's key -> group ids
        for begin in range(self._first_row(version), len(log), 1000):
            self.add(begin, log.read(begin, min(begin + 1000, len(log))))

    def _first_row(self, version: int) -> int:
        """No row before it is in the window: what step s trains was written before version s."""
        return self._log.assigned.get(version - self._replay.window, (0, 0))[1] if self._replay.window else 0

    def add(self, begin: int, logged: pa.Table) -> None:
        """Take up the rows of the log from `begin` on."""
        for row, prompt in enumerate(groups.rows(logged.select(["group_id", *_KEY_COLUMNS])), begin):
            key = hash(_key(prompt))
            self._rows[prompt["group_id"]] = _Logged(row, key)
            self._by_prompt.setdefault(key, []).append(prompt["group_id"])

    def forget(self, version: int) -> None:
        """Drop what has fallen out of the window of `version`."""
        first = self._first_row(version)
        for group_id in list(takewhile(lambda group_id: self._rows[group_id].row < first, self._rows)):
            key = self._rows.pop(group_id).key
            self._by_prompt[key].remove(group_id)
            if not self._by_prompt[key]:
                del self._by_prompt[key]

    def learned(self, version: int, references: Mapping[int, list[float | None]], residuals: Mapping[int, list[float | None]]) -> None:
        for group_id, values in residuals.items():  # what is now known of a copy holds for what it is a copy of
            for (original, index), value in zip(self._copies.pop(group_id, ()), values, strict=False):
                if value is not None and (entry := self._rows.get(original)) is not None and entry.residuals is not None:
                    entry.residuals[index] = value
        for group_id in (*references, *residuals):
            if (entry := self._rows.get(group_id)) is not None:
                if group_id in references:
                    entry.version, entry.references = version, _packed(references[group_id])
                if group_id in residuals:
                    entry.residuals = _packed(residuals[group_id])

    def pick(self, prompt: pa.Table, num: int, version: int) -> pa.Table:
        """See GroupBuffer.history."""
        key, oldest = _key_of(prompt), version - self._replay.window if self._replay.window else 0
        entries = [self._rows[group_id] for group_id in self._by_prompt.get(hash(key), ())]
        logged = self._log.rows([entry.row for entry in entries])
        pairs = [(entry, logged.slice(i, 1)) for i, entry in enumerate(entries)]
        candidates = [
            _Candidate(newest, residual if math.isnan(told := _at(entry.residuals, i)) else told, i, entry, group)
            for entry, group in pairs
            if _key_of(group) == key  # not another prompt with the same hash
            for i, (newest, residual) in groups.replayable(group).items()
            if newest >= oldest
        ]
        num = min(num, len(candidates))
        if self._replay.policy == "uniform":
            random = np.random.default_rng([self._seed, prompt["group_id"][0].as_py()])
            picked = [candidates[i] for i in random.choice(len(candidates), num, replace=False)] if num else []
        else:
            candidates.sort(key=_Candidate.newest_first)
            if self._replay.policy == "residual":
                candidates.sort(key=lambda candidate: -abs(candidate.residual))  # a stable sort: the newest of equals
            picked = candidates[:num]
        if self._replay.policy == "residual":
            originals = [(self._log.group_ids[candidate.entry.row], candidate.index) for candidate in picked]
            self._copies[prompt["group_id"][0].as_py()] = originals
        return _replayed(prompt, picked)


@dataclass(slots=True)
class _Candidate:
    newest: int
    residual: float
    index: int
    entry: _Logged
    group: pa.Table

    def newest_first(self) -> tuple[int, int, int]:
        return -self.newest, -self.entry.row, self.index


def _replayed(prompt: pa.Table, picked: Sequence[_Candidate]) -> pa.Table:
    if not picked:
        return groups.log_columns(groups.with_columns(groups.join(prompt), rewards=[[]], reward_parts=[{}], reward_reasons=[[]]))
    group = groups.join(prompt, *(groups.take(candidate.group, [candidate.index]) for candidate in picked))
    told = [(candidate.entry.version, _at(candidate.entry.references, candidate.index)) for candidate in picked]
    known = any(not math.isnan(value) for _, value in told)
    return groups.log_columns(
        groups.with_columns(
            group,
            sources=[["replay"] * len(picked)],
            reference_logprobs=[[None if math.isnan(value) else value for _, value in told] if known else None],
            reference_versions=[[None if math.isnan(value) else version for version, value in told] if known else None],
        )
    )


def _packed(values: Sequence[float | None]) -> array[float]:
    return array("d", [math.nan if value is None else value for value in values])


def _at(values: array[float] | None, index: int) -> float:
    return math.nan if values is None else values[index]


class GroupBuffer:
    """See the module. `max_staleness` None: unbounded. A log with groups in it is taken up where it stands.

    `version`: of the weights that the learner starts from. No other buffer writes to the folder until this one has ended.

    Raises:
        RuntimeError: one still does after LOCK_WAIT_S.
    """

    def __init__(
        self,
        folder: str | Path,
        groups_per_step: int,
        num_steps: int,
        max_staleness: int | None,
        version: int = 0,
        replay: ReplayConfig | None = None,
        seed: int = 0,
    ) -> None:
        self._lock = _lock(Path(folder))
        self.log = GroupLog(folder)
        self.groups_per_step = groups_per_step
        self.num_steps = num_steps
        self.max_staleness = max_staleness
        self.version = max(version, max(self.log.assigned, default=0) - 1)  # a step is given only to a learner that made all before it
        self._history = History(self.log, replay, seed, self.version) if replay is not None and replay.share > 0 else None
        self._finished = set(self.log.group_ids)
        self._running: set[int] = set()
        self._skipped: set[int] = set()
        self._next_id = 0
        self._weights: tuple[int, Any] | None = None
        self._learner_version = version  # behind `version` while a learner that came back repeats steps
        self._metrics: dict[int, dict[str, Any]] = {}
        self._orders_path = Path(folder) / ORDERS
        self._orders = {(entry["step"], entry["saved"]): entry["order"] for entry in read_lines(self._orders_path)}
        self._allowed = 0
        self._saved_step = version if version > 0 else -1  # a run that is taken up starts from a checkpoint
        self._save_wanted = -1  # version of which, or of a newer one, save() waits for a checkpoint
        self._closed = False
        self.error: str | None = None
        # What the learner does, and the step whose groups it waits for.
        self._learner: tuple[str, int | None] = ("has not started", None)
        self._learner_since = time.time()
        self._learner_from: int | None = None  # version that it started from last
        self._learner_deaths = 0  # in a row
        self._learner_cause = "no cause is known"
        self._restarts_path = Path(folder) / RESTARTS
        self._learner_restarts: list[dict[str, Any]] = read_lines(self._restarts_path)
        self._last_group_at: float | None = None
        self._last_step_at: float | None = None
        self._waits = {"learner": _Waits(), "dial": _Waits(), "driver": _Waits()}
        self._learner_is_up = False
        # One condition per kind of news: with hundreds of free slots waiting to start, a finished group must not wake them all.
        self._new_version, self._new_group, self._new_order = (asyncio.Condition() for _ in range(3))

    def release(self) -> None:
        """Let another buffer have the folder, as the end of this process does."""
        self.log.close()
        self._lock.close()

    # --- rollout ---------------------------------------------------------------------------------------------------

    @property
    def _num_started(self) -> int:
        return len(self._finished) + len(self._running)

    def _may_start(self) -> bool:
        if self._num_started >= self.num_steps * self.groups_per_step:
            return False
        return self.max_staleness is None or self._num_started // self.groups_per_step <= self.version + self.max_staleness

    async def start(self, num: int = 1) -> list[tuple[int, int]] | None:
        """Wait until the dial lets a group start, and start up to `num` of them.

        Returns:
            [(group id, oldest version of the weights that may begin it)], or None when the run is over. The bound on the
            version is the dial again, seen from the engine: one that still holds older weights waits for newer ones. They
            come: no group asks for more than `version`, and a learner that is behind it needs no new group to get there.
        """
        async with self._new_version:
            with self._waits["dial"]:
                await self._new_version.wait_for(lambda: self._closed or self._may_start())
            if self._closed:
                return None
            started: list[tuple[int, int]] = []
            while len(started) < num and self._may_start():
                while self._next_id in self._finished or self._next_id in self._running or self._next_id in self._skipped:
                    self._next_id += 1
                oldest = 0 if self.max_staleness is None else max(0, self._num_started // self.groups_per_step - self.max_staleness)
                # After a resume the log can be ahead of the weights: never ask for a version that is not there.
                started.append((self._next_id, min(oldest, self.version)))
                self._running.add(self._next_id)
            return started

    async def history(self, prompt: pa.Table, num: int) -> pa.Table:
        """At most `num` completions that the policy wrote for this prompt before, as a group of source "replay".

        They come with rewards and sampling log-probs as logged, and with the references that the learner told of. None of them
        is in a group twice, but it may be in several; there are none unless replay is configured.
        """
        return _replayed(prompt, []) if self._history is None else self._history.pick(prompt, num, self.version)

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
        references = [name for name in groups.REFERENCE_COLUMNS if name in group.schema.names and not group[name].null_count]
        groups.validate(group, (*groups.LOGGED_COLUMNS, *references))
        group_id = group.column("group_id")[0].as_py()
        self._running.discard(group_id)
        if group_id in self._finished:
            return False
        row = len(self.log)
        self.log.append(group)
        self._finished.add(group_id)
        self._last_group_at = time.time()
        if self._history is not None:
            self._history.add(row, group)
        async with self._new_group:
            self._new_group.notify_all()
        return groups.all_cut_off(group)

    # --- learner ---------------------------------------------------------------------------------------------------

    def _must_save(self, step: int) -> bool:
        return self._saved_step < self._save_wanted < step

    def _learner_is(self, doing: str, waits_for: int | None = None) -> None:
        if self._learner != (doing, waits_for):
            self._learner, self._learner_since = (doing, waits_for), time.time()

    async def learner_started(self, step: int) -> None:
        """It is here, with the weights of `step`: for the first time, or again after it failed."""
        if self._learner_from is not None:
            self._learner_restarts.append({"time": time.time(), "step": step, "cause": self._learner_cause})
            append_line(self._restarts_path, self._learner_restarts[-1])  # the driver may die before it hears of it
            self._learner_deaths += 1
            if self._learner_deaths >= MAX_LEARNER_DEATHS:
                await self.close(f"the learner died {self._learner_deaths} times in a row without a step between: {self._learner_cause}")
        self._learner_from = step
        self._learner_is(f"starts from step {step}")

    async def learner_failed(self, cause: str) -> None:
        """It died, and is about to be started again."""
        self._learner_cause, self._learner_is_up = cause, False
        self._learner_is(f"died and is started again: {cause}")

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
            if not self._has_order(step, saved):
                self._learner_is("waits for the driver")
                with self._waits["driver"]:
                    await self._new_order.wait_for(lambda: self._has_order(step, saved))
            if key not in self._orders:
                if self._closed:
                    self._learner_is("was told to stop")
                    return "stop"
                self._orders[key] = "save" if self._must_save(step) and not saved else "train"
                # On disk: the other ranks may ask the buffer that comes after this one.
                append_line(self._orders_path, {"step": step, "saved": saved, "order": self._orders[key]})
            self._learner_is(f"trains step {step}" if self._orders[key] == "train" else f"saves step {step - 1}")
            return self._orders[key]

    def _has_order(self, step: int, saved: bool) -> bool:
        return self._closed or (step, saved) in self._orders or (self._must_save(step) and not saved) or step <= self._allowed

    async def batch(self, step: int) -> pa.Table | None:
        """The groups of a step, in order of arrival; waits for them. Asked again, by any rank or after a restart: the same rows.

        The assignment is in the log before it is answered. None: the run was closed.
        """
        async with self._new_group:
            self._learner_is_up = True
            if step not in self.log.assigned:
                begin = self.log.end
                end = begin + self.groups_per_step
                if len(self.log) < end:
                    self._learner_is("waits for groups", step)
                with self._waits["learner"]:
                    await self._new_group.wait_for(lambda: self._closed or step in self.log.assigned or len(self.log) >= end)
                if step not in self.log.assigned:
                    if self._closed:
                        self._learner_is("was told to stop")
                        return None
                    self.log.assign(step, begin, end)
            self._learner_is(f"trains step {step}")
            return self.log.read(*self.log.assigned[step])

    async def learned(self, version: int, references: Mapping[int, list[float | None]], residuals: Mapping[int, list[float | None]]) -> None:
        """What a step knows of its groups (id -> one number per completion; None: not trained on), for who replays them.

        `references`: log-probs under the reference model of `version`. `residuals`: (R - mean R) - beta (D - mean D).
        """
        if self._history is not None:
            self._history.learned(version, references, residuals)

    async def published(self, version: int, weights: Any, metrics: dict[str, Any] | None = None) -> None:
        """The learner has made `version`: opens the dial, tells the engines where the weights are and the driver how it went.

        One that came back from a checkpoint makes older versions again: engines without newer ones get those.
        """
        async with self._new_version:
            self.version = max(self.version, version)
            self._learner_version = version
            self._weights = (version, weights)
            if metrics is not None:
                self._metrics[version] = metrics
                append_line(self._orders_path.with_name(STEPS), {"step": version, "metrics": metrics})
                self._last_step_at = time.time()
            self._new_version.notify_all()
        if self._learner_from is None:  # it started before this buffer took the place of a dead one
            self._learner_from = version
        elif version > self._learner_from:
            self._learner_deaths = 0
        self._learner_is(f"has published version {version}")
        if self._history is not None:
            self._history.forget(self.version)

    async def saved(self, step: int) -> None:
        """The learner has written a checkpoint."""
        async with self._new_order:
            self._saved_step = step
            self._learner_is(f"has saved step {step}")
            self._new_order.notify_all()

    # --- engines ---------------------------------------------------------------------------------------------------

    async def weights(self, newer_than: int) -> tuple[int, Any] | None:
        """The weights that were published last, once they are newer: (version, where). None: the run was closed."""
        async with self._new_version:
            await self._new_version.wait_for(lambda: self._closed or (self._weights is not None and self._weights[0] > newer_than))
            return None if self._closed else self._weights

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
        """A checkpoint of what was published last, written now unless there is one; its step. None: the run was closed before."""
        async with self._new_order:
            wanted = self._save_wanted = self._learner_version
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

    async def waits(self) -> dict[str, float] | None:
        """Seconds, since this buffer is there, of waiting: "learner" for groups, engines with room for the "dial", the learner for the "driver".

        None: there is no learner, or it has just come back.
        """
        return {who: waits.seconds for who, waits in self._waits.items()} if self._learner_is_up else None

    async def reconnect(self, running: list[int], allowed: int, closed: bool, error: str | None) -> None:
        """What a buffer that takes the place of a dead one cannot know from the log: the groups in flight, and how far the run goes."""
        async with self._new_version:
            self._running |= {*running} - self._finished
        await self.allow(allowed)
        if closed:
            await self.close(error)

    async def status(self) -> dict[str, Any]:
        """Who waits for whom, for the watchdog and for a person who asks. Times are Unix time."""
        num_waiting = len(self.log) - self.log.end
        learner, waits_for = self._learner
        if waits_for is not None:
            learner = f"{learner}: step {waits_for} has {num_waiting} of {self.groups_per_step}"
        return {
            "version": self.version,
            "num_finished": len(self._finished),
            "num_running": len(self._running),
            "oldest_running": min(self._running, default=None),
            "num_waiting": num_waiting,
            "dial": self._dial(),
            "learner": learner,
            "learner_since": self._learner_since,
            "learner_restarts": list(self._learner_restarts),
            "last_group_at": self._last_group_at,
            "last_step_at": self._last_step_at,
            "closed": self._closed,
            "error": self.error,
        }

    def _dial(self) -> str:
        if self._may_start():
            return "open"
        if self._num_started >= self.num_steps * self.groups_per_step:
            return "all groups are started"
        return f"closed: {self._num_started} groups started, version {self.version} allows no more"


class _Waits:
    """Seconds in which at least one waited: `with waits: await …`."""

    def __init__(self) -> None:
        self._num, self._since, self._before = 0, 0.0, 0.0

    def __enter__(self) -> None:
        if self._num == 0:
            self._since = time.monotonic()
        self._num += 1

    def __exit__(self, *_: object) -> None:
        self._num -= 1
        if self._num == 0:
            self._before += time.monotonic() - self._since

    @property
    def seconds(self) -> float:
        return self._before + (time.monotonic() - self._since if self._num else 0.0)


def _lock(folder: Path) -> Any:
    """The folder's lock file, held until it is closed or its process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")  # noqa: SIM115 - lives as long as the buffer
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"another process writes to {folder}") from None
            time.sleep(0.1)
