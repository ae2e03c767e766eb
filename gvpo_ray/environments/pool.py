"""Actors hold the environments. Ray starts one again that dies; its episodes end with their reason.

This module imports neither torch nor vLLM, because actors import it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from gvpo_ray.actors import EventCallback, actor_name, cause_of, innermost, is_death
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.config.environment import EnvironmentConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.environments.client import Client, LostError, NoEnvironmentError
from gvpo_ray.environments.contract import Contract, pickled_by_value
from gvpo_ray.environments.episode import Episodes
from gvpo_ray.environments.forks import Forks
from gvpo_ray.environments.host import Host
from gvpo_ray.environments.world import Limits
from gvpo_ray.sandbox.confine import unprotected


class _EnvironmentActor(Host):
    def __init__(
        self,
        cls: type,
        arguments: Mapping[str, Any],
        limits: Limits,
        variables: Sequence[str],
        is_confined: bool,
    ) -> None:
        self._forks, self._leaving = Forks(cls, arguments, limits, variables, is_confined), threading.Event()
        super().__init__(self._forks.world)
        threading.Thread(target=_end_with, args=(self._forks, self._leaving), daemon=True).start()
        self._unprotected: list[str] = unprotected() if is_confined else getattr(cls, "_unprotected", list)()

    async def status(self) -> dict[str, Any]:
        """Add what this machine's kernel does not protect, and which environment variables it has not."""
        return {
            **await super().status(),
            "unprotected": self._unprotected,
            "missing": self._forks.missing,
        }

    async def leave(self) -> None:
        """End the worlds, with their folders, and leave the end of this process to Ray."""
        self._leaving.set()
        await asyncio.to_thread(self._forks.close)


def _end_with(forks: Forks, leaving: threading.Event) -> None:
    """End this process, which Ray starts again, with its worlds: no tool call is to blame for their end.

    Ray ends a process after its children. One that ends itself then counts as one that crashed, and every run
    would end with Ray's words about that.
    """
    forks.wait()
    if not leaving.is_set():
        os._exit(1)


class EnvironmentGroup:
    """An EnvironmentGroup is the environment actors, seen from the driver.

    Args:
        config: the section.
        contract: the environment's class.
        note: called with every restart of an actor.
        say: called with lines for the user.
    """

    def __init__(
        self, config: EnvironmentConfig, contract: Contract, note: EventCallback, say: Callable[[str], None]
    ) -> None:
        pickled_by_value(contract.cls)
        self._contract = contract
        self._begin(config, note, say)
        limits = Limits(config.timeout_s, config.max_calls, config.max_text)
        own = contract.arguments, limits, config.variables, config.sandbox
        self.actors: list[Any] = spread(config, _EnvironmentActor, contract.cls, *own)
        """Handles of the actors."""

    def _begin(self, config: EnvironmentConfig, note: EventCallback, say: Callable[[str], None]) -> None:
        self._config, self._note, self._say = config, note, say
        self._processes: dict[int, int] = {}
        self._said: set[str] = set()

    def episodes(self, model: ModelConfig, prompts: PromptsConfig) -> Episodes:
        """Return what engines make episodes with."""
        contract = self._contract
        clients = [ActorClient(actor) for actor in self.actors]
        return Episodes(self._config, model, prompts, contract.tools, clients, contract.has_reward)

    async def watch(self) -> None:
        """Note every restart of an actor; what is wrong with one that cannot be reached, its callers say."""
        while True:
            for number, actor in enumerate(self.actors):
                with contextlib.suppress(RayError):
                    self._take(number, await actor.status.remote())
            await asyncio.sleep(WATCH_S)

    def _take(self, number: int, status: Mapping[str, Any]) -> None:
        said = [f"not protected from programs of the environment: {each}" for each in status["unprotected"]]
        said += [
            f"environment.variables: {name} is not set on the node of an environment actor"
            for name in status.get("missing", ())
        ]
        for sentence in said:
            if sentence not in self._said:
                self._said.add(sentence)
                self._say(sentence)
        if self._processes.setdefault(number, status["pid"]) != status["pid"]:
            self._processes[number] = status["pid"]
            why = "its process or its node died; its episodes ended without a reward"
            self._note("environment", f"environment-{number}", why)

    async def close(self) -> None:
        """Kill the actors; they are told before, for which they have a second."""
        told = asyncio.gather(*(actor.leave.remote() for actor in self.actors), return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(told, 1)
        for actor in self.actors:
            ray.kill(actor, no_restart=True)


def spread(config: EnvironmentConfig, actor: type, *arguments: Any) -> list[Any]:
    """Start the actors of an environment, spread over the nodes; return their handles."""
    return [
        ray.remote(actor)
        .options(
            name=actor_name(f"environment-{number}"),
            num_cpus=config.num_cpus,
            resources=config.resources,
            max_concurrency=10_000,
            scheduling_strategy="SPREAD",
            max_restarts=-1,
            max_task_retries=0,
        )
        .remote(*arguments)
        for number in range(config.num)
    ]


WATCH_S = 1.0
"""Seconds between two looks at whether an actor was started again."""


class ActorClient(Client):
    """An ActorClient calls a host that is an actor.

    Args:
        actor: its handle.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def _call(self, limit_s: float | None, method: str, *args: Any) -> Any:
        """Call a method. An actor that does not answer within `limit_s` seconds is killed and started again.

        Raises:
            LostError: the actor is gone, or was killed here.
            NoEnvironmentError: the actor cannot be made, or its code is wrong.
        """
        try:
            async with asyncio.timeout(limit_s) as limit:
                return await getattr(self._actor, method).remote(*args)
        except TimeoutError as error:
            if not limit.expired():
                raise LostError(str(error)) from error
            ray.kill(self._actor, no_restart=False)
            raise LostError(f"an environment actor gave no answer for {limit_s:g} s") from error
        except RayError as error:
            if not is_death(error) or "creation task" in str(innermost(error)):
                raise NoEnvironmentError(f"environment: {cause_of(error)}") from error
            raise LostError(cause_of(error)) from error
