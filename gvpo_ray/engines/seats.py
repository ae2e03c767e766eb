"""The seats of a pool, each for one engine, and the groups that are in flight there."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from gvpo_ray.actors import resources_of
from gvpo_ray.config.engines import PoolConfig
from gvpo_ray.observe.status import EngineState


@dataclass
class Request:
    """A group in flight at an engine."""

    since: float
    """When the group was first given to an engine, in seconds of time.time()."""
    kept: list[Any]
    """Object refs of tables with completions that survive the engine's death."""


@dataclass(eq=False)
class Seat:
    """The place of one engine in its pool; when the engine dies, another takes its seat."""

    pool: str
    """Name of the pool."""
    config: PoolConfig
    number: int
    """Position in the pool, from 0."""
    capacity: int
    """Largest number of completions in flight."""
    load: int = 0
    """Number of completions in flight, those of groups that are just being assigned included."""
    engine: Any = None
    """Handle of the engine's actor; None while the seat is empty."""
    node: str = ""
    """Id of the engine's Ray node."""
    is_asked: bool = True
    """Whether there should be an engine. For an elastic pool's seats beyond `num`, autoscale.py decides."""
    asked_at: float = field(default_factory=time.time)
    """When the seat was last asked to be filled, in seconds of time.time()."""
    state: EngineState = EngineState.WANTED
    since: float = field(default_factory=time.time)
    """When the state last changed, in seconds of time.time()."""
    status: dict[str, Any] = field(default_factory=dict)
    """The engine's last answer to `status`."""
    num_tokens: int = 0
    """Number of tokens that engines of this seat have written, in groups that came back."""
    in_flight: dict[int, Request] = field(default_factory=dict)
    """Group id -> the group in flight."""
    failed: asyncio.Future[None] | None = None
    """Gets the error of the first call that found the engine dead."""

    @property
    def name(self) -> str:
        """The engine's name, `<pool>-<number>`."""
        return f"{self.pool}-{self.number}"

    @property
    def has_room(self) -> bool:
        """Whether the engine runs and can take another group."""
        return self.state == EngineState.RUNNING and self.load < self.capacity

    @property
    def is_elastic(self) -> bool:
        """Whether the seat is beyond the pool's `num`, so that autoscale.py may fill and clear it."""
        return self.number >= self.config.num

    @property
    def wants(self) -> dict[str, float]:
        """The resources that the engine asks Ray for: resource name -> amount."""
        return resources_of(self.config)

    def becomes(self, state: EngineState) -> None:
        """Change the state, and note the time."""
        self.state, self.since = state, time.time()
