"""The driver sees the pools of engine actors as one EngineGroup.

This module imports neither torch nor vLLM, because actors import it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pyarrow as pa

from gvpo_ray.actors import EventCallback
from gvpo_ray.config.engines import EnginesConfig, SamplingConfig
from gvpo_ray.engines.actor import MakeEngine
from gvpo_ray.engines.dispatcher import Dispatcher
from gvpo_ray.engines.slots import Slot
from gvpo_ray.engines.supervisor import Supervisor, Waits, Weights
from gvpo_ray.engines.turns import Turns
from gvpo_ray.observe.status import EngineState


class EngineGroup:
    """An EngineGroup is the engines of all pools, seen from the driver.

    `sample` gives a group to the engine with the most room (dispatcher.py). `run` keeps every slot filled
    with a living engine (supervisor.py). All methods run on the session's event loop.

    Args:
        config: the pools, and what they have in common.
        num_completions: completions per group.
        make: makes an engine actor (actor.engine_maker).
        weights: source of newer weights. None: the engines load model.path themselves.
        note: called with every recovery.
        waits: GroupBuffer.waits, seconds that the learner and others have waited, by which elastic pools grow
            and shrink. None: elastic pools have max_num engines from the beginning.
        placed: awaited before the first engine takes its place in the cluster.
        turns: says whose turn it is on GPUs that engines and learner share; None: they share none.
    """

    def __init__(
        self,
        config: EnginesConfig,
        num_completions: int,
        make: MakeEngine,
        weights: Weights | None,
        note: EventCallback,
        waits: Waits | None = None,
        placed: Callable[[], Awaitable[None]] | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.slots = [
            Slot(name, pool, number, pool.max_groups * num_completions)
            for name, pool in config.all_pools().items()
            for number in range(max(pool.num, pool.max_num or 0))
        ]
        if waits is not None:
            # if no pool has fixed engines, the first slot stays wanted: one engine at least
            for slot in self.slots[not any(pool.num for pool in config.all_pools().values()) :]:
                if slot.is_elastic:
                    slot.is_wanted, slot.state = False, EngineState.OFF
        self._placed = placed
        self._prompts_before: dict[tuple[str, int], tuple[int, int]] = {}
        self._dispatcher = Dispatcher(self.slots, num_completions, note)
        self._supervisor = Supervisor(
            config, self.slots, make, weights, note, waits, turns, self._dispatcher.changed
        )

    @property
    def max_groups(self) -> int:
        """Largest number of groups in flight at the engines that run."""
        return self._dispatcher.max_groups

    @property
    def room(self) -> asyncio.Event:
        """An event that is set whenever an engine may have got room."""
        return self._dispatcher.room

    @property
    def times(self) -> dict[str, float]:
        """Report of the newest weight update, as Engine.update returns it."""
        return self._supervisor.times

    def prefix_cache(self) -> dict[str, float]:
        """Return the hit rate of vLLM's prefix cache since the last call, as a metric; {}: no new prompts.

        The engines' counts are those of their last answers to `status`, at most seconds old.
        """
        counts = {
            (slot.name, slot.status["pid"]): (
                slot.status["num_cached_tokens"],
                slot.status["num_prompt_tokens"],
            )
            for slot in self.slots
            if slot.is_ours and slot.status
        }
        before, self._prompts_before = self._prompts_before, counts
        cached, prompts = (
            sum(now[i] - before.get(engine, (0, 0))[i] for engine, now in counts.items()) for i in (0, 1)
        )
        return {"engines/prefix_cache_hit_rate": cached / prompts} if prompts else {}

    def num_free(self) -> int:
        """Return the number of groups that could begin at once; negative if more than that wait already."""
        return self._dispatcher.num_free()

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

        When an engine dies or leaves, the group goes to another one, which keeps the finished completions. A
        server that refuses the prompt gives it no (further) completions; that is noted.

        Args:
            prompt: the group's one row.
            sampling: how to sample, and how many completions the group has.
            min_version: oldest weights to start with.
            seed: seed of this group alone, or None.
            kept: tables with completions that the group already has, as Arrow IPC buffers (groups.to_wire) or
                object refs of them.
            is_new: whether this is a new group of the training; all others go first.
            only_ours: whether servers, whose weights are not the policy's, are left out.

        Raises:
            RayError: an object ref among `kept` is lost with its process (actors.is_lost), or the engine's
                code or its input is wrong.
        """
        return await self._dispatcher.sample(prompt, sampling, min_version, seed, kept, is_new, only_ours)

    async def run(self) -> None:
        """Keep every slot that is wanted filled until the weights end.

        Raises every error that is not a dead process or node, as an exception group.
        """
        if self._placed is not None:
            await self._placed()
        await self._supervisor.run()

    def engine_with(self, group_id: int) -> str | None:
        """Return the name of the engine that a group is in flight at, or None."""
        return next((slot.name for slot in self.slots if group_id in slot.in_flight), None)

    def status(self) -> list[dict[str, Any]]:
        """Return the status of every slot, as dicts of plain values."""
        return [
            {
                "name": slot.name,
                "pool": slot.pool,
                "state": slot.state,
                "since": slot.since,
                "node": slot.node[:8],
                "wants": slot.wants,
                "version": slot.status.get("version"),
                "num_groups": len(slot.in_flight),
                "num_tokens": slot.num_tokens,
                "address": slot.status.get("address"),
            }
            for slot in self.slots
        ]

    async def close(self) -> None:
        """End the engines and kill their actors.

        If Ray outlives the run, the actors would otherwise keep their GPUs as long as anybody holds a handle.
        """
        engines = [slot.engine for slot in self.slots if slot.engine is not None]
        try:
            await asyncio.gather(*(engine.close.remote() for engine in engines), return_exceptions=True)
        finally:
            with contextlib.ExitStack() as all_of_them:  # one that raises leaves none of the others
                for slot in reversed(self.slots):
                    all_of_them.callback(slot.clear)
