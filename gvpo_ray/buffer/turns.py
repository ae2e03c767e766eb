"""Engines and learner take turns on the GPUs that they share.

    learner   batch(step) ─ take() ──────── trains ──────── published(version) ─ give()
    engines   asleep once told ─ slept(turn)                awake, take the new weights, sample

The learner's turn begins when it gets a batch and all engines sleep, and ends when its new weights are
published. Before the learner has published for the first time it is nobody's turn, and no engine starts: vLLM
measures the GPU's memory as it starts, and a process that takes or frees memory meanwhile would mislead it.
"""

from __future__ import annotations

import asyncio
import time

from gvpo_ray.buffer.states import Owner


class Turns:
    """The Turns say whose turn it is; turns are numbered, also across restarts of the buffer.

    A restarted buffer does not know whose turn it is, until the learner asks for a batch or publishes.
    Engines stay as they are meanwhile.
    """

    def __init__(self) -> None:
        self._turn = time.time_ns()
        self._owner: Owner | None = None
        self._slept = 0
        self._closed = False
        self._changed = asyncio.Condition()

    async def take(self) -> None:
        """Give the turn to the learner, and wait until all engines sleep; every rank of it calls this."""
        async with self._changed:
            self._becomes(Owner.LEARNER)
            turn = self._turn
            await self._changed.wait_for(lambda: self._closed or self._slept == turn or self._turn != turn)

    async def give(self) -> None:
        """Give the turn to the engines."""
        async with self._changed:
            self._becomes(Owner.ENGINES)

    def _becomes(self, owner: Owner) -> None:
        if self._owner is not owner:
            self._owner = owner
            self._turn += 1
            self._changed.notify_all()

    async def next(self, turn: int) -> tuple[int, Owner] | None:
        """Wait until it is another turn than `turn`; return it and its owner; None: the run was closed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or (self._owner and self._turn != turn))
            return None if self._closed or self._owner is None else (self._turn, self._owner)

    async def slept(self, turn: int) -> None:
        """Tell that all engines sleep, as they were told for this turn."""
        async with self._changed:
            self._slept = turn
            self._changed.notify_all()

    async def close(self) -> None:
        """End the run, and wake all who wait."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
