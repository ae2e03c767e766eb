"""Functions from elsewhere: found by place or pickle, called, and what they return is read.

    def reward(prompts, completions, **columns) -> list[float | None]

One number per completion, None where it cannot tell.
"""

from __future__ import annotations

import asyncio
import base64
import functools
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

Score = float | None | tuple[float | None, str]
"""Of one completion: the reward, None for "cannot be verified", or either with a remark for
`reward_reasons`."""

RewardFunction = Callable[..., Any]
"""`reward(prompts, completions, **columns) -> one Score per completion`, or a coroutine function; columns are
lists of that length."""


@dataclass(frozen=True)
class Part:
    """What one reward function says of one completion."""

    value: float | None
    reason: str | None = None
    is_fault: bool = False
    """The function did not do its work: it raised, or returned what is no reward."""


def call(
    name: str,
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: Mapping[str, Any],
    catch: type[BaseException] = Exception,
) -> list[Part]:
    """One Part per completion, whatever the function does short of ending the process.

    Args:
        catch: BaseException where nothing but this call runs: a completion may lead to SystemExit, and some
            libraries' time limits are no Exception either.

    Raises:
        MemoryError: comes through, because what the function left behind still fills the memory.
    """
    try:
        returned = function(prompts=prompts, completions=completions, **columns)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_await(returned))
    except MemoryError:
        raise
    except catch as error:  # untrusted output is scored here
        return [Part(None, f"{name} raised {describe(error)}", is_fault=True)] * len(completions)
    returned = returned.tolist() if hasattr(returned, "tolist") else returned  # numpy, torch
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
    score, remark = score if isinstance(score, tuple) and len(score) == 2 else (score, None)
    remark = None if remark is None else str(remark)[:500]
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
    return math.isfinite(value) and abs(value) <= 3.4028234e38


def describe(error: BaseException) -> str:
    """One line for an error that somebody else's code raised."""
    if isinstance(error, ConfigError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def load(source: Mapping[str, Any]) -> RewardFunction:
    """The function behind `module:function`, `path.py:function` or a pickle, with its arguments, ready to be
    timed.

    One that has an attribute `warm_up` is warmed up: it is called once, without arguments.

    Raises:
        ConfigError: no such file, module, function or argument. Whatever a user's module raises comes
            through.
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
    if warm_up := getattr(function, "warm_up", None):
        warm_up()
    return functools.partial(function, **source["arguments"]) if source["arguments"] else function


def _find(place: str) -> RewardFunction:
    place, _, attribute = place.rpartition(":")
    if place.endswith(".py"):
        module = _load_file(Path(place).expanduser().resolve())
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not (place == error.name or place.startswith(error.name + ".")):
                raise  # the module is there, and something that it imports is not
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
