"""Task sets of the package verifiers (its v1 interface) are loaded here, and their tasks become rows.

    prompts:
      path: verifiers:gsm8k-v1            # an installed package, or verifiers:path.py
      taskset: {split: train}             # its settings

A row has the column `task`, the data of the task as JSON, from which environments/tasksets.py makes it again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from gvpo_ray.config.base import TASKSET, ConfigError
from gvpo_ray.config.data import PromptsConfig

MISSING = "needs the package verifiers: pip install 'gvpo-ray[environments]'"

Loaded = TypeVar("Loaded")

LOAD_S = 600.0
"""Most seconds that a task set may take to say its tasks; it may have to download them."""


def in_time(key: str, name: str, function: Callable[[], Loaded]) -> Loaded:
    """Return what a function returns that runs a task set's code.

    Args:
        key: of the config.
        name: of the task set.
        function: whatever it raises is raised here.

    Raises:
        ConfigError: it takes longer than LOAD_S. Its thread is left where it hangs.
    """
    found: list[Loaded] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            found.append(function())
        except SystemExit as error:  # or the command would end with the task set's status, and say nothing
            raised.append(ConfigError(f"{key}: {name} ends the process: SystemExit({error})"))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(LOAD_S)
    if raised:
        raise raised[0]
    if not found:
        raise ConfigError(f"{key}: {name} is not loaded within {LOAD_S:g} s")
    return found[0]


def module_name(path: str) -> str:
    """Return the name of the module that a file of a task set becomes, which is also the task set's id."""
    return Path(path).stem.replace("-", "_").lower()


def register(path: str, code: str) -> str:
    """Make a task set's file a module, so that verifiers finds it; return its id.

    Args:
        path: of the file, which may be on another machine.
        code: what is in it.

    Raises:
        ConfigError: another module has its name.
    """
    name = module_name(path)
    if (known := sys.modules.get(name)) is not None:
        if getattr(known, "__file__", None) != path:
            raise ConfigError(f"{path}: another module is called {name}: rename the file")
        return name
    module = ModuleType(name)
    module.__file__ = path
    module.__spec__ = ModuleSpec(name, None, origin=path)
    sys.modules[name] = module
    try:
        exec(compile(code, path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return name


def source_of(name: str) -> tuple[str, str | None]:
    """Return the id of a task set, or the path of its file, and the code of that file (None: a package).

    It is called where the run is started, since other machines find other modules.

    Args:
        name: behind `verifiers:`.

    Raises:
        ConfigError: the file would hide a module, or verifiers would find its own of that name instead.
        OSError: the file cannot be read.
    """
    if not name.endswith(".py"):
        return name, None
    path = Path(name).expanduser().absolute()
    code = path.read_text(encoding="utf-8")
    module = module_name(str(path))
    if "." in module:
        raise ConfigError(f"{path}: a module's name has no dot: rename the file")
    if module not in sys.modules and any(_is_another(spec, path) for spec in _found(module)):
        raise ConfigError(f"{path}: another module is called {module}: rename the file")
    return str(path), code


def _found(module: str) -> Iterator[ModuleSpec | None]:
    """Look for modules of this name: of the machine, in the run's folder, and of verifiers."""
    yield importlib.util.find_spec(module)
    yield PathFinder.find_spec(module, [os.getcwd()])
    for package in ("verifiers.v1.tasksets", "verifiers.v1.harnesses"):
        with contextlib.suppress(ImportError):
            yield importlib.util.find_spec(f"{package}.{module}")


def _is_another(spec: ModuleSpec | None, path: Path) -> bool:
    """Return whether a module that was found is one, and is not the file; a bare folder is none."""
    if spec is None or spec.origin is None:
        return False
    return Path(spec.origin).resolve() != path.resolve()


def id_of(name: str) -> str:
    """Return the id of a task set, after making its file a module, if it is one."""
    place, code = source_of(name)
    return place if code is None else register(place, code)


def read_tasks(config: PromptsConfig, key: str) -> dict[str, list[Any]]:
    """Return the tasks of a task set as columns: prompt, task, and answer where the tasks have one.

    Args:
        config: the section; its path begins with `verifiers:`, and `limit` bounds a task set without an end.
        key: where it stands in the run's config.

    Raises:
        ConfigError: the package, the task set or its settings are wrong, or it has no end and no limit.
    """
    try:
        from verifiers.v1.utils.loaders import load_taskset, taskset_config_type
    except ImportError as error:
        raise ConfigError(f"{key}.path: {config.path} {MISSING}") from error
    assert isinstance(config.path, str)
    name = config.path.removeprefix(TASKSET)

    def load() -> list[Any]:
        ident = id_of(name)
        settings = taskset_config_type(ident).model_validate({**config.taskset, "id": ident})
        taskset = load_taskset(settings)
        if not taskset.bounded and config.limit is None:
            raise ConfigError(f"{key}.limit: {config.path} has no end: say how many tasks")
        # what has an end is cut by the caller, after the slice of its split
        return [task.data for task in itertools.islice(taskset, None if taskset.bounded else config.limit)]

    try:
        tasks = in_time(f"{key}.path", config.path, load)
    except ConfigError:
        raise
    except Exception as error:  # a task set is a user's module, and may raise anything
        told = " ".join(str(error).split())
        raise ConfigError(f"{key}.path: {config.path}: {type(error).__name__}: {told}") from error
    columns: dict[str, list[Any]] = {
        "prompt": [data.prompt_text or data.name or f"task {data.idx}" for data in tasks],
        "task": [json.dumps(data.model_dump(mode="json")) for data in tasks],
    }
    answers = [getattr(data, "answer", None) for data in tasks]
    if any(answer is not None for answer in answers):
        columns["answer"] = answers
    return columns
