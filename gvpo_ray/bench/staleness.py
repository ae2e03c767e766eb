"""`gvpo-ray bench staleness`: how well each objective learns from data of a given age, the same number of trained groups for all.

Age a: each batch is trained a steps after it was sampled, which is what a fleet that is always ahead by the dial's whole width gives
(`max_staleness: a`). Unbounded: everything is sampled from the first policy, before the first step. Nothing is discarded at any age.

Each method is tuned once with the same budget of four runs (experiments.py: `tune`), at age 16, and keeps what was best there at every age.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gvpo_ray.bench.experiments import Cell, Method, Results, markdown, percent, picture, run_all, tune, tuned, tuned_options

AGES = (0, 1, 4, 16, 64, 100)
"""In steps; the last is the number of steps: unbounded."""
TUNED_AT = 16
BETAS, CLIPS = (0.1, 0.3), (0.2, 0.4)
METHODS = {
    "gvpo (default)": Method({}, "loss.beta", ("auto", 0.1)),
    "gvpo, behaviour alone": Method({"loss.importance_cap": None, "loss.damped": False}, "loss.beta", BETAS),
    "gvpo, previous": Method({"loss.reference": "previous"}, "loss.beta", BETAS),
    "gvpo, every: 16": Method({"loss.reference": "every: 16"}, "loss.beta", BETAS),
    "gvpo, initial": Method({"loss.reference": "initial"}, "loss.beta", BETAS),
    "grpo, with the ratio": Method({"loss": {}, "loss.objective": "grpo"}, "loss.clip", CLIPS),
    "grpo, without": Method({"loss": {}, "loss.objective": "grpo", "loss.old_policy": "previous"}, "loss.clip", CLIPS),
    "dr_grpo, without": Method({"loss": {}, "loss.objective": "dr_grpo", "loss.old_policy": "previous"}, "loss.clip", CLIPS),
}


def cells_of(task: str, method: str, age: int, seeds: Sequence[int], results: Results) -> list[Cell]:
    """None of them before the method is tuned: its options are not known."""
    options = tuned(task, METHODS[method], TUNED_AT, results)
    return [] if options is None else [Cell(task, options, seed, age) for seed in seeds]


def main(tasks: Sequence[str], num_seeds: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder)
    tune(tasks, METHODS, TUNED_AT, results)
    for num in range(1, num_seeds + 1):  # a whole table early, a better one later
        for age in AGES:
            run_all([cell for task in tasks for method in METHODS for cell in cells_of(task, method, age, range(num), results)], results)
            write(tasks, results, range(num))


def write(tasks: Sequence[str], results: Results, seeds: Sequence[int]) -> None:
    """staleness.md and a picture for each task, from what is there."""
    text = ["# Data age", "", f"pass@1 in % at temperature 1 on held-out prompts after 100 steps; ± 95 % over {len(seeds)} seeds.", ""]
    for task in tasks:
        rows = {(method, age): results.of(cells_of(task, method, age, seeds, results)) for method in METHODS for age in AGES}
        body = [[method, *(percent([row["pass@1"] for row in rows[method, age]]) for age in AGES)] for method in METHODS]
        text += [f"## {task}", "", markdown(["age in steps", *map(str, AGES[:-1]), "unbounded"], body)]
        lines = {
            method: [(age + 0.5, sum(row["pass@1"] for row in found) / len(found)) for age in AGES if (found := rows[method, age])]
            for method in METHODS
        }
        picture(results.folder / f"staleness-{task}.png", lines, "age in steps + 1/2", "pass@1", task, log=True)
    text += tuned_options(tasks, METHODS, TUNED_AT, results)
    (results.folder / "staleness.md").write_text("\n".join(text))
