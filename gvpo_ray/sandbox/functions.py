"""Loading and calling of reward functions, and checks of the values that they return.

    def reward(prompts, completions, **columns) -> list[float | None]

A reward function returns one number per completion, or None for a completion that it cannot verify.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from gvpo_ray.config.base import ConfigError
from gvpo_ray.sandbox.adapters import adapted, as_list, as_number, check_columns

Score = float | None | tuple[float | None, str]
"""A reward function's result for one completion: the reward, or None (it cannot be verified), alone or in a
pair with a remark for `reward_reasons`."""

RewardFunction = Callable[..., Any]
"""`reward(prompts, completions, **columns) -> one Score per completion`, or a coroutine function of this
form; each column is a list of one entry per completion."""


@dataclass(frozen=True)
class Part:
    """One reward function's result for one completion, after all checks."""

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

    Raises:
        MemoryError: the function ran out of memory. This is never counted as a fault, because the function's
            leftovers may still fill the memory.
    """
    try:
        returned = function(prompts=prompts, completions=completions, **columns)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_await(returned))
    except MemoryError:
        raise
    except catch as error:  # untrusted output is scored here
        return [Part(None, f"{name} raised {describe(error)}", is_fault=True)] * len(completions)
    returned = as_list(returned, len(completions))
    if not isinstance(returned, (list, tuple)):
        return [
            Part(None, f"{name} returned {_shown(returned)}, not a list of rewards", is_fault=True)
        ] * len(completions)
    if len(returned) != len(completions):
        count = f"{len(completions)} completion{'s' * (len(completions) > 1)}"
        return [Part(None, f"{name} returned {len(returned)} rewards for {count}", is_fault=True)] * len(
            completions
        )
    return [_part(name, score) for score in returned]


async def _await(awaitable: Any) -> Any:
    return await awaitable


def _part(name: str, score: Any) -> Part:
    """Check one value that a reward function returned."""
    score, remark = score if isinstance(score, tuple) and len(score) == 2 else (score, None)
    score, said = as_number(score)
    remark = said if remark is None else str(remark)
    remark = None if remark is None else remark[:500]
    if score is None:
        return Part(None, remark or f"{name} gave no reward (None)")
    if not isinstance(score, numbers.Real):
        return Part(None, f"{name} returned {_shown(score)}, not a number", is_fault=True)
    if not fits_float32(float(score)):
        return Part(None, f"{name} returned {float(score)}, not a finite float32", is_fault=True)
    return Part(float(score), remark)


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"


def fits_float32(value: float) -> bool:
    """Return whether a number is finite, also as a float32."""
    return math.isfinite(value) and abs(value) <= 3.4028234e38


def describe(error: BaseException) -> str:
    """Return one line, of limited length, for an error that a user's code raised."""
    if isinstance(error, ConfigError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def load(source: Mapping[str, Any]) -> RewardFunction:
    """Load the function that verifiers.rewards.source_of describes, and bind its configured arguments.

    If the function has an attribute `warm_up`, that is called once, without arguments, so that the first
    check takes no longer than others.

    Args:
        source: `place` (`module:function` or `path.py:function`) or `pickle` (base64), `arguments`, and
            `is_strict` (built in), which refuses arguments that only **kwargs would take. With `columns`
            (key of a data set -> names), the function's required arguments must be among them.

    Raises:
        ConfigError: no such file, module, function or argument. Errors of a user's module come through as
            they are.
    """
    function = (
        _callable(cloudpickle.loads(base64.b64decode(source["pickle"])), "it")
        if "pickle" in source
        else _find(source["place"])
    )
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters) and not source["is_strict"]
    for name in source["arguments"]:
        if name not in named and not takes_any:
            raise ConfigError(
                f"no argument {name!r}; it takes {', '.join(sorted(named - {'prompts', 'completions'}))}"
            )
    if source.get("columns") is not None:
        check_columns(function, source["arguments"], source["columns"])
    if warm_up := getattr(function, "warm_up", None):
        warm_up()
    return adapted(function, source["arguments"], source["is_strict"])


def _find(place: str) -> RewardFunction:
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
