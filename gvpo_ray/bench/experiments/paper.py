"""`gvpo-ray bench paper` makes the paper's table and figures (arXiv 2504.19599) on tasks for a CPU.

    Table 1    base, GRPO, Dr. GRPO, RLOO, REINFORCE and GVPO at equal samples
    beta       pass@1 against beta, for short answers (at two learning rates) and long ones (the paper: flat
               from 0.01 to 0.5)
    k          completions per prompt from 2 to 32, at equal completions
    history    historical to current completions from 0:8 to 4:4 in a group (Figure 4)
    frontier   pass@1 against the distance from the start, along the runs of Table 1

Each method is tuned first with the same budget of four runs (cells.py: `tune`). These runs have a seed of
their own and are compared on training prompts, so that no choice depends on the held-out ones.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gvpo_ray.bench.experiments.cells import (
    Cell,
    Method,
    ResultRow,
    Results,
    open_results,
    run_all,
    tune,
    tuned,
)
from gvpo_ray.bench.experiments.tables import markdown, mean_curve, percent, picture, tuned_options

METHODS = {
    "GRPO": Method({"loss": {}, "loss.objective": "grpo"}, "loss.clip", (0.2, 0.4)),
    "Dr. GRPO": Method({"loss": {}, "loss.objective": "dr_grpo"}, "loss.clip", (0.2, 0.4)),
    "RLOO": Method(
        {"loss": {}, "loss.objective": "rloo", "loss.reference": "initial"},
        "loss.kl_coefficient",
        (0.0, 0.02),
    ),
    "REINFORCE": Method(
        {"loss": {}, "loss.objective": "reinforce", "loss.reference": "initial", "loss.baseline": 0.5},
        "loss.kl_coefficient",
        (0.0, 0.02),
    ),
    "GVPO": Method({"loss.beta": "auto"}),
}
TABLES = {"arithmetic": ("methods", "beta", "k", "history"), "chain": ("beta",), "sort": ("methods",)}
"""Tables of each task."""
BETAS = (0.01, 0.1, 0.5, 1.0, 5.0)
SHARES_OF_THE_RATE = {"arithmetic": (1.0, 0.5), "chain": (1.0,), "sort": (1.0,)}
"""Learning rates of the beta table, as shares of the tuned rate. Short answers show how rate and beta act
together; the other tasks, at the tuned rate alone, show the effect of length."""
SIZES = {"GVPO": (2, 4, 8, 16, 32), "GRPO": (2, 8, 32)}
HISTORICAL = (0, 1, 2, 3, 4)
"""Numbers of historical completions among the 8 of a group."""
REFERENCES: dict[str, dict[str, Any]] = {"": {}, "reference: previous": {"loss.reference": "previous"}}
"""References of the history table: the default, with which each completion has its own, and one for the whole
group, as in the paper."""


def main(tasks: Sequence[str], num_seeds: int, folder: Path) -> None:
    """Run the cells that have no result yet, and write paper.md and its pictures to `folder`.

    Raises:
        ConfigError: this is no checkout of the repository.
    """
    results = open_results(folder)
    for task in tasks:
        tune([task], METHODS if "methods" in TABLES[task] else {"GVPO": METHODS["GVPO"]}, 0, results)
        for num in range(1, num_seeds + 1):  # whole tables early, better ones later
            tables = cells_of(task, results, range(num))
            cells = [cell for name in TABLES[task] for alike in tables[name].values() for cell in alike]
            run_all(cells, results, partial(write, results, range(num)))


Tables = dict[str, dict[tuple[Any, str], list[Cell]]]
"""Cells by row and column of each table, by its name."""


def cells_of(task: str, results: Results, seeds: Sequence[int]) -> Tables:
    """Return the cells of a task's tables; those of methods that are not tuned yet are left out."""
    best = {name: tuned(task, method, 0, results) for name, method in METHODS.items()}
    gvpo = best["GVPO"]
    tables: Tables = {
        "methods": {
            (method, ""): [Cell(task, options, seed) for seed in seeds]
            for method, options in best.items()
            if options is not None
        },
        "beta": {},
        "k": {},
        "history": {},
    }
    if gvpo is None:
        return tables
    rate = gvpo["learner.learning_rate"]
    for value, times in [("auto", 1.0), *itertools.product(BETAS, SHARES_OF_THE_RATE[task])]:
        overrides = {**gvpo, "loss.beta": value, "learner.learning_rate": rate * times}
        tables["beta"][value, f"{times:g} x the tuned rate"] = [Cell(task, overrides, seed) for seed in seeds]
    for method, k in ((method, k) for method, sizes in SIZES.items() for k in sizes):
        if (options := best[method]) is not None:
            num_groups = 128 // k
            overrides = {
                **options,
                **({} if k == 8 else {"sampling.num_completions": k, "groups_per_step": num_groups}),
            }
            tables["k"][k, method] = [Cell(task, overrides, seed) for seed in seeds]
    for n, (title, reference) in itertools.product(HISTORICAL, REFERENCES.items()):
        overrides = {**gvpo, **reference, **({"replay.share": n / 8} if n else {})}
        tables["history"][f"{n}:{8 - n}", title] = [Cell(task, overrides, seed) for seed in seeds]
    return tables


def write(results: Results, seeds: Sequence[int]) -> None:
    """Write paper.md and its pictures from the results so far."""
    intervals = f"± 95 % over up to {len(seeds)} seeds, without it one run"
    text = [
        "# The paper in miniature",
        "",
        f"pass@1 in % at temperature 1 on held-out prompts; {intervals}.",
        "",
    ]
    tables = {task: cells_of(task, results, seeds) for task in TABLES}
    tasks = [task for task in TABLES if any(_all(table, results) for table in tables[task].values())]

    def value(rows: list[ResultRow], name: str = "pass@1") -> str:
        return percent([row[name] for row in rows])

    compared = [task for task in tasks if "methods" in TABLES[task]]
    head = ["", *(f"{task}{what}" for task in compared for what in ("", ", greedy"))]
    starts = {task: _all(tables[task]["methods"], results) for task in compared}
    body = [
        [
            "base",
            *itertools.chain(
                *([value(starts[task][:1], name) for name in ("start", "start_greedy")] for task in compared)
            ),
        ]
    ]
    for method in METHODS:
        rows = {task: results.of(tables[task]["methods"].get((method, ""), [])) for task in compared}
        body.append(
            [
                method,
                *itertools.chain(*([value(rows[task]), value(rows[task], "greedy")] for task in compared)),
            ]
        )
    text += [
        "## Table 1: methods at equal samples",
        "",
        markdown(head, body),
        *tuned_options(tasks, METHODS, 0, results),
    ]
    text += [f"![frontier](frontier-{task}.png)\n" for task in compared]
    titles = {
        "beta": "beta",
        "k": "completions per prompt, of 128 in a step",
        "history": "historical : current completions of a group",
    }
    for name, title in titles.items():
        shown = [task for task in tasks if name in TABLES[task]]
        columns = list({(task, column): None for task in shown for _, column in tables[task][name]})
        keys = list({row: None for task in shown for row, _ in tables[task][name]})
        body = [
            [row, *(value(results.of(tables[task][name].get((row, column), []))) for task, column in columns)]
            for row in keys
        ]
        text += [
            f"## {title}",
            "",
            markdown(["", *(", ".join(filter(None, column)) for column in columns)], body),
        ]
        text += [f"![beta](beta-{task}.png)\n" for task in shown if name == "beta"]
    (results.folder / "paper.md").write_text("\n".join(text), encoding="utf-8")
    for task in compared:
        lines = {
            method: mean_curve(results.of(cells), "kl")
            for (method, _), cells in tables[task]["methods"].items()
        }
        # Linear up to 2 nats, within which most runs stay; logarithmic beyond, where one goes to dozens.
        picture(
            results.folder / f"frontier-{task}.png",
            {task: lines},
            "KL from the start, nats per completion",
            "pass@1",
            "symlog",
        )
    for task in tasks:
        if "beta" not in TABLES[task]:
            continue
        by_rate: dict[str, list[Any]] = {}
        for (beta, rate), cells in tables[task]["beta"].items():
            if beta != "auto" and (found := results.of(cells)):
                ends = [row["pass@1"] for row in found]
                by_rate.setdefault(rate, []).append((beta, statistics.mean(ends), min(ends), max(ends)))
        picture(
            results.folder / f"beta-{task}.png",
            {f"{task}: mean, least and greatest run": by_rate},
            "beta",
            "pass@1",
            "log",
        )


def _all(table: dict[tuple[Any, str], list[Cell]], results: Results) -> list[ResultRow]:
    return [row for cells in table.values() for row in results.of(cells)]
