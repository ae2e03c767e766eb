"""Autoscaling decides which elastic pool gets another engine, and which one loses one.

There are too few engines while the learner waits for groups. There are too many while the bound on staleness
keeps engines with room from starting new groups. A pool changes by at most one engine every
`engines.scale_window_s`. Scaling up makes a cluster's autoscaler bring a node; scaling down drains the engine
and frees its node. Pools are listed with the cheapest first: it grows first and shrinks last.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from gvpo_ray.observe.status import EngineState

GROW_ABOVE_WAIT_SHARE = 0.1
"""Another engine is asked for when the learner waits for groups for more than this share of its time."""

SHRINK_BELOW_WAIT_SHARE = 0.02
"""An engine is let go only while the learner waits for at most this share of its time."""

MAX_LOAD_AFTER_SHRINK = 0.9
"""The remaining engines must stay below this load, or the pool would grow again at once."""

START_PATIENCE_S = 600.0
"""Seconds that a new engine may take to come up. After that its pool counts as full, and another pool grows
instead."""


def slot_to_fill(slots: Sequence[Any], waited: float) -> Any | None:
    """Return the slot that should get an engine, or None to add no engine.

    Args:
        slots: the slots (slots.Slot) of all pools, in the order of the pools.
        waited: share of the window in which the learner waited for groups, 0 to 1.
    """
    free = [slot for slot in slots if not slot.is_wanted]
    if waited <= GROW_ABOVE_WAIT_SHARE or not free:
        return None
    late = {
        slot.pool
        for slot in slots
        if slot.is_wanted
        and slot.state != EngineState.RUNNING
        and time.time() - slot.wanted_at > START_PATIENCE_S
    }
    running = sum(slot.capacity for slot in slots if slot.state == EngineState.RUNNING)
    coming = sum(
        slot.capacity
        for slot in slots
        if slot.is_wanted and slot.state != EngineState.RUNNING and slot.pool not in late
    )
    if running and running + coming >= running / max(1e-9, 1 - waited):
        return None  # the engines that are coming up suffice
    return next((slot for slot in free if slot.pool not in late), None)


def slot_to_clear(slots: Sequence[Any], waited: float, closed: float) -> Any | None:
    """Return the slot whose engine should go, or None to remove no engine.

    Args:
        slots: the slots (slots.Slot) of all pools, in the order of the pools.
        waited: share of the window in which the learner waited for groups, 0 to 1.
        closed: share of the window in which the bound on staleness let no group start although engines had
            room, 0 to 1.
    """
    running = [slot for slot in slots if slot.state == EngineState.RUNNING]
    spare = [slot for slot in slots if slot.is_wanted and slot.is_elastic]
    if (
        waited > SHRINK_BELOW_WAIT_SHARE
        or not spare
        or any(not slot.is_wanted and slot.state != EngineState.OFF for slot in slots)
    ):
        return None  # the engine that was removed last is still draining
    if coming := [slot for slot in spare if slot.state != EngineState.RUNNING]:
        return coming[-1] if closed > 1 - MAX_LOAD_AFTER_SHRINK else None
    all_of_it = sum(slot.capacity for slot in running)
    slot = spare[-1]
    return slot if (1 - closed) * all_of_it <= MAX_LOAD_AFTER_SHRINK * (all_of_it - slot.capacity) else None
