"""The files of a run directory are read for a report, as far as they are there and complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gvpo_ray.config.loading import NOT_YAML
from gvpo_ray.config.shown import hide, know
from gvpo_ray.files import read_lines
from gvpo_ray.observe.computes import read_computes
from gvpo_ray.observe.metrics import METRICS
from gvpo_ray.observe.report.figures import NO_RECOVERY, Point, finite


@dataclass(frozen=True)
class Run:
    """A Run holds the contents of a run directory."""

    name: str
    number: int
    """0, or 1 for the run that it is compared with."""
    path: Path
    series: dict[str, list[Point]]
    """Points by the key of metrics.jsonl, the quotients of METRICS among them."""
    events: list[dict[str, Any]]
    config: str
    """Text of config.yaml, without secrets."""
    computes: str = ""
    """How the learner computes."""

    @property
    def recoveries(self) -> list[dict[str, Any]]:
        """Events in which something died and was replaced."""
        return [event for event in self.events if event.get("who") not in NO_RECOVERY]


def read_run(path: Path, name: str, number: int) -> Run:
    """Read a run directory. Of a step that was written twice, the later line counts."""
    values: dict[str, dict[float, float]] = {}
    for line in read_lines(path / "metrics.jsonl", skip_malformed=True):
        step = finite(line.pop("step", None))
        if step is None:
            continue
        for key, value in line.items():
            if (drawable := finite(value)) is not None:
                values.setdefault(key, {})[step] = drawable
    for metric in METRICS:
        if " / " in metric.name:
            one, other = (values.get(part, {}) for part in metric.name.split(" / "))
            quotients = {step: finite(value / other[step]) for step, value in one.items() if other.get(step)}
            values[metric.name] = {step: value for step, value in quotients.items() if value is not None}
    file = path / "config.yaml"
    config = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return Run(
        name,
        number,
        path,
        {key: sorted(points.items()) for key, points in values.items() if points},
        read_lines(path / "events.jsonl", skip_malformed=True),
        _without_secrets(config),
        read_computes(path),
    )


def _without_secrets(config: str) -> str:
    """Return a config's text without its secrets, which `mask` knows from now on."""
    if not (data := _parsed(config)):
        return config  # no YAML: the page masks what it shows
    know(data)
    text: str = yaml.safe_dump(hide(data), sort_keys=False, allow_unicode=True)
    return text


def config_of(run: Run) -> dict[str, Any]:
    """Return the resolved config of a run without secrets; empty where it cannot be read."""
    return _parsed(run.config)


def _parsed(config: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(config)
    except NOT_YAML:
        return {}
    return data if isinstance(data, dict) else {}


def state_of(run: Run) -> str:
    """Return the steps trained and the state of the run, as far as its files say it."""
    trained = int(run.series["loss"][-1][0]) if "loss" in run.series else 0
    num_steps = config_of(run).get("num_steps")
    last = next((event.get("name") for event in reversed(run.events) if event.get("who") == "run"), None)
    if isinstance(num_steps, int) and trained >= num_steps:
        state = "complete"
    else:
        states = {"started": "running, or killed", "stopped": "stopped before its end"}
        state = states.get(str(last), "not complete")
    of_all = "" if num_steps is None else f" of {num_steps}"
    return f"{trained}{of_all} steps trained: {state}"
