"""Reward functions are loaded and called here, and the values that they return are checked.

    def reward(prompts, completions, **columns) -> list[float | None]

A reward function returns one number per completion, or None for a completion that it cannot verify.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dis
import errno
import importlib
import importlib.util
import inspect
import numbers
import socket
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle  # type: ignore[import-untyped]

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.shown import know, masked
from gvpo_ray.errors import GvpoError
from gvpo_ray.sandbox.adapters import adapted, as_list, as_number, check_signature

Loaded = TypeVar("Loaded")

Score = float | None | tuple[float | None, str]
"""A reward function's result for one completion: the reward, or None (it cannot be verified), alone or in a
pair with a remark for `reward_reasons`."""

RewardFunction = Callable[..., Any]
"""`reward(prompts, completions, **columns) -> one Score per completion`, or a coroutine function of this
form; each column is a list of one entry per completion."""


@dataclass(frozen=True)
class Part:
    """A Part is one reward function's result for one completion, after all checks."""

    value: float | None
    """A finite float32; None: there is no reward."""
    reason: str | None = None
    """Why there is no value, or the function's remark."""
    is_fault: bool = False
    """Whether the function failed: it raised, or returned something that is no reward."""


def call(
    name: str,
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: Mapping[str, Any],
    catch: type[BaseException] = Exception,
    may_wait: bool = False,
) -> list[Part]:
    """Call a reward function and return one Part per completion, also if it raises or returns nonsense.

    Args:
        name: the function's name in verifiers.rewards, for reasons.
        function: the reward function; a coroutine function is run to its end.
        prompts: one text per completion.
        completions: the texts to score.
        columns: further arguments, lists of one entry per completion.
        catch: the class of exceptions that count as faults of the function. BaseException fits a process that
            does nothing else: a completion may cause SystemExit, and the time limits of some libraries are no
            Exception either.
        may_wait: whether a service that cannot be reached is an OutOfReach, and not a fault of the function.

    Raises:
        OutOfReach: with `may_wait`: the function calls a service that does not answer, so that its
            completions should be scored later: it raises OutOfReach, or the system refused, broke or could
            not make a connection.
        MemoryError: the function ran out of memory. This is never counted as a fault, because the function's
            leftovers may still fill the memory.
    """
    try:
        returned = function(prompts=prompts, completions=completions, **columns)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_await(returned))
        # inside `try` as well: what comes back may be of the user's own classes
        return _parts(name, returned, len(completions))
    except MemoryError:
        raise
    except catch as error:  # untrusted output is scored here
        if may_wait and (unreachable := _unreachable(error)):
            unreachable.reward = name
            raise unreachable from error
        return [Part(None, _clean(f"{name} raised {describe(error)}"), is_fault=True)] * len(completions)


class OutOfReach(GvpoError, ConnectionError):
    """A service that a reward function calls does not answer; the message is the cause in one line.

    A trusted reward function raises it to have its completions scored later.

    Args:
        cause: the cause.
        is_answer: whether the service answered, and failed at this request.
        is_own: whether the service is there and refuses the request (wrong address, wrong form, no right to
            it), which no waiting mends if it has never worked.
        reward: name of the reward function, once it is known.
    """

    def __init__(self, cause: str, is_answer: bool = False, is_own: bool = False, reward: str = "") -> None:
        super().__init__(cause)
        self.is_answer, self.is_own, self.reward = is_answer, is_own, reward

    def __reduce__(self) -> Any:
        """Return how the error is made anew in another process."""
        return OutOfReach, (str(self), self.is_answer, self.is_own, self.reward)


MAX_REASON = 2000
"""Characters of the reason of one reward; what a child of the sandbox says may be longer."""

_NO_CONNECTION = (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT)
"""Numbers of the system's errors of connections that are no ConnectionError."""


def _unreachable(error: BaseException | None) -> OutOfReach | None:
    """Return the OutOfReach for an error that comes from a connection, else None.

    Clients have errors of their own, and all raise them because of the system's. A broken pipe and a time
    limit may as well be of the function's own processes and loops, so that they are its faults.
    """
    cause = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, OutOfReach):
            return cause
        if (
            (isinstance(cause, ConnectionError) and not isinstance(cause, BrokenPipeError))
            or isinstance(cause, socket.gaierror)
            or (isinstance(cause, OSError) and cause.errno in _NO_CONNECTION)
        ):
            assert error is not None
            return OutOfReach(describe(error))
        cause = cause.__cause__ or cause.__context__
    return None


def _parts(name: str, returned: Any, number: int) -> list[Part]:
    """Check what a reward function returned for a number of completions."""
    returned = as_list(returned, number)
    if not isinstance(returned, (list, tuple)):
        fault = f"{name} returned {_shown(returned)}, not a list of rewards, one for each completion"
    elif len(returned) != number:
        fault = f"{name} returned {len(returned)} rewards for {number} completion{'s' * (number > 1)}"
    else:
        return [_part(name, score) for score in returned]
    return [Part(None, _clean(fault), is_fault=True)] * number


async def _await(awaitable: Any) -> Any:
    return await awaitable


def _part(name: str, score: Any) -> Part:
    """Check one value that a reward function returned."""
    score, remark = score if isinstance(score, tuple) and len(score) == 2 else (score, None)
    score, said = as_number(score)
    remark = said if remark is None else str(remark)
    remark = None if remark is None else _clean(masked(remark, 500))
    if score is None:
        return Part(None, remark or f"{name} gave no reward (None)")
    if not isinstance(score, numbers.Real):
        return Part(None, _clean(f"{name} returned {_shown(score)}, not a number"), is_fault=True)
    if not fits_float32(score):
        return Part(None, f"{name} returned {_shown_number(score)}, not a finite float32", is_fault=True)
    return Part(float(score), remark)


def _clean(text: str) -> str:
    """Return a reason as one line of valid Unicode.

    The lines of `reward_reasons` are reasons, and Arrow holds no half surrogate pairs.
    """
    return " ".join(text.encode("utf-8", "replace").decode().splitlines())


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {masked(str(value), 60)!r}"


def _shown_number(value: Any) -> str:
    try:
        return str(float(value))
    except OverflowError:
        return "a number beyond 1e308"


def fits_float32(value: Any) -> bool:
    """Return whether a number is finite, also as a float32."""
    # no conversion: an int or a fraction may be too large for one; and NaN fails every comparison
    return bool(-3.4028234e38 <= value <= 3.4028234e38)


def describe(error: BaseException) -> str:
    """Return one line, of limited length, for an error that a user's code raised."""
    if isinstance(error, (ConfigError, OutOfReach)):
        return masked(str(error), MAX_REASON).encode("utf-8", "replace").decode()
    try:
        text = " ".join(_clean(masked(str(error), 3000)).split())[:300]
    except Exception:  # a user's class of errors may be at fault itself
        text = "its text cannot be shown"
    return f"{type(error).__name__}: {text}"


def load(source: Mapping[str, Any], imports_ahead: bool = False) -> RewardFunction:
    """Load the function that verifiers.rewards.source_of describes, and bind its configured arguments.

    If the function has an attribute `warm_up`, that is called once, without arguments, so that the first
    check takes no longer than others.

    Args:
        source: `place` (`module:function` or `path.py:function`) or `pickle` (base64), `arguments`, and
            `is_strict` (built in), which refuses arguments that only **kwargs would take. With `columns`
            (key of a data set -> names), the function's required arguments must be among them.
        imports_ahead: import now what a user's function would import in each call.

    Raises:
        ConfigError: no such file, module, function or argument, or a signature that cannot be called. Errors
            of a user's module come through as they are.
    """
    know(source["arguments"])
    function = (
        _callable(cloudpickle.loads(base64.b64decode(source["pickle"])), "it")
        if "pickle" in source
        else find(source["place"])
    )
    check_signature(function, source["arguments"], source["is_strict"], source.get("columns"))
    if warm_up := getattr(function, "warm_up", None):
        warm_up()
    if imports_ahead and not source["is_strict"]:
        import_ahead(function)
    return adapted(function, source["arguments"], source["is_strict"])


def import_ahead(function: RewardFunction) -> None:
    """Import what the functions of a reward function's module import when they run.

    A child of the sandbox serves one check of a user's function, and would import it anew each time: a second
    or two of every check for torch. What cannot be imported is left to the check.
    """
    whole = function if inspect.isroutine(function) else type(function).__call__
    whole = inspect.unwrap(whole)
    names = getattr(whole, "__globals__", {})
    parts = [whole, *(value for value in names.values() if getattr(value, "__globals__", None) is names)]
    codes = [part.__code__ for part in parts if hasattr(part, "__code__")]
    for module in dict.fromkeys(module for code in codes for module in _imports(code)):
        with contextlib.suppress(Exception):  # a user's module may raise anything
            importlib.import_module(module)


def _imports(code: types.CodeType) -> Iterator[str]:
    """Yield the modules that a code imports, without those that are relative to a package."""
    before: list[Any] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME" and before[-2] == 0:  # two constants: level, names
            yield str(instruction.argval)
        before.append(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _imports(constant)


def of_user(key: str, load: Callable[[], Loaded]) -> Loaded:
    """Return load(), which imports a user's module.

    Args:
        key: the key of the config that names it.
        load: loads it; it may raise anything.

    Raises:
        ConfigError: it raises; the line begins with the key.
    """
    try:
        return load()
    except Exception as error:  # importing a user's module may raise anything
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(f"{key}: {kind}{error}") from error


def guarded(function: Callable[..., Any], args: Sequence[Any], arguments: Mapping[str, Any]) -> Any:
    """Call a user's function so that SystemExit and its kin are errors like others: they end no process."""
    try:
        return function(*args, **arguments)
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def find(place: str) -> RewardFunction:
    """Import the function at `module:function` or `path.py:function`."""
    place, _, attribute = place.rpartition(":")
    if place.endswith(".py"):
        module = _load_file(Path(place).expanduser().resolve())
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not (place == error.name or place.startswith(error.name + ".")):
                raise  # the module exists, and something that it imports does not
            raise ConfigError(f"no module named {error.name}") from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{place} has no function {attribute!r}")
    return _callable(getattr(module, attribute), attribute)


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(f"gvpo_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.append(str(path.parent))  # helpers beside the file; last, so that they shadow nothing
    spec.loader.exec_module(module)
    return module


def _callable(value: Any, name: str) -> RewardFunction:
    if not callable(value):
        raise ConfigError(f"{name} is {type(value).__name__}, not a function")
    function: RewardFunction = value
    return function
