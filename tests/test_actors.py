"""What an error says of an actor, and the facts of Ray that are read from its private modules."""

from __future__ import annotations

import importlib
import pickle

import pytest
import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from gvpo_ray.actors import Draining, Fate, Hang, UpdateFailed, cause_of, classify, num_gpus_here
from gvpo_ray.config.base import ConfigError


def task_error(cause: Exception) -> RayTaskError:
    """An error of a task or of an actor's method, as Ray brings it to the caller."""
    return RayTaskError("sample", "Traceback …", cause).as_instanceof_cause()


class EngineDeadError(Exception):
    """Named as vLLM's."""


@pytest.mark.parametrize(
    ("error", "fate"),
    [
        (ObjectLostError("ab" * 28, None, ""), Fate.LOST),
        (task_error(ObjectLostError("ab" * 28, None, "")), Fate.LOST),
        (Draining("node is about to go"), Fate.LEAVING),
        (task_error(Draining("node is about to go")), Fate.LEAVING),
        (RayActorError(), Fate.DEAD),
        (OutOfMemoryError("out of memory"), Fate.DEAD),
        (Hang("no token for 60 s"), Fate.DEAD),
        (UpdateFailed("version 3: OSError: full"), Fate.DEAD),
        (task_error(EngineDeadError("core")), Fate.DEAD),
        (task_error(ConnectionError("refused")), Fate.DEAD),
        (ExceptionGroup("tasks", [task_error(TimeoutError("slow"))]), Fate.DEAD),
        (task_error(ValueError("wrong")), Fate.BUG),
        (task_error(ConfigError("engines: wrong")), Fate.BUG),
        (KeyError("x"), Fate.BUG),
    ],
)
def test_an_error_says_whether_its_actor_lost_something_leaves_died_or_is_wrong(
    error: BaseException, fate: Fate
) -> None:
    assert classify(error) is fate


def test_a_dead_core_is_said_with_its_first_cause_where_that_is_known() -> None:
    error = EngineDeadError("See stack trace (above) for the root cause.")
    assert cause_of(task_error(error)) == "vLLM's core process died: no cause is known"
    error.add_note("torch.OutOfMemoryError: CUDA out of memory")
    again = pickle.loads(pickle.dumps(error))
    assert (
        cause_of(task_error(again)) == "vLLM's core process died: torch.OutOfMemoryError: CUDA out of memory"
    )
    again.add_note("at version 3")
    assert cause_of(again).endswith("died: torch.OutOfMemoryError: CUDA out of memory; at version 3")


def test_the_private_names_of_ray_that_are_used_are_there() -> None:
    assert callable(importlib.import_module("ray._private.state").state.get_draining_nodes)
    assert num_gpus_here() >= 0 and not ray.is_initialized()
