"""The tables and pictures of the experiments are made here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gvpo_ray.bench.experiments.cells import NUM_TRIALS, Method, ResultRow, Results, tuned


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and half the width of its 95 % interval by Student's t (nan for one value)."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    from scipy.stats import t  # of the bench extra

    quantile = float(t.ppf(0.975, len(values) - 1))
    return statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def percent(values: Sequence[float]) -> str:
    """Write the mean in percent, with its interval where there are several values; "" for none."""
    if not values:
        return ""
    mean, interval = mean_and_interval(values)
    return f"{100 * mean:.1f}" + ("" if math.isnan(interval) else f" ± {100 * interval:.1f}")


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def tuned_options(
    tasks: Sequence[str], methods: Mapping[str, Method], age: int, results: Results
) -> list[str]:
    """Write the learning rate and the option that each method was tuned to, as lines of Markdown."""
    body = []
    for name, method in methods.items():
        found = [tuned(task, method, age, results) for task in tasks]
        keys = [
            "learner.learning_rate",
            *(["loss.clip_low" if method.option == "loss.clip" else method.option] if method.option else []),
        ]
        body.append(
            [
                name,
                method.option or "",
                *(", ".join(str(best[key]) for key in keys) if best else "" for best in found),
            ]
        )
    text = (
        f"Tuned with {NUM_TRIALS} runs each at age {age}, by pass@1 on training prompts: learning "
        "rate, and the option"
    )
    return [f"{text}.", "", markdown(["", "option", *tasks], body)]


Lines = Mapping[str, Sequence[tuple[float, ...]]]
"""Points of each line by its name: (x, y), or (x, y, low, high) where a range is drawn."""


def picture(
    path: Path, panels: Mapping[str, Lines], x: str, y: str, scale: str = "linear", ticks: Sequence[str] = ()
) -> None:
    """Write a PNG with a panel for each title, three in a row.

    Args:
        path: of the file.
        panels: lines of each panel by its title; lines of the same name have the same colour.
        x: label of the x axis.
        y: label of the y axis.
        scale: of the x axis, as matplotlib names it.
        ticks: names of x = 0, 1, ...; default: numbers.
    """
    from matplotlib.figure import Figure

    panels = {title: lines for title, lines in panels.items() if any(lines.values())}
    columns = min(3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = Figure(
        figsize=(6, 4) if columns == 1 else (4 * columns, 3.2 * rows), dpi=120, layout="constrained"
    )
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    colours = {
        name: f"C{i}"
        for i, name in enumerate(
            dict.fromkeys(name for lines in panels.values() for name, points in lines.items() if points)
        )
    }
    drawn: dict[str, Any] = {}
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        axes.set(title=title, xlabel=x, ylabel=y, xscale=scale)
        axes.label_outer()
        axes.grid(alpha=0.3)
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)
        for name, points in lines.items():
            if points:
                at, values, *ranges = zip(*points, strict=True)
                (drawn[name],) = axes.plot(at, values, marker="o", markersize=4, color=colours[name])
                if ranges:
                    axes.vlines(at, *ranges, color=colours[name], alpha=0.5)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    if drawn and columns == 1:
        grid[0].legend(drawn.values(), drawn, fontsize=8)
    elif drawn:
        figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path)


def mean_curve(rows: Sequence[ResultRow], x: str) -> list[tuple[float, ...]]:
    """Average the curves of runs that differ in their seed, as points (x, pass@1); `x` is `step` or `kl`."""
    places = zip(*(row["curve"] for row in rows), strict=True)
    return [
        tuple(statistics.mean(point[name] for point in alike) for name in (x, "pass@1")) for alike in places
    ]
