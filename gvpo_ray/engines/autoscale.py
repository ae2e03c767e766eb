"""How many engines an elastic pool has: when another one is asked for, and when one is let go.

Engines are too few while the learner waits for groups, and too many while the dial keeps those there are from
starting any. Every `engines.scale_window_s` one engine at most is asked for, which makes a cluster's
autoscaler bring its node, or let go, which drains it and lets the node go. Pools are listed with the cheapest
first: it grows first and shrinks last.
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
"""How long an engine that was asked for may take to come. Beyond, its pool has no node for it: another pool
is asked."""


def slot_to_fill(seats: Sequence[Any], waited: float) -> Any | None:
    """The seat to fill, or None. `seats`: of all pools in their order (seats.Seat); `waited`: share of the
    time that the learner waited.
    """
    free = [seat for seat in seats if not seat.is_asked]
    if waited <= GROW_ABOVE_WAIT_SHARE or not free:
        return None
    late = {
        seat.pool
        for seat in seats
        if seat.is_asked
        and seat.state != EngineState.RUNNING
        and time.time() - seat.asked_at > START_PATIENCE_S
    }
    running = sum(seat.capacity for seat in seats if seat.state == EngineState.RUNNING)
    coming = sum(
        seat.capacity
        for seat in seats
        if seat.is_asked and seat.state != EngineState.RUNNING and seat.pool not in late
    )
    if running and running + coming >= running / max(1e-9, 1 - waited):
        return None  # those that are on their way will do
    return next((seat for seat in free if seat.pool not in late), None)


def slot_to_clear(seats: Sequence[Any], waited: float, closed: float) -> Any | None:
    """The seat to clear, or None. `closed`: share of the time that the dial let no group start although there
    was room.
    """
    running = [seat for seat in seats if seat.state == EngineState.RUNNING]
    spare = [seat for seat in seats if seat.is_asked and seat.is_elastic]
    if (
        waited > SHRINK_BELOW_WAIT_SHARE
        or not spare
        or any(not seat.is_asked and seat.state != "off" for seat in seats)
    ):
        return None  # the last one that was let go is still on its way out
    if coming := [seat for seat in spare if seat.state != EngineState.RUNNING]:
        return coming[-1] if closed > 1 - MAX_LOAD_AFTER_SHRINK else None
    all_of_it = sum(seat.capacity for seat in running)
    seat = spare[-1]
    return seat if (1 - closed) * all_of_it <= MAX_LOAD_AFTER_SHRINK * (all_of_it - seat.capacity) else None
