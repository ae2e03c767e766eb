"""A world is the environment of one episode, with the time limits of its calls; it has a process of its own.

Its tools are called with what the policy has written. So whatever comes of such a call, the policy reads it:
a result, what was raised, or that there was no answer in time. `reset`, `respond` and `get_reward` are the
environment's own: where one fails, the episode has no reward.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from gvpo_ray.config.shown import know, masked
from gvpo_ray.config.verifiers import ReasonKind
from gvpo_ray.data.calls import Call, well_formed
from gvpo_ray.sandbox.functions import MAX_REASON, describe, fits_float32, guarded

Count = Annotated[int, Field(ge=0, lt=1 << 31)]
"""A number of calls, as a process may send it."""

Reason = Annotated[str, Field(max_length=MAX_REASON)]
"""Why an episode cannot go on or has no reward, as a process may send it."""


@dataclass
class Answer:
    """An Answer is what a turn has led to."""

    messages: list[dict[str, str]] = field(default_factory=list)
    """Of the roles "tool" and "user"."""
    num_errors: Count = 0
    """Tool calls that failed: malformed ones, those that hung and those that were not made are included."""
    num_hung: Count = 0
    """Tool calls that gave no answer in time."""
    num_refused: Count = 0
    """Tool calls beyond environment.max_calls, which were not made."""
    is_over: bool = False
    """Whether the environment says that the episode ends here."""
    reason: Reason | None = None
    """Why it cannot go on: the environment failed, or its process is gone."""
    is_broken: bool = False
    """Whether a tool call has brought the environment down."""


class Outcome(NamedTuple):
    """An Outcome is how an episode was scored."""

    reward: float | None
    reason: Reason | None = None
    """Why there is no reward."""
    is_broken: bool = False
    """Whether that is so because a tool call has brought the environment down."""


@dataclass(frozen=True)
class Limits:
    """Limits holds the limits of an environment's calls, from the section `environment`."""

    timeout_s: float = 60.0
    max_calls: int = 16
    max_text: int = 100_000
    """Characters that the policy reads of one turn's tools, of a response or of an opening."""


class HangError(Exception):
    """A call of an environment did not return within its time limit; a World makes its answer of it."""


class World:
    """A World makes an environment and calls its methods.

    Synchronous methods run in one thread, as long as none hangs: what an environment opens in one call, such
    as a database, it may use in the next.

    Args:
        cls: the environment's class.
        arguments: of the class.
        limits: of its calls.
        begins: called as each call begins, which has limits.timeout_s from then on.
    """

    def __init__(
        self,
        cls: type,
        arguments: Mapping[str, Any],
        limits: Limits,
        begins: Callable[[], None] = lambda: None,
    ) -> None:
        know({"arguments": dict(arguments)})
        self._make: Callable[[], Any] = lambda: cls(**arguments)
        self._limits, self._begins = limits, begins
        self._thread = ThreadPoolExecutor(1)
        self.environment: Any = None
        self.has_hung = False
        """Whether a call has, which may still be under way in a thread."""

    async def open(self, row: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """Make the environment and reset it with a row; return what it says, or why it could not begin."""
        try:
            self.environment = await self._call(self._make)
            said = await self._call(self.environment.reset, **_fitting(self.environment.reset, row))
            return (None if said is None else readable(str(said), self._limits.max_text)), None
        except Exception as error:  # a user's class may raise anything
            return None, _why("reset", error)

    async def act(self, calls: Sequence[Call], message: str) -> Answer:
        """Make a turn's tool calls, or let the environment respond to its message."""
        if not calls:
            return await self._response(message)
        tools, names = [_tool(self.environment, call) for call in calls], tool_names(type(self.environment))
        num_made = self._limits.max_calls
        for i in range(num_made, len(calls)):
            tools[i] = f"not made: a turn may have {num_made} tool calls"
        at_once = {
            i: asyncio.ensure_future(self._result(tool, call))
            for i, (tool, call) in enumerate(zip(tools, calls, strict=True))
            if inspect.iscoroutinefunction(tool)
        }
        results: list[_Result] = []
        for i, (tool, call) in enumerate(zip(tools, calls, strict=True)):
            if any(result.is_hung for result in results) and i not in at_once:
                tool = "not made: an earlier call of this turn gave no answer"
            results.append(await (at_once[i] if i in at_once else self._result(tool, call)))
        most = self._limits.max_text // len(calls)
        messages = [
            # some templates write the name: one that is no tool's may spell special tokens
            {
                "role": "tool",
                "name": call.name if call.name in names else "unknown",
                "content": readable(result.text, most),
            }
            for call, result in zip(calls, results, strict=True)
        ]
        return Answer(
            messages,
            num_errors=sum(result.is_error for result in results),
            num_hung=sum(result.is_hung for result in results),
            num_refused=max(0, len(calls) - num_made),
        )

    async def score(self) -> Outcome:
        """Ask the environment for its episode's reward."""
        if not hasattr(self.environment, "get_reward"):
            return Outcome(None)
        try:
            value = await self._call(self.environment.get_reward)
            if value is None:
                return Outcome(None, "environment: get_reward gave None")
            reward = float(value)
        except Exception as error:  # a user's class may raise anything
            return Outcome(None, _why("get_reward", error))
        if not fits_float32(reward):
            return Outcome(None, f"environment: get_reward gave {reward:g}, which is no finite float32")
        return Outcome(reward)

    async def close(self) -> None:
        """Let the environment go."""
        self._thread.shutdown(wait=False)

    async def _response(self, message: str) -> Answer:
        if not hasattr(self.environment, "respond"):
            return Answer(is_over=True)
        try:
            text = await self._call(self.environment.respond, message)
            text = None if text is None else readable(str(text), self._limits.max_text)
        except Exception as error:  # a user's class may raise anything
            return Answer(reason=_why("respond", error))
        if text is None:
            return Answer(is_over=True)
        return Answer([{"role": "user", "content": text}])

    async def _result(self, tool: Any, call: Call) -> _Result:
        """Make a tool call; a `tool` that is a text says why it is not made."""
        if isinstance(tool, str):
            return _Result(f"Error: {tool}", is_error=True)
        try:
            value = await self._call(tool, **call.arguments)
            # a result may have no text: an integer of more than 4300 digits, a dict with tuples as keys
            if isinstance(value, (dict, list, tuple)):
                return _Result(json.dumps(value, default=str, ensure_ascii=False))
            return _Result(str(value))
        except HangError as error:
            return _Result(f"Error: {error}", is_error=True, is_hung=True)
        except Exception as error:  # what the policy's arguments lead to
            return _Result(f"Error: {type(error).__name__}: {_text_of(error, self._limits)}", is_error=True)

    async def _call(self, function: Callable[..., Any], /, *args: Any, **arguments: Any) -> Any:
        """Call a method within the time limit; raise HangError where it does not return."""
        self._begins()
        is_async = inspect.iscoroutinefunction(function)
        try:
            async with asyncio.timeout(self._limits.timeout_s) as limit:
                if is_async:
                    return await function(*args, **arguments)
                value = await asyncio.wrap_future(self._thread.submit(guarded, function, args, arguments))
                return await value if inspect.isawaitable(value) else value
        except TimeoutError:
            if not limit.expired():  # the environment's own
                raise
        self.has_hung = True
        if not is_async:  # nothing can end what is in the thread: the next call has another one
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = ThreadPoolExecutor(1)
        raise HangError(f"no answer within {self._limits.timeout_s:g} s")


class _Result(NamedTuple):
    """A _Result is what the policy reads of a tool call."""

    text: str
    is_error: bool = False
    is_hung: bool = False


def readable(text: str, most: int) -> str:
    """Return a text as the policy reads it: well formed, and with a remark at its end where that is cut off.

    Tokenising takes time and memory by the character, in a process that the episodes of an engine share.
    """
    if len(text) <= most:
        return well_formed(text)
    return f"{well_formed(text[:most])}\n[cut: {most} of {len(text)} characters]"


def _text_of(error: Exception, limits: Limits) -> str:
    """Return the text of an error that a tool has raised, whose class may be at fault itself."""
    try:
        return masked(str(error), limits.max_text)
    except Exception:
        return "its text cannot be shown"


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
