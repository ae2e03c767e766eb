"""The algorithm needs neither Ray nor vLLM nor DeepSpeed; no module is long. `lint-imports` does the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

PROGRAM = """
import importlib.util, json, sys

HIDDEN = ("ray", "vllm", "deepspeed")


class Without:
    \"\"\"A finder as on a machine where the hidden packages are not installed.\"\"\"

    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, *arguments):
        return None if name.partition(".")[0] in HIDDEN else self._finder.find_spec(name, *arguments)


sys.meta_path[:] = map(Without, sys.meta_path)
assert all(importlib.util.find_spec(name) is None for name in HIDDEN)

import learners
import tiny
from gvpo_ray.config.loss import loss_config
from gvpo_ray.learner.step import train_step

for objective in ("gvpo", "grpo"):
    given = learners.settings(f"{sys.argv[1]}/{objective}")
    given.loss = loss_config(objective=objective)
    policy = learners.load(tiny.make_model(given.model_path), given)
    before = learners.weights(policy)
    metrics = train_step(policy, [tiny.make_group(i) for i in range(4)], given)
    moved = not learners.same(before, learners.weights(policy))
    loaded = sorted(name for name in HIDDEN if name in sys.modules)
    told = {"step": policy.step, "moved": moved, "grad_norm": metrics["grad_norm"], "loaded": loaded}
    print("told", json.dumps(told))
"""


def test_steps_are_trained_where_ray_and_vllm_and_deepspeed_are_not_installed(tmp_path: Path) -> None:
    """One by GVPO and one by GRPO."""
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("told ") for line in done.stdout.splitlines() if line.startswith("told ")]
    assert len(lines) == 2
    for told in map(json.loads, lines):
        assert told.pop("grad_norm") > 0
        assert told == {"step": 1, "moved": True, "loaded": []}


def test_no_module_of_the_package_has_more_than_450_lines() -> None:
    package = Path(__file__).parents[1] / "gvpo_ray"
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in package.rglob("*.py")}
    assert len(lengths) > 100
    assert {str(path.relative_to(package)): num for path, num in lengths.items() if num > 450} == {}
