"""A slot is an engine's place in its pool; it also knows the groups that are in flight there."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from gvpo_ray.actors import actor_name, bundles_of, resources_of
from gvpo_ray.config.engines import PoolConfig
from gvpo_ray.groups import from_wire, to_wire
from gvpo_ray.observe.status import EngineState


@dataclass
class Request:
    """A Request is a group in flight at an engine."""

    since: float
    """When the group was first given to an engine, in seconds of time.time()."""
    kept: list[Any]
    """Tables with completions that survive the engine's death, as Arrow IPC buffers in the driver's memory
    (rows of other groups included), or, of those that the group began with, object refs of them."""
    num_freed: int = 0
    """Number of its finished completions whose places at the engine others may already have."""

    def rescued(self, group_id: int) -> tuple[Any, ...]:
        """Return `kept` without the rows of other groups; object refs are returned as they are."""
        return tuple(_own(part, group_id) if isinstance(part, pa.Buffer) else part for part in self.kept)


def _own(part: pa.Buffer, group_id: int) -> pa.Buffer:
    table = from_wire(part)
    return to_wire(table.filter(pc.equal(table["group_id"], group_id)))


@dataclass(eq=False)
class Slot:
    """A Slot is the place of one engine in its pool; when the engine dies, another one takes its place."""

    pool: str
    """Name of the pool."""
    config: PoolConfig
    number: int
    """Position in the pool, from 0."""
    capacity: int
    """Largest number of completions in flight."""
    load: int = 0
    """Number of completions in flight, those of groups that are just being assigned included. A finished one
    of an unfinished group counts until the driver has it."""
    engine: Any = None
    """Handle of the engine's actor; None while the slot is empty."""
    placement: Any = None
    """The engine's placement group; None: it is on one node, where its actor holds all."""
    node: str = ""
    """Id of the engine's Ray node."""
    is_wanted: bool = True
    """Whether there should be an engine. For an elastic pool's slots beyond `num`, autoscale.py decides."""
    wanted_at: float = field(default_factory=time.time)
    """When the pool last asked for an engine here, in seconds of time.time()."""
    state: EngineState = EngineState.WANTED
    since: float = field(default_factory=time.time)
    """When the state last changed, in seconds of time.time()."""
    status: dict[str, Any] = field(default_factory=dict)
    """The engine's last answer to `status`."""
    num_tokens: int = 0
    """Number of tokens that engines of this slot have written, in groups that came back."""
    in_flight: dict[int, Request] = field(default_factory=dict)
    """Group id -> the group in flight."""
    failed: asyncio.Future[None] | None = None
    """Gets the error of the first call that found the engine dead."""
    leaves: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the engine has to leave: preemption notice of its node, SIGTERM, or its pool scales down."""
    deaths: deque[float] = field(default_factory=deque)
    """When engines of this slot died within the last hour, in seconds of time.monotonic()."""
    failed_starts: int = 0
    """Number of starts in a row that failed here."""
    failures: int = 0
    """Number of engines in a row that failed here at their work, since any engine of ours did some."""

    @property
    def name(self) -> str:
        """The engine's name, `<pool>-<number>`."""
        return f"{self.pool}-{self.number}"

    @property
    def has_room(self) -> bool:
        """Return whether the engine runs and can take another group."""
        return self.state == EngineState.RUNNING and self.load < self.capacity

    @property
    def is_elastic(self) -> bool:
        """Return whether the slot is beyond the pool's `num`, so that autoscale.py may fill and clear it."""
        return self.number >= self.config.num

    @property
    def is_ours(self) -> bool:
        """Return whether the engine samples with the policy's weights, and not at an external server."""
        return self.config.url is None

    @property
    def wants(self) -> dict[str, float]:
        """The resources that the engine asks Ray for: resource name -> amount."""
        return resources_of(self.config)

    @property
    def is_used_up(self) -> bool:
        """Return whether the engines here died more than max_restarts_per_hour times within the last hour."""
        while self.deaths and time.monotonic() - self.deaths[0] > 3600:
            self.deaths.popleft()
        return len(self.deaths) > self.config.max_restarts_per_hour

    def fill(self, make: Callable[..., Any]) -> None:
        """Make an engine actor here; one that may be on several nodes gets a placement group first.

        Ray packs its bundles onto as few nodes as there is room on. All are reserved, or none is.

        Args:
            make: as actor.MakeEngine.
        """
        if not self.config.is_spread:
            self.engine = make(self.pool, self.config, self.number)
            return
        self.placement = placement_group(bundles_of(self.config), "PACK", actor_name(self.name))
        self.engine = make(self.pool, self.config, self.number, self.placement)

    def clear(self) -> None:
        """Kill the engine, if there is one, and give back its placement group.

        With that Ray ends the processes that are left on other nodes.
        """
        engine, placement = self.engine, self.placement
        self.engine = self.placement = None
        try:
            if engine is not None:
                ray.kill(engine, no_restart=True)
        finally:
            if placement is not None:
                remove_placement_group(placement)

    def becomes(self, state: EngineState) -> None:
        """Change the state, and note the time."""
        self.state, self.since = state, time.time()
