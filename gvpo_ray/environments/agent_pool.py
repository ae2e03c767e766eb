"""Agents run in actors. Ray starts one again that dies; its episodes end with their reason.

This module imports neither torch nor vLLM, because actors import it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from gvpo_ray.actors import EventCallback
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.config.environment import EnvironmentConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.environments.agent import Agents
from gvpo_ray.environments.agent_host import AgentHost
from gvpo_ray.environments.contract import pickled_by_value
from gvpo_ray.environments.pool import ActorClient, EnvironmentGroup, spread
from gvpo_ray.environments.tasksets import Tasks


class _EnvironmentActor(AgentHost):
    """Its process has the name of other environments' actors, by which `bench chaos` finds them."""


class AgentGroup(EnvironmentGroup):
    """An AgentGroup is the actors that run agents, seen from the driver.

    Args:
        config: the section.
        agent: the function.
        is_graded: whether some reward function grades texts.
        note: called with every restart of an actor.
        say: called with lines for the user.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        agent: Callable[..., Any],
        is_graded: bool,
        note: EventCallback,
        say: Callable[[str], None],
    ) -> None:
        if not isinstance(agent, Tasks):  # which takes the task set's file along
            pickled_by_value(agent)
        self._begin(config, note, say)
        self.actors = spread(config, _EnvironmentActor, agent, config.timeout_s, config.max_turns, is_graded)

    def episodes(self, model: ModelConfig, prompts: PromptsConfig) -> Agents:
        """Return what engines make episodes with."""
        return Agents(self._config, model, prompts, [], [ActorClient(actor) for actor in self.actors])

    async def close(self) -> None:
        """Kill the actors, which have no processes of their own to be told about."""
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
