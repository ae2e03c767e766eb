"""The completions that a report shows: the best and the worst of evaluations and of the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.observe.report.charts import escaped, finite, fold, shown
from gvpo_ray.observe.report.reading import Run

MAX_CHARACTERS = 4000
MAX_EVALUATIONS = 12  # of a set whose completions are shown
NUM_EXAMPLES = 3
NUM_TRAINED = 64  # of the newest groups, from which the examples of the training are taken


COLUMNS = ("prompt", "answer", "completions", "rewards")
DETAILS = ("reward_parts", "reward_reasons", "finish_reasons", "sources", "version_min", "version_max")


def completions_of(run: Run) -> str:
    """Best, worst and unverifiable ones of the held-out sets' evaluations, the last open, and of the newest
    trained groups.
    """
    by_set: dict[str, list[tuple[int, Path]]] = {}
    for file in (run.path / "evaluations").glob("*-step-*.arrow"):
        name, _, number = file.stem.rpartition("-step-")
        if number.isdecimal():
            by_set.setdefault(name, []).append((int(number), file))
    parts = []
    for name, files in sorted(by_set.items()):
        files.sort(reverse=True)
        num = min(MAX_EVALUATIONS, len(files))  # spread over the run, the first and the last among them
        picked = [files[i * (len(files) - 1) // max(1, num - 1)] for i in range(num)]
        for step, file in picked:
            parts.append(fold(f"{name}, step {step}", _cases(file), is_open=step == picked[0][0]))
        if num < len(files):
            parts.append(f"<p><small>{num} of the {len(files)} evaluations of {escaped(name)}.</small></p>")
    if logs := sorted((run.path / "groups").glob("*.arrow"))[-1:]:
        parts.append(
            fold(f"the newest {NUM_TRAINED} groups of the training", _cases(logs[0], newest=NUM_TRAINED))
        )
    return "".join(parts)


def _cases(file: Path, newest: int | None = None) -> str:
    try:
        batches = groups.read_batches(file, is_log=newest is not None)
        table = pa.Table.from_batches(batches[-newest:] if newest else batches) if batches else groups.empty()
        table = table.slice(max(0, len(table) - newest)) if newest else table
        table = groups.validate(
            table.select([name for name in (*COLUMNS, *DETAILS) if name in table.schema.names]), COLUMNS
        )
    except groups.GroupError as error:  # its writer was killed, or is at it
        return f"<p>{escaped(error)}</p>"
    cases = {
        kind: [_case(kind, table, i, j) for i, j in found]
        for kind, found in _extremes(table["rewards"].to_pylist()).items()
    }
    return (
        "".join(f'<div class="cases">{"".join(found)}</div>' for found in cases.values() if found)
        or "<p>No completion has a reward.</p>"
    )


def _extremes(rewards: Sequence[Sequence[Any]]) -> dict[str, list[tuple[int, int]]]:
    """(prompt, completion) of the best, the worst and some without a reward, one per prompt in each; none is
    in two.
    """
    scored = [
        [(reward, i, j) for j, reward in enumerate(row) if finite(reward) is not None]
        for i, row in enumerate(rewards)
    ]
    best = sorted(
        (max(group, key=lambda case: case[0]) for group in scored if group), key=lambda case: -case[0]
    )[:NUM_EXAMPLES]
    left = [[case for case in group if case not in best] for group in scored]
    worst = sorted(
        (min(group, key=lambda case: case[0]) for group in left if group), key=lambda case: case[0]
    )[:NUM_EXAMPLES]
    none = [(i, row.index(None)) for i, row in enumerate(rewards) if None in row][:NUM_EXAMPLES]
    return {
        "best": [(i, j) for _, i, j in best],
        "worst": [(i, j) for _, i, j in worst],
        "unverifiable": none,
    }


def _case(kind: str, table: pa.Table, row: int, completion: int) -> str:
    group = next(groups.rows(table.slice(row, 1)))

    def of(name: str) -> Any:
        return group[name][completion] if group.get(name) else None

    def cut(value: object) -> str:
        text = str(value)
        return escaped(
            text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} … ({len(text):,} characters)"
        )

    reward = of("rewards")
    by_function = {name: values[completion] for name, values in (group.get("reward_parts") or {}).items()}
    parts = [f"{name} {'null' if part is None else shown(part)}" for name, part in by_function.items()]
    if (oldest := of("version_min")) is not None:
        parts.append(
            f"version {oldest}"
            if oldest == of("version_max")
            else f"versions {oldest} to {of('version_max')}"
        )
    parts += [
        str(value)
        for name in ("sources", "finish_reasons", "reward_reasons")
        if (value := of(name)) is not None
    ]
    head = (
        f"<b>{kind}{'' if reward is None else f': reward {shown(reward)}'}</b> "
        f"<small>{cut(' · '.join(parts))}</small>"
    )
    prompt, written, answer = (
        cut(value) for value in (group["prompt"], group["completions"][completion], group["answer"])
    )
    texts = (
        f'<pre>{prompt}</pre><pre class="completion">{written}</pre><p><small>answer: {answer}</small></p>'
    )
    return f'<article class="case {kind}"><p>{head}</p>{texts}</article>'
