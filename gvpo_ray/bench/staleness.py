"""`gvpo-ray bench staleness`: how well each objective learns from data of a given age, the same number of trained groups for all.

Age a: each batch is trained a steps after it was sampled, which is what a fleet that is always ahead by the dial's whole width gives
(`max_staleness: a`). Unbounded: everything is sampled from the first policy, before the first step. Nothing is discarded at any age.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gvpo_ray.bench.experiments import Cell, Results, markdown, percent, picture, run_all

AGES = (0, 1, 4, 16, 64, 100)
"""In steps; the last is the number of steps: unbounded."""
RATE = 4e-4
METHODS: dict[str, dict[str, Any]] = {
    "gvpo, behaviour": {"loss.reference": "behaviour"},
    "gvpo, previous": {"loss.reference": "previous"},
    "gvpo, every: 16": {"loss.reference": "every: 16"},
    "gvpo, initial": {"loss.reference": "initial"},
    "grpo, with the ratio": {"loss": {}, "loss.objective": "grpo"},
    "grpo, without": {"loss": {}, "loss.objective": "grpo", "loss.old_policy": "previous"},
    "dr_grpo, without": {"loss": {}, "loss.objective": "dr_grpo", "loss.old_policy": "previous"},
}


def cells_of(task: str, method: str, age: int, seeds: Sequence[int]) -> list[Cell]:
    return [Cell(task, {**METHODS[method], "learner.learning_rate": RATE}, seed, age) for seed in seeds]


def main(tasks: Sequence[str], num_seeds: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder)
    for num in range(1, num_seeds + 1):  # a whole table early, a better one later
        run_all([cell for task in tasks for age in AGES for method in METHODS for cell in cells_of(task, method, age, range(num))], results)
        write(tasks, results, range(num))


def write(tasks: Sequence[str], results: Results, seeds: Sequence[int]) -> None:
    """staleness.md and a picture for each task, from what is there."""
    text = ["# Data age", "", f"pass@1 in % at temperature 1 on held-out prompts after 100 steps; ± 95 % over {len(seeds)} seeds.", ""]
    for task in tasks:
        rows = {(method, age): results.of(cells_of(task, method, age, seeds)) for method in METHODS for age in AGES}
        body = [[method, *(percent([row["pass@1"] for row in rows[method, age]]) for age in AGES)] for method in METHODS]
        text += [f"## {task}", "", markdown(["age in steps", *map(str, AGES[:-1]), "unbounded"], body)]
        lines = {
            method: [(age + 0.5, sum(row["pass@1"] for row in found) / len(found)) for age in AGES if (found := rows[method, age])]
            for method in METHODS
        }
        picture(results.folder / f"staleness-{task}.png", lines, "age in steps + 1/2", "pass@1", task, log=True)
    (results.folder / "staleness.md").write_text("\n".join(text))
