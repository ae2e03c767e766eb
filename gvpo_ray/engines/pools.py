"""The pools of engine actors, and their supervision.

When an engine dies, `EngineGroup` starts another one. Only unfinished completions are lost: their groups
go on at other engines, with the completions that were finished.

This module imports neither torch nor vLLM, because actors import it.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError

from gvpo_ray.actors import (
    Draining,
    Fate,
    Hang,
    Note,
    RunError,
    cause_of,
    classify,
    draining_nodes,
    innermost,
    is_lost,
)
from gvpo_ray.config.engines import EnginesConfig, SamplingConfig
from gvpo_ray.engines.actor import MakeEngine
from gvpo_ray.engines.autoscale import slot_to_clear, slot_to_fill
from gvpo_ray.engines.seats import Request, Seat
from gvpo_ray.groups import to_wire
from gvpo_ray.observe.status import EngineState

MAX_FAILED_STARTS = 3
"""Number of failed starts of a seat's engine after which the run stops, if no engine of its pool has ever
started: the config is wrong then."""


class EngineGroup:
    """The engines of all pools, seen from the driver.

    `sample` gives a group to the engine with the most room. `run` keeps every seat filled with a living
    engine. All methods run on the session's event loop.

    Args:
        config: the pools, and what they have in common.
        num_completions: completions per group.
        make: makes an engine actor (actor.engine_maker).
        weights: source of newer weights: `await weights(newer_than)` -> (version, published weights), or None
            at the end of the run. None: the engines load model.path themselves.
        note: called with every recovery.
        waits: GroupBuffer.waits, seconds that the learner and others have waited, by which elastic pools grow
            and shrink. None: elastic pools have max_num engines from the beginning.
        placed: awaited before the first engine takes its place in the cluster.
    """

    def __init__(
        self,
        config: EnginesConfig,
        num_completions: int,
        make: MakeEngine,
        weights: Callable[[int], Awaitable[tuple[int, Any] | None]] | None,
        note: Note,
        waits: Callable[[], Awaitable[dict[str, float] | None]] | None = None,
        placed: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.config, self._make, self._weights, self._note, self._waits, self._placed = (
            config,
            make,
            weights,
            note,
            waits,
            placed,
        )
        self.seats = [
            Seat(name, pool, number, pool.max_groups * num_completions)
            for name, pool in config.all_pools().items()
            for number in range(max(pool.num, pool.max_num or 0))
        ]
        if waits is not None:
            # if no pool has fixed engines, the first seat stays asked for: one engine at least
            for seat in self.seats[not any(pool.num for pool in config.all_pools().values()) :]:
                if seat.is_elastic:
                    seat.is_asked, seat.state = False, EngineState.OFF
        self._num_completions = num_completions
        self._is_fixed = config.weight_transfer == "nccl"
        if self._is_fixed:  # the learner's broadcast group has to include all engines
            for seat in self.seats:
                seat.engine = make(seat.pool, seat.config, seat.number)
        self._deaths: dict[str, deque[float]] = {seat.pool: deque() for seat in self.seats}
        self._has_started: set[str] = set()
        self._waiting: list[tuple[int, int, int, bool, asyncio.Future[Seat]]] = []
        self._order = itertools.count()
        self._draining: dict[str, float] = {}
        self.room = asyncio.Event()
        """Set whenever an engine may have got room."""
        self.times: dict[str, float] = {}
        """Report of the newest weight update, as Engine.update returns it."""

    # --- sampling -------------------------------------------------------------------------------------------

    @property
    def num_slots(self) -> int:
        """Largest number of groups in flight at the engines that run."""
        return (
            sum(seat.capacity for seat in self.seats if seat.state == EngineState.RUNNING)
            // self._num_completions
        )

    def num_free(self) -> int:
        """Return the number of groups that could begin at once; negative if more than that wait already."""
        free = sum(seat.capacity - seat.load for seat in self.seats if seat.has_room)
        return free // self._num_completions - len(self._waiting)

    async def sample(
        self,
        prompt: pa.Table,
        sampling: SamplingConfig,
        min_version: int,
        seed: int | None = None,
        kept: tuple[Any, ...] = (),
        is_new: bool = False,
        only_ours: bool = False,
    ) -> Any:
        """Sample a group at the engine with the most room; return an object ref of the sampled group.

        When an engine dies or leaves, the group goes to another one, which keeps the finished completions.

        Args:
            prompt: the group's one row.
            sampling: how to sample, and how many completions the group has.
            min_version: oldest weights to start with.
            seed: seed of this group alone, or None.
            kept: tables with completions that the group already has, as Arrow IPC buffers (groups.to_wire) or
                object refs of them.
            is_new: whether this is a new group of the training; all others go first.
            only_ours: whether servers, whose weights are not the policy's, are left out.
        """
        group_id, size, since = prompt["group_id"][0].as_py(), sampling.num_completions, time.time()
        on_wire = to_wire(prompt)
        while True:
            seat = await self._seat(size, 2 if is_new else 1, only_ours)
            if seat.state != EngineState.RUNNING:  # it stopped running after it was assigned
                seat.load -= size
                self._changed()
                continue
            engine, failed = seat.engine, seat.failed
            seat.in_flight[group_id] = in_flight = Request(since, list(kept))
            try:
                sampled, numbers = engine.sample.remote(on_wire, sampling, min_version, seed, *kept)
                missing, num_tokens = await numbers
                seat.num_tokens += num_tokens
                if not missing:
                    return sampled
                kept = (sampled,)  # the engine drains, and another one goes on
            except RayError as error:
                match classify(error):
                    case Fate.LOST:
                        kept = ()  # the kept completions are lost with their node
                    case Fate.LEAVING:  # `_watch` drains the engine
                        seat.becomes(EngineState.LEAVING)
                    case Fate.DEAD:
                        kept = tuple(in_flight.kept)
                        if failed is not None and not failed.done():
                            failed.set_exception(error)
                            seat.becomes(EngineState.DEAD)
                    case Fate.BUG:
                        raise
            finally:
                del seat.in_flight[group_id]
                seat.load -= size
                self._changed()

    async def _seat(self, size: int, priority: int, only_ours: bool) -> Seat:
        """Wait for a seat with room, and reserve `size` completions there. Lower priorities go first."""
        future: asyncio.Future[Seat] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._order), size, only_ours, future))
        self._changed()
        return await future

    def _changed(self) -> None:
        """Assign waiting groups to engines with room, lowest priority number first."""
        while self._waiting:
            _, _, size, only_ours, future = self._waiting[0]
            free = [seat for seat in self.seats if seat.has_room and not (only_ours and seat.config.url)]
            if not free and not future.cancelled():
                break
            heapq.heappop(self._waiting)
            if not future.cancelled():
                seat = min(free, key=lambda seat: seat.load / seat.capacity)
                seat.load += size
                future.set_result(seat)
        self.room.set()

    # --- supervision ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep every seat that is asked for filled until the weights end.

        Raises every error that is not a dead process or node.
        """
        if self._placed is not None:
            await self._placed()
        beside = [asyncio.ensure_future(task) for task in (self._watch_nodes(), self._scale())]
        try:
            async with asyncio.TaskGroup() as tasks:
                for seat in self.seats:
                    tasks.create_task(self._keep(seat))
        finally:
            for task in beside:
                task.cancel()

    async def _scale(self) -> None:
        """Scale elastic pools: once per window add at most one engine, or remove one (autoscale.py)."""
        if self._waits is None or not any(seat.is_elastic for seat in self.seats):
            return
        before, then = await self._waits(), time.monotonic()
        while True:
            await asyncio.sleep(self.config.scale_window_s)
            waits, now = await self._waits(), time.monotonic()
            if before is not None and waits is not None:
                share = {
                    who: min(1.0, (seconds - before[who]) / (now - then)) for who, seconds in waits.items()
                }
                # no evaluation in this window, and the buffer was not restarted
                if share["driver"] == 0 and min(share.values()) >= 0:
                    self._grow_or_shrink(share["learner"], share["dial"])
            before, then = waits, now

    def _grow_or_shrink(self, waited: float, closed: float) -> None:
        if seat := slot_to_fill(self.seats, waited):
            seat.is_asked, seat.asked_at = True, time.time()
            why = f"the learner waited for groups {100 * waited:.0f} % of the time"
            self._note("pool", seat.pool, f"grows to {self._num_asked(seat.pool)} engines: {why}")
        elif seat := slot_to_clear(self.seats, waited, closed):
            seat.is_asked = False
            # not placed yet: withdraw the request for its resources
            if seat.state != EngineState.RUNNING and seat.engine is not None:
                ray.kill(seat.engine, no_restart=True)
            self._note(
                "pool",
                seat.pool,
                f"shrinks to {self._num_asked(seat.pool)} engines: the dial was closed {100 * closed:.0f} "
                "% of the time",
            )

    def _num_asked(self, pool: str) -> int:
        return sum(seat.is_asked for seat in self.seats if seat.pool == pool)

    async def _keep(self, seat: Seat) -> None:
        """Run one engine after the other in one seat, while the seat is asked for, until the weights end."""
        failed_starts = 0
        while True:
            while not seat.is_asked:
                if seat.state != EngineState.OFF:
                    seat.becomes(EngineState.OFF)
                await asyncio.sleep(SCALE_CHECK_S)
            try:
                await self._one(seat)
                return
            except (RayError, Hang, Draining) as error:
                if not seat.is_asked:  # removed by autoscaling
                    self._clear(seat)
                    continue
                cause, fate = innermost(error), classify(error)
                is_leaving = fate is Fate.LEAVING
                was_starting = seat.state in (EngineState.WANTED, EngineState.STARTING)
                # a start may fail for a reason that is gone at the next try
                may_pass = was_starting and isinstance(cause, (RuntimeError, OSError))
                if fate not in (Fate.LEAVING, Fate.DEAD) and not may_pass:
                    raise
                self._note("engine", seat.name, f"left: {cause}" if is_leaving else cause_of(error))
                failed_starts = failed_starts + 1 if was_starting else 0
                if self._is_fixed or (
                    failed_starts >= MAX_FAILED_STARTS and seat.pool not in self._has_started
                ):
                    raise
                self._clear(seat)
                if not is_leaving:
                    await self._may_restart(seat, cause_of(error))

    def _clear(self, seat: Seat) -> None:
        """Kill the seat's engine, if there is one."""
        seat.status = {}
        seat.becomes(EngineState.DEAD)
        if seat.engine is not None:
            ray.kill(seat.engine, no_restart=True)
            seat.engine = None

    async def _one(self, seat: Seat) -> None:
        """Start one engine in a seat and supervise it; return when the weights end, raise when it dies."""
        if seat.engine is None:
            seat.becomes(EngineState.WANTED)
            seat.engine = self._make(seat.pool, seat.config, seat.number)
        engine = seat.engine
        await engine.__ray_ready__.remote()
        seat.becomes(EngineState.STARTING)
        report = await engine.start_here.remote()
        seat.node = report["node"]
        self._has_started.add(seat.pool)
        seat.failed = asyncio.get_running_loop().create_future()
        lives = [self._follow(seat, engine), self._watch(seat, engine), self._collect(seat, engine)]
        tasks = [seat.failed, *map(asyncio.ensure_future, lives)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, seat: Seat, engine: Any) -> None:
        """Send newer weights to an engine until the weights end.

        The loop waits for a version newer than the engine's; the learner's publish wakes it.
        """
        if self._weights is None or seat.config.url:
            seat.becomes(EngineState.RUNNING)
            self._changed()
            await asyncio.Event().wait() if self._weights is None else await self._until_the_end()
            return
        seat.becomes(EngineState.WAITS_FOR_WEIGHTS)
        version = -1
        while (news := await self._weights(version)) is not None:
            try:
                self.times = await engine.update.remote(news[0], news[1], news[1]["probe"])
            except RayError as error:
                # the learner died, and its weights with it; its successor publishes newer ones
                if not is_lost(error):
                    raise
                await asyncio.sleep(0.5)
                continue
            version = news[0]
            if seat.state == EngineState.WAITS_FOR_WEIGHTS:
                seat.becomes(EngineState.RUNNING)
                self._changed()

    async def _until_the_end(self) -> None:
        assert self._weights is not None
        while await self._weights(1 << 60) is not None:
            pass

    async def _collect(self, seat: Seat, engine: Any) -> None:
        """Collect finished completions of unfinished groups, so that they survive the engine's death."""
        while True:
            table, group_ids = engine.hand_over.remote()
            found = await group_ids
            if not found:
                return  # the engine is closed
            for group_id in found:
                if group_id in seat.in_flight:
                    seat.in_flight[group_id].kept.append(table)

    async def _watch(self, seat: Seat, engine: Any) -> None:
        """Watch an engine for a hang, and drain it when its node is about to go or its pool shrinks.

        Raises:
            Hang: the engine writes no token, or does not answer, for engines.hang_s seconds.
            Draining: the engine is drained, and none of its groups is in flight.
        """
        hang_s = self.config.hang_s
        while True:
            try:
                seat.status = await asyncio.wait_for(engine.status.remote(), hang_s)
            except TimeoutError:
                raise Hang(f"no answer for {hang_s:g} s") from None
            silent = time.time() - seat.status["last_token_at"]
            if seat.status["num_completions"] and silent > hang_s:
                raise Hang(
                    f"no token for {silent:.0f} s with {seat.status['num_completions']} completions in flight"
                )
            if seat.node in self._draining or seat.status.get("leaving") or not seat.is_asked:
                notice = self._draining.get(seat.node, 0) - time.time()
                # Results still have to travel before the node goes.
                seconds = (
                    self.config.drain_s
                    if notice <= 0
                    else max(0.0, min(self.config.drain_s, notice - HAND_OVER_MARGIN_S))
                )
                seat.becomes(EngineState.LEAVING)
                await engine.drain.remote(seconds)
                while seat.load:
                    await asyncio.sleep(0.05)
                raise Draining(
                    f"node {seat.node[:8]} is about to go" if seat.is_asked else "its pool shrinks"
                )
            await asyncio.sleep(1 + len(self.seats) / 64)

    async def _watch_nodes(self) -> None:
        """Read Ray's drain notices once a second, as Ray Train and Serve do.

        Fills `_draining`: node id -> when the node goes, in seconds of time.time() (0: unknown).
        """
        while True:
            with contextlib.suppress(RayError):  # the cluster's head does not answer: ask again
                self._draining = await asyncio.to_thread(draining_nodes)
            await asyncio.sleep(1.0)

    async def _may_restart(self, seat: Seat, cause: str) -> None:
        """Wait before a dead engine is replaced: exponential back-off, and the pool's restarts per hour.

        Raises:
            RunError: the restarts of this hour are used up, and no engine of any pool is alive.
        """
        deaths, most = self._deaths[seat.pool], seat.config.max_restarts_per_hour
        deaths.append(time.monotonic())
        recent = sum(time.monotonic() - death < 600 for death in deaths)
        await asyncio.sleep(min(60.0, 0.5 * 2 ** min(recent, 10)) * random.uniform(0.5, 1))
        while True:
            while deaths and time.monotonic() - deaths[0] > 3600:
                deaths.popleft()
            if len(deaths) <= most:
                return
            if all(other.state in (EngineState.DEAD, EngineState.OFF) for other in self.seats):
                raise RunError(
                    f"engines of pool {seat.pool} died {len(deaths)} times within an hour "
                    f"(max_restarts_per_hour: {most}), last: {cause}"
                )
            await asyncio.sleep(1.0)

    def who_has(self, group_id: int) -> str | None:
        """Return the name of the engine that a group is in flight at, or None."""
        return next((seat.name for seat in self.seats if group_id in seat.in_flight), None)

    def status(self) -> list[dict[str, Any]]:
        """Return the status of every seat, as dicts of plain values."""
        return [
            {
                "name": seat.name,
                "pool": seat.pool,
                "state": seat.state,
                "since": seat.since,
                "node": seat.node[:8],
                "wants": seat.wants,
                "version": seat.status.get("version"),
                "num_groups": len(seat.in_flight),
                "num_tokens": seat.num_tokens,
            }
            for seat in self.seats
        ]

    async def close(self) -> None:
        """End the engines and kill their actors.

        If Ray outlives the run, the actors would otherwise keep their GPUs as long as anybody holds a handle.
        """
        engines = [seat.engine for seat in self.seats if seat.engine is not None]
        try:
            await asyncio.gather(*(engine.close.remote() for engine in engines), return_exceptions=True)
        finally:
            for engine in engines:
                ray.kill(engine, no_restart=True)


SCALE_CHECK_S = 0.5
"""Seconds between two looks at whether an empty seat of an elastic pool is asked for."""

HAND_OVER_MARGIN_S = 5.0
"""Seconds of a node's notice that are reserved for moving completions away from it."""
