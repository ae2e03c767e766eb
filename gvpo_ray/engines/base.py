"""Engines sample completions; their base class is here.

Engine (vLLM's AsyncLLM), ServerEngine (an OpenAI-compatible API) and FakeEngine have the same few methods:

    generate(group, sampling, min_version, seed, *kept)   group table -> (group table with its completions,
                                                          number of completions that are missing)
    finished()                                            finished completions of unfinished groups, to be
                                                          kept safe elsewhere
    update(version, weights, probe)                       swap in newer weights while completions are in
                                                          flight
    drain(seconds) / status() / close()

Engines are plain classes; actor.py makes them Ray actors, each with one event loop and many groups in flight.
This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.actors import Draining
from gvpo_ray.config.engines import SamplingConfig

MIGRATE_AFTER_S = 1.0
"""Age in seconds at which a finished completion of an unfinished group leaves the engine, so that it survives
the engine's death. It is also the interval between two such batches: sending completions one by one would
cost short groups more than sampling them."""

FLUSH_S = 2.0
"""Seconds between the end of a drain after SIGTERM and the end of the process, in which the results of the
last calls reach their callers."""

OPTIONAL_COLUMNS = (*groups.MASK_COLUMNS, *groups.EPISODE_COLUMNS, *groups.EXPERT_COLUMNS)
"""Columns that only some completions have."""

ABORTED = "abort"
"""finish_reason of a completion that a drain cut off; another engine continues it from its tokens."""


@dataclass(eq=False)
class InFlight:
    """InFlight is a group that an engine is sampling."""

    group: pa.Table
    """One row, without completions."""
    size: int
    """Number of completions that are being sampled; those that were finished before do not count."""
    since: float = field(default_factory=lambda: time.time())
    """When sampling began, in seconds of time.time()."""
    finished_at: dict[int, float] = field(default_factory=dict)
    """Index of a completion -> when it was finished. FakeEngine fills it in beforehand."""
    migrated: set[int] = field(default_factory=set)
    """Indices of the completions that `BaseEngine.finished` has returned."""

    def finished(self, before: float) -> list[int]:
        """Return the indices of the completions that were finished at the time `before` or earlier."""
        return [i for i, at in self.finished_at.items() if at <= before]


class Work(NamedTuple):
    """Work is what an engine has to sample of a group, besides the completions that are finished."""

    group: pa.Table
    """One row, without completions."""
    size: int
    """Number of completions to sample."""
    begun: list[dict[str, Any]]
    """Completion columns of those that another engine was cut off at; the first ones continue them."""
    sampling: SamplingConfig
    seed: int | None
    done: list[str]
    """Entries of the column `episodes` of the completions that are finished, as far as they are episodes."""


class BaseEngine(abc.ABC):
    """BaseEngine is what all engines share: groups in flight, migration of finished completions, draining.

    Args:
        drain_s: seconds to drain after SIGTERM (the node is about to go), before the process ends. None:
            SIGTERM is left alone.
    """

    def __init__(self, drain_s: float | None = None) -> None:
        self._drain_s = drain_s
        self.version = -1
        self._is_leaving = self._is_draining = self._is_closed = self._is_updating = self._is_asleep = False
        self._begin = asyncio.Condition()  # notified when waiting groups may begin, or must go elsewhere
        self._in_flight: dict[InFlight, None] = {}  # the oldest first
        self.refusals: dict[int, str] = {}
        """Group id -> why a server refuses to sample (the rest of) a group that `generate` has returned."""
        self.num_prompt_tokens = self.num_cached_tokens = 0
        """Tokens of all prompts so far, and those of them whose keys and values were in the prefix cache."""
        self._num_tokens = 0
        self._last_token_at = time.time()

    async def finished(self) -> tuple[list[int], pa.Table]:
        """Wait for completions, finished MIGRATE_AFTER_S ago, of unfinished groups; return each of them once.

        Returns:
            Group ids and a table with one row per group id: the prompt columns, and the completions that are
            new since the last call. Both are empty once the engine is closed.
        """
        columns = [*groups.PROMPT_COLUMNS, *groups.COMPLETION_COLUMNS]
        wanted = {*columns, *OPTIONAL_COLUMNS, *groups.REWARD_COLUMNS}
        while not self._is_closed:
            await asyncio.sleep(MIGRATE_AFTER_S)
            due = time.time() - MIGRATE_AFTER_S
            found = []
            for running in self._in_flight:
                if running.since > due:  # the rest began even later
                    break
                if new := [i for i in running.finished(due) if i not in running.migrated]:
                    running.migrated.update(new)
                    table = self._table(running, new)
                    found.append(table.select([name for name in table.column_names if name in wanted]))
            if found:
                table = pa.concat_tables(found)
                return table["group_id"].to_pylist(), table
        return [], groups.empty(columns)

    async def drain(self, seconds: float) -> None:
        """Take no new groups, and return when none is in flight.

        Groups in flight may go on for `seconds`; then they are cut off.
        """
        self._is_draining = True
        async with self._begin:
            self._begin.notify_all()
        end = time.monotonic() + seconds
        while self._in_flight:
            if (left := end - time.monotonic()) <= 0:
                await self._cut_off()  # again and again: a request may be on its way to vLLM
            await asyncio.sleep(min(0.05, max(left, 0.01)))

    async def status(self) -> dict[str, Any]:
        """Return what the engine is doing, as a dict of plain values.

        `last_token_at` (seconds of time.time()) is when the newest token was written. It is now while the
        engine has nothing to do, and it moves when groups arrive at an idle engine or new weights come.
        """
        now = time.time()
        num_completions = sum(running.size - len(running.finished(now)) for running in self._in_flight)
        has_work = num_completions > 0 and self._is_sampling() and not self._is_asleep
        oldest = next(iter(self._in_flight), None)
        return {
            "version": self.version,
            "num_groups": len(self._in_flight),
            "num_completions": num_completions,
            "num_tokens": self._num_tokens,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "last_token_at": self._last_token_at if self._is_updating or has_work else now,
            "oldest": oldest and {"group_id": oldest.group["group_id"][0].as_py(), "since": oldest.since},
            "updating": self._is_updating,
            "leaving": self._is_leaving,
            "pid": os.getpid(),
        }

    def _is_sampling(self) -> bool:
        """Return whether completions in flight wait for the engine, and not for what is outside of it."""
        return True

    async def close(self) -> None:
        """End the engine; a call of `finished` that waits returns nothing."""
        self._is_closed = True

    async def _may_begin(self, min_version: int = -1) -> None:
        """Wait for weights of at least `min_version`; raise Draining if the engine drains."""
        async with self._begin:
            await self._begin.wait_for(lambda: self.version >= min_version or self._is_draining)
        if self._is_draining:
            raise Draining("this engine is about to leave and takes no new work")

    async def _has_version(self, version: int) -> None:
        async with self._begin:
            self.version, self._last_token_at = version, time.time()
            self._begin.notify_all()

    @contextlib.contextmanager
    def _at_work(self, running: InFlight) -> Iterator[None]:
        if not self._in_flight:
            self._last_token_at = running.since
        self._in_flight[running] = None
        try:
            yield
        finally:
            del self._in_flight[running]

    def _leave_on_sigterm(self) -> None:
        """Drain on SIGTERM. Must be called on the engine's event loop.

        Python runs its signal handlers in the main thread alone, and only that thread may set one up. In an
        async Ray actor no method runs in the main thread, not even the constructor, because that thread waits
        in C++. faulthandler's handler is written in C, any thread may set it up, and it writes to a file:
        here a pipe that the event loop reads.
        """
        if self._drain_s is not None:
            reader, writer = os.pipe()
            asyncio.get_running_loop().add_reader(reader, self._leave, reader)
            faulthandler.register(signal.SIGTERM, file=writer, all_threads=False)

    def _leave(self, reader: int) -> None:
        os.read(reader, 65536)
        if not self._is_leaving:
            self._is_leaving = True
            self._leaving = asyncio.ensure_future(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        assert self._drain_s is not None
        await self.drain(self._drain_s)
        await asyncio.sleep(FLUSH_S)
        await self.close()
        os._exit(0)

    @abc.abstractmethod
    async def start(self) -> dict[str, Any]:
        """Start the engine; return `seconds`, how long that took, and `pid`."""

    async def generate(
        self,
        group: pa.Table,
        sampling: SamplingConfig,
        min_version: int = 0,
        seed: int | None = None,
        *kept: pa.Table,
    ) -> tuple[pa.Table, int]:
        """Sample the completions of one group.

        Args:
            group: one row with the prompt columns.
            sampling: how to sample, and how many completions the group has.
            min_version: oldest weights to start with; the call waits for them.
            seed: seed of this group alone, so that its samples do not depend on what else is sampled.
            kept: tables of one row with completions that the group already has. Finished ones come first and
                are not sampled again; those that were cut off ("abort") are continued.

        Returns:
            The group with its completions, and how many of them another engine has to sample or to continue:
            0, unless this one was drained meanwhile.

        Raises:
            Draining: the engine takes no new work; another one has to sample the group.
        """
        await self._may_begin(min_version)
        done, begun, num_new = split_kept(kept, sampling.num_completions)
        entries = [part["episodes"][0].as_py() for part in done if "episodes" in part.column_names]
        episodes = [entry for of_part in entries for entry in of_part or ()]  # null: they are no episodes
        work = Work(group, num_new, begun, sampling, seed_beside(kept, sampling, seed), episodes)
        table, missing = await self._rest(work)
        table = groups.join(group, *done, table) if kept else table
        return table if missing else self._whole(table), missing

    def _whole(self, table: pa.Table) -> pa.Table:
        """Return a group, of which nothing is missing, as it is handed over."""
        return table

    @abc.abstractmethod
    async def _rest(self, work: Work) -> tuple[pa.Table, int]:
        """Sample what is missing of a group.

        The group is in flight meanwhile (`_at_work`). Returns what `generate` returns, without the
        completions that were finished before.
        """

    @abc.abstractmethod
    async def update(
        self, version: int, weights: dict[str, Any], probe: dict[str, Any] | None = None
    ) -> dict[str, float]:
        """Fetch newer weights and swap them in.

        Args:
            version: the new version.
            weights: what the learner published.
            probe: sequences with the learner's log-probs, to compare this engine's with.

        Returns:
            `copy_s` and `pause_s`, the seconds of the copy (generation goes on) and of the pause (it stops),
            and with a probe `parity_mean`, `parity_rms` and `parity_max`, differences of log-probs in nats
            per token.
        """

    async def sleep(self) -> None:
        """Free the GPU's memory for a learner that shares the GPU; groups in flight stand still."""
        self._is_asleep = True

    async def wake(self) -> None:
        """Take the GPU's memory again, and go on with the groups in flight."""
        self._is_asleep, self._last_token_at = False, time.time()

    @abc.abstractmethod
    def _table(self, running: InFlight, which: Sequence[int]) -> pa.Table:
        """Return the group's row with its new completions of the indices `which`, in this order."""

    @abc.abstractmethod
    async def _cut_off(self) -> None:
        """Make the groups in flight return with the tokens that they have."""


def split_kept(kept: Sequence[pa.Table], size: int) -> tuple[list[pa.Table], list[dict[str, Any]], int]:
    """Split the completions that a group already has into finished ones and cut-off ones.

    Args:
        kept: tables of one row each, with completions of the same group.
        size: number of completions that the group shall have.

    Returns:
        Tables with the finished completions, the cut-off ones (a dict of the completion columns each) to be
        continued, and the number of completions that are still to be sampled, the continued ones included.
    """
    done: list[pa.Table] = []
    begun: list[dict[str, Any]] = []
    for part in kept:
        reasons = part["finish_reasons"][0].as_py()
        finished = [i for i, reason in enumerate(reasons) if reason != ABORTED]
        if begun:  # a later part may hold the whole of a completion whose beginning an earlier part holds
            for ids in groups.take(part, finished)["completion_ids"][0].as_py():
                of_it = [row for row in begun if ids[: len(row["completion_ids"])] == row["completion_ids"]]
                if of_it:
                    begun.remove(max(of_it, key=lambda row: len(row["completion_ids"])))
        if finished:
            done.append(part if len(finished) == len(reasons) else groups.take(part, finished))
        if len(finished) < len(reasons):
            (row,) = groups.rows(part)
            begun += [
                {
                    name: row[name][i]
                    for name in (*groups.COMPLETION_COLUMNS, *OPTIONAL_COLUMNS)
                    if row.get(name) is not None
                }
                for i, reason in enumerate(reasons)
                if reason == ABORTED
            ]
    num_new = max(0, size - sum(map(num_rollouts, done)))
    return done, begun[:num_new], num_new


def num_rollouts(part: pa.Table) -> int:
    """Return the number of completions of a one-row table, all branches of an episode as one."""
    entries = (part["episodes"][0].as_py() if "episodes" in part.column_names else None) or ()
    return len(part["completions"][0]) - sum('"branch"' in entry for entry in entries if entry)


def seed_beside(kept: Sequence[pa.Table], sampling: SamplingConfig, seed: int | None) -> int | None:
    """Return the seed for the rest of a group of which some completions are kept.

    The kept completions were drawn with seed, seed + 1 and so on; the same seeds would draw them again. So
    the seed moves on by the number of completions times the number of kept tokens.
    """
    if seed is None or not kept:
        return seed
    return seed + sampling.num_completions * sum(
        len(ids) for part in kept for ids in part["completion_ids"][0].as_py()
    )
