"""The results of the GPU check are recorded: a JSON line for each at once, a table of verdicts at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RULES = {
    "entries": "Dynamo entries of an attention function over 40 ragged passes: at most 6, no fallback",
    "semantics": "packed log-probs as float64 padded ones: 1e-4 nats in float32; bf16 gradients within 3 %",
    "train_step": "loss and gradient norm as on the CPU: 1e-4 in float32, 2 % in bf16",
    "speed": "FlexAttention at least 1.5 x the padded path at 512/512, k = 8",
    "mfu": "useful FLOPs over the peak of a matrix product: 35 % at the 7B shape, 25 % at 1.5B",
}
"""Decision rules, written down before the first run on a GPU."""


class Box:
    """A Box is a time limit, which sections ask before each piece of work."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Return the seconds until the limit; they are negative after it."""
        return self._end - time.monotonic()

    def has(self, seconds: float) -> bool:
        """Return whether more than so many seconds are left."""
        return self.left > seconds


class Report:
    """A Report holds the results of all sections; `add` writes each to gpu.jsonl at once.

    Args:
        folder: of gpu.jsonl.
        console: where results are printed.
        goes_on: add to the file that is there in place of replacing it.
    """

    def __init__(self, folder: Path, console: Console, goes_on: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.console = console
        file = folder / "gpu.jsonl"
        known = file.read_text(encoding="utf-8") if goes_on and file.exists() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in known.splitlines()]
        mode = "a" if goes_on else "w"
        self._file = open(file, mode, encoding="utf-8")  # noqa: SIM115 - for the whole run

    @property
    def peak(self) -> float:
        """FLOP/s of a large bfloat16 matrix product, from the section `probe`; nan before it has run."""
        return next((line["tflops"] * 1e12 for line in self.lines if "tflops" in line), float("nan"))

    def add(self, section: str, name: str, **values: Any) -> None:
        """Record one result; values `rule` and `ok` name a decision rule and say whether it holds."""
        line = {"section": section, "name": name, **{key: _plain(value) for key, value in values.items()}}
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        shown = ", ".join(
            f"{key} {_short(value)}" for key, value in line.items() if key not in ("section", "name")
        )
        self.console.print(f"{section:12s} {name}: {shown}", soft_wrap=True)

    @contextmanager
    def attempt(self, section: str, name: str) -> Iterator[None]:
        """Record the first line of an error inside the context, and suppress the error.

        One kernel that fails must not hide the results of the others.
        """
        try:
            yield
        except Exception as error:  # any kernel or library may fail here, and which one it was is the result
            text = str(error).strip().splitlines()
            self.add(section, name, failed=f"{type(error).__name__}: {text[0] if text else ''}"[:400])
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def table(self) -> None:
        """Print the verdicts of all decision rules that were reached."""
        table = Table(title="bench gpu: decision rules", title_justify="left")
        for heading in ("rule", "case", "result", "holds"):
            table.add_column(heading)
        for line in self.lines:
            if "rule" in line:
                values = {k: v for k, v in line.items() if k not in ("section", "name", "rule", "ok")}
                result = ", ".join(f"{key} {_short(value)}" for key, value in values.items())
                table.add_row(line["rule"], line["name"], result, "yes" if line["ok"] else "NO")
        self.console.print(table)
        for name, text in RULES.items():
            self.console.print(f"{name}: {text}", soft_wrap=True)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def now(device: torch.device) -> float:
    """Return a time in seconds, after the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
