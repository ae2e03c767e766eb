"""`gvpo-ray bench staleness` compares how well objectives learn from data of a given age.

All cells train the same number of groups. At age a, each batch is trained a steps after it was sampled, as
with a fleet that is always as far ahead as `max_staleness: a` allows. At the age `unbounded`, everything is
sampled from the first policy, before the first step. No group is discarded at any age.

Each method is tuned once, at age 16, with the same budget of four runs (cells.py: `tune`), and keeps these
options at every age.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gvpo_ray.bench.experiments.cells import Cell, Method, Results, open_results, run_all, tune, tuned
from gvpo_ray.bench.experiments.tables import markdown, mean_curve, percent, picture, tuned_options

AGES = (0, 1, 4, 16, 64, 100)
"""Ages in steps. The last is the number of steps of a run, and so unbounded."""
TUNED_AT = 16
BETAS, CLIPS = (0.1, 0.3), (0.2, 0.4)
OF_MEANS = (0.01, 0.1)
"""Clips of GSPO, whose ratio is a mean per token: the published 0.0003 is for a thousand tokens, and answers
have 15 to 75 here."""
METHODS = {
    "gvpo (default)": Method({"loss.beta": "auto"}),
    "gvpo, behaviour alone": Method({"loss.importance_cap": None, "loss.damped": False}, "loss.beta", BETAS),
    "gvpo, previous": Method({"loss.reference": "previous"}, "loss.beta", BETAS),
    "gvpo, every: 16": Method({"loss.reference": "every: 16"}, "loss.beta", BETAS),
    "gvpo, initial": Method({"loss.reference": "initial"}, "loss.beta", BETAS),
    "grpo, with the ratio": Method({"loss": {}, "loss.objective": "grpo"}, "loss.clip", CLIPS),
    "grpo, without": Method(
        {"loss": {}, "loss.objective": "grpo", "loss.old_policy": "previous"}, "loss.clip", CLIPS
    ),
    "dr_grpo, without": Method(
        {"loss": {}, "loss.objective": "dr_grpo", "loss.old_policy": "previous"}, "loss.clip", CLIPS
    ),
    "oapl": Method({"loss": {}, "loss.objective": "oapl"}, "loss.beta", BETAS),
    "gspo": Method({"loss": {}, "loss.objective": "gspo"}, "loss.clip", OF_MEANS),
}
OBJECTIVES = tuple(dict.fromkeys(re.split("[, ]", name)[0] for name in METHODS))
"""The objectives of the methods, with which their names begin."""

Grid = dict[str, tuple[int, ...]]

FEW = (0, 16, 100)
OUTLINE: Grid = dict.fromkeys(("gvpo (default)", "grpo, with the ratio", "oapl", "gspo"), FEW)
WHOLE: Grid = {name: FEW if name in ("gvpo, behaviour alone", "oapl", "gspo") else AGES for name in METHODS}
GRIDS = {"arithmetic": WHOLE, "chain": OUTLINE, "sort": OUTLINE}
"""Ages at which each method is run, by task: all of them for one task, a few for the others."""

EXTERNAL: dict[str, dict[str, Any]] = {
    "none": {},
    "half": {"sources.people.group_share": 0.5},
    "all": {"sources.people.group_share": 1.0},
}
"""Overrides that give the share of groups of people's completions; all other groups have age 0."""
MEASURES = {"pass@1": "at temperature 1", "greedy": "greedy"}


def cells_of(task: str, method: str, age: int, seeds: Sequence[int], results: Results) -> list[Cell]:
    """Return the cells of a method at an age, one per seed; none before the method is tuned."""
    options = tuned(task, METHODS[method], TUNED_AT, results)
    return [] if options is None else [Cell(task, options, seed, age) for seed in seeds]


def main(tasks: Sequence[str], num_seeds: int, folder: Path, objectives: Sequence[str] = OBJECTIVES) -> None:
    """Run the cells that have no result yet, and write staleness.md and its pictures to `folder`.

    Args:
        tasks: names of tasks.
        num_seeds: runs of each cell.
        folder: of results.parquet.
        objectives: those whose methods are run; the tables have all that have results.

    Raises:
        ConfigError: this is no checkout of the repository.
    """
    results = open_results(folder)
    for task in tasks:
        grid = {name: ages for name, ages in GRIDS[task].items() if re.split("[, ]", name)[0] in objectives}
        tune([task], {name: METHODS[name] for name in grid}, TUNED_AT, results)
        for num in range(1, num_seeds + 1):  # a whole table early, a better one later
            places = [(method, age) for age in AGES for method in grid if age in grid[method]]
            cells = [
                cell for method, age in places for cell in cells_of(task, method, age, range(num), results)
            ]
            run_all(cells, results, partial(write, results, range(num)))
    if "arithmetic" in tasks and "gvpo" in objectives:
        cells = [cell for alike in external_cells(range(num_seeds), results).values() for cell in alike]
        run_all(cells, results, partial(write, results, range(num_seeds)))


def external_cells(seeds: Sequence[int], results: Results) -> dict[str, list[Cell]]:
    """Return the cells with people's completions by their share; none before the method is tuned."""
    options = tuned("arithmetic", METHODS["gvpo (default)"], TUNED_AT, results)
    return (
        {}
        if options is None
        else {
            share: [Cell("arithmetic", {**options, **more}, seed) for seed in seeds]
            for share, more in EXTERNAL.items()
        }
    )


def write(results: Results, seeds: Sequence[int]) -> None:
    """Write staleness.md and its pictures from the results so far.

    Each task has a picture of the final pass@1 and one of the curves.
    """
    tasks = []
    intervals = f"± 95 % over up to {len(seeds)} seeds, without it one run"
    text = ["# Data age", "", f"pass@1 in % on held-out prompts after 100 steps; {intervals}.", ""]
    for task in GRIDS:
        methods, ages = (
            GRIDS[task],
            [age for age in AGES if any(age in some for some in GRIDS[task].values())],
        )
        rows = {
            (method, age): results.of(cells_of(task, method, age, seeds, results))
            for method in methods
            for age in ages
        }
        if not any(rows.values()):
            continue
        tasks.append(task)
        text += [f"## {task}", ""]
        for name, title in MEASURES.items():
            body = [
                [method, *(percent([row[name] for row in rows[method, age]]) for age in ages)]
                for method in methods
            ]
            text += [markdown([f"{title}, age in steps", *map(_named, ages)], body)]
        text += [
            f"![pass@1 against age](staleness-{task}.png)",
            "",
            f"![whole curves](curves-{task}.png)",
            "",
        ]
        lines = {
            method: [
                (i, sum(row["pass@1"] for row in found) / len(found))
                for i, age in enumerate(ages)
                if (found := rows[method, age])
            ]
            for method in methods
        }
        picture(
            results.folder / f"staleness-{task}.png",
            {task: lines},
            "age in steps",
            "pass@1",
            ticks=[*map(_named, ages)],
        )
        curves = {
            f"age {_named(age)}": {method: mean_curve(rows[method, age], "step") for method in methods}
            for age in ages
        }
        picture(results.folder / f"curves-{task}.png", curves, "steps", "pass@1")
    external = {share: results.of(cells) for share, cells in external_cells(seeds, results).items()}
    body = [
        [title, *(percent([row[name] for row in rows]) for rows in external.values())]
        for name, title in MEASURES.items()
    ]
    text += (
        ["## People's completions, of all groups (arithmetic)", "", markdown(["", *external], body)]
        if any(external.values())
        else []
    )
    text += tuned_options(tasks, METHODS, TUNED_AT, results)
    (results.folder / "staleness.md").write_text("\n".join(text), encoding="utf-8")


def _named(age: int) -> str:
    return "unbounded" if age == AGES[-1] else f"{age}"
