"""A run's recoveries are recorded in events.jsonl."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from gvpo_ray.config.shown import mask
from gvpo_ray.files import append_line, read_lines


class EventLog:
    """The event log, events.jsonl, has every recovery of a run, and when its processes began and ended.

    A line is {"time": Unix seconds, "step", "who": engine | verifier | learner | buffer | driver | pool |
    run, "name", "why"}. A `run` is started or stopped; a `pool` grows or shrinks.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.entries: list[dict[str, Any]] = read_lines(self.path)

    def add(self, step: int, who: str, name: str, why: str = "") -> None:
        """Append an event, with the current time."""
        entry = {"time": round(time.time(), 3), "step": step, "who": who, "name": name, "why": mask(why)}
        self.entries.append(entry)
        append_line(self.path, entry)

    def counts(self) -> dict[str, int]:
        """Return the number of recoveries since the run began, by who."""
        return Counter(entry["who"] for entry in self.entries if entry["who"] not in ("run", "pool"))

    @property
    def was_cut_off(self) -> bool:
        """Return whether the last process of the run ended without recording that it stopped."""
        return (
            bool(self.entries)
            and next((e["name"] for e in reversed(self.entries) if e["who"] == "run"), "stopped") == "started"
        )
