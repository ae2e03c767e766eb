"""The file status.json holds the state of every stage of a run; it is written, read and explained here.

The training loop writes it every few seconds; `gvpo-ray status` and the watchdog print it in words.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.loading import read_yaml
from gvpo_ray.config.shown import know
from gvpo_ray.files import is_locked, write_whole

Status = Mapping[str, Any]


class RunState(StrEnum):
    """A RunState is a state of the driver of a run. The values are labels in Prometheus."""

    STARTING = "starting"
    TRAINING = "training"
    EVALUATING = "evaluating"
    STOPPED = "stopped"
    COMPLETE = "complete"


class EngineState(StrEnum):
    """An EngineState is a state of a slot of an engine pool. The values are labels in Prometheus."""

    OFF = "off"
    """The pool does not want an engine here now."""
    WANTED = "wanted"
    """Ray was asked for the resources."""
    STARTING = "starting"
    WAITS_FOR_WEIGHTS = "waits for weights"
    RUNNING = "running"
    LEAVING = "leaving"
    DEAD = "dead"
    """The engine died, and its replacement waits for its turn."""


def write_status(run_dir: Path, status: Status) -> None:
    """Replace status.json of a run."""
    write_whole(run_dir / "status.json", json.dumps(status))


def read_status(run_dir: str | Path) -> list[str]:
    """Return the lines that `gvpo-ray status` prints.

    Raises:
        ConfigError: the folder is not the directory of a run.
    """
    folder = Path(run_dir)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{run_dir}: no config.yaml: not the directory of a run")
    with contextlib.suppress(ConfigError):  # of a file that somebody edited; the status is worth showing
        know(read_yaml(folder / "config.yaml"))
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        status = None
    runs = False
    with contextlib.suppress(OSError):  # no locks here: what the run last said is worth showing
        runs = is_locked(folder / ".lock")
    if status is None:
        return [f"{run_dir}: {'is starting' if runs else 'has not run yet'}"]
    age = _ago(status["time"])
    if runs:
        head = f"{run_dir}: runs on {status['host']}, process {status['pid']}; this is from {age}"
    else:
        is_done = status["step"] >= status["num_steps"]
        has_any = any((folder / "checkpoints").glob("step-*"))
        place = "from its newest checkpoint" if has_any else "from its first step, for want of a checkpoint"
        state = "complete" if is_done else f"not running; the same command goes on {place}"
        head = f"{run_dir}: {state}. What it last said, {age}:"
    return [head, *status_lines(status)]


def _ago(then: float) -> str:
    seconds = max(0.0, time.time() - then)
    return (
        f"{seconds:.0f} s ago"
        if seconds < 120
        else f"{seconds / 60:.0f} min ago"
        if seconds < 7200
        else f"{seconds / 3600:.0f} h ago"
    )


def status_lines(status: Status) -> list[str]:
    """Describe every stage in a line or more: what it does or waits for, and since when."""
    buffer = status["buffer"]
    lines = [f"driver: step {status['step']} of {status['num_steps']}, {status['doing']}"]
    if buffer is None:
        lines.append("buffer: does not answer")
    else:
        since = f", since {_ago(buffer['learner_since'])}" if buffer["learner_since"] else ""
        lines.append(f"learner: {buffer['learner']}{since}")
        lines.append(
            f"buffer: version {buffer['version']}, {buffer['num_finished']} groups finished, "
            f"{buffer['num_waiting']} of them wait for the learner, {buffer['num_running']} on their way; "
            f"the staleness bound is {buffer['staleness']}"
        )
    for pool in dict.fromkeys(engine["pool"] for engine in status["engines"]):
        engines = [engine for engine in status["engines"] if engine["pool"] == pool]
        states = Counter(engine["state"] for engine in engines)
        counts = ", ".join(f"{number} {state}" for state, number in states.items())
        lines.append(
            f"engines of {pool}: {counts}; {sum(engine['num_groups'] for engine in engines)} groups in flight"
        )
        for engine in engines:
            if engine.get("address") and engine["state"] == EngineState.RUNNING:
                lines.append(f"  {engine['name']} serves at {engine['address']}/v1")
            if engine["state"] not in (EngineState.RUNNING, EngineState.OFF):
                wants = f" {engine['wants']}" if engine["state"] == EngineState.WANTED else ""
                lines.append(f"  {engine['name']}: {engine['state']}{wants}, since {_ago(engine['since'])}")
    states = Counter(engine["state"] for engine in status["engines"])
    if states and not states[EngineState.RUNNING]:
        is_back = states[EngineState.STARTING] or states[EngineState.WAITS_FOR_WEIGHTS]
        lines.append(
            "no engine is running: the run waits for the first that comes back"
            if status["recoveries"].get("engine") and not is_back
            else "no engine is running yet"
        )
    if verifiers := ", ".join(f"{name} has {number} calls" for name, number in status["verifiers"].items()):
        lines.append(f"verifiers: {verifiers}")
    lines += status.get("outages", [])
    if oldest := status["oldest"]:
        lines.append(
            f"oldest group on its way: {oldest['group_id']}, begun {_ago(oldest['since'])}, now at "
            f"{oldest['where']}: {oldest['prompt']!r}"
        )
    shown = (
        f"{name} {free:g} of {total:g}"
        for name, (free, total) in status["resources"].items()
        if name not in ("memory", "object_store_memory")
    )
    lines.append(f"free resources: {', '.join(shown)}")
    if counts := ", ".join(f"{who} {number}" for who, number in status["recoveries"].items()):
        lines.append(f"recoveries so far: {counts}")
    return lines
