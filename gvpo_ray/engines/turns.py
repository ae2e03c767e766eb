"""Engines sleep during the learner's turns on the GPUs that both share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from gvpo_ray.actors import UpdateFailed, cause_of, is_death
from gvpo_ray.buffer.states import Owner
from gvpo_ray.engines.slots import Slot
from gvpo_ray.observe.status import EngineState


class Turns(Protocol):
    """The buffer's client says whose turn it is."""

    async def next_turn(self, turn: int) -> tuple[int, Owner] | None:
        """Wait until it is another turn than `turn`; return it and its owner; None: the run is over."""
        ...

    async def engines_sleep(self, turn: int) -> None:
        """Tell that all engines sleep, as they were told for this turn."""
        ...


class Sleepers:
    """The Sleepers put all engines of ours to sleep for the learner's turns, and wake them for their own.

    Args:
        slots: of all pools.
        turns: says whose turn it is. None: engines and learner share nothing, and it is always the engines'.
    """

    def __init__(self, slots: Sequence[Slot], turns: Turns | None) -> None:
        self._slots, self._turns = [slot for slot in slots if slot.is_ours], turns
        self._locks = {slot: asyncio.Lock() for slot in self._slots}
        self._is_ours = asyncio.Event()
        if turns is None:
            self._is_ours.set()

    @contextlib.asynccontextmanager
    async def awake(self, slot: Slot) -> AsyncIterator[None]:
        """Wait for the engines' turn, and let the learner wait meanwhile: this slot's engine works.

        It starts, or takes new weights. An engine that slept is woken first.
        """
        if not slot.is_ours or self._turns is None:
            yield
            return
        while True:
            await self._is_ours.wait()
            async with self._locks[slot]:
                if self._is_ours.is_set():  # still: others had the lock before
                    await _ask(slot, "wake")
                    yield
                    return

    async def run(self) -> None:
        """Follow the turns until the run is over."""
        if self._turns is None:
            return
        turn = 0
        while (following := await self._turns.next_turn(turn)) is not None:
            turn, owner = following
            if owner is Owner.LEARNER:
                self._is_ours.clear()
                await asyncio.gather(*map(self._put_to_sleep, self._slots))
                await self._turns.engines_sleep(turn)
            else:
                self._is_ours.set()
                await asyncio.gather(*map(self._wake_up, self._slots))

    async def _put_to_sleep(self, slot: Slot) -> None:
        """Let an engine sleep; one that is dead, or dies of it, has freed its memory too."""
        async with self._locks[slot]:
            await _ask(slot, "sleep")

    async def _wake_up(self, slot: Slot) -> None:
        async with self._locks[slot]:
            await _ask(slot, "wake")


async def _ask(slot: Slot, what: str) -> None:
    """Call an engine's `sleep` or `wake`, if it is up; if it dies of it, its supervisor sees that too."""
    if _is_up(slot):
        engine = slot.engine
        try:
            await getattr(engine, what).remote()
        except RayError as error:
            _give_up(slot, engine, what, error)


def _give_up(slot: Slot, engine: Any, what: str, error: RayError) -> None:
    """Kill an engine that lives on although it cannot sleep or wake, and tell its supervisor why.

    Its memory is needed.
    """
    if is_death(error) or slot.engine is not engine:  # which its supervisor has seen already
        return
    if slot.failed is not None and not slot.failed.done():
        slot.failed.set_exception(UpdateFailed(f"it cannot {what}: {cause_of(error)}"))
    ray.kill(engine, no_restart=True)


def _is_up(slot: Slot) -> bool:
    up = (EngineState.WAITS_FOR_WEIGHTS, EngineState.RUNNING, EngineState.LEAVING)
    return slot.engine is not None and slot.state in up
