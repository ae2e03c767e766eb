"""What a report reads: the files of a run directory, as far as they are there and whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gvpo_ray.files import read_lines
from gvpo_ray.observe.report import charts
from gvpo_ray.observe.report.charts import Point, finite


@dataclass(frozen=True)
class Run:
    """What the directory of a run says."""

    name: str
    number: int
    """0; 1 of the run that it is compared with."""
    path: Path
    series: dict[str, list[Point]]
    events: list[dict[str, Any]]
    config: str

    @property
    def recoveries(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("who") not in charts.NO_RECOVERY]


def read_run(path: Path, name: str, number: int) -> Run:
    values: dict[str, dict[float, float]] = {}  # of a step that was written twice, the later
    for line in read_lines(path / "metrics.jsonl", skip_malformed=True):
        step = finite(line.pop("step", None))
        for key, value in line.items() if step is not None else ():
            if (drawable := finite(value)) is not None:
                values.setdefault(key, {})[step] = drawable
    config = (path / "config.yaml").read_text(errors="replace") if (path / "config.yaml").is_file() else ""
    return Run(
        name,
        number,
        path,
        {key: sorted(points.items()) for key, points in values.items()},
        read_lines(path / "events.jsonl", skip_malformed=True),
        config,
    )


def config_of(run: Run) -> dict[str, Any]:
    try:
        data = yaml.safe_load(run.config)
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def flattened(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary by dotted keys."""
    flat = {}
    for key, value in data.items():
        flat.update(
            flattened(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{key}": value}
        )
    return flat


def state_of(run: Run) -> str:
    """Steps trained, and what became of the run as far as its directory tells: a killed one cannot say so."""
    trained = int(run.series["loss"][-1][0]) if "loss" in run.series else 0
    num_steps = config_of(run).get("num_steps")
    last = next((event.get("name") for event in reversed(run.events) if event.get("who") == "run"), None)
    if isinstance(num_steps, int) and trained >= num_steps:
        state = "complete"
    else:
        state = {"started": "running, or killed", "stopped": "stopped before its end"}.get(
            str(last), "not complete"
        )
    return (
        f"{trained} of {num_steps} steps trained: {state}"
        if num_steps is not None
        else f"{trained} steps trained: {state}"
    )


def matching(run: Run, pattern: str) -> dict[str, list[Point]]:
    """The points that a name of CHARTS stands for, by what * stands for ("" without one)."""
    if " / " in pattern:
        one, other = (run.series.get(name, []) for name in pattern.split(" / "))
        units = dict(other)
        return {
            "": [
                (step, value / units[step])
                for step, value in one
                if units.get(step) and finite(value / units[step]) is not None
            ]
        }
    head, star, tail = pattern.partition("*")
    if not star:
        return {"": run.series.get(pattern, [])}
    found = {
        name[len(head) : len(name) - len(tail)]: points
        for name, points in run.series.items()
        if name.startswith(head) and name.endswith(tail)
    }
    return {label: found[label] for label in sorted(found, key=charts.in_order) if label}
