"""The actors: engines in pools, verifiers, reward models, the buffer. The only file that makes them.

An engine that dies costs its unfinished completions: `EngineGroup` replaces it, and what it had in flight goes on elsewhere with the
siblings that were finished. A verifier that dies is started again by Ray, and so is the buffer, which rebuilds itself from its log.

Actors import this file: it imports neither torch nor vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import inspect
import itertools
import os
import random
import re
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from gvpo_ray.buffer import GroupBuffer
from gvpo_ray.config import EnginesConfig, LearnerConfig, ModelConfig, PoolConfig, RewardConfig, SamplingConfig, VerifiersConfig
from gvpo_ray.elastic import one_less, one_more
from gvpo_ray.engines import Draining, Engine
from gvpo_ray.groups import from_wire, num_completion_tokens, to_wire
from gvpo_ray.reward_model import RewardModel
from gvpo_ray.rewards import Rewards
from gvpo_ray.server import ServerEngine
from gvpo_ray.verifiers import Verifier


class RunError(RuntimeError):
    """The run has stopped; the message is the first cause."""


class Hang(RuntimeError):
    """An engine writes no token, or does not answer."""


Note = Callable[[str, str, str], None]
"""note(who, name, why): somebody died and was replaced, such as ("engine", "engines-0", "EngineDeadError: …")."""


def actor_name(text: str) -> str:
    """An actor's name on the dashboard. Ray wants each once: the one of a run that was stopped just now may still be there."""
    return f"{text}-{uuid.uuid4().hex[:6]}"


# --- what an error means -------------------------------------------------------------------------------------------------


def first_of(error: BaseException) -> BaseException:
    """The first of a task group's errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def innermost(error: BaseException) -> BaseException:
    """The error that Ray, or Ray Train, carried here."""
    seen: set[int] = set()
    error = first_of(error)
    while id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
            error = error.cause
        elif failures := getattr(error, "worker_failures", None):  # Ray Train: rank -> exception
            error = failures[min(failures)]
    return error


def cause_of(error: BaseException) -> str:
    """One line for what a user should know first: the innermost cause, without its tracebacks."""
    error = innermost(error)
    if isinstance(error, RayActorError) and "creation task" not in str(error):
        return "its process or its node died"  # Ray's text says no more
    if _is_dead_core(error):
        return "vLLM's core process died (EngineDeadError)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if isinstance(error, RayError):  # its text is a traceback: the error that it ends with says more than its head
        named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit): ", line)]
        if named:
            return named[-1]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")


def is_death(error: BaseException) -> bool:
    """Whether somebody died or was not to be reached, rather than did something wrong: worth another try elsewhere."""
    error = innermost(error)
    died = (RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError, Hang, Draining, ConnectionError, TimeoutError)
    return isinstance(error, died) or _is_dead_core(error)


def _is_dead_core(error: BaseException) -> bool:
    return type(error).__name__ == "EngineDeadError"  # vLLM's: importing it would take seconds


def is_lost(error: BaseException) -> bool:
    """Whether what was asked for has gone with the process or node that held it."""
    return isinstance(innermost(error), ObjectLostError)


# --- engines -------------------------------------------------------------------------------------------------------------


class Remote:
    """What turns an engine into an actor. Tables travel as groups.to_wire makes them."""

    async def start_here(self) -> dict[str, Any]:
        return {**await self.start(), "node": ray.get_runtime_context().get_node_id()}  # type: ignore[attr-defined]

    @ray.method(num_returns=2)
    async def sample(
        self, prompt: pa.Buffer, sampling: SamplingConfig, min_version: int, seed: int | None, *kept: pa.Buffer
    ) -> tuple[pa.Buffer, tuple[int, int]]:
        """The sampled group; and how many of its completions are missing, and how many tokens were written: what the driver awaits."""
        group = from_wire(prompt)
        tables = [from_wire(part) for part in kept]
        own = [part for table in tables if len(part := table.filter(pc.equal(table["group_id"], group["group_id"][0])))]
        sampled, missing = await self.generate(group, sampling, min_version, seed, *own)  # type: ignore[attr-defined]
        return to_wire(sampled), (missing, num_completion_tokens(sampled) - sum(map(num_completion_tokens, own)))

    @ray.method(num_returns=2)
    async def hand_over(self) -> tuple[pa.Buffer, list[int]]:
        group_ids, table = await self.finished()  # type: ignore[attr-defined]
        return to_wire(table), group_ids


class _EngineActor(Remote, Engine):
    pass


class _ServerActor(Remote, ServerEngine):
    pass


def engine_maker(model: ModelConfig, config: EnginesConfig, seed: int, load_weights: bool, system_prompt: str | None) -> MakeEngine:
    """How the engines of a run are made: vLLM, or the client of a pool's server."""

    def make(name: str, pool: PoolConfig, number: int) -> Any:
        resources = {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus, "resources": pool.resources, "accelerator_type": pool.accelerator_type}
        options = {"name": actor_name(f"{name}-{number}"), "max_concurrency": 10_000, "max_restarts": 0, **resources}
        if pool.url is not None:
            key = os.environ.get(pool.url_key_variable) if pool.url_key_variable else None
            return ray.remote(_ServerActor).options(**options).remote(name, model, pool, system_prompt, key, config.drain_s)
        return ray.remote(_EngineActor).options(**options).remote(model, pool, config.weight_transfer, seed + number, load_weights, config.drain_s)

    return make


def resources_of(actor: PoolConfig | LearnerConfig) -> dict[str, float]:
    """Of one engine or learner worker, under Ray's names."""
    accelerator = {f"accelerator_type:{actor.accelerator_type}": 0.001} if actor.accelerator_type else {}
    own = {"CPU": actor.num_cpus, "GPU": actor.num_gpus, **actor.resources, **accelerator}
    return {name: number for name, number in own.items() if number}


MakeEngine = Callable[[str, PoolConfig, int], Any]
"""(pool's name, pool, number) -> handle of a new actor with Engine's methods, `sample` and `hand_over`."""


@dataclass
class _InFlight:
    since: float
    kept: list[Any]
    """Refs of the group's completions that are safe outside the engine."""


@dataclass(eq=False)
class _Seat:
    """The place of one engine in its pool: when an engine dies, another takes its seat."""

    pool: str
    config: PoolConfig
    number: int
    capacity: int
    """Completions in flight, at most."""
    load: int = 0
    engine: Any = None
    node: str = ""
    is_asked: bool = True
    """Whether there should be an engine; of an elastic pool's seats beyond num, elastic.py decides."""
    asked_at: float = field(default_factory=time.time)
    state: str = "wanted"
    """off (not asked for), wanted (asked Ray for a place), starting, waits for weights, running, leaving, dead (waits for its next try)."""
    since: float = field(default_factory=time.time)
    status: dict[str, Any] = field(default_factory=dict)
    """What the engine said of itself last."""
    num_tokens: int = 0
    """Written here so far, in groups that came back."""
    in_flight: dict[int, _InFlight] = field(default_factory=dict)
    """By group id."""
    failed: asyncio.Future[None] | None = None
    """Gets the error of the first call that found the engine dead."""

    @property
    def name(self) -> str:
        return f"{self.pool}-{self.number}"

    @property
    def has_room(self) -> bool:
        return self.state == "running" and self.load < self.capacity

    @property
    def is_elastic(self) -> bool:
        return self.number >= self.config.num

    @property
    def wants(self) -> dict[str, float]:
        """What it asks Ray for."""
        return resources_of(self.config)

    def becomes(self, state: str) -> None:
        self.state, self.since = state, time.time()


MAX_FAILED_STARTS = 3
"""Tries to start the first engine of a pool: what fails as often is the config, not bad luck."""


class EngineGroup:
    """The engine pools. `sample` gives a group to the engine with the most room; `run` keeps every seat filled.

    Methods run on the session's loop.

    Args:
        weights: where newer weights come from: `await weights(newer_than)` -> (version, where) or None at the end; None: the engines
            load model.path themselves.
        note: told of every recovery.
        waits: GroupBuffer.waits, by which elastic pools grow and shrink. None: they have max_num engines from the beginning.
        placed: what to wait for before the first engine takes its place in the cluster.
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
        self.config, self._make, self._weights, self._note, self._waits, self._placed = config, make, weights, note, waits, placed
        self.seats = [
            _Seat(name, pool, number, pool.max_groups * num_completions)
            for name, pool in config.all_pools().items()
            for number in range(max(pool.num, pool.max_num or 0))
        ]
        if waits is not None:
            for seat in self.seats[not any(pool.num for pool in config.all_pools().values()) :]:  # one at least
                if seat.is_elastic:
                    seat.is_asked, seat.state = False, "off"
        self._num_completions = num_completions
        self._is_fixed = config.weight_transfer == "nccl"
        if self._is_fixed:  # the learner has to know them all
            for seat in self.seats:
                seat.engine = make(seat.pool, seat.config, seat.number)
        self._deaths: dict[str, deque[float]] = {seat.pool: deque() for seat in self.seats}
        self._has_started: set[str] = set()
        self._waiting: list[tuple[int, int, int, bool, asyncio.Future[_Seat]]] = []
        self._order = itertools.count()
        self._draining: dict[str, float] = {}
        self.room = asyncio.Event()
        """Set whenever an engine may have got room."""
        self.times: dict[str, float] = {}
        """Of the newest weight update."""

    # --- sampling ------------------------------------------------------------------------------------------------------

    @property
    def num_slots(self) -> int:
        """Groups in flight, at most."""
        return sum(seat.capacity for seat in self.seats if seat.state == "running") // self._num_completions

    def num_free(self) -> int:
        """Groups that could begin at once."""
        free = sum(seat.capacity - seat.load for seat in self.seats if seat.has_room)
        return free // self._num_completions - len(self._waiting)

    async def sample(
        self, prompt: pa.Table, sampling: SamplingConfig, min_version: int, seed: int | None = None, kept: tuple[Any, ...] = (),
        is_new: bool = False, only_ours: bool = False,
    ) -> Any:  # fmt: skip
        """Ref of the sampled group: by the engine with the most room, and where that dies by others, which begin with what it had finished.

        Args:
            kept: completions that are there already, on the wire or refs of that.
            is_new: a new group of the training: everything else goes first.
            only_ours: not by a server that has other weights.
        """
        group_id, size, since = prompt["group_id"][0].as_py(), sampling.num_completions, time.time()
        on_wire = to_wire(prompt)
        while True:
            seat = await self._seat(size, 2 if is_new else 1, only_ours)
            if seat.state != "running":  # since it was given to us
                seat.load -= size
                self._changed()
                continue
            engine, failed = seat.engine, seat.failed
            seat.in_flight[group_id] = in_flight = _InFlight(since, list(kept))
            try:
                sampled, numbers = engine.sample.remote(on_wire, sampling, min_version, seed, *kept)
                missing, num_tokens = await numbers
                seat.num_tokens += num_tokens
                if not missing:
                    return sampled
                kept = (sampled,)  # the engine is leaving
            except RayError as error:
                if is_lost(error):
                    kept = ()  # what was kept is gone with its node
                elif isinstance(innermost(error), Draining):  # whoever watches it will see it off
                    seat.becomes("leaving")
                elif is_death(error):
                    kept = tuple(in_flight.kept)
                    if failed is not None and not failed.done():
                        failed.set_exception(error)
                        seat.becomes("dead")
                else:
                    raise
            finally:
                del seat.in_flight[group_id]
                seat.load -= size
                self._changed()

    async def _seat(self, size: int, priority: int, only_ours: bool) -> _Seat:
        future: asyncio.Future[_Seat] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._order), size, only_ours, future))
        self._changed()
        return await future

    def _changed(self) -> None:
        """Give what waits to who has room."""
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

    # --- supervision ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep every seat that is asked for filled until the weights end. Raises what is nobody's death."""
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
        """Elastic pools (elastic.py): ask for one engine more, or let one go."""
        if self._waits is None or not any(seat.is_elastic for seat in self.seats):
            return
        before, then = await self._waits(), time.monotonic()
        while True:
            await asyncio.sleep(self.config.scale_window_s)
            waits, now = await self._waits(), time.monotonic()
            if before is not None and waits is not None:
                share = {who: min(1.0, (seconds - before[who]) / (now - then)) for who, seconds in waits.items()}
                if share["driver"] == 0 and min(share.values()) >= 0:  # it did not evaluate meanwhile, and the buffer is the same
                    self._grow_or_shrink(share["learner"], share["dial"])
            before, then = waits, now

    def _grow_or_shrink(self, waited: float, closed: float) -> None:
        if seat := one_more(self.seats, waited):
            seat.is_asked, seat.asked_at = True, time.time()
            why = f"the learner waited for groups {100 * waited:.0f} % of the time"
            self._note("pool", seat.pool, f"grows to {self._num_asked(seat.pool)} engines: {why}")
        elif seat := one_less(self.seats, waited, closed):
            seat.is_asked = False
            if seat.state != "running" and seat.engine is not None:  # it has no place yet: take the request back
                ray.kill(seat.engine, no_restart=True)
            self._note("pool", seat.pool, f"shrinks to {self._num_asked(seat.pool)} engines: the dial was closed {100 * closed:.0f} % of the time")

    def _num_asked(self, pool: str) -> int:
        return sum(seat.is_asked for seat in self.seats if seat.pool == pool)

    async def _keep(self, seat: _Seat) -> None:
        """One engine after the other in one seat, while it is asked for."""
        failed_starts = 0
        while True:
            while not seat.is_asked:
                if seat.state != "off":
                    seat.becomes("off")
                await asyncio.sleep(SCALE_CHECK_S)
            try:
                await self._one(seat)
                return
            except (RayError, Hang, Draining) as error:
                if not seat.is_asked:  # let go
                    self._clear(seat)
                    continue
                cause, was_starting = innermost(error), seat.state in ("wanted", "starting")
                is_leaving = isinstance(cause, Draining)
                if not is_death(error) and not (was_starting and isinstance(cause, (RuntimeError, OSError))):
                    raise
                self._note("engine", seat.name, f"left: {cause}" if is_leaving else cause_of(error))
                failed_starts = failed_starts + 1 if was_starting else 0
                if self._is_fixed or (failed_starts >= MAX_FAILED_STARTS and seat.pool not in self._has_started):
                    raise
                self._clear(seat)
                if not is_leaving:
                    await self._may_restart(seat, cause_of(error))

    def _clear(self, seat: _Seat) -> None:
        seat.status = {}
        seat.becomes("dead")
        if seat.engine is not None:
            ray.kill(seat.engine, no_restart=True)
            seat.engine = None

    async def _one(self, seat: _Seat) -> None:
        """The life of one engine; returns when the weights end."""
        if seat.engine is None:
            seat.becomes("wanted")
            seat.engine = self._make(seat.pool, seat.config, seat.number)
        engine = seat.engine
        await engine.__ray_ready__.remote()
        seat.becomes("starting")
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

    async def _follow(self, seat: _Seat, engine: Any) -> None:
        """Keep the engine's weights new. Waits for a version newer than the engine's (woken by the learner's publish)."""
        if self._weights is None or seat.config.url:
            seat.becomes("running")
            self._changed()
            await asyncio.Event().wait() if self._weights is None else await self._until_the_end()
            return
        seat.becomes("waits for weights")
        version = -1
        while (news := await self._weights(version)) is not None:
            try:
                self.times = await engine.update.remote(news[0], news[1], news[1]["probe"])
            except RayError as error:
                if not is_lost(error):  # the learner died, and its weights with it: it will be back with newer ones
                    raise
                await asyncio.sleep(0.5)
                continue
            version = news[0]
            if seat.state == "waits for weights":
                seat.becomes("running")
                self._changed()

    async def _until_the_end(self) -> None:
        assert self._weights is not None
        while await self._weights(1 << 60) is not None:
            pass

    async def _collect(self, seat: _Seat, engine: Any) -> None:
        """Hold what is finished of groups that are not, so that it outlives the engine."""
        while True:
            table, group_ids = engine.hand_over.remote()
            found = await group_ids
            if not found:
                return  # the engine is closed
            for group_id in found:
                if group_id in seat.in_flight:
                    seat.in_flight[group_id].kept.append(table)

    async def _watch(self, seat: _Seat, engine: Any) -> None:
        """Notice an engine that hangs, and one that is about to leave.

        Raises:
            Hang: it writes no token, or does not answer.
            Draining: it has left: nothing of it is in flight.
        """
        hang_s = self.config.hang_s
        while True:
            try:
                seat.status = await asyncio.wait_for(engine.status.remote(), hang_s)
            except TimeoutError:
                raise Hang(f"no answer for {hang_s:g} s") from None
            silent = time.time() - seat.status["last_token_at"]
            if seat.status["num_completions"] and silent > hang_s:
                raise Hang(f"no token for {silent:.0f} s with {seat.status['num_completions']} completions in flight")
            if seat.node in self._draining or seat.status.get("leaving") or not seat.is_asked:
                notice = self._draining.get(seat.node, 0) - time.time()
                # What is left when the notice is over has to travel yet.
                seconds = self.config.drain_s if notice <= 0 else max(0.0, min(self.config.drain_s, notice - HAND_OVER_MARGIN_S))
                seat.becomes("leaving")
                await engine.drain.remote(seconds)
                while seat.load:
                    await asyncio.sleep(0.05)
                raise Draining(f"node {seat.node[:8]} is about to go" if seat.is_asked else "its pool shrinks")
            await asyncio.sleep(1 + len(self.seats) / 64)

    async def _watch_nodes(self) -> None:
        """Ray's drain notices: node -> when it goes (0: nobody said), as Ray Train and Serve read them."""
        while True:
            with contextlib.suppress(RayError):  # the cluster's head is away: ask again
                draining = await asyncio.to_thread(ray._private.state.state.get_draining_nodes)
                self._draining = {node: deadline_ms / 1000 for node, deadline_ms in draining.items()}
            await asyncio.sleep(1.0)

    async def _may_restart(self, seat: _Seat, cause: str) -> None:
        """Back off, and keep to the pool's budget."""
        deaths, most = self._deaths[seat.pool], seat.config.max_restarts_per_hour
        deaths.append(time.monotonic())
        recent = sum(time.monotonic() - death < 600 for death in deaths)
        await asyncio.sleep(min(60.0, 0.5 * 2 ** min(recent, 10)) * random.uniform(0.5, 1))
        while True:
            while deaths and time.monotonic() - deaths[0] > 3600:
                deaths.popleft()
            if len(deaths) <= most:
                return
            if all(other.state in ("dead", "off") for other in self.seats):
                raise RunError(f"engines of pool {seat.pool} died {len(deaths)} times within an hour (max_restarts_per_hour: {most}), last: {cause}")
            await asyncio.sleep(1.0)

    def who_has(self, group_id: int) -> str | None:
        """Name of the engine that a group is in."""
        return next((seat.name for seat in self.seats if group_id in seat.in_flight), None)

    def status(self) -> list[dict[str, Any]]:
        """Of every seat."""
        return [
            {"name": seat.name, "pool": seat.pool, "state": seat.state, "since": seat.since, "node": seat.node[:8], "wants": seat.wants,
             "version": seat.status.get("version"), "num_groups": len(seat.in_flight), "num_tokens": seat.num_tokens}
            for seat in self.seats
        ]  # fmt: skip

    async def close(self) -> None:
        engines = [seat.engine for seat in self.seats if seat.engine is not None]
        await asyncio.gather(*(engine.close.remote() for engine in engines), return_exceptions=True)


SCALE_CHECK_S = 0.5

HAND_OVER_MARGIN_S = 5.0
"""Of a node's notice, kept for handing over."""


# --- verifiers -----------------------------------------------------------------------------------------------------------


class VerifierGroup:
    """The verifier actors; a group goes to the one with the fewest in hand.

    A verifier that dies, alone or with its node, is started again by Ray, and what it had in hand is checked again: a check has no
    effect but its answer. With `max_num` the group grows while every verifier has groups waiting, and shrinks when one is idle.
    """

    def __init__(self, config: VerifiersConfig, rewards: Rewards | None, note: Note = lambda *_: None) -> None:
        for function in (rewards or {}).values():
            # Functions of the user's own files travel by value: the actors' machines need not have the files.
            module = inspect.getmodule(function)
            if module is not None and module.__name__ != "__main__" and "site-packages" not in (module.__file__ or "site-packages"):
                ray.cloudpickle.register_pickle_by_value(module)
        self.config, self._rewards, self._note = config, dict(rewards or {}), note
        self._processes: dict[Any, int] = {}
        self._models: list[Any] = []
        self._model_rewards = {name: self._reward_model(name, reward) for name, reward in config.rewards.items() if reward.model}
        self._in_hand: dict[Any, int] = {}
        self._idle_since: dict[Any, float] = {}
        self._endings: set[asyncio.Future[None]] = set()
        self._num_started = 0
        for _ in range(config.num):
            self._grow()

    @property
    def actors(self) -> list[Any]:
        return list(self._in_hand)

    def status(self) -> dict[str, int]:
        """Groups in hand of each."""
        return {f"verifier-{i}": number for i, number in enumerate(self._in_hand.values())}

    async def score(self, sampled: Any) -> Any:
        """Object ref of a sampled group -> ref of the group with its rewards; returns when that is there."""
        if len(self._in_hand) < (self.config.max_num or 0) and min(self._in_hand.values()) >= GROW_AT:
            self._grow()
        verifier = min(self._in_hand, key=lambda actor: self._in_hand[actor])
        self._in_hand[verifier] += 1
        try:
            scored, process = verifier.score_group.remote(sampled)
            process = await process
            if self._processes.setdefault(verifier, process) != process:
                self._processes[verifier] = process
                number = list(self._in_hand).index(verifier)
                self._note("verifier", f"verifier-{number}", "its process or its node died; what it had in hand was checked again")
            return scored
        finally:
            self._in_hand[verifier] -= 1
            self._shrink(verifier)

    def _grow(self) -> None:
        # A group's table may arrive late (from another node): a later one must not wait for it.
        actor = ray.remote(_VerifierActor).options(
            name=actor_name(f"verifier-{self._num_started}"), num_cpus=self.config.num_cpus, resources=self.config.resources,
            max_concurrency=1, allow_out_of_order_execution=True, scheduling_strategy="SPREAD", max_restarts=-1, max_task_retries=MAX_VERIFIER_DEATHS,
        ).remote(self.config, self._rewards, self._model_rewards)  # fmt: skip
        self._num_started += 1
        self._in_hand[actor] = 0

    def _shrink(self, verifier: Any) -> None:
        """End a verifier beyond `num` that stays idle while others are, too."""
        now = time.monotonic()
        for actor, in_hand in self._in_hand.items():
            if in_hand:
                self._idle_since.pop(actor, None)
            else:
                self._idle_since.setdefault(actor, now)
        for actor, since in list(self._idle_since.items()):
            if len(self._in_hand) > self.config.num and now - since > IDLE_S:
                del self._in_hand[actor], self._idle_since[actor]
                self._processes.pop(actor, None)
                ending = asyncio.ensure_future(self._end(actor))
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)

    async def _end(self, actor: Any) -> None:
        """For good: an actor that ends by itself is started again, and so would be its ending."""
        with contextlib.suppress(ray.exceptions.RayError):
            await actor.close.remote()  # its sandbox
        ray.kill(actor, no_restart=True)

    def _reward_model(self, name: str, config: RewardConfig) -> Callable[..., Any]:
        actor = ray.remote(RewardModel)
        actors = [
            actor.options(
                name=actor_name(f"reward-model-{name}-{i}"), num_cpus=config.num_cpus, num_gpus=config.num_gpus, max_concurrency=1,
                max_restarts=-1, max_task_retries=MAX_VERIFIER_DEATHS,
            ).remote(config.model, config.batch_size, config.num_gpus > 0)
            for i in range(config.num)
        ]  # fmt: skip
        self._models += actors
        return _RemoteReward(actors)

    async def close(self) -> None:
        await asyncio.gather(*(verifier.close.remote() for verifier in self._in_hand), *self._endings, return_exceptions=True)


GROW_AT = 2
"""Groups in hand of every verifier at which one more is started."""

IDLE_S = 30.0
"""A verifier beyond verifiers.num that has had nothing to do for so long is ended."""

MAX_VERIFIER_DEATHS = 1000
"""Deaths of its verifier that a group survives, those while it waits for its turn included: more are not bad luck but the reward function."""


class _VerifierActor(Verifier):
    @ray.method(num_returns=2)
    def score_group(self, sampled: pa.Buffer) -> tuple[pa.Buffer, int]:
        """The scored group, and this process's number: what the driver awaits, so that the table does not come to it."""
        return to_wire(self.score(from_wire(sampled))), os.getpid()


class _RemoteReward:
    """A reward model's actors as a reward function, called in the verifiers; each verifier goes round."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors
        self._next = random.randrange(len(actors))

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        self._next += 1
        return ray.get(self._actors[self._next % len(self._actors)].score.remote(prompts, completions))


# --- the buffer ----------------------------------------------------------------------------------------------------------


class _BufferActor(GroupBuffer):
    async def put_all(self, *scored: pa.Buffer) -> list[bool]:
        """`put` of each."""
        return [await self.put(from_wire(group)) for group in scored]

    async def batch_on_wire(self, step: int) -> pa.Buffer | None:
        batch = await self.batch(step)
        return None if batch is None else to_wire(batch)

    @ray.method(num_returns=2)
    async def replayed(self, prompt: pa.Buffer, num: int) -> tuple[pa.Buffer, None]:
        """Historical completions, and nothing: what the driver awaits, so that the table does not come to it."""
        return to_wire(await self.history(from_wire(prompt), num)), None


MAX_PUTS = 64
"""Groups that go to the buffer in one call."""


class Buffer:
    """The buffer actor as the driver sees it: `await buffer.call(method, …)`.

    When the actor dies Ray starts it again on its log, and the driver tells it what the log does not hold.

    Args:
        state: what to tell: (ids of the groups in flight, step up to which may be trained, whether the run is over, its first error).
        arguments: of GroupBuffer.
    """

    def __init__(self, state: Callable[[], tuple[list[int], int, bool, str | None]], note: Note, *arguments: Any) -> None:
        on_the_head = {"node:__internal_head__": 0.001}  # other nodes may go
        self.actor = (
            ray.remote(_BufferActor)
            .options(name=actor_name("buffer"), num_cpus=0, resources=on_the_head, max_concurrency=100_000, max_restarts=-1)
            .remote(*arguments)
        )
        self._state, self._note = state, note
        self._lives, self._lock = 0, asyncio.Lock()
        self._to_put: list[tuple[Any, asyncio.Future[bool]]] = []
        self._putting: asyncio.Future[None] | None = None

    async def put(self, scored: Any) -> bool:
        """GroupBuffer.put of a scored group, by ref. Those that come while a call is under way go together in the next."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._to_put.append((scored, future))
        if self._putting is None or self._putting.done():
            self._putting = asyncio.ensure_future(self._put_waiting())
        return await future

    async def _put_waiting(self) -> None:
        while self._to_put:
            batch, self._to_put = self._to_put[:MAX_PUTS], self._to_put[MAX_PUTS:]
            try:
                answers = await self.call("put_all", *(ref for ref, _ in batch))
            except Exception as error:  # each of those who wait has to hear of it
                for _, future in batch:
                    future.set_exception(error)
            else:
                for (_, future), answer in zip(batch, answers, strict=True):
                    future.set_result(answer)

    async def call(self, method: str, *arguments: Any) -> Any:
        """The method's answer; of one with two returns, the ref of the first once the second is there."""
        while True:
            async with self._lock:  # not before a new one knows what is in flight
                life = self._lives
            try:
                answer = getattr(self.actor, method).remote(*arguments)
                if isinstance(answer, list):
                    await answer[1]
                    return answer[0]
                return await answer
            except ActorUnavailableError as error:
                await self._again(life, error)

    async def _again(self, life: int, error: RayError) -> None:
        async with self._lock:  # hundreds of calls fail at once
            while life == self._lives:
                try:
                    await self.actor.reconnect.remote(*self._state())
                    self._lives += 1
                    self._note("buffer", "buffer", f"{cause_of(error)}; it is rebuilt from its log")
                except ActorUnavailableError:
                    await asyncio.sleep(0.2)


class LearnersBuffer:
    """The buffer actor as the learner sees it: calls that wait. One that died is asked again once it is back."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._published: tuple[int, Any, dict[str, Any] | None] | None = None

    def _call(self, method: str, *arguments: Any) -> Any:
        while True:
            try:
                return ray.get(getattr(self._actor, method).remote(*arguments))
            except ActorUnavailableError:
                time.sleep(0.2)
                if self._published is not None and method != "published":  # where the newest weights are, only the learner knows
                    self._call("published", *self._published)

    def learner_started(self, step: int) -> None:
        self._call("learner_started", step)

    def order(self, step: int, saved: bool) -> str:
        answer: str = self._call("order", step, saved)
        return answer

    def batch(self, step: int) -> pa.Table | None:
        batch = self._call("batch_on_wire", step)
        return None if batch is None else from_wire(batch)

    def learned(self, version: int, references: dict[int, list[float | None]], residuals: dict[int, list[float | None]]) -> None:
        self._call("learned", version, references, residuals)

    def published(self, version: int, weights: Any, metrics: dict[str, Any] | None) -> None:
        self._published = (version, weights, metrics)
        self._call("published", version, weights, metrics)

    def saved(self, step: int) -> None:
        self._call("saved", step)

    def close(self, error: str) -> None:
        self._call("close", error)
