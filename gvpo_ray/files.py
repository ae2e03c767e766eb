"""JSON lines on disk: read what is whole, and append in place of a torn line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[Any]:
    """The objects of a file of JSON lines, as far as it is there: a killed writer may leave a torn last
    line.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def append_line(path: Path, entry: Any) -> None:
    """One more line, in place of a torn one: it must not run into that."""
    with open(path, "ab+") as file:
        if size := file.tell():
            file.seek(size - 1)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(entry).encode() + b"\n")
