"""The algorithm needs neither Ray nor vLLM nor DeepSpeed; no module is long, and docstrings begin with
sentences. `lint-imports` does the rest.
"""

from __future__ import annotations

import ast
import json
import os
import re
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


def test_no_line_of_the_package_has_more_than_110_columns_not_even_one_that_ends_with_a_pragma() -> None:
    package = Path(__file__).parents[1] / "gvpo_ray"
    found = [
        f"{path.relative_to(package)}:{number}"
        for path in package.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 110
    ]
    assert found == []


FRAGMENT = re.compile(r"(How|Of|One|What|Where|Whether|Which|Who|Whose|Why)\b")


def test_no_docstring_of_a_module_a_class_or_a_function_begins_with_a_clause_in_place_of_a_sentence() -> None:
    package, num, found = Path(__file__).parents[1] / "gvpo_ray", 0, []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                num += text is not None
                if text is not None and FRAGMENT.match(text):
                    found.append(f"{path.relative_to(package)}: {text.splitlines()[0]}")
    assert num > 2000 and found == []
