"""The console shows the progress of runs and evaluations: lines, bars on a terminal, a table at the end."""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gvpo_ray import groups
from gvpo_ray.buffer.log import Quarantine
from gvpo_ray.config.data import NO_PROMPTS
from gvpo_ray.config.plan import resource_plan
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.config.shown import visible
from gvpo_ray.observe.advice import HINT_STEPS, beta_hint
from gvpo_ray.observe.metrics import evaluation_metrics
from gvpo_ray.observe.metrics_log import MetricsLog


class RunConsole:
    """A RunConsole prints a run's progress at the driver: a plain line per step, and a bar on a terminal."""

    def __init__(self, config: GVPOConfig, done: int, num_steps: int) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self._num_steps = num_steps
        self._ends: deque[tuple[int, float]] = deque(maxlen=32)
        """Step and time of the last ends of steps: the run's start, which is slower, is not among them."""
        self._passes: dict[str, float] = {}
        self._lines: deque[Mapping[str, Any]] = deque(maxlen=HINT_STEPS)
        self._hints_at_beta = config.loss.depends_on_beta
        self._progress = Progress(
            TextColumn("[bold]step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            transient=True,
        )
        self._bar = self._progress.add_task("starting", total=num_steps, completed=done)

    def __enter__(self) -> RunConsole:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line as it is: nothing in it is markup or an emoji of rich, or acts on the terminal."""
        self.console.print(visible(text), markup=False, emoji=False)

    def step(self, line: Mapping[str, Any]) -> None:
        """Print the line of a trained step, and remember the evaluation that came with it."""
        self.evaluated(line)
        step = line["step"]
        self._ends.append((step, time.monotonic()))
        left = time_left(self._ends, self._num_steps)
        parts = [
            f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}",
            f"reward {line['reward/mean']:.3f}",
            *(f"pass@1 {name} {value:.3f}" for name, value in self._passes.items()),
            f"loss {line['loss']:.4f}",
            f"kl_ref {line['policy/kl_ref']:.3f}",
            f"{line['tokens/trained'] / max(1e-9, line['time/step']):,.0f} tokens/s",
            f"staleness {line['staleness/mean']:.1f}",
            f"waited {100 * line['time/wait_for_groups'] / max(1e-9, line['time/step']):.0f}%",
            f"{line['time/step']:.1f} s",
        ]
        if left is not None:
            parts.append(f"left {duration(left)}")
        if line.get("updates/skipped"):
            parts.append(f"{line['updates/skipped']:.0f} updates skipped: their gradient was not a number")
        self.say(" · ".join(parts))
        self._lines.append(line)
        if self._hints_at_beta and (hint := beta_hint(list(self._lines))):
            self.say(hint)
            self._hints_at_beta = False  # one hint per run is enough
        text = "" if left is None else f"left {duration(left)}"
        self._progress.update(self._bar, completed=step, description=text)

    def evaluated(self, line: Mapping[str, Any]) -> None:
        """Remember the pass@1 of each held-out set in `line`, for the lines of steps."""
        for key, value in line.items():
            if key.startswith("eval/") and key.endswith("/pass@1"):
                self._passes[key.split("/")[1]] = value

    def summary(self, run_dir: Path, metrics: MetricsLog, num_examples: int = 3) -> None:
        """Print a table of the first and last evaluations, some completions of both, and what went wrong."""
        table = Table(title="before and after", title_justify="left")
        for column in ("", "before", "after"):
            table.add_column(column, justify="left" if not column else "right")
        examples: list[str] = []
        for name, files in groups.evaluations(run_dir).items():
            before, after = (list(groups.rows(groups.load(file))) for _, file in (files[0], files[-1]))
            values = [evaluation_metrics(name, rows) for rows in (before, after)]
            table.add_row(f"{name}: step", str(files[0][0]), str(files[-1][0]))
            for key, label in (
                ("pass@1", "pass@1"),
                ("stderr", "± standard error"),
                ("length_mean", "mean length"),
                ("truncated", "truncated"),
            ):
                table.add_row(f"  {label}", *(f"{value[f'eval/{name}/{key}']:.3f}" for value in values))
            for old, new in list(zip(before, after, strict=False))[:num_examples]:
                examples.append(f"{one_line(_asked(old))}  (answer {old['answer']})")
                for when, row in (("before", old), ("after ", new)):
                    examples.append(
                        f"  {when}: {one_line(row['completions'][0])}  → reward {row['rewards'][0]}"
                    )
        trained = [line for line in metrics.lines if "loss" in line]
        if trained:
            ends = [f"{line['reward/mean']:.3f}" for line in (trained[0], trained[-1])]
            table.add_row("reward/mean of a step", *ends)
        self.console.print(table)
        for text in examples:
            self.say(text)
        unverifiable = sum(line["completions/unverifiable"] > 0 for line in trained)
        if unverifiable:
            self.say(
                f"{unverifiable} steps had completions that could not be verified: they were left out "
                "(completions/unverifiable)"
            )
        if quarantined := Quarantine(run_dir / "quarantine.jsonl").entries():
            self.say(
                f"{len(quarantined)} prompts are quarantined: every check of their completions hit a limit "
                f"({run_dir / 'quarantine.jsonl'})"
            )
            for entry in quarantined[:num_examples]:
                self.say(f"  {one_line(entry['prompt'])}  (answer {entry['answer']})")
        self.say(f"run directory: {run_dir}")


@contextlib.contextmanager
def evaluation_progress(sets: Mapping[str, tuple[int, int]]) -> Iterator[Callable[[str], None]]:
    """Show progress bars of an evaluation; yield a function that counts one prompt of a named set.

    Args:
        sets: number of prompts and of those that are not sampled yet, by the name of the set.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.print(
            "evaluating "
            + ", ".join(f"{name}: {missing} of {total} prompts" for name, (total, missing) in sets.items())
        )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = {
            name: progress.add_task(name, total=total, completed=total - missing)
            for name, (total, missing) in sets.items()
        }
        yield lambda name: progress.advance(bars[name])


def plan_table(config: GVPOConfig) -> Table:
    """Return the table of the resource plan that `gvpo-ray check` prints."""
    table = Table(title="resource plan", title_justify="left")
    for column in ("actor", "number", "CPUs each", "GPUs each", "CPUs", "GPUs"):
        table.add_column(column, justify="left" if column == "actor" else "right")
    cpus = gpus = 0.0
    only_evaluates = config.prompts.path == NO_PROMPTS and not config.sources
    plan = [row for row in resource_plan(config) if not (only_evaluates and row[0] == "learner worker")]
    for who, number, cpu, gpu in plan:
        cpus, gpus = cpus + number * cpu, gpus + number * gpu
        table.add_row(who, str(number), f"{cpu:g}", f"{gpu:g}", f"{number * cpu:g}", f"{number * gpu:g}")
    table.add_section()
    table.add_row("in all", "", "", "", f"{cpus:g}", f"{gpus:g}")
    return table


def _asked(row: Mapping[str, Any]) -> str:
    """Return what a prompt asks: of a conversation its last message, since examples may stand before it."""
    messages = json.loads(row.get("data") or "{}").get("messages") or [{}]
    content = messages[-1].get("content")
    return content if isinstance(content, str) else str(row["prompt"])


def one_line(text: str, width: int = 110) -> str:
    """Join the lines of a text into one, and cut it to `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def time_left(ends: Sequence[tuple[int, float]], num_steps: int) -> float | None:
    """Return the seconds that the remaining steps take at the mean speed between the known ends of steps.

    None: there is one end or none. What came before it, such as the start of engines, says nothing about the
    steps after it.

    Args:
        ends: number and time (s) of finished steps, in order.
        num_steps: number of the last step.
    """
    if len(ends) < 2:
        return None
    (first, began), (last, now) = ends[0], ends[-1]
    return (now - began) / (last - first) * (num_steps - last)


def duration(seconds: float) -> str:
    """Write a duration as h:mm:ss, or as m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
