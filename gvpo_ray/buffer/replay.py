"""Replay decides which logged completions of a prompt a later group of that prompt begins with."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.buffer.log import KEY_COLUMNS, GroupLog, prompt_key, prompt_key_of
from gvpo_ray.config.data import ReplayConfig


@dataclass(slots=True)
class _Logged:
    """An entry of the index is one row of the log, with the references that the learner reported last."""

    row: int
    key: int
    version: int | None = None  # the version of the reference's weights
    references: array[float] | None = None


class ReplayIndex:
    """The index knows which rows of the log have completions of a prompt that may be replayed.

    The completions themselves are read from the log.

    Args:
        log: the run's log.
        replay: how many versions back completions are replayed (`window`).
        version: current version of the weights.
    """

    def __init__(self, log: GroupLog, replay: ReplayConfig, version: int) -> None:
        self._log, self._replay = log, replay
        self._rows: dict[int, _Logged] = {}  # by group id, in order of arrival
        self._by_prompt: dict[int, list[int]] = {}  # hash of the prompt's key -> group ids
        for begin in range(self._first_row(version), len(log), 1000):
            self.add(begin, log.read(begin, min(begin + 1000, len(log))))

    def _first_row(self, version: int) -> int:
        """Return the first row that may be in the window of `version`.

        The rows of step s were written before version s existed, so the rows of all steps up to version -
        window are too old.
        """
        return self._log.assigned.get(version - self._replay.window, (0, 0))[1] if self._replay.window else 0

    def add(self, begin: int, logged: pa.Table) -> None:
        """Index the rows `logged` of the log, which start at row `begin`."""
        for row, prompt in enumerate(groups.rows(logged.select(["group_id", *KEY_COLUMNS])), begin):
            key = hash(prompt_key(prompt))
            self._rows[prompt["group_id"]] = _Logged(row, key)
            self._by_prompt.setdefault(key, []).append(prompt["group_id"])

    def forget(self, version: int) -> None:
        """Drop the rows that have left the window of `version`."""
        first = self._first_row(version)
        for group_id in list(takewhile(lambda group_id: self._rows[group_id].row < first, self._rows)):
            key = self._rows.pop(group_id).key
            self._by_prompt[key].remove(group_id)
            if not self._by_prompt[key]:
                del self._by_prompt[key]

    def report_references(self, version: int, references: Mapping[int, list[float | None]]) -> None:
        """Record references of completions; see GroupBuffer.report_references."""
        for group_id, values in references.items():
            if (entry := self._rows.get(group_id)) is not None:
                entry.version, entry.references = version, _packed(values)

    def pick(self, prompt: pa.Table, num: int, version: int) -> pa.Table:
        """Return the newest replayable completions of a prompt; see GroupBuffer.history."""
        key, oldest = prompt_key_of(prompt), version - self._replay.window if self._replay.window else 0
        entries = [self._rows[group_id] for group_id in self._by_prompt.get(hash(key), ())]
        logged = self._log.rows([entry.row for entry in entries])
        pairs = [(entry, logged.slice(i, 1)) for i, entry in enumerate(entries)]
        candidates = [
            _Candidate(newest, i, entry, group)
            for entry, group in pairs
            if prompt_key_of(group) == key  # not another prompt with the same hash
            for i, newest in groups.replayable(group).items()
            if newest >= oldest
        ]
        candidates.sort(key=_Candidate.newest_first)
        return replayed(prompt, candidates[:num])


@dataclass(slots=True)
class _Candidate:
    """A candidate is one completion that may be replayed; `newest` is its version_max."""

    newest: int
    index: int
    entry: _Logged
    group: pa.Table

    def newest_first(self) -> tuple[int, int, int]:
        """Return the sort key that puts the newest completions first."""
        return -self.newest, -self.entry.row, self.index


def replayed(prompt: pa.Table, picked: Sequence[_Candidate]) -> pa.Table:
    """Return the picked completions as one group of the prompt, with the columns of the log.

    Their source is "replay". A reference that the learner did not report is null.
    """
    if not picked:
        return groups.log_columns(
            groups.with_columns(groups.join(prompt), rewards=[[]], reward_parts=[{}], reward_reasons=[[]])
        )
    group = groups.join(prompt, *(groups.take(candidate.group, [candidate.index]) for candidate in picked))
    told = [
        (candidate.entry.version, _at(candidate.entry.references, candidate.index)) for candidate in picked
    ]
    known = any(not math.isnan(value) for _, value in told)
    return groups.log_columns(
        groups.with_columns(
            group,
            sources=[["replay"] * len(picked)],
            reference_logprobs=[
                [None if math.isnan(value) else value for _, value in told] if known else None
            ],
            reference_versions=[
                [None if math.isnan(value) else version for version, value in told] if known else None
            ],
        )
    )


def _packed(values: Sequence[float | None]) -> array[float]:
    """Pack references into an array of doubles; nan: not trained on."""
    return array("d", [math.nan if value is None else value for value in values])


def _at(values: array[float] | None, index: int) -> float:
    """Return one packed reference; nan: not known, or not trained on."""
    return math.nan if values is None else values[index]
