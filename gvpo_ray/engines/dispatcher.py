"""The dispatcher gives each group to an engine with room, and to another one when that engine dies or leaves.

Only unfinished completions are lost: a group goes on with the completions that were finished.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from ray.exceptions import RayError

from gvpo_ray.actors import EventCallback, Fate, classify, is_lost
from gvpo_ray.config.engines import SamplingConfig
from gvpo_ray.engines.slots import Request, Slot
from gvpo_ray.groups import to_wire
from gvpo_ray.observe.status import EngineState

_Waiting = tuple[int, int, int, asyncio.Future[Slot]]
"""A group that waits for a slot: (priority, order of arrival, number of completions, gets the slot)."""


class Dispatcher:
    """The Dispatcher assigns groups to the slots of all pools; everything runs on the session's event loop.

    Args:
        slots: of all pools.
        num_completions: completions per group of the training.
        note: called when a server refuses a prompt.
    """

    def __init__(self, slots: Sequence[Slot], num_completions: int, note: EventCallback) -> None:
        self._slots, self._num_completions, self._note = slots, num_completions, note
        # Groups that only our own engines may take wait in a heap of their own, so that they hold up nobody
        # who may also go to a server.
        self._for_any: list[_Waiting] = []
        self._for_ours: list[_Waiting] = []
        self._order = itertools.count()
        self.room = asyncio.Event()
        """An event that is set whenever an engine may have got room."""

    @property
    def max_groups(self) -> int:
        """Largest number of groups in flight at the engines that run."""
        running = (slot.capacity for slot in self._slots if slot.state == EngineState.RUNNING)
        return sum(running) // self._num_completions

    def num_free(self) -> int:
        """Return the number of groups that could begin at once; negative if more than that wait already."""
        free = {True: 0, False: 0}
        for slot in self._slots:
            if slot.has_room:
                free[slot.is_ours] += slot.capacity - slot.load
        ours, others = free[True] // self._num_completions, free[False] // self._num_completions
        return max(0, ours - len(self._for_ours)) + others - len(self._for_any)

    async def sample(
        self,
        prompt: pa.Table,
        sampling: SamplingConfig,
        min_version: int,
        seed: int | None,
        kept: tuple[Any, ...],
        is_new: bool,
        only_ours: bool,
    ) -> Any:
        """Sample a group, as EngineGroup.sample says."""
        group_id, size, since = prompt["group_id"][0].as_py(), sampling.num_completions, time.time()
        on_wire = to_wire(prompt)
        while True:
            slot = await self._slot(size, 2 if is_new else 1, only_ours)
            if slot.state != EngineState.RUNNING:  # it stopped running after it was assigned
                slot.load -= size
                self.changed()
                continue
            engine, failed = slot.engine, slot.failed
            slot.in_flight[group_id] = in_flight = Request(since, list(kept))
            try:
                sampled, numbers = engine.sample.remote(on_wire, sampling, min_version, seed, *kept)
                missing, num_tokens, refusal = await numbers
                slot.num_tokens += num_tokens
                if refusal:
                    self._note("pool", slot.pool, f"gives group {group_id} fewer completions: {refusal}")
                if not missing:
                    return sampled
                slot.leaves.set()  # the engine drains, and another one goes on
                kept = await _fetched(sampled) or in_flight.rescued(group_id)
            except RayError as error:
                match classify(error):
                    case Fate.LEAVING:
                        slot.becomes(EngineState.LEAVING)
                        slot.leaves.set()
                    case Fate.DEAD:
                        kept = in_flight.rescued(group_id)
                        if failed is not None and not failed.done():
                            failed.set_exception(error)
                            slot.becomes(EngineState.DEAD)
                    case Fate.LOST | Fate.BUG:  # LOST: what the group began with is gone with its process
                        raise
            finally:
                del slot.in_flight[group_id]
                slot.load -= size - in_flight.num_freed
                self.changed()

    async def _slot(self, size: int, priority: int, only_ours: bool) -> Slot:
        """Wait for a slot with room, and reserve `size` completions there. Lower priorities go first."""
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        waiting = self._for_ours if only_ours else self._for_any
        heapq.heappush(waiting, (priority, next(self._order), size, future))
        self.changed()
        return await future

    def changed(self) -> None:
        """Assign waiting groups to engines with room, lowest priority number first."""
        while self._for_any or self._for_ours:
            free = [slot for slot in self._slots if slot.has_room]
            choices = ((self._for_ours, [slot for slot in free if slot.is_ours]), (self._for_any, free))
            open_ones = [(heap, slots) for heap, slots in choices if _without_cancelled(heap) and slots]
            if not open_ones:
                break
            heap, slots = min(open_ones, key=lambda choice: choice[0][0][:2])
            _, _, size, future = heapq.heappop(heap)
            slot = min(slots, key=lambda slot: slot.load / slot.capacity)
            slot.load += size
            future.set_result(slot)
        self.room.set()


def _without_cancelled(heap: list[_Waiting]) -> list[_Waiting]:
    while heap and heap[0][-1].cancelled():
        heapq.heappop(heap)
    return heap


async def _fetched(table: Any) -> tuple[Any, ...]:
    """Bring a table from a node that is about to go to the driver; return nothing if the node went first."""
    try:
        return (await table,)
    except RayError as error:
        if not is_lost(error):
            raise
        return ()
