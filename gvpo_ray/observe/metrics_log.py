"""metrics.jsonl: the metrics of every step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gvpo_ray.files import append_line, read_lines, write_whole


class MetricsLog:
    """metrics.jsonl: one JSON object per line, with `step`. Lines after the checkpoint that a run resumes
    from are written anew.

    `on_line` is told of every new one.
    """

    def __init__(self, path: str | Path, resume_step: int) -> None:
        self.path = Path(path)
        self.lines: list[dict[str, Any]] = []
        self.on_line: Callable[[dict[str, Any]], None] = lambda line: None
        if self.path.exists():
            there = read_lines(self.path, skip_malformed=True)
            self.lines = [line for line in there if line.get("step", 0) <= resume_step]
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        line = {"step": step, **metrics}
        self.lines.append(line)
        append_line(self.path, line)
        self.on_line(line)
        return line

    def last(self, name: str, default: Any = None) -> Any:
        """The newest value of a metric."""
        return next((line[name] for line in reversed(self.lines) if name in line), default)
