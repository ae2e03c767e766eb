"""Replay decides which logged completions of a prompt a later group of that prompt begins with."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, insort
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
    versions: array[int]
    """version_max of each completion; -1: it may not be replayed."""
    version: int | None = None
    """Version of the reference's weights."""
    references: array[float] | None = None

    def newest(self) -> tuple[int, int]:
        """Return the newest version, and the row, by which later rows of the same version are newer."""
        return max(self.versions), self.row


class ReplayIndex:
    """The index knows which completions of a prompt may be replayed, and how new they are.

    The completions themselves are read from the log, and only those that are picked.

    Args:
        log: the run's log.
        replay: how many versions back completions are replayed (`window`).
        version: current version of the weights.
    """

    def __init__(self, log: GroupLog, replay: ReplayConfig, version: int) -> None:
        self._log, self._replay = log, replay
        self._rows: dict[int, _Logged] = {}  # by group id, in order of arrival
        self._by_prompt: dict[int, list[_Logged]] = {}  # by the hash of the prompt's key, the newest last
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
        prompts, versions = groups.rows(logged.select(["group_id", *KEY_COLUMNS])), groups.replayable(logged)
        for row, (prompt, of_row) in enumerate(zip(prompts, versions, strict=True), begin):
            if any(version is not None for version in of_row):
                newest = array("q", [-1 if version is None else version for version in of_row])
                entry = _Logged(row, hash(prompt_key(prompt)), newest)
                self._rows[prompt["group_id"]] = entry
                insort(self._by_prompt.setdefault(entry.key, []), entry, key=_Logged.newest)

    def forget(self, version: int) -> None:
        """Drop the rows that have left the window of `version`."""
        first = self._first_row(version)
        for group_id in list(takewhile(lambda group_id: self._rows[group_id].row < first, self._rows)):
            entry = self._rows.pop(group_id)
            entries = self._by_prompt[entry.key]
            del entries[bisect_left(entries, entry.newest(), key=_Logged.newest)]
            if not entries:
                del self._by_prompt[entry.key]

    def report_references(self, version: int, references: Mapping[int, list[float | None]]) -> None:
        """Record references of completions; see GroupBuffer.report_references."""
        for group_id, values in references.items():
            if (entry := self._rows.get(group_id)) is not None:
                entry.version, entry.references = version, _packed(values)

    def pick(self, prompt: pa.Table, num: int, version: int) -> pa.Table:
        """Return the newest replayable completions of a prompt; see GroupBuffer.history."""
        key, oldest = prompt_key_of(prompt), version - self._replay.window if self._replay.window else 0
        entries = self._by_prompt.get(hash(key), [])
        while True:
            places = _newest(entries, num, max(0, oldest))
            rows = list(dict.fromkeys(entry.row for entry, _ in places))
            logged = self._log.rows(rows)
            by_row = {row: logged.slice(i, 1) for i, row in enumerate(rows)}
            wrong = {row for row, group in by_row.items() if prompt_key_of(group) != key}
            if not wrong:
                return replayed(prompt, [_Candidate(i, entry, by_row[entry.row]) for entry, i in places])
            # Another prompt's, with the same hash.
            entries = [entry for entry in entries if entry.row not in wrong]


def _newest(entries: Sequence[_Logged], num: int, oldest: int) -> list[tuple[_Logged, int]]:
    """Return entry and index of the `num` newest completions, the newest first.

    Of one version, those of later rows come first, and within a row those before others. No entry is looked
    at that is older than all of them.

    Args:
        entries: the newest last.
        num: most completions.
        oldest: their lowest version.
    """
    found: list[tuple[int, int, int, _Logged]] = []
    for entry in reversed(entries):
        newest, row = entry.newest()
        if (
            num < 1
            or newest < oldest
            or (len(found) == num and (newest, row) < (-found[-1][0], -found[-1][1]))
        ):
            break
        found += [(-version, -row, i, entry) for i, version in enumerate(entry.versions) if version >= oldest]
        found = sorted(found, key=lambda place: place[:3])[:num]
    return [(entry, i) for _, _, i, entry in found]


@dataclass(slots=True)
class _Candidate:
    """A candidate is one completion that is replayed, by its index in a group."""

    index: int
    entry: _Logged
    group: pa.Table


def replayed(prompt: pa.Table, picked: Sequence[_Candidate]) -> pa.Table:
    """Return the picked completions as one group of the prompt, with the columns of the log.

    Their source is "replay". A reference that neither the log has nor the learner reported is null.
    """
    if not picked:
        return groups.log_columns(
            groups.with_columns(groups.join(prompt), rewards=[[]], reward_parts=[{}], reward_reasons=[[]])
        )
    group = groups.join(prompt, *(groups.take(candidate.group, [candidate.index]) for candidate in picked))
    references = [_reference_of(candidate) for candidate in picked]
    known = any(not math.isnan(value) for _, value in references)
    return groups.log_columns(
        groups.with_columns(
            group,
            sources=[["replay"] * len(picked)],
            reference_logprobs=[
                [None if math.isnan(value) else value for _, value in references] if known else None
            ],
            reference_versions=[
                [None if math.isnan(value) else version for version, value in references] if known else None
            ],
        )
    )


def _reference_of(candidate: _Candidate) -> tuple[int | None, float]:
    """Return version and log-prob of a completion's reference; nan: not known.

    The log has those by another model, and what the learner reported of the run's own is in the index.
    """
    if candidate.entry.references is not None:
        return candidate.entry.version, _at(candidate.entry.references, candidate.index)
    columns = (candidate.group[name][0].as_py() for name in groups.REFERENCE_COLUMNS)
    logprob, version = ((values or {candidate.index: None})[candidate.index] for values in columns)
    return (None, math.nan) if logprob is None else (version, logprob)


def _packed(values: Sequence[float | None]) -> array[float]:
    """Pack references into an array of doubles; nan: not trained on."""
    return array("d", [math.nan if value is None else value for value in values])


def _at(values: array[float] | None, index: int) -> float:
    """Return one packed reference; nan: not known, or not trained on."""
    return math.nan if values is None else values[index]
