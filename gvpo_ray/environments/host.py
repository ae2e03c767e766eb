"""A host holds the environments of many episodes. It is an actor; engines call it.

It also keeps each episode's tokens up to its last turn. So when an engine dies, another one claims the
episodes of its groups and goes on with their tokens, and the environments have lost nothing. Every turn has a
number, and a turn that has been made is answered again and not made again.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from gvpo_ray.config.shown import know, mask
from gvpo_ray.config.verifiers import ReasonKind
from gvpo_ray.data.dialogue import Call
from gvpo_ray.sandbox.functions import describe

MAX_THREADS = 256
"""Most calls of synchronous methods at once."""

MAX_HUNG = 8
"""Number of synchronous calls, late and still in their threads, which nothing can end, at which the host's
process ends and is started again. One that returns late, or had no thread yet, is none of them."""

GONE = "environment: its actor died, and the episode's state with it"
"""Reason of an episode whose environment is no more."""

SoFar = dict[str, Any]
"""Completion columns of an episode, up to the end of a turn."""


@dataclass
class Opened:
    """An Opened episode is what an engine gets to know of one."""

    name: str
    lease: int
    """Number of the engine, by order, that has it; calls of earlier ones are refused."""
    said: str | None
    """What reset has returned."""
    so_far: SoFar | None = None
    reason: str | None = None
    """Why it could not begin."""


@dataclass
class Answer:
    """An Answer is what a turn has led to."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    """Of the roles "tool" and "user"."""
    num_errors: int = 0
    """Tool calls that failed, malformed ones included."""
    is_over: bool = False
    """Whether the environment says that the episode ends here."""
    reason: str | None = None
    """Why it cannot go on and has no reward: a call did not return, or the environment failed."""


@dataclass(eq=False)
class _Episode:
    name: str
    group_id: int
    environment: Any
    said: str | None = None
    lease: int = 0
    so_far: SoFar | None = None
    turns: list[asyncio.Task[Answer]] = field(default_factory=list)
    outcome: asyncio.Task[tuple[float | None, str | None]] | None = None


class HangError(Exception):
    """A call of an environment did not return within its time limit."""


class Host:
    """A Host makes environments, and calls their methods within a time limit.

    Args:
        cls: the environment's class.
        arguments: of the class.
        timeout_s: time limit of a call, in seconds.
    """

    def __init__(self, cls: type, arguments: Mapping[str, Any], timeout_s: float) -> None:
        know({"arguments": dict(arguments)})
        self._make: Callable[[], Any] = lambda: cls(**arguments)
        self._responds, self._has_reward = hasattr(cls, "respond"), hasattr(cls, "get_reward")
        self._timeout_s, self._late = timeout_s, list[Future[Any]]()
        self._threads = ThreadPoolExecutor(MAX_THREADS)
        self._episodes: dict[str, _Episode] = {}

    async def open(self, group_id: int, row: Mapping[str, Any], num: int) -> list[Opened]:
        """Begin `num` episodes of a group; `row` goes to reset, as far as it has such arguments."""
        return list(await asyncio.gather(*(self._open(group_id, row) for _ in range(num))))

    async def claim(self, group_id: int, without: Iterable[str] = ()) -> list[Opened]:
        """Take over the episodes of a group that there are, but for those of the names `without`."""
        left_out = set(without)
        found = [e for e in self._episodes.values() if e.group_id == group_id and e.name not in left_out]
        for episode in found:
            episode.lease += 1
        return [Opened(e.name, e.lease, e.said, e.so_far) for e in found]

    async def act(
        self, name: str, lease: int, turn: int, so_far: SoFar, calls: Sequence[Call], message: str
    ) -> Answer:
        """Make a turn's tool calls, or let the environment respond to its message.

        Args:
            name: of the episode.
            lease: from Opened.
            turn: its number, from 0.
            so_far: the episode's columns up to the end of this turn.
            calls: the turn's tool calls; synchronous ones are made in their order, asynchronous ones at once.
            message: the turn's text.
        """
        episode = self._episodes.get(name)
        if episode is None or episode.lease != lease:
            return Answer(reason=GONE)
        if turn == len(episode.turns):
            episode.so_far = so_far
            episode.turns.append(asyncio.ensure_future(self._act(episode, calls, message)))
        return await asyncio.shield(episode.turns[turn])

    async def finish(self, name: str, lease: int, so_far: SoFar) -> tuple[float | None, str | None]:
        """End an episode; return its reward, or None and the reason."""
        episode = self._episodes.get(name)
        if episode is None or episode.lease != lease:
            return None, GONE
        if episode.outcome is None:
            episode.so_far = so_far
            episode.outcome = asyncio.ensure_future(self._reward(episode))
        return await asyncio.shield(episode.outcome)

    async def release(self, group_id: int) -> None:
        """Forget the episodes of a group, which nobody will claim."""
        for name in [e.name for e in self._episodes.values() if e.group_id == group_id]:
            del self._episodes[name]

    async def status(self) -> dict[str, int]:
        """Return the number of episodes, and the pid."""
        return {"num_episodes": len(self._episodes), "pid": os.getpid()}

    async def _open(self, group_id: int, row: Mapping[str, Any]) -> Opened:
        name = uuid.uuid4().hex
        try:
            environment = await self._call(self._make)
            said = await self._call(environment.reset, **_fitting(environment.reset, row))
        except Exception as error:  # a user's class may raise anything
            return Opened(name, 0, None, reason=_why("reset", error))
        said = None if said is None else str(said)
        self._episodes[name] = _Episode(name, group_id, environment, said)
        return Opened(name, 0, said)

    async def _act(self, episode: _Episode, calls: Sequence[Call], message: str) -> Answer:
        environment = episode.environment
        if not calls:
            if not self._responds:
                return Answer(is_over=True)
            try:
                text = await self._call(environment.respond, message)
            except Exception as error:  # a user's class may raise anything
                return Answer(reason=_why("respond", error))
            if text is None:
                return Answer(is_over=True)
            return Answer([{"role": "user", "content": str(text)}])
        tools, names = [_tool(environment, call) for call in calls], tool_names(type(environment))
        at_once = {
            i: asyncio.ensure_future(self._result(tool, call))
            for i, (tool, call) in enumerate(zip(tools, calls, strict=True))
            if inspect.iscoroutinefunction(tool)
        }
        results: list[tuple[str, bool]] = []
        try:
            for i, (tool, call) in enumerate(zip(tools, calls, strict=True)):
                results.append(await (at_once[i] if i in at_once else self._result(tool, call)))
        except HangError as error:
            return Answer(reason=_why(call.name, error))
        finally:
            for task in at_once.values():
                task.cancel()
        messages = [
            # some templates write the name: one that is no tool's may spell special tokens
            {"role": "tool", "name": call.name if call.name in names else "unknown", "content": text}
            for call, (text, _) in zip(calls, results, strict=True)
        ]
        return Answer(messages, sum(is_error for _, is_error in results))

    async def _result(self, tool: Any, call: Call) -> tuple[str, bool]:
        """Make a tool call; return its result as text, and whether it is an error that the policy reads."""
        if isinstance(tool, str):
            return f"Error: {tool}", True
        try:
            value = await self._call(tool, **call.arguments)
            # a result may have no text: an integer of more than 4300 digits, a dict with tuples as keys
            if isinstance(value, (dict, list, tuple)):
                return json.dumps(value, default=str, ensure_ascii=False), False
            return str(value), False
        except HangError:
            raise
        except Exception as error:  # what the policy's arguments lead to
            return f"Error: {type(error).__name__}: {mask(str(error))}", True

    async def _reward(self, episode: _Episode) -> tuple[float | None, str | None]:
        if not self._has_reward:
            return None, None
        try:
            value = await self._call(episode.environment.get_reward)
            if value is None:
                return None, "environment: get_reward gave None"
            reward = float(value)
        except Exception as error:  # a user's class may raise anything
            return None, _why("get_reward", error)
        if not math.isfinite(reward):
            return None, f"environment: get_reward gave {reward}"
        return reward, None

    async def _call(self, function: Callable[..., Any], /, *args: Any, **arguments: Any) -> Any:
        """Call a method within the time limit; raise HangError where it does not return."""
        in_thread: Future[Any] | None = None
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                if inspect.iscoroutinefunction(function):
                    return await function(*args, **arguments)
                in_thread = self._threads.submit(_guarded, function, args, arguments)
                value = await asyncio.wrap_future(in_thread)
                return await value if inspect.isawaitable(value) else value
        except TimeoutError:
            if not limit.expired():  # the environment's own
                raise
        if in_thread is not None and not in_thread.cancel():
            self._late = [one for one in (*self._late, in_thread) if not one.done()]
            if len(self._late) >= MAX_HUNG:
                self._worn_out()
        raise HangError(f"no answer within {self._timeout_s:g} s")

    def _worn_out(self) -> None:
        """End the process soon, so that this call's answer still arrives."""
        asyncio.get_running_loop().call_later(1.0, os._exit, 1)


def _guarded(function: Callable[..., Any], args: Sequence[Any], arguments: Mapping[str, Any]) -> Any:
    """Call a function in which SystemExit and its kin are errors like others."""
    try:
        return function(*args, **arguments)
    except Exception:
        raise
    except BaseException as error:  # a tool that calls sys.exit must not end the host
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _tool(environment: Any, call: Call) -> Any:
    """Return the method that a call names, or what is wrong with the call."""
    if call.error is not None:
        return call.error
    names = tool_names(type(environment))
    if call.name not in names:
        return f"there is no tool {call.name!r}, only {', '.join(names) or 'conversation'}"
    tool = getattr(environment, call.name)
    try:
        inspect.signature(tool).bind(**call.arguments)
    except TypeError as error:
        return f"{call.name}: {error}"
    return tool


def tool_names(cls: type) -> list[str]:
    """Return the names of a class's tools: its public methods but for reset, respond and get_reward."""
    return [
        name
        for name, value in inspect.getmembers(cls)
        if not name.startswith("_")
        and name not in ("reset", "respond", "get_reward")
        and inspect.isroutine(value)
    ]


def _fitting(function: Callable[..., Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return those columns of a row that a function takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(row)
    return {parameter.name: row[parameter.name] for parameter in parameters if parameter.name in row}


def _why(method: str, error: Exception) -> str:
    """Return the reason of an episode that an environment's method has ended."""
    if isinstance(error, HangError):
        return f"{ReasonKind.TIMEOUT}: environment: {method}: {error}"
    return f"environment: {method} raised {describe(error)}"
