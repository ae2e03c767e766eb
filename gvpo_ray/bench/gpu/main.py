"""`gvpo-ray bench gpu` checks in eight minutes that the learner is right and fast on one GPU.

The check needs neither ray nor vllm nor deepspeed. Each section has a time limit and writes each result as
soon as it is known; a failure is a result too. On a CPU the sizes are toys, which shows only that the check
itself works.

    python -m gvpo_ray.bench.gpu.main --out FOLDER [--seconds 450] [--sections probe,semantics,...]
"""

from __future__ import annotations

import argparse
import os
import pkgutil
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from gvpo_ray.bench.gpu.report import Box, Report

SECTIONS = {
    "probe": ("gvpo_ray.bench.gpu.probe:run", 10),
    "recompiles": ("gvpo_ray.bench.gpu.semantics:recompiles", 60),
    "train_step": ("gvpo_ray.bench.gpu.steps:run", 60),
    "speed": ("gvpo_ray.bench.gpu.speed:run", 110),
    "semantics": ("gvpo_ray.bench.gpu.semantics:run", 80),
    "publish": ("gvpo_ray.bench.gpu.publish:run", 20),
    "choices": ("gvpo_ray.bench.gpu.speed:choices", 60),
    "numerics": ("gvpo_ray.bench.gpu.numerics:run", 25),
    "profile": ("gvpo_ray.bench.gpu.profile:run", 25),
}
"""Where the function of each section is, and its time in seconds where all of them have 450.

The sections whose loss would cost most come first. Time that one leaves over is not given to others.
"""

GRACE_S = 20
"""Seconds after its time limit at which a section is given up, because it hangs or compiles without end."""


def main(
    out: str | Path, seconds: float = 450, sections: Sequence[str] = tuple(SECTIONS), goes_on: bool = False
) -> int:
    """Run the sections, and write gpu.jsonl and traces to a folder.

    Args:
        out: the folder.
        seconds: time for all sections, which they share in the proportions of SECTIONS.
        sections: names of SECTIONS, in the order in which they run.
        goes_on: add to the gpu.jsonl of the folder in place of replacing it.

    Returns:
        Exit status: 1 where a decision rule does not hold or anything failed, else 0.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # what these sections import, before their time begins
    works = {name: pkgutil.resolve_name(SECTIONS[name][0]) for name in sections}
    report = Report(Path(out), Console(highlight=False, width=170), goes_on)
    whole, shares = Box(seconds), sum(SECTIONS[name][1] for name in sections)
    for i, name in enumerate(sections):
        begin, limit = time.monotonic(), min(SECTIONS[name][1] * seconds / shares, whole.left)
        done = threading.Event()
        again = [sys.executable, "-m", "gvpo_ray.bench.gpu.main", "--goes-on", "--out", str(out)]
        rest = ["--sections", ",".join(sections[i + 1 :])]
        threading.Thread(
            target=_give_up, args=(report, name, done, limit, whole, again, rest), daemon=True
        ).start()
        with report.attempt(name, "the section itself"):
            works[name](report, device, device.type == "cpu", Box(limit))
        done.set()
        report.add(name, "took", seconds=time.monotonic() - begin)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.table()
    return int(any("failed" in line or line.get("ok") is False for line in report.lines))


def _give_up(
    report: Report,
    name: str,
    done: threading.Event,
    limit: float,
    whole: Box,
    again: list[str],
    rest: list[str],
) -> None:
    """Watch a section in a thread; if it does not end, start this program anew with the sections after it.

    The stack of the section is recorded first. Neither a thread nor a kernel that never ends can be stopped,
    so only a new process can go on.
    """
    if done.wait(limit + GRACE_S):
        return
    frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    at = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-12:]]
    report.add(name, "given up", failed=f"no end {GRACE_S} s after its time", at=at)
    if rest[1] and whole.left > 10:
        os.execv(again[0], [*again, "--seconds", str(whole.left), *rest])
    report.table()
    os._exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=450)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--goes-on", action="store_true", help="add to the results that are in the folder")
    given = parser.parse_args()
    raise SystemExit(main(given.out, given.seconds, given.sections.split(","), given.goes_on))
