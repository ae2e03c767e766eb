"""A run directory has a line that says how the learner computes: layout, attention, head and activations."""

from __future__ import annotations

from pathlib import Path

from gvpo_ray.files import write_whole

FILE = "learner.txt"
"""The file of a run directory with that line; the learner writes it whenever it starts."""


def write_computes(run_dir: str | Path, line: str) -> None:
    """Write the line."""
    write_whole(Path(run_dir) / FILE, line)


def read_computes(run_dir: str | Path) -> str:
    """Return the line; "" where the learner has not started."""
    file = Path(run_dir) / FILE
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
