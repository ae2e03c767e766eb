"""A run's groups are kept on disk: the log has all of them, the quarantine the prompts not tried again."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.files import append_line, lock, read_lines, repair_lines, writing


def read_assignments(path: Path) -> dict[int, tuple[int, int]]:
    """Return the rows [begin, end) of each step in an assignments.jsonl, which may be absent."""
    return {entry["step"]: (entry["begin"], entry["end"]) for entry in read_lines(path)}


class GroupLog:
    """The durable log holds a run's groups in order of arrival, and which step trains which of them.

    `NNNNN.arrow` are Arrow IPC streams with one record batch per group; each process writes a new segment,
    because a stream cannot be reopened. `assignments.jsonl` has lines `{"step": s, "begin": a, "end": b}`:
    rows [a, b) of the log are the batch of step s. Only the offset of each row is in memory, so any row can
    be read without those before it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.group_ids: list[int] = []
        self._segments: list[tuple[Path, pa.Schema]] = []
        # Two columns with one entry per row: its segment, and its offset there in bytes.
        self._places = array("q"), array("q")
        for segment in sorted(self.folder.glob("*.arrow")):
            self._scan(segment)
        self._assignments = self.folder / "assignments.jsonl"
        repair_lines(self._assignments)  # a torn last line was never reported to anybody
        self.assigned = read_assignments(self._assignments)
        self._file: Any = None

    def __len__(self) -> int:
        return len(self.group_ids)

    @property
    def end(self) -> int:
        """The first row that is not assigned to a step."""
        return max((end for _, end in self.assigned.values()), default=0)

    def _scan(self, segment: Path) -> None:
        """Find the rows of a segment, up to the last whole one.

        A writer that was killed leaves a torn row, or not even the schema.
        """
        if segment.stat().st_size == 0:
            return
        with pa.memory_map(str(segment)) as source:
            try:
                schema = pa.ipc.read_schema(source)
                self._segments.append((segment, schema))
                while True:
                    begin = source.tell()
                    batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)
                    self._add(begin, batch.column("group_id")[0].as_py())
            except (pa.ArrowInvalid, OSError, EOFError):
                pass

    def _add(self, begin: int, group_id: int) -> None:
        for column, value in zip(self._places, (len(self._segments) - 1, begin), strict=True):
            column.append(value)
        self.group_ids.append(group_id)

    def append(self, group: pa.Table) -> None:
        """Write one group.

        It survives the death of this process at once, and the death of the machine from the next assign() on.
        """
        batch = groups.log_columns(group).combine_chunks().to_batches()[0]
        if self._file is None:
            number = int(max((p.stem for p in self.folder.glob("*.arrow")), default="-1")) + 1
            segment = self.folder / f"{number:05d}.arrow"
            with writing(segment):
                self._file = open(segment, "xb", buffering=0)  # noqa: SIM115 - lives as long as the log
            self._segments.append((segment, groups.SCHEMA))
            self._write(groups.SCHEMA.serialize())
        begin = self._file.tell()
        self._write(batch.serialize())
        self._add(begin, batch.column("group_id")[0].as_py())

    def _write(self, message: pa.Buffer) -> None:
        left = memoryview(message)
        try:
            with writing(self._segments[-1][0]):
                while left:
                    left = left[self._file.write(left) :]
        except OSError:
            # Half a group may be in this segment (disk full), and no row after it could be read.
            self._file = None
            raise

    def assign(self, step: int, begin: int, end: int) -> None:
        """Assign rows [begin, end) to a step, on disk before the return."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        append_line(self._assignments, {"step": step, "begin": begin, "end": end}, sync=True)
        self.assigned[step] = (begin, end)

    def read(self, begin: int, end: int) -> pa.Table:
        """Read rows [begin, end) from disk."""
        return self.rows(range(begin, end))

    def rows(self, indices: Sequence[int]) -> pa.Table:
        """Read these rows from disk, in this order."""
        numbers, begins = self._places
        sources = {
            number: pa.memory_map(str(self._segments[number][0]))
            for number in {numbers[row] for row in indices}
        }
        tables = []
        for row in indices:
            source = sources[numbers[row]]
            source.seek(begins[row])
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), self._segments[numbers[row]][1])
            tables.append(groups.log_columns(pa.Table.from_batches([batch])))
        return pa.concat_tables(tables) if tables else groups.empty(groups.LOG_COLUMNS)

    def close(self) -> None:
        """Close the segment that is being written, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Quarantine:
    """The quarantine lists prompts whose checks all hit a limit: they are sampled once, and never again.

    The file has one JSON object per line, so that a person can read it. The groups of these prompts are in
    the log too, without rewards and with the reasons.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._keys = {prompt_key(entry) for entry in self.entries()}

    def __len__(self) -> int:
        return len(self._keys)

    def entries(self) -> list[dict[str, str]]:
        """Return {"dataset", "prompt", "answer"} of each prompt, in order of arrival."""
        return read_lines(self.path)

    def holds(self, prompt: pa.Table) -> bool:
        """Return whether a prompt (one row of the group table) is in quarantine."""
        return bool(self._keys) and prompt_key_of(prompt) in self._keys

    def add(self, prompt: pa.Table) -> None:
        """Put a prompt (one row of the group table) into quarantine, once."""
        row = next(groups.rows(prompt))
        if prompt_key(row) not in self._keys:
            self._keys.add(prompt_key(row))
            append_line(self.path, {name: row[name] for name in KEY_COLUMNS})


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
        RuntimeError: another process still holds the lock after LOCK_WAIT_S.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return lock(folder / ".lock", LOCK_WAIT_S)
    except BlockingIOError:
        raise RuntimeError(f"another process writes to {folder}") from None
