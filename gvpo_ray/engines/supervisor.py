"""The supervisor starts the engines of all pools, sends them weights, and replaces those that die."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from gvpo_ray.actors import (
    Draining,
    EventCallback,
    Fate,
    Hang,
    RunError,
    UpdateFailed,
    cause_of,
    classify,
    draining_nodes,
    innermost,
    is_death,
    is_lost,
)
from gvpo_ray.config.engines import EnginesConfig
from gvpo_ray.engines.actor import MakeEngine
from gvpo_ray.engines.autoscale import slot_to_clear, slot_to_fill
from gvpo_ray.engines.base import num_rollouts
from gvpo_ray.engines.slots import Slot
from gvpo_ray.engines.turns import Sleepers, Turns
from gvpo_ray.errors import GvpoError
from gvpo_ray.files import DiskFull
from gvpo_ray.groups import from_wire
from gvpo_ray.observe.status import EngineState

Weights = Callable[[int], Awaitable[tuple[int, Any] | None]]
"""A source of newer weights: `await weights(newer_than)` -> (version, published weights), or None at the end
of the run."""

Waits = Callable[[], Awaitable[dict[str, float] | None]]
"""Returns the seconds that the learner and others have waited (GroupBuffer.waits), or None."""

MAX_FAILURES = 3
"""Number of failures in a row of one slot's engines after which the run stops, if all others fail as well: a
start, while no engine of the pool has ever started; or an update or a prompt, while no engine of ours has
taken newer weights or returned a completion. Config, weights or prompts are wrong then, and not an engine.
A disk that is full does not empty by itself: one failure of each engine is enough then."""

NODE_CHECK_S = 0.5
"""Seconds between two looks at the nodes that Ray will remove."""

SCALE_CHECK_S = 0.5
"""Seconds between two looks at whether an empty slot of an elastic pool is wanted."""

RETRY_S = 10.0
"""Seconds after which work beside the engines is tried again when it has failed."""

MIGRATION_MARGIN_S = 5.0
"""Seconds of a node's notice that are reserved for moving completions away from it."""


class Supervisor:
    """The Supervisor keeps every slot that is wanted filled with a living engine.

    Args:
        config: the pools, and what they have in common.
        slots: of all pools.
        make: makes an engine actor (actor.engine_maker).
        weights: source of newer weights. None: the engines load model.path themselves.
        note: called with every recovery.
        waits: the waiting times by which elastic pools grow and shrink. None: they do not.
        turns: on GPUs that engines and learner share; None: they share none.
        changed: called when an engine has come that groups may be assigned to.
    """

    def __init__(
        self,
        config: EnginesConfig,
        slots: Sequence[Slot],
        make: MakeEngine,
        weights: Weights | None,
        note: EventCallback,
        waits: Waits | None,
        turns: Turns | None,
        changed: Callable[[], None],
    ) -> None:
        self._sleepers = Sleepers(slots, turns)
        self._config, self._slots, self._make, self._weights = config, slots, make, weights
        self._note, self._waits, self._changed = note, waits, changed
        self._is_fixed = config.weight_transfer != "objects"
        if self._is_fixed:  # the learner sends to all engines at once
            with contextlib.ExitStack() as made:
                for slot in slots:
                    made.callback(slot.clear)
                    slot.fill(make)
                made.pop_all()
        self._has_started: set[str] = set()
        self._newest_taken = -1
        self._num_collected = 0  # completions of unfinished groups
        self._done_before: tuple[int, ...] = ()  # what engines of ours had done when the last one failed
        self._draining: dict[str, float] = {}
        self.times: dict[str, float] = {}
        """Report of the newest weight update, as Engine.update returns it."""

    async def run(self) -> None:
        """Keep every wanted slot filled until the weights end.

        The first error of any task that is not a dead process or node ends all of them.

        Raises:
            ExceptionGroup: with that error.
        """
        async with asyncio.TaskGroup() as tasks:
            works = {
                "reading preemption notices": self._watch_nodes,
                "autoscaling": self._scale,
                "taking turns with the learner": self._sleepers.run,
            }
            beside = [tasks.create_task(self._go_on(what, work)) for what, work in works.items()]
            async with asyncio.TaskGroup() as keepers:
                for slot in self._slots:
                    keepers.create_task(self._keep(slot))
            for task in beside:
                task.cancel()

    # --- one slot -------------------------------------------------------------------------------------------

    async def _keep(self, slot: Slot) -> None:
        """Run one engine after the other in one slot, while the slot is wanted, until the weights end."""
        while True:
            while not slot.is_wanted:
                if slot.state != EngineState.OFF:
                    slot.becomes(EngineState.OFF)
                await asyncio.sleep(SCALE_CHECK_S)
            try:
                await self._one(slot)
                return
            except (RayError, Hang, Draining, UpdateFailed) as error:
                if not slot.is_wanted:  # removed by autoscaling
                    self._clear(slot)
                    continue
                cause, fate = innermost(error), classify(error)
                is_leaving = fate is Fate.LEAVING
                was_starting = slot.state in (EngineState.WANTED, EngineState.STARTING)
                # a start may fail for a reason that is gone at the next try
                may_pass = was_starting and isinstance(cause, (RuntimeError, OSError))
                if fate not in (Fate.LEAVING, Fate.DEAD) and not may_pass:
                    raise
                self._note("engine", slot.name, f"left: {cause}" if is_leaving else cause_of(error))
                if self._is_fixed or self._is_hopeless(slot, cause, was_starting):
                    raise
                self._clear(slot)
                if not is_leaving:
                    await self._may_restart(slot, cause_of(error))

    def _is_hopeless(self, slot: Slot, cause: BaseException, was_starting: bool) -> bool:
        """Count a failure of the slot's engine; return whether all engines fail, and not this one alone.

        A process or node that is lost, or leaves, says nothing of the others, and a server's silence may
        pass.
        """
        tries = 1 if _is_full_disk(cause) else MAX_FAILURES
        if was_starting:
            slot.failed_starts += 1
            of_pool = [other for other in self._slots if other.pool == slot.pool]
            return slot.pool not in self._has_started and _all_fail(slot, of_pool, "failed_starts", tries)
        slot.failed_starts = 0
        if isinstance(cause, (Draining, RayError)) or not slot.is_ours:
            return False
        ours = [other for other in self._slots if other.is_ours]
        done = self._newest_taken, self._num_collected, sum(other.num_tokens for other in ours)
        if done != self._done_before:
            self._done_before = done
            for other in ours:
                other.failures = 0
        slot.failures += 1
        return _all_fail(slot, ours, "failures", tries)

    def _clear(self, slot: Slot) -> None:
        """Kill the slot's engine, if there is one."""
        slot.status = {}
        slot.becomes(EngineState.DEAD)
        slot.clear()

    async def _one(self, slot: Slot) -> None:
        """Start one engine in a slot and supervise it; return when the weights end, raise when it dies."""
        if slot.engine is None:
            slot.becomes(EngineState.WANTED)
            slot.fill(self._make)
        engine = slot.engine
        await engine.__ray_ready__.remote()
        slot.becomes(EngineState.STARTING)
        start_s = self._config.start_s
        why = f"not started within {start_s:g} s (engines.start_s)"
        async with self._sleepers.awake(slot):
            slot.node = (await _within(start_s, engine.start_here.remote(), why))["node"]
            slot.becomes(EngineState.WAITS_FOR_WEIGHTS)
        self._has_started.add(slot.pool)
        slot.failed = asyncio.get_running_loop().create_future()
        slot.leaves.clear()
        if slot.node in self._draining or not slot.is_wanted:
            slot.leaves.set()
        lives = (self._follow, self._watch, self._collect, self._leave)
        tasks = [slot.failed, *(asyncio.ensure_future(live(slot, engine)) for live in lives)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, slot: Slot, engine: Any) -> None:
        """Send newer weights to an engine until the weights end.

        The loop waits for a version newer than the engine's; the learner's publish wakes it.

        Raises:
            UpdateFailed: the engine cannot take the weights, and another one may.
        """
        if self._weights is None or not slot.is_ours:
            slot.becomes(EngineState.RUNNING)
            self._changed()
            await asyncio.Event().wait() if self._weights is None else await self._until_the_end()
            return
        slot.becomes(EngineState.WAITS_FOR_WEIGHTS)
        version = -1
        while (news := await self._weights(version)) is not None:
            try:
                async with self._sleepers.awake(slot):
                    taken = await engine.update.remote(news[0], news[1], news[1]["probe"])
                    # of the engines that take a version, the one that is furthest from the learner is told of
                    said = self.times.get("parity_mean") if news[0] == self._newest_taken else None
                    if said is not None:
                        taken = {**taken, "parity_mean": max(said, taken.get("parity_mean", said))}
                    self.times = taken
            except RayError as error:
                # the learner died, and its weights with it; its successor publishes newer ones
                if is_lost(error):
                    await asyncio.sleep(0.5)
                    continue
                if _is_its_own(error):
                    raise UpdateFailed(f"version {news[0]}: {cause_of(error)}") from error
                raise
            version = news[0]
            self._newest_taken = max(version, self._newest_taken)
            if slot.state == EngineState.WAITS_FOR_WEIGHTS:
                slot.becomes(EngineState.RUNNING)
                self._changed()

    async def _until_the_end(self) -> None:
        assert self._weights is not None
        while await self._weights(1 << 60) is not None:
            pass

    async def _collect(self, slot: Slot, engine: Any) -> None:
        """Bring finished completions of unfinished groups to the driver, where they survive the node."""
        while True:
            group_ids, table = await engine.take_finished.remote()
            if not group_ids:
                return  # the engine is closed
            self._num_collected += len(group_ids)
            rows = from_wire(table)
            counts = [num_rollouts(rows.slice(i, 1)) for i in range(len(rows))]
            for group_id, num in zip(group_ids, counts, strict=True):
                if group_id in slot.in_flight:
                    slot.in_flight[group_id].kept.append(table)
                    # one long completion does not keep the places of its siblings
                    slot.in_flight[group_id].num_freed += num
                    slot.load -= num
            self._changed()

    async def _watch(self, slot: Slot, engine: Any) -> None:
        """Watch an engine for a hang, and keep its newest status.

        Raises:
            Hang: the engine writes no token, takes no weights or does not answer for engines.hang_s seconds.
        """
        hang_s = self._config.hang_s
        while True:
            slot.status = await _within(hang_s, engine.status.remote(), f"no answer for {hang_s:g} s")
            silent, num = time.time() - slot.status["last_token_at"], slot.status["num_completions"]
            if num and silent > hang_s:
                raise Hang(f"no token for {silent:.0f} s with {num} completions in flight")
            if slot.status.get("updating") and silent > hang_s:
                raise Hang(f"new weights are not in place after {silent:.0f} s")
            if slot.status.get("leaving"):
                slot.leaves.set()
            # The more engines, the more seldom each: one second's answers must not fill the driver's loop.
            await asyncio.sleep(1 + len(self._slots) / 64)

    async def _leave(self, slot: Slot, engine: Any) -> None:
        """Wait until the engine has to leave, and drain it.

        Raises:
            Draining: the engine is drained, and none of its groups is in flight.
            Hang: the drain does not end.
        """
        await slot.leaves.wait()
        notice = self._draining.get(slot.node, 0) - time.time()
        # Results still have to travel before the node goes.
        seconds = (
            self._config.drain_s
            if notice <= 0
            else max(0.0, min(self._config.drain_s, notice - MIGRATION_MARGIN_S))
        )
        slot.becomes(EngineState.LEAVING)
        limit = seconds + self._config.hang_s

        async def drained() -> None:
            await engine.drain.remote(seconds)
            while slot.load or slot.in_flight:
                await asyncio.sleep(0.05)

        await _within(limit, drained(), f"not drained within {limit:g} s")
        raise Draining(f"node {slot.node[:8]} is about to go" if slot.is_wanted else "its pool shrinks")

    async def _may_restart(self, slot: Slot, cause: str) -> None:
        """Wait before a dead engine is replaced: exponential back-off, and the slot's restarts per hour.

        Raises:
            RunError: this slot's restarts of this hour are used up, and so are those of all others.
        """
        slot.deaths.append(time.monotonic())
        recent = sum(time.monotonic() - death < 600 for death in slot.deaths)
        await asyncio.sleep(min(60.0, 0.5 * 2 ** min(recent, 10)) * random.uniform(0.5, 1))
        while slot.is_used_up and slot.is_wanted:
            if all(
                other.state == EngineState.OFF or (other.state == EngineState.DEAD and other.is_used_up)
                for other in self._slots
            ):
                raise RunError(
                    f"engine {slot.name} died {len(slot.deaths)} times within an hour "
                    f"(max_restarts_per_hour: {slot.config.max_restarts_per_hour}), last: {cause}"
                )
            await asyncio.sleep(1.0)

    # --- all slots ------------------------------------------------------------------------------------------

    async def _go_on(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do work beside the engines, and again after an error that may pass, which is said.

        Files and the cluster may be out of reach for a while. Any other error is a mistake in the code, and
        ends the run with its cause.
        """
        while True:
            try:
                return await work()
            except (OSError, RayError) as error:
                self._note("pool", what, f"failed and is tried again: {cause_of(error)}")
                await asyncio.sleep(RETRY_S)

    async def _watch_nodes(self) -> None:
        """Read Ray's preemption notices, as Ray Train and Serve do, and tell the engines of those nodes."""
        while True:
            with contextlib.suppress(RayError):  # the cluster's head does not answer: ask again
                self.nodes_leave(await asyncio.to_thread(draining_nodes))
            await asyncio.sleep(NODE_CHECK_S)

    def nodes_leave(self, draining: dict[str, float]) -> None:
        """Let all engines of these nodes leave at once.

        Args:
            draining: node id -> when the node goes, in seconds of time.time() (0: unknown).
        """
        self._draining = draining
        for slot in self._slots:
            if slot.node in draining:
                slot.leaves.set()

    async def _scale(self) -> None:
        """Scale elastic pools: once per window add at most one engine, or remove one (autoscale.py)."""
        if self._waits is None or not any(slot.is_elastic for slot in self._slots):
            return
        before, then = await self._waits(), time.monotonic()
        while True:
            await asyncio.sleep(self._config.scale_window_s)
            waits, now = await self._waits(), time.monotonic()
            if before is not None and waits is not None:
                share = {
                    who: min(1.0, (seconds - before[who]) / (now - then)) for who, seconds in waits.items()
                }
                # no evaluation in this window, and the buffer was not restarted
                if share["driver"] == 0 and min(share.values()) >= 0:
                    self._grow_or_shrink(share["learner"], share["bound"])
            before, then = waits, now

    def _grow_or_shrink(self, waited: float, closed: float) -> None:
        if slot := slot_to_fill(self._slots, waited):
            slot.is_wanted, slot.wanted_at = True, time.time()
            why = f"the learner waited for groups {100 * waited:.0f} % of the time"
            self._note("pool", slot.pool, f"grows to {self._num_wanted(slot.pool)} engines: {why}")
        elif slot := slot_to_clear(self._slots, waited, closed):
            slot.is_wanted = False
            slot.leaves.set()
            # not placed yet: withdraw the request for its resources
            if slot.state != EngineState.RUNNING and slot.engine is not None:
                ray.kill(slot.engine, no_restart=True)
            why = f"the staleness bound was closed {100 * closed:.0f} % of the time"
            self._note("pool", slot.pool, f"shrinks to {self._num_wanted(slot.pool)} engines: {why}")

    def _num_wanted(self, pool: str) -> int:
        return sum(slot.is_wanted for slot in self._slots if slot.pool == pool)


async def _within(seconds: float, answer: Awaitable[Any], why: str) -> Any:
    """Return an engine's answer; raise Hang, with this reason, if there is none within `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            return await answer
    except TimeoutError as error:
        if isinstance(error, RayError):  # the engine's own
            raise
        raise Hang(why) from None


def _is_its_own(error: RayError) -> bool:
    """Return whether a failed update may be the engine's own failure: its disk, its memory, its vLLM core.

    It is not if the weights do not match, which every engine would say.
    """
    cause = innermost(error)
    # vLLM's core sends errors of its own as plain Exceptions.
    is_vllms = isinstance(cause, RuntimeError) and not isinstance(cause, GvpoError)
    may_be = isinstance(cause, OSError) or is_vllms or type(cause) is Exception
    return may_be and not is_death(error)


def _is_full_disk(cause: BaseException) -> bool:
    """Return whether a failure, or what a failed update failed of, is a full disk."""
    failed = cause.__cause__ if isinstance(cause, UpdateFailed) else cause
    return failed is not None and isinstance(innermost(failed), DiskFull)


def _all_fail(slot: Slot, fellows: Sequence[Slot], count: str, tries: int) -> bool:
    """Return whether a slot has failed `tries` times, and each of its fellows that has a place once."""
    here = (each for each in fellows if each.state not in (EngineState.OFF, EngineState.WANTED))
    return getattr(slot, count) >= tries and all(getattr(each, count) for each in here)
