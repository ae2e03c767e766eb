"""Ray actors get their names and resources here, and their errors are classified and put into one line."""

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

from gvpo_ray.config.engines import PoolConfig
from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.shown import mask
from gvpo_ray.errors import GvpoError


def actor_name(text: str) -> str:
    """Return an actor's name for Ray's dashboard: `text` and a random suffix.

    Ray requires unique names, and the actor of a run that was stopped a moment ago may still be there.
    """
    return f"{text}-{uuid.uuid4().hex[:6]}"


def tag_of(text: str) -> str:
    """Return a text as a tag of a metric of Ray, which must be ASCII."""
    return re.sub(r"[^\x20-\x7e]", "_", text)


def resources_of(actor: PoolConfig | LearnerConfig) -> dict[str, float]:
    """Return what one engine or learner worker reserves, by Ray's names of resources."""
    accelerator = {f"accelerator_type:{actor.accelerator_type}": 0.001} if actor.accelerator_type else {}
    own = {"CPU": actor.num_cpus, "GPU": actor.num_gpus, **actor.resources, **accelerator}
    return {name: number for name, number in own.items() if number}


def bundles_of(pool: PoolConfig) -> list[dict[str, float]]:
    """Return the bundles of an engine whose GPUs may be of several nodes: one per GPU, as vLLM takes them.

    The first has what its actor asks for too. The actor looks for GPUs before vLLM's processes start, so it
    has to be on a node with one; and of a bundle vLLM takes nothing but the GPU.
    """
    wanted = resources_of(pool)
    gpu = {name: n for name, n in wanted.items() if name.startswith("accelerator_type:")} | {"GPU": 1.0}
    return [wanted | gpu, *[gpu] * (round(pool.num_gpus) - 1)]


class Draining(GvpoError, RuntimeError):
    """An engine raises this when its node is about to leave and it takes no new work."""


class RunError(GvpoError, RuntimeError):
    """A run that has stopped raises this; the message is the first cause."""


class Hang(GvpoError, RuntimeError):
    """An engine that produces no token, or does not answer, raises this."""


class UpdateFailed(GvpoError, RuntimeError):
    """An engine that cannot take new weights raises this: its disk or its memory is full, or vLLM failed."""


def draining_nodes() -> dict[str, float]:
    """Return the nodes that Ray will remove: node id -> deadline in Unix seconds (0: none given).

    This is private in Ray, and read from Ray 2.60.0: Ray Train and Ray Serve read the same table.
    """
    import ray._private.state

    draining = ray._private.state.state.get_draining_nodes()
    return {node: deadline_ms / 1000 for node, deadline_ms in draining.items()}


def num_gpus_here() -> int:
    """Return the number of GPUs of this machine, as an embedded Ray would count them.

    This is private in Ray, and read from Ray 2.60.0: `ray.init` counts with the same class.
    """
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    return int(NvidiaGPUAcceleratorManager.get_current_node_num_accelerators())


EventCallback = Callable[[str, str, str], None]
"""A callback note(who, name, why) for recoveries, such as ("engine", "engines-0", "EngineDeadError: …").

`who` is the kind of actor that died and was replaced, or "pool" for what a pool does: it changes its size, or
its server refuses a prompt.
"""


def first_of(error: BaseException) -> BaseException:
    """Return the first error of a task group's exception group; any other error is returned as it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def innermost(error: BaseException) -> BaseException:
    """Return the original error inside the wrappers of Ray and Ray Train."""
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
    """Return one line for the user: the innermost cause of an error, without tracebacks and secrets."""
    return mask(_cause_of(innermost(error)))


def _cause_of(error: BaseException) -> str:
    if isinstance(error, RayActorError) and "creation task" not in str(error):
        return "its process or its node died"  # Ray's text says no more
    if _is_dead_core(error):
        return f"vLLM's core process died: {'; '.join(getattr(error, '__notes__', ['no cause is known']))}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # The text of a RayError is a traceback: the error on its last line says more than its first line.
    if isinstance(error, RayError):
        named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit): ", line)]
        if named:
            return named[-1]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")


class Fate(Enum):
    """A Fate says what an error of a call to an actor means for the actor, and what to do with the call."""

    LOST = auto()
    """An object that the call needed was lost with its process or node: repeat the call without it."""
    LEAVING = auto()
    """The actor is about to leave and takes no new work: repeat the call with another one."""
    DEAD = auto()
    """The actor died, hangs or cannot be reached: repeat the call with another one."""
    BUG = auto()
    """The code or its input is wrong: the run stops with this error."""


def classify(error: BaseException) -> Fate:
    """Return what an error of a call to an actor means."""
    if is_lost(error):
        return Fate.LOST
    if isinstance(innermost(error), Draining):
        return Fate.LEAVING
    return Fate.DEAD if is_death(error) else Fate.BUG


def is_death(error: BaseException) -> bool:
    """Return whether an error means that a process, node or server died or could not be reached.

    Such a call deserves another try elsewhere; every other error is a mistake of the code or its input.
    """
    error = innermost(error)
    died = (
        RayActorError,
        NodeDiedError,
        OutOfMemoryError,
        WorkerCrashedError,
        Hang,
        Draining,
        UpdateFailed,
        ConnectionError,
        TimeoutError,
    )
    return isinstance(error, died) or _is_dead_core(error)


def _is_dead_core(error: BaseException) -> bool:
    return type(error).__name__ == "EngineDeadError"  # vLLM's: importing it would take seconds


def is_lost(error: BaseException) -> bool:
    """Return whether an object that a call needed was lost with the process or node that held it."""
    return isinstance(innermost(error), ObjectLostError)
