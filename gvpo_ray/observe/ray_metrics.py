"""The metrics and the status of a run go to Prometheus as gauges of Ray.

The name of a metric comes from the registry in metrics.py: `gvpo_` before it, `_` for every other sign, its
unit at the end, and a label for each of its free parts. Every series has the label `run`, the name of the
run directory. Ray puts `ray_` before all names:

    reward/mean                 gvpo_reward_mean{run="math"}
    time/step                   gvpo_time_step_seconds
    eval/test/pass@1            gvpo_eval_pass_ratio{set="test", k="1"}
    gvpo/residual_var/4         gvpo_residual_var_by_staleness{staleness="4"}

`of_status` adds what each stage does now and how much waits for it, from the status of the run:

    gvpo_run_state{state}            1 for the state of the driver, 0 for the others: starting, training,
                                     evaluating, stopped, complete
    gvpo_num_steps                   number of steps after which the run is complete
    gvpo_engines{pool, state}        engines of a pool by state
    gvpo_engine_groups{pool}         groups in flight at a pool
    gvpo_engine_version{pool}        oldest weights that an engine of the pool has
    gvpo_groups{at}                  groups in progress by stage: prompts (they wait for an engine), engines,
                                     verifiers, buffer
    gvpo_oldest_group_seconds        age of the oldest of these groups; 0 where there is none
    gvpo_verifiers{state}            busy and idle verifiers
    gvpo_buffer_groups{state}        finished: in all; waiting: finished, for the learner; running: begun and
                                     not finished
    gvpo_staleness_bound_open        1 while the maximum staleness lets another group begin
    gvpo_learner_state{state}        1 for the state of the learner, 0 for the others (LearnerState)
    gvpo_learner_state_seconds       time in this state
"""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from gvpo_ray.buffer.states import BoundState, LearnerState
from gvpo_ray.observe import metrics
from gvpo_ray.observe.status import EngineState, RunState

Series = tuple[str, dict[str, str], float]
"""Name, labels and value of a time series."""

Line = Mapping[str, Any]
"""A line of metrics.jsonl."""

PLACES = ("prompts", "engines", "verifiers", "buffer")
"""Stages of a group in progress."""


def series_of(name: str) -> tuple[str, dict[str, str]]:
    """Return the Prometheus name and labels of a key of metrics.jsonl.

    The name is `series` of the registered metric, or its name without the free parts and with its unit.
    A key that is not registered keeps its name.
    """
    metric, labels = metrics.find(name)
    if metric is None:
        return f"gvpo_{_plain(name.removeprefix('gvpo/'))}", {}
    if metric.series:
        return f"gvpo_{metric.series}", labels
    plain = _plain(re.sub(r"[/@]\{\w+\}", "", metric.name.removeprefix("gvpo/")))
    suffix = metrics.SUFFIXES.get(metric.unit, "")
    plain = plain.removesuffix("_per_s" if metric.unit == "tokens/s" else "_s")
    if suffix and suffix not in plain.split("_"):
        plain = f"{plain}_{suffix}"
    return f"gvpo_{plain}", labels


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name)


def numbers_of(line: Line) -> dict[str, float]:
    """Return the finite numbers of a line; trackers and Prometheus take nothing else."""
    return {
        name: float(value)
        for name, value in line.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def of_line(line: Line) -> list[Series]:
    """Return the series of a line of metrics.jsonl."""
    return [(*series_of(name), value) for name, value in numbers_of(line).items()]


def of_status(status: Mapping[str, Any]) -> list[Series]:
    """Return the series of the run's status, as run/rollouts.py reports it."""

    def one_of(name: str, states: Iterable[str], state: str) -> list[Series]:
        return [(name, {"state": other}, float(other == state)) for other in states]

    def seconds_since(then: float | None) -> float:
        return max(0.0, status["time"] - then) if then else 0.0

    num_busy = sum(number > 0 for number in status["verifiers"].values())
    series: list[Series] = [
        ("gvpo_num_steps", {}, float(status["num_steps"])),
        *one_of("gvpo_run_state", RunState, status["doing"]),
        *(("gvpo_groups", {"at": place}, float(status["running"].get(place, 0))) for place in PLACES),
        ("gvpo_oldest_group_seconds", {}, seconds_since(status["oldest"] and status["oldest"]["since"])),
        ("gvpo_verifiers", {"state": "busy"}, float(num_busy)),
        ("gvpo_verifiers", {"state": "idle"}, float(len(status["verifiers"]) - num_busy)),
        *((*series_of(f"recoveries/{who}"), float(number)) for who, number in status["recoveries"].items()),
    ]
    for pool in dict.fromkeys(engine["pool"] for engine in status["engines"]):
        engines = [engine for engine in status["engines"] if engine["pool"] == pool]
        states = Counter(engine["state"] for engine in engines)
        series += [
            ("gvpo_engines", {"pool": pool, "state": state}, float(states[state])) for state in EngineState
        ]
        num_groups = sum(engine["num_groups"] for engine in engines)
        series.append(("gvpo_engine_groups", {"pool": pool}, float(num_groups)))
        versions = [engine["version"] for engine in engines if engine["version"] is not None]
        series += [("gvpo_engine_version", {"pool": pool}, float(min(versions)))] if versions else []
    if buffer := status["buffer"]:
        series += [
            ("gvpo_buffer_groups", {"state": state}, float(buffer[f"num_{state}"]))
            for state in ("finished", "waiting", "running")
        ]
        series.append(("gvpo_staleness_bound_open", {}, float(buffer["bound"] == BoundState.OPEN)))
        series += one_of("gvpo_learner_state", LearnerState, buffer["learner_state"])
        series.append(("gvpo_learner_state_seconds", {}, seconds_since(buffer["learner_since"])))
    return series


class Gauges:
    """Gauges exports series as Ray gauges.

    Ray drops a gauge that was not set within two of its reports (20 s), and a step may take longer, so
    `show` sets every known series again.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}
        self._newest: dict[str, list[Series]] = {}
        self._lock = threading.Lock()  # lines come from the user's thread, the status from the ring's

    def show(self, kind: str, series: list[Series]) -> None:
        """Replace the series of a kind; those of this kind that `series` lacks are exported no longer."""
        from ray.util.metrics import Gauge

        with self._lock:
            self._newest[kind] = series
            for name, labels, value in (entry for entries in self._newest.values() for entry in entries):
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, tag_keys=("run", *labels))
                self._gauges[name].set(value, {"run": self._run, **labels})


def place(line: Line) -> int:
    """Return the position of a line in its run. A step's evaluation comes after its training line."""
    return 2 * int(line["step"]) + any(name.startswith("eval/") for name in line)
