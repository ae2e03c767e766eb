"""A task set of the package verifiers is played by its own harness, as an agent of this project is.

    engine ─► AgentHost.play ─► Tasks(base_url, api_key, task) ─► Env.run_slot ─► harness ─► interception
      ▲                                                                                         │
      └──────────────── calls of the model, with their tokens ◄── the host's forwarder ◄────────┘

All of it runs in a thread with an event loop of its own, since a task set's code may block: a reward
that computes for long, a client that waits. Then the episodes of this actor wait, each until its time limit,
and the actor itself goes on answering.

The interception is verifiers' own server, which records the trace and passes the harness's requests on. So
what is trained are the engine's tokens, put together to branches as agent.py says, and the trace gives the
reward alone: trace.reward; none where a part of it has no score, where there is none, or where the trace or
the episode has an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.environment import EnvironmentConfig
from gvpo_ray.data.tasksets import MISSING, in_time, register, source_of
from gvpo_ray.errors import GvpoError

Made = TypeVar("Made")

START_S = 600.0
"""Most seconds that a task set may take to begin in an actor; it may have data to read, or to download."""


class TaskError(GvpoError):
    """An episode of a task set has no reward; the message says why."""


class Tasks:
    """Tasks plays the tasks of a task set. It is made at the driver, and plays where it is sent to.

    Args:
        config: the section, with a task set.

    Raises:
        ConfigError: the package, the task set or its settings are wrong, or it has several agents.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        assert config.taskset is not None
        self._name, self._max_turns = config.taskset, config.max_turns
        self._arguments, self._timeout_s = config.arguments, config.timeout_s
        try:
            self._place, self._code = source_of(self._name)
        except OSError as error:
            raise ConfigError(f"environment.name: {self._name} cannot be read: {error.strerror}") from error
        self._begun: asyncio.Future[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            in_time("environment.name", self._name, self._settings)
        except ConfigError:
            raise
        except ImportError as error:
            why = MISSING if (error.name or "").startswith("verifiers") else str(error)
            raise ConfigError(f"environment.name: verifiers:{self._name} {why}") from error
        except Exception as error:  # a task set is a user's module, and may raise anything
            told = " ".join(str(error).split())
            raise ConfigError(f"environment.name: {self._name}: {type(error).__name__}: {told}") from error

    def _settings(self) -> tuple[Any, str]:
        """Return the config of verifiers' environment, and the name of the seat that the policy has.

        Where the harness runs no programs, neither it nor the tasks need a container, and the config names no
        runtime, it runs on this machine, in place of verifiers' own default, a sandbox of a service.
        """
        from verifiers.v1.configs.agent import agent_config_fields
        from verifiers.v1.utils.loaders import harness_class, resolve_env_config, taskset_class

        ident = self._place if self._code is None else register(self._place, self._code)
        given = {
            "interception": {"type": "server"},
            **self._arguments,
            "taskset": {**self._arguments.get("taskset", {}), "id": ident},
        }
        config = resolve_env_config(given)
        seats = agent_config_fields(config)
        if len(seats) != 1:
            names = ", ".join(seats)
            raise ConfigError(f"environment.name: {self._name} has several agents ({names}): one is trained")
        ((seat, spec),) = seats.items()
        if any(one.retries.max_retries or one.retries.rules for one in (config, spec)):
            raise ConfigError(
                "environment.arguments: retries: a second play of an episode has calls of the first"
            )
        if config.interception.type != "server":
            raise ConfigError("environment.arguments: interception: there is one server in each actor")
        own = dict(self._arguments.get(seat, {}))
        theirs = type(spec).model_fields["runtime"].get_default(call_default_factory=True)
        harness, tasks = (
            harness_class(config.agent_harnesses()[seat].id),
            taskset_class(ident).task_type(),
        )
        confined = [one.__name__ for one in (harness, tasks) if one.NEEDS_CONTAINER]
        if spec.runtime == theirs and not harness.EXECUTES_CODE and not confined:
            own["runtime"] = {"type": "subprocess"}
        own["max_turns"] = min(self._max_turns, spec.max_turns or self._max_turns)
        found = resolve_env_config({**given, seat: own})
        if confined and getattr(found, seat).runtime.type == "subprocess":
            raise ConfigError(
                f"environment.arguments: {seat}.runtime: {confined[0]} needs a container, and subprocess has "
                "none: say another type, such as docker"
            )
        return found, seat

    async def begin(self) -> None:
        """Load the task set and start what its episodes share, once; an episode's time has not begun.

        Raises:
            TimeoutError: it takes too long.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._work, name="task set", daemon=True).start()
        try:
            async with asyncio.timeout(START_S):
                await self._apart(self._ready(), START_S)
        except TimeoutError as error:
            raise TimeoutError(f"{self._name} has not begun within {START_S:g} s") from error

    async def __call__(self, base_url: str, api_key: str, model: str, task: str, **row: Any) -> float:
        """Play an episode; return its reward.

        Args:
            base_url: of the model, for this episode.
            api_key: its key.
            model: its name.
            task: the data of the task, as JSON.
            row: further columns, which nothing asks for.

        Raises:
            TaskError: it has none.
        """
        await self.begin()
        return await self._apart(self._play(base_url, api_key, model, task), self._timeout_s)

    def _work(self) -> None:
        """Run the loop of the task set's thread, also after its code wanted to end the process."""
        assert self._loop is not None
        while True:
            with contextlib.suppress(SystemExit):
                return self._loop.run_forever()

    async def _apart(self, work: Coroutine[Any, Any, Made], limit_s: float) -> Made:
        """Run a coroutine in the task set's thread.

        Where it is given up, and the thread then answers nothing for `limit_s`, the thread hangs in the task
        set's code, which nothing can end: the process ends, and is started again.
        """
        assert self._loop is not None

        async def guarded() -> Made:
            try:
                return await work
            except SystemExit as error:  # it would end the thread, and nobody would learn why
                raise RuntimeError(f"{self._name} ends the process: SystemExit({error})") from error

        done = asyncio.run_coroutine_threadsafe(guarded(), self._loop)
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            answers = threading.Event()
            self._loop.call_soon_threadsafe(answers.set)
            here = asyncio.get_running_loop()
            here.call_later(limit_s, lambda: answers.is_set() or os._exit(1))
            raise

    async def _ready(self) -> tuple[Any, Any]:
        """Return verifiers' environment, which serves, and a pool of connections."""
        if self._begun is None:
            self._begun = asyncio.get_running_loop().create_future()
            self._serving = asyncio.create_task(self._serve(self._begun))
        found: tuple[Any, Any] = await asyncio.shield(self._begun)
        return found

    async def _play(self, base_url: str, api_key: str, model: str, task: str) -> float:
        from verifiers.v1.clients import EvalClientConfig, ModelContext

        env, http = await self._ready()
        kind = type(env.taskset).task_type()
        data = kind.data_type().model_validate(json.loads(task))
        (slot,) = env.slots(kind(data, env.taskset.config.task))
        endpoint = EvalClientConfig(base_url=base_url)
        # one pool of connections for all: verifiers would make one for each episode, and keep it
        clients, key = env._interception.clients, endpoint.model_dump_json()
        clients[key] = _client(endpoint, api_key, http)
        try:
            return _reward(await env.run_slot(slot, ModelContext(model=model, client=endpoint)))
        finally:
            del clients[key]

    async def _serve(self, begun: asyncio.Future[Any]) -> None:
        """Hold what the episodes of this process share, as long as it lives."""
        from verifiers.v1.clients.base import build_async_httpx
        from verifiers.v1.configs.client import EvalClientConfig
        from verifiers.v1.utils.loaders import load_environment

        try:
            env = load_environment(self._settings()[0])
            async with env.serving():
                begun.set_result((env, build_async_httpx(EvalClientConfig())))
                await asyncio.Event().wait()
        except (Exception, SystemExit) as error:  # of a user's module: the reason of each of its episodes
            if begun.done():
                raise
            self._begun = None  # the next episode tries again: a hub may have been out of reach
            begun.set_exception(error)

    def __getstate__(self) -> Mapping[str, Any]:
        """Leave out what lives in one process."""
        return {**self.__dict__, "_begun": None, "_serving": None, "_loop": None}


def _client(endpoint: Any, api_key: str, http: Any) -> Any:
    """Return verifiers' client of an endpoint, with a key that is in no variable of the environment."""
    from verifiers.v1.clients import EvalClient

    client = EvalClient.__new__(EvalClient)
    client.base_url, client.api_key, client.headers, client.client = endpoint.base_url, api_key, {}, http
    return client


def _reward(episode: Any) -> float:
    """Return the reward of an episode.

    Raises:
        TaskError: it has an error, not one trace, or a trace without a whole reward.
    """
    for part in (*episode.traces, episode):
        if not part.ok:
            error = part.last_error
            raise TaskError("it is not whole" if error is None else f"{error.type}: {error.message}")
    if len(episode.traces) != 1:
        raise TaskError(f"it has {len(episode.traces)} traces: the calls of one agent are trained")
    (trace,) = episode.traces
    if not trace.rewards:
        raise TaskError("its task gives no reward")
    if unscored := [name for name, reward in trace.rewards.items() if reward is None]:
        raise TaskError(f"the reward {unscored[0]} has no score")
    return float(trace.reward)
