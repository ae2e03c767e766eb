"""A report shows the best and the worst completions of evaluations and of the training, chosen here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.observe.report.conversation import Decode, Turn, decoder_of, share_trained, turns_of
from gvpo_ray.observe.report.figures import finite, shown
from gvpo_ray.observe.report.reading import Run

MAX_CHARACTERS = 4000
"""Length to which each text is cut."""
MAX_TURNS = 64
"""Number of turns of a completion that are shown."""
MAX_EVALUATIONS = 12
"""Number of evaluations of a set whose completions are shown."""
NUM_EXAMPLES = 3
"""Number of completions of each kind under one heading."""
NUM_TRAINED = 64
"""Number of the newest trained groups, from which the examples of the training are taken."""

COLUMNS = ("prompt", "answer", "completions", "rewards")
DETAILS = (
    "reward_parts",
    "reward_reasons",
    "finish_reasons",
    "sources",
    "version_min",
    "version_max",
    "completion_ids",
    "trained_tokens",
)


@dataclass(frozen=True)
class Case:
    """A Case is one completion with what is known of it; its texts are cut to MAX_CHARACTERS."""

    kind: str
    """One of best, worst and unverifiable."""
    reward: str
    details: str
    prompt: str
    completion: str
    answer: str
    turns: list[Turn] = field(default_factory=list)
    """The completion as a conversation, where its environment wrote a part of it; else []."""


@dataclass(frozen=True)
class Examples:
    """Examples are completions under one heading."""

    title: str
    cases: list[list[Case]] = field(default_factory=list)
    """Completions of each kind."""
    note: str = ""
    """Reason why there are no cases."""
    is_open: bool = False


def completions_of(run: Run) -> tuple[list[Examples], list[str]]:
    """Choose examples of the held-out sets' evaluations and of the newest trained groups.

    Returns them, the newest evaluation of each set open, and notes on evaluations that were left out.
    """
    examples, notes, decode = [], [], decoder_of(run)
    for name, files in groups.evaluations(run.path).items():
        files.reverse()
        num = min(MAX_EVALUATIONS, len(files))  # spread over the run, the first and the last among them
        picked = [files[i * (len(files) - 1) // max(1, num - 1)] for i in range(num)]
        for step, file in picked:
            is_open = step == picked[0][0]
            examples.append(_examples(f"{name}, step {step}", file, decode, is_open=is_open))
        if num < len(files):
            notes.append(f"{num} of the {len(files)} evaluations of {name}.")
    if logs := groups.segments(run.path / "groups")[-1:]:
        title = f"the newest {NUM_TRAINED} groups of the training"
        examples.append(_examples(title, logs[0], decode, newest=NUM_TRAINED))
    return examples, notes


def _examples(
    title: str, file: Path, decode: Decode | None, newest: int | None = None, is_open: bool = False
) -> Examples:
    try:
        batches = groups.read_batches(file, is_log=newest is not None)
        table = pa.Table.from_batches(batches[-newest:] if newest else batches) if batches else groups.empty()
        table = table.slice(max(0, len(table) - newest)) if newest else table
        names = [name for name in (*COLUMNS, *DETAILS) if name in table.schema.names]
        tokens = [name for name in names if name == "completion_ids"]
        table = groups.validate(table.select(names), [*COLUMNS, *tokens])
    except groups.GroupError as error:  # its writer was killed, or still writes
        return Examples(title, note=str(error), is_open=is_open)
    found = _extremes(table["rewards"].to_pylist())
    cases = [
        [_case(kind, table, i, j, decode) for i, j in places] for kind, places in found.items() if places
    ]
    return Examples(title, cases, "" if cases else "No completion has a reward.", is_open)


def _extremes(rewards: Sequence[Sequence[Any]]) -> dict[str, list[tuple[int, int]]]:
    """Return (prompt, completion) of the best, the worst and some without a reward.

    Each kind has at most one per prompt; no completion is in two kinds.
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


def _case(kind: str, table: pa.Table, row: int, completion: int, decode: Decode | None) -> Case:
    group = next(groups.rows(table.slice(row, 1)))

    def of(name: str) -> Any:
        return group[name][completion] if group.get(name) else None

    def cut(value: object) -> str:
        text = str(value)
        return (
            text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} … ({len(text):,} characters)"
        )

    reward = of("rewards")
    by_function = {name: values[completion] for name, values in (group.get("reward_parts") or {}).items()}
    details = [f"{name} {'null' if part is None else shown(part)}" for name, part in by_function.items()]
    if (oldest := of("version_min")) is not None:
        is_one = oldest == of("version_max")
        details.append(f"version {oldest}" if is_one else f"versions {oldest} to {of('version_max')}")
    mask = of("trained_tokens")
    details += [trained] if (trained := share_trained(mask)) else []
    names = ("sources", "finish_reasons", "reward_reasons")
    details += [str(value) for name in names if (value := of(name)) is not None]
    return Case(
        kind,
        "" if reward is None else shown(reward),
        cut(" · ".join(details)),
        cut(group["prompt"]),
        cut(group["completions"][completion]),
        cut(group["answer"]),
        [
            replace(turn, text=cut(turn.text))
            for turn in turns_of(of("completion_ids") or [], mask, decode)[:MAX_TURNS]
        ],
    )
