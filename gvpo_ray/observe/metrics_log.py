"""The file metrics.jsonl has a line of metrics for every step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gvpo_ray.files import append_line, read_lines, write_whole


class MetricsLog:
    """A MetricsLog is the file metrics.jsonl: one JSON object per line, with `step`.

    A resumed run drops the lines after its checkpoint and writes them again. `on_line` gets every new line.
    """

    def __init__(self, path: str | Path, resume_step: int) -> None:
        self.path = Path(path)
        self.lines: list[dict[str, Any]] = []
        self.on_line: Callable[[dict[str, Any]], None] = lambda line: None
        if self.path.exists():
            there = read_lines(self.path, skip_malformed=True)
            self.lines = [line for line in there if line.get("step", 0) <= resume_step]
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in self.lines), sync=True)

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Append the metrics of a step, and return the line."""
        line = {"step": step, **metrics}
        self.lines.append(line)
        append_line(self.path, line)
        self.on_line(line)
        return line

    def last(self, name: str, default: Any = None) -> Any:
        """Return the newest value of a metric, or `default` where no line has it."""
        return next((line[name] for line in reversed(self.lines) if name in line), default)
