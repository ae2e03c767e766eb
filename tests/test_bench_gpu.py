"""`gvpo-ray bench gpu` on a CPU, at toy sizes: it ends, writes what it found and goes on after a section that
hangs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gvpo_ray.bench.gpu.report import RULES
from gvpo_ray.cli import main

ROOT = Path(__file__).parent.parent

HIDDEN = """
import sys
for name in ("ray", "vllm", "deepspeed"):
    sys.modules[name] = None  # an import of it raises ImportError
from gvpo_ray.bench.gpu import main as gpu
"""

HANGS = """
import time
gpu.GRACE_S = 0.5
gpu.hangs = lambda *_: time.sleep(1000)
gpu.SECTIONS["recompiles"] = ("gvpo_ray.bench.gpu.main:hangs", 1)
raise SystemExit(gpu.main(sys.argv[1], 60, ["recompiles", "probe"]))
"""


def lines_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


def bench(program: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """Run a program; what it printed, and the lines of its gpu.jsonl."""
    ran = subprocess.run(
        [sys.executable, "-c", HIDDEN + program, str(folder)],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    return ran, lines_in(folder)


def test_three_sections_end_on_a_cpu_without_ray_and_vllm_and_deepspeed(tmp_path: Path) -> None:
    program = (
        "gpu.GRACE_S = 250\nraise SystemExit(gpu.main(sys.argv[1], 60, ['probe', 'train_step', 'speed']))"
    )
    # the grace: on a machine that does much else, one piece of work may take long
    ran, lines = bench(program, tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [line["section"] for line in lines if line["name"] == "took"] == ["probe", "train_step", "speed"]
    assert not [line for line in lines if "failed" in line]
    ruled = {line["rule"]: line["ok"] for line in lines if "rule" in line}
    assert ruled["train_step"] is True
    for name, text in RULES.items():
        assert f"{name}: {text}" in ran.stdout


def test_a_section_that_hangs_is_given_up_and_the_next_one_runs(tmp_path: Path) -> None:
    ran, lines = bench(HANGS, tmp_path)
    (given_up,) = [line for line in lines if line["name"] == "given up"]
    assert given_up["section"] == "recompiles" and "no end" in given_up["failed"]
    assert any("<lambda>" in place for place in given_up["at"])
    assert [line["section"] for line in lines if line["name"] == "took"] == ["probe"]
    assert ran.returncode == 1


def test_the_verb_runs_the_sections_that_are_named(
    tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the bench sets it, for its process
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)
    assert main(["bench", "gpu", "--out", str(tmp_path), "--seconds", "20", "--sections", "probe"]) == 0
    assert {line["section"] for line in lines_in(tmp_path)} == {"probe"}
