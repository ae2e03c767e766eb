"""Engines sample completions: Engine (vLLM's AsyncLLM), ServerEngine (an OpenAI-compatible API) and
FakeEngine behind the same few methods.

    generate(group, sampling, min_version, seed, *kept)   group table -> (group table with its completions,
                                                          how many it lacks)
    finished()                                            what is finished of groups that are not, to be kept
                                                          safe elsewhere
    update(version, weights, probe)                       swap in newer weights while completions are in
                                                          flight
    drain(seconds) / status() / close()

Plain classes; actor.py makes them actors, one event loop each, many groups in flight. Importing this imports
neither torch nor vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.actors import Draining
from gvpo_ray.config.engines import SamplingConfig

HAND_OVER_S = 1.0
"""A completion that has been finished for so long while its group is not is handed over: it then outlives the
engine. What is due goes together, as often: one by one would cost short groups more than to sample them."""

LAST_WORDS_S = 2.0
"""Between the end of a drain after SIGTERM and the end of the process: what the last calls returned is still
on its way."""

ABORTED = "abort"
"""finish_reason of a completion that was cut off by a drain: another engine goes on with its tokens."""


@dataclass(eq=False)
class InFlight:
    """One group that an engine is at."""

    group: pa.Table
    size: int
    """Completions that are being sampled: without the kept ones that were finished before."""
    since: float = field(default_factory=lambda: time.time())
    finished_at: dict[int, float] = field(default_factory=dict)
    """By index. FakeEngine knows them beforehand."""
    handed_over: set[int] = field(default_factory=set)

    def finished(self, before: float) -> list[int]:
        return [i for i, at in self.finished_at.items() if at <= before]


class BaseEngine:
    """What engines have in common: which groups are in flight, what of them is handed over, and how they
    leave.

    Args:
        drain_s: where given, SIGTERM (a node that is about to go) makes the engine drain for so long and then
            ends the process.
    """

    def __init__(self, drain_s: float | None = None) -> None:
        self._drain_s = drain_s
        self.version = -1
        self._is_leaving = self._is_draining = self._is_closed = self._is_updating = False
        self._begin = asyncio.Condition()  # notified when groups that wait may begin, or have to go elsewhere
        self._in_flight: dict[InFlight, None] = {}  # the oldest first
        self._num_tokens = 0
        self._last_token_at = time.time()

    async def finished(self) -> tuple[list[int], pa.Table]:
        """Completions that were finished HAND_OVER_S ago, of groups that are not, each once: their group ids,
        and a row for each.

        Waits until there are some; none come after close().
        """
        columns = [*groups.PROMPT_COLUMNS, *groups.COMPLETION_COLUMNS]
        while not self._is_closed:
            await asyncio.sleep(HAND_OVER_S)
            due = time.time() - HAND_OVER_S
            found = []
            for running in self._in_flight:
                if running.since > due:  # and so are the rest
                    break
                if new := [i for i in running.finished(due) if i not in running.handed_over]:
                    running.handed_over.update(new)
                    found.append(self._table(running, new).select(columns))
            if found:
                table = pa.concat_tables(found)
                return table["group_id"].to_pylist(), table
        return [], groups.empty(columns)

    async def drain(self, seconds: float) -> None:
        """Take no new work, go on for `seconds` with what is in flight and then cut it off; returns when
        nothing is in flight.
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
        """What it is at; `last_token_at` is also when it last had nothing to do, or got new weights."""
        now = time.time()
        num_completions = sum(running.size - len(running.finished(now)) for running in self._in_flight)
        oldest = next(iter(self._in_flight), None)
        return {
            "version": self.version,
            "num_groups": len(self._in_flight),
            "num_completions": num_completions,
            "num_tokens": self._num_tokens,
            "last_token_at": self._last_token_at if num_completions else now,
            "oldest": oldest and {"group_id": oldest.group["group_id"][0].as_py(), "since": oldest.since},
            "updating": self._is_updating,
            "leaving": self._is_leaving,
            "pid": os.getpid(),
        }

    async def close(self) -> None:
        self._is_closed = True

    async def _may_begin(self, min_version: int = -1) -> None:
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
        """To be called on the engine's loop.

        Python runs its signal handlers in the main thread alone, and lets nobody else set one up. In an async
        Ray actor no method, the constructor included, runs there, and the thread itself waits in C++.
        faulthandler's handler is C, for whoever sets it up, and writes to a file: here a pipe that the loop
        reads.
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
        await asyncio.sleep(LAST_WORDS_S)
        await self.close()
        os._exit(0)

    def _table(self, running: InFlight, which: Sequence[int]) -> pa.Table:
        """The group with these of its new completions, in this order."""
        raise NotImplementedError

    async def _cut_off(self) -> None:
        """Make what is in flight return with what it has."""
        raise NotImplementedError


def sort_out(kept: Sequence[pa.Table], size: int) -> tuple[list[pa.Table], list[dict[str, Any]], int]:
    """One-row tables with completions of a group of `size` -> (those that are finished, those to go on with,
    how many there are to sample).
    """
    done: list[pa.Table] = []
    begun: list[dict[str, Any]] = []
    for part in kept:
        reasons = part["finish_reasons"][0].as_py()
        finished = [i for i, reason in enumerate(reasons) if reason != ABORTED]
        if begun:  # a later part may have one whole that an earlier one has the beginning of
            for ids in groups.take(part, finished)["completion_ids"][0].as_py():
                of_it = [row for row in begun if ids[: len(row["completion_ids"])] == row["completion_ids"]]
                if of_it:
                    begun.remove(max(of_it, key=lambda row: len(row["completion_ids"])))
        if finished:
            done.append(part if len(finished) == len(reasons) else groups.take(part, finished))
        if len(finished) < len(reasons):
            (row,) = groups.rows(part)
            begun += [
                {name: row[name][i] for name in groups.COMPLETION_COLUMNS}
                for i, reason in enumerate(reasons)
                if reason == ABORTED
            ]
    num_new = max(0, size - sum(len(part["completions"][0]) for part in done))
    return done, begun[:num_new], num_new


def seed_beside(kept: Sequence[pa.Table], sampling: SamplingConfig, seed: int | None) -> int | None:
    """A group's seed beside what is kept of it: with the seeds that this was drawn with (seed, seed + 1, …)
    it would come again.
    """
    if seed is None or not kept:
        return seed
    return seed + sampling.num_completions * sum(
        len(ids) for part in kept for ids in part["completion_ids"][0].as_py()
    )
