"""A run's groups are kept on disk: the log has all of them, the quarantine the prompts not tried again."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.errors import GvpoError
from gvpo_ray.files import (
    append_line,
    append_lines,
    lock,
    make_folder,
    read_lines,
    repair_lines,
    sync_to_disk,
    writing,
)


class LogError(GvpoError, RuntimeError):
    """A log lacks groups that a step was trained on, or another process writes to it."""

    status = 2


def read_assignments(path: Path) -> dict[int, tuple[int, int]]:
    """Return the rows [begin, end) of each step in an assignments.jsonl, which may be absent."""
    return {entry["step"]: (entry["begin"], entry["end"]) for entry in read_lines(path)}


@dataclass(slots=True)
class _Segment:
    """A segment is one file of the log, which one process wrote."""

    path: Path
    schema: pa.Schema
    first: int
    """Its first row's number in the log."""
    num_indexed: int = 0
    """Rows that are in its index."""
    is_synced: bool = False
    """Whether its name, and all its rows but those that this process writes, are on the disk."""

    @property
    def index(self) -> Path:
        return self.path.with_suffix(".index")


class GroupLog:
    """The durable log holds a run's groups in order of arrival, and which step trains which of them.

    `NNNNN.arrow` are Arrow IPC streams with one record batch per group; each process writes a new segment,
    because a stream cannot be reopened. `assignments.jsonl` has lines `{"step": s, "begin": a, "end": b}`:
    rows [a, b) of the log are the batch of step s. Only the offset of each row is in memory, so any row can
    be read without those before it. `NNNNN.index` has offset and group id (two int64) of a segment's rows up
    to the last assigned one; it saves scanning them, and is made again where it is absent.

    Anybody may read a log, also while it is written: opening it changes nothing. Only the holder of the
    folder's lock may repair it and write to it.

    Raises:
        LogError: rows that are assigned to a step are not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.group_ids: list[int] = []
        self._segments: list[_Segment] = []
        # Two columns with one entry per row: its segment, and its offset there in bytes.
        self._places = array("q"), array("q")
        self._assignments = self.folder / "assignments.jsonl"
        # Before the rows, which are written first: so another process that writes now is never ahead here.
        self.assigned = read_assignments(self._assignments)
        for path in groups.segments(self.folder):
            self._scan(path)
        self._file: Any = None
        if self.end > len(self):
            step = max(self.assigned, key=lambda step: self.assigned[step][1])
            raise LogError(
                f"{self.folder}: step {step} was trained on the groups up to row {self.end}, and only "
                f"{len(self)} are there: groups were lost (by a power failure, or a file was removed)"
            )

    def __len__(self) -> int:
        return len(self.group_ids)

    @property
    def end(self) -> int:
        """The first row that is not assigned to a step."""
        return max((end for _, end in self.assigned.values()), default=0)

    # --- reading --------------------------------------------------------------------------------------------

    def _scan(self, path: Path) -> None:
        """Find the rows of a segment, up to the last whole one.

        A writer that was killed leaves a torn row, or not even the schema.
        """
        if path.stat().st_size == 0:
            return
        with pa.memory_map(str(path)) as source, groups.up_to_a_torn_row(path):
            schema = pa.ipc.read_schema(source)
            self._segments.append(_Segment(path, schema, len(self)))
            self._take_index(source)
            while True:
                begin = source.tell()
                self._add([begin], [_group_id(source, schema)])

    def _take_index(self, source: Any) -> None:
        """Take the rows that the last segment's index has, and go behind them in `source`.

        After a power failure the index may have pages of zeros, or rows that the segment lacks: then it is
        not used.
        """
        segment, first = self._segments[-1], source.tell()
        data = segment.index.read_bytes() if segment.index.is_file() else b""
        entries = array("q", data[: len(data) // 16 * 16])
        begins, group_ids = entries[0::2], entries[1::2]
        if not begins or begins[0] != first or not all(one < other for one, other in pairwise(begins)):
            return
        is_right = False
        with groups.up_to_a_torn_row(segment.path):
            source.seek(begins[-1])
            is_right = _group_id(source, segment.schema) == group_ids[-1]
        if is_right:
            self._add(begins, group_ids)
            segment.num_indexed = len(begins)
        else:
            source.seek(first)

    def _add(self, begins: Sequence[int], group_ids: Sequence[int]) -> None:
        numbers, places = self._places
        numbers.extend([len(self._segments) - 1] * len(begins))
        places.extend(begins)
        self.group_ids.extend(group_ids)

    def read(self, begin: int, end: int) -> pa.Table:
        """Read rows [begin, end) from disk."""
        return self.rows(range(begin, end))

    def rows(self, indices: Sequence[int]) -> pa.Table:
        """Read these rows from disk, in this order."""
        numbers, begins = self._places
        sources = {
            number: pa.memory_map(str(self._segments[number].path))
            for number in {numbers[row] for row in indices}
        }
        tables = []
        for row in indices:
            source = sources[numbers[row]]
            source.seek(begins[row])
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), self._segments[numbers[row]].schema)
            tables.append(groups.log_columns(pa.Table.from_batches([batch])))
        return pa.concat_tables(tables) if tables else groups.empty(groups.LOG_COLUMNS)

    # --- writing --------------------------------------------------------------------------------------------

    def repair(self) -> None:
        """Make an earlier process's log whole: before anything is appended, and by the lock's holder alone.

        The torn last line of the assignments, which nobody was told of, is cut off. The whole lines are put
        on the disk, as their writer may have been killed before that.
        """
        if self._assignments.is_file():
            repair_lines(self._assignments)
            sync_to_disk(self._assignments)
            self._sync(self.end)
            self._write_index(self.end)

    def append(self, group: pa.Table) -> None:
        """Write one group.

        It survives the death of this process at once, and the death of the machine from the next assign() on.
        """
        batch = groups.log_columns(group).combine_chunks().to_batches()[0]
        if self._file is None:
            make_folder(self.folder)
            number = max((int(path.stem) for path in groups.segments(self.folder)), default=-1) + 1
            path = self.folder / f"{number:05d}.arrow"
            with writing(path):
                self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - lives as long as the log
            self._segments.append(_Segment(path, groups.SCHEMA, len(self)))
            self._write(groups.SCHEMA.serialize())
        begin = self._file.tell()
        self._write(batch.serialize())
        self._add([begin], [batch.column("group_id")[0].as_py()])

    def _write(self, message: pa.Buffer) -> None:
        left = memoryview(message)
        try:
            with writing(self._segments[-1].path):
                while left:
                    left = left[self._file.write(left) :]
        except OSError:
            # Half a group may be in this segment (disk full), and no row after it could be read.
            self._file = None
            raise

    def assign(self, step: int, begin: int, end: int) -> None:
        """Assign rows [begin, end) to a step, on disk before the return; see assign_all."""
        self.assign_all({step: (begin, end)})

    def assign_all(self, rows: Mapping[int, tuple[int, int]]) -> None:
        """Assign rows [begin, end) to each of several steps.

        On the return all of them are on the disk, and so are the rows themselves, whichever process wrote
        them.
        """
        end = max((end for _, end in rows.values()), default=0)
        assert end <= len(self), f"row {end} of {len(self)}"
        self._sync(end)
        self._write_index(end)
        lines = [{"step": step, "begin": begin, "end": end} for step, (begin, end) in rows.items()]
        append_lines(self._assignments, lines, sync=True)
        self.assigned.update(rows)

    def _sync(self, end: int) -> None:
        """Put the segments with rows before `end`, and their names, on the disk."""
        is_new = False
        for number, segment in enumerate(self._segments):
            is_written = self._file is not None and number == len(self._segments) - 1
            if segment.first < end and (is_written or not segment.is_synced):
                sync_to_disk(segment.path)
                is_new |= not segment.is_synced
                segment.is_synced = True
        if is_new:
            sync_to_disk(self.folder)

    def _write_index(self, end: int) -> None:
        """Write the rows before `end` that are not in their segment's index yet."""
        last = [*(segment.first for segment in self._segments[1:]), len(self)]
        for segment, after in zip(self._segments, last, strict=True):
            begin, after = segment.first + segment.num_indexed, min(after, end)
            if begin < after:
                places = zip(self._places[1][begin:after], self.group_ids[begin:after], strict=True)
                # In its place, as a writer that was killed may have left half an entry.
                with writing(segment.index):
                    segment.index.touch()
                    with segment.index.open("r+b") as file:
                        file.seek(16 * segment.num_indexed)
                        file.write(array("q", [number for place in places for number in place]).tobytes())
                        file.truncate()
                segment.num_indexed += after - begin

    def close(self) -> None:
        """Close the segment that is being written, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _group_id(source: Any, schema: pa.Schema) -> int:
    """Read the next row of a segment, and return its group's id."""
    batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)
    group_id: int = batch.column("group_id")[0].as_py()
    return group_id


class EndedBy(enum.Enum):
    """An EndedBy says how the checks of a group's completions ended, as far as that speaks of its prompt."""

    NONE = "none"
    WELL = "none, and the environment has brought an episode to a reward"
    CHECKS = "limits of a check"
    LATE = "the time limit of the environment, at all episodes"


class Quarantine:
    """The quarantine lists prompts whose checks all hit a limit: they are not sampled again.

    The file has one JSON object per line, so that a person can read it. The groups of these prompts are in
    the log too, without rewards and with the reasons.

    An environment that does not answer in time may be slow because the machine is busy, or because it is down
    for all prompts. So a prompt whose episodes all ended by that comes in at the second time if episodes of
    others, and none of its own, got rewards in between, and at time MAX_LATE without one in any case. A run
    that is taken up counts on: what it counts by is in a file of its own, LATE_FILE beside `path`.

    Args:
        path: the file.
        verifiers: has the limits of a check. A prompt that was put in under a lower one is released.
        environment_s: the time limit of the environment's calls, in seconds; the same holds of it.
    """

    def __init__(
        self,
        path: str | Path,
        verifiers: VerifiersConfig | None = None,
        environment_s: float | None = None,
    ) -> None:
        self.path = Path(path)
        self._of_checks = {name: getattr(verifiers, name) for name in LIMITS} if verifiers else {}
        self._of_environment = {} if environment_s is None else {ENVIRONMENT_LIMIT: environment_s}
        self._limits = self._of_checks | self._of_environment
        self._num_well = 0
        self._late: dict[tuple[str, ...], tuple[int, int]] = {}  # times, and _num_well at the first
        self._late_path = self.path.with_name(LATE_FILE)
        for entry in read_lines(self._late_path):
            if not self._releases(entry):
                self._count(prompt_key(entry), entry["late"])
        self._keys = {prompt_key(entry) for entry in self.entries()}
        self._num_covered: dict[str | None, int] = {}  # of each table's prompts, from the first on

    def __len__(self) -> int:
        return len(self._keys)

    def entries(self) -> list[dict[str, Any]]:
        """Return the file's entry of each prompt that is not released, in order of arrival."""
        by_key = {prompt_key(entry): entry for entry in read_lines(self.path)}
        return [entry for entry in by_key.values() if not self._releases(entry)]

    def _releases(self, entry: Mapping[str, Any]) -> bool:
        limits = entry.get("limits", {})
        return any(self._limits.get(name, value) > value for name, value in limits.items())

    def holds(self, prompt: pa.Table) -> bool:
        """Return whether a prompt (one row of the group table) is in quarantine."""
        return bool(self._keys) and prompt_key_of(prompt) in self._keys

    def judge(self, prompt: pa.Table, ended_by: EndedBy) -> bool:
        """Put a prompt (one row of the group table) in if its group's end is its fault; return whether it is.

        Args:
            prompt: of the group.
            ended_by: how its checks ended.
        """
        if ended_by is EndedBy.NONE:
            return False
        if ended_by is not EndedBy.CHECKS:
            key, is_late = prompt_key_of(prompt), ended_by is EndedBy.LATE
            is_first = any(before == self._num_well for _, before in self._late.values())
            if is_late or is_first or key in self._late:
                known = dict(zip(KEY_COLUMNS, key, strict=True))
                append_line(self._late_path, {**known, "late": is_late, "limits": self._of_environment})
            if not self._count(key, is_late):
                return False
        self.add(prompt, self._of_environment if ended_by is EndedBy.LATE else self._of_checks)
        return True

    def _count(self, key: tuple[str, ...], is_late: bool) -> bool:
        """Count a group that ended late or well; return whether it was late, and its prompt is at fault."""
        if not is_late:
            self._num_well += 1
            self._late.pop(key, None)
            return False
        times, before = self._late.get(key, (0, self._num_well))
        self._late[key] = times + 1, before
        return bool(times and self._num_well > before) or times + 1 >= MAX_LATE

    def add(self, prompt: pa.Table, limits: Mapping[str, Any] | None = None) -> None:
        """Put a prompt (one row of the group table) into quarantine, once; the limits are a check's."""
        row = next(groups.rows(prompt))
        if prompt_key(row) not in self._keys:
            self._keys.add(prompt_key(row))
            known = {name: row[name] for name in KEY_COLUMNS}
            append_line(self.path, {**known, "limits": self._of_checks if limits is None else limits})

    def what_ends(self) -> str:
        """Return which limits the prompts have hit, for a message."""
        hit = {name for entry in self.entries() for name in entry.get("limits", {})}
        if hit == {ENVIRONMENT_LIMIT}:
            return f"no environment answers within {ENVIRONMENT_LIMIT}; a higher one releases the prompts"
        return (
            f"no check ends within the limits of the verifiers section ({', '.join(LIMITS)}); higher ones "
            "release the prompts"
        )

    def holds_all(self, prompts: pa.Table, of: str | None = None) -> bool:
        """Return whether every row of a table is in quarantine; `of` stands for the same table in each call.

        A row that was found there is not looked at again, so all calls together look at each row once.
        """
        covered = self._num_covered.get(of, 0)
        while covered < len(prompts) and self.holds(prompts.slice(covered, 1)):
            covered += 1
        self._num_covered[of] = covered
        return covered == len(prompts)


LIMITS = ("timeout_s", "cpu_s", "memory_gib")
"""Keys of the section `verifiers` that are limits of one check."""

ENVIRONMENT_LIMIT = "environment.timeout_s"
"""Key of the time limit of an environment's calls."""

LATE_FILE = "late.jsonl"
"""A run directory's file of groups that the environment's time limit ended, and of what went well after."""

MAX_LATE = 3
"""Times that all episodes of a prompt may end by it before the prompt is in quarantine in any case."""

KEY_COLUMNS = ("dataset", "prompt", "answer")
"""Columns that identify a prompt across groups."""


def prompt_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what identifies a prompt across groups: its values of KEY_COLUMNS."""
    return tuple(row[name] for name in KEY_COLUMNS)


def prompt_key_of(group: pa.Table) -> tuple[str, ...]:
    """Return prompt_key of a one-row group."""
    return prompt_key(next(groups.rows(group.select(list(KEY_COLUMNS)))))


LOCK_WAIT_S = 60.0
"""Seconds that a new buffer waits for the lock of the one before it, whose process may still be ending."""


def lock_folder(folder: Path) -> Any:
    """Return the folder's lock file, which is held until it is closed or its process ends.

    Raises:
        LogError: another process still holds the lock after LOCK_WAIT_S.
    """
    make_folder(folder)
    try:
        return lock(folder / ".lock", LOCK_WAIT_S)
    except BlockingIOError:
        raise LogError(f"another process writes to {folder}") from None
