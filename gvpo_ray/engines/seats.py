"""The place of one engine in its pool, and the groups that are in flight there."""

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
    since: float
    kept: list[Any]
    """Refs of the group's completions that are safe outside the engine."""


@dataclass(eq=False)
class Seat:
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
    """Whether there should be an engine; of an elastic pool's seats beyond num, autoscale.py decides."""
    asked_at: float = field(default_factory=time.time)
    state: EngineState = EngineState.WANTED
    since: float = field(default_factory=time.time)
    status: dict[str, Any] = field(default_factory=dict)
    """What the engine said of itself last."""
    num_tokens: int = 0
    """Written here so far, in groups that came back."""
    in_flight: dict[int, Request] = field(default_factory=dict)
    """By group id."""
    failed: asyncio.Future[None] | None = None
    """Gets the error of the first call that found the engine dead."""

    @property
    def name(self) -> str:
        return f"{self.pool}-{self.number}"

    @property
    def has_room(self) -> bool:
        return self.state == EngineState.RUNNING and self.load < self.capacity

    @property
    def is_elastic(self) -> bool:
        return self.number >= self.config.num

    @property
    def wants(self) -> dict[str, float]:
        """What it asks Ray for."""
        return resources_of(self.config)

    def becomes(self, state: EngineState) -> None:
        self.state, self.since = state, time.time()
