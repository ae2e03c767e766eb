"""Ray actors: their names and resources, what the death of one means, and the one line that a user should
read of it.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from enum import Enum, auto

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from gvpo_ray.config.base import GvpoError
from gvpo_ray.config.engines import PoolConfig
from gvpo_ray.config.learner import LearnerConfig


def actor_name(text: str) -> str:
    """An actor's name on the dashboard. Ray wants each once: the one of a run that was stopped just now may
    still be there.
    """
    return f"{text}-{uuid.uuid4().hex[:6]}"


def resources_of(actor: PoolConfig | LearnerConfig) -> dict[str, float]:
    """Of one engine or learner worker, under Ray's names."""
    accelerator = {f"accelerator_type:{actor.accelerator_type}": 0.001} if actor.accelerator_type else {}
    own = {"CPU": actor.num_cpus, "GPU": actor.num_gpus, **actor.resources, **accelerator}
    return {name: number for name, number in own.items() if number}


class Draining(GvpoError, RuntimeError):
    """The engine is about to leave and takes no new work."""


class RunError(GvpoError, RuntimeError):
    """The run has stopped; the message is the first cause."""


class Hang(GvpoError, RuntimeError):
    """An engine writes no token, or does not answer."""


def draining_nodes() -> dict[str, float]:
    """Return the nodes that Ray has been told will go: id -> Unix time in seconds at which (0: nobody said).

    Private in Ray, and read from Ray 2.60.0: Ray Train and Ray Serve read the same table.
    """
    import ray._private.state

    draining = ray._private.state.state.get_draining_nodes()
    return {node: deadline_ms / 1000 for node, deadline_ms in draining.items()}


def num_gpus_here() -> int:
    """Return the number of GPUs of this machine, as an embedded Ray would count them.

    Private in Ray, and read from Ray 2.60.0: `ray.init` counts with the same class.
    """
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    return int(NvidiaGPUAcceleratorManager.get_current_node_num_accelerators())


Note = Callable[[str, str, str], None]
"""note(who, name, why): somebody died and was replaced, such as ("engine", "engines-0", "EngineDeadError:
…")."""


def first_of(error: BaseException) -> BaseException:
    """The first of a task group's errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def innermost(error: BaseException) -> BaseException:
    """The error that Ray, or Ray Train, carried here."""
    seen: set[int] = set()
    error = first_of(error)
    while id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
            error = error.cause
        elif failures := getattr(error, "worker_failures", None):  # Ray Train: rank -> exception
            error = failures[min(failures)]
    return error


def cause_of(error: BaseException) -> str:
    """One line for what a user should know first: the innermost cause, without its tracebacks."""
    error = innermost(error)
    if isinstance(error, RayActorError) and "creation task" not in str(error):
        return "its process or its node died"  # Ray's text says no more
    if _is_dead_core(error):
        return "vLLM's core process died (EngineDeadError)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # its text is a traceback: the error that it ends with says more than its head
    if isinstance(error, RayError):
        named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit): ", line)]
        if named:
            return named[-1]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")


class Fate(Enum):
    """What an error of a call to an actor says of the actor, and so what to do with the call."""

    LOST = auto()
    """An object that the call needed has gone with its process or node: ask again without it."""
    LEAVING = auto()
    """The actor is about to leave and takes no new work: ask another one."""
    DEAD = auto()
    """The actor died, hangs or is out of reach: ask another one."""
    BUG = auto()
    """The code or its input is wrong: the run stops with this error."""


def classify(error: BaseException) -> Fate:
    """Say what an error of a call to an actor means."""
    if is_lost(error):
        return Fate.LOST
    if isinstance(innermost(error), Draining):
        return Fate.LEAVING
    return Fate.DEAD if is_death(error) else Fate.BUG


def is_death(error: BaseException) -> bool:
    """Whether somebody died or was not to be reached, rather than did something wrong: worth another try
    elsewhere.
    """
    error = innermost(error)
    died = (
        RayActorError,
        NodeDiedError,
        OutOfMemoryError,
        WorkerCrashedError,
        Hang,
        Draining,
        ConnectionError,
        TimeoutError,
    )
    return isinstance(error, died) or _is_dead_core(error)


def _is_dead_core(error: BaseException) -> bool:
    return type(error).__name__ == "EngineDeadError"  # vLLM's: importing it would take seconds


def is_lost(error: BaseException) -> bool:
    """Whether what was asked for has gone with the process or node that held it."""
    return isinstance(innermost(error), ObjectLostError)
