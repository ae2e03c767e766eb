from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest

from gvpo_ray.engines.autoscale import START_PATIENCE_S, slot_to_clear, slot_to_fill


@dataclass
class Slot:
    pool: str
    state: str = "off"
    is_elastic: bool = True
    capacity: int = 64
    wanted_at: float = 0.0

    @property
    def is_wanted(self) -> bool:
        return self.state != "off"


def slots(**pools: str) -> list[Slot]:
    """`cheap="running off"`: states of the pool's slots, in order; one that is not running was asked for just
    now.
    """
    return [
        Slot(pool, state, wanted_at=time.time()) for pool, states in pools.items() for state in states.split()
    ]


@pytest.mark.parametrize(
    ("waited", "states", "which"),
    [
        (0.5, {"cheap": "running off off"}, 1),
        (0.05, {"cheap": "running off off"}, None),  # hardly ever waits
        (0.5, {"cheap": "running running"}, None),  # there are no more
        (0.5, {"cheap": "off off"}, 0),
        (0.5, {"cheap": "wanted off"}, 1),  # nothing runs yet: however many are coming, another helps
        (0.4, {"cheap": "running wanted off"}, None),  # twice as many as there are will do
        (0.6, {"cheap": "running wanted off"}, 2),
        (0.5, {"cheap": "off", "dear": "running off"}, 0),  # the cheapest first
        (0.5, {"cheap": "running", "dear": "off"}, 1),
        (0.5, {"cheap": "dead off", "dear": "running off"}, None),  # one is on its way back
    ],
)
def test_a_pool_grows_while_the_learner_waits_for_groups(
    waited: float, states: dict[str, str], which: int | None
) -> None:
    found = slots(**states)
    assert slot_to_fill(found, waited) is (None if which is None else found[which])


def test_a_pool_whose_engines_do_not_come_is_passed_over() -> None:
    found = slots(cheap="running wanted off", dear="off")
    found[1].wanted_at -= START_PATIENCE_S + 1
    assert slot_to_fill(found, 0.4) is found[3]


@pytest.mark.parametrize(
    ("waited", "closed", "states", "which"),
    [
        (0.0, 0.6, {"cheap": "running running"}, 1),
        (0.0, 0.5, {"cheap": "running running"}, None),  # one alone would be at its limit
        (0.0, 0.35, {"cheap": "running running running running"}, 3),
        (0.05, 0.6, {"cheap": "running running"}, None),  # the learner waits now and then
        (0.0, 0.6, {"cheap": "running", "dear": "running"}, 1),  # the dearest first
        (0.0, 0.6, {"cheap": "running wanted"}, 1),  # one that is not there yet costs least
        (0.0, 0.99, {"cheap": "running off"}, None),
        (0.0, 1.0, {"cheap": "running off"}, 0),
    ],
)
def test_a_pool_shrinks_while_the_bound_is_closed_and_those_that_are_left_will_do(
    waited: float, closed: float, states: dict[str, str], which: int | None
) -> None:
    found = slots(**states)
    assert slot_to_clear(found, waited, closed) is (None if which is None else found[which])


def test_a_pool_keeps_its_fewest_and_lets_go_of_one_at_a_time() -> None:
    found: list[Any] = slots(cheap="running running")
    for slot in found:
        slot.is_elastic = False
    assert slot_to_clear(found, 0.0, 1.0) is None

    class Leaving(Slot):
        is_wanted = False

    assert slot_to_clear([*slots(cheap="running running"), Leaving("cheap", "leaving")], 0.0, 0.9) is None
    assert slot_to_clear(slots(cheap="running running"), 0.0, 0.9) is not None
