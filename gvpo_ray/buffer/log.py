"""What stays of a run's groups: the log with all of them, and the prompts in quarantine."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.files import append_line, lock, read_lines, repair_lines


def read_assignments(path: Path) -> dict[int, tuple[int, int]]:
    """Return the rows [begin, end) of each step in an assignments.jsonl, which may be absent."""
    return {entry["step"]: (entry["begin"], entry["end"]) for entry in read_lines(path)}


class GroupLog:
    """Durable record of a run's groups, in order of arrival, and of which step trains which of them.

    `NNNNN.arrow`: Arrow IPC streams, one record batch per group, a new segment per process (a stream cannot
    be reopened). `assignments.jsonl`: `{"step": s, "begin": a, "end": b}`, rows [a, b) of the log are the
    batch of step s. In memory is where each row begins, so that any row is read without those before it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.group_ids: list[int] = []
        self._segments: list[tuple[Path, pa.Schema]] = []
        # of each row: its segment, and the byte of it at which the row begins
        self._places = array("q"), array("q")
        for segment in sorted(self.folder.glob("*.arrow")):
            self._scan(segment)
        self._assignments = self.folder / "assignments.jsonl"
        repair_lines(self._assignments)  # a torn last line was never answered
        self.assigned = read_assignments(self._assignments)
        self._file: Any = None

    def __len__(self) -> int:
        return len(self.group_ids)

    @property
    def end(self) -> int:
        """First row that no step has been given."""
        return max((end for _, end in self.assigned.values()), default=0)

    def _scan(self, segment: Path) -> None:
        """Find the rows of a segment, up to the last whole one: a killed writer leaves a torn one, or not
        even a head.
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
        """Write one group. It survives the death of this process; of the machine, from the next assign()
        on.
        """
        batch = groups.log_columns(group).combine_chunks().to_batches()[0]
        if self._file is None:
            number = int(max((p.stem for p in self.folder.glob("*.arrow")), default="-1")) + 1
            segment = self.folder / f"{number:05d}.arrow"
            self._file = open(segment, "xb", buffering=0)  # noqa: SIM115 - lives as long as the log
            self._segments.append((segment, groups.SCHEMA))
            self._write(groups.SCHEMA.serialize())
        begin = self._file.tell()
        self._write(batch.serialize())
        self._add(begin, batch.column("group_id")[0].as_py())

    def _write(self, message: pa.Buffer) -> None:
        left = memoryview(message)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            # half a group may be in this segment (disk full): what comes after it could not be read
            self._file = None
            raise

    def assign(self, step: int, begin: int, end: int) -> None:
        """Give rows [begin, end) to a step, on disk before it returns."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        append_line(self._assignments, {"step": step, "begin": begin, "end": end}, sync=True)
        self.assigned[step] = (begin, end)

    def read(self, begin: int, end: int) -> pa.Table:
        """Rows [begin, end) from disk."""
        return self.rows(range(begin, end))

    def rows(self, indices: Sequence[int]) -> pa.Table:
        """These rows from disk, in this order."""
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
        if self._file is not None:
            self._file.close()
            self._file = None


class Quarantine:
    """Prompts on which every check hit its limit: sampled once, and never again. One JSON object per line, so
    that a person can look.

    Their groups are in the log too, without a reward and with the reasons.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._keys = {prompt_key(entry) for entry in self.entries()}

    def __len__(self) -> int:
        return len(self._keys)

    def entries(self) -> list[dict[str, str]]:
        """{"dataset", "prompt", "answer"} of each, in the order in which they came."""
        return read_lines(self.path)

    def holds(self, prompt: pa.Table) -> bool:
        return bool(self._keys) and prompt_key_of(prompt) in self._keys

    def add(self, prompt: pa.Table) -> None:
        row = next(groups.rows(prompt))
        if prompt_key(row) not in self._keys:
            self._keys.add(prompt_key(row))
            append_line(self.path, {name: row[name] for name in KEY_COLUMNS})


KEY_COLUMNS = ("dataset", "prompt", "answer")


def prompt_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY_COLUMNS)


def prompt_key_of(group: pa.Table) -> tuple[str, ...]:
    return prompt_key(next(groups.rows(group.select(list(KEY_COLUMNS)))))


LOCK_WAIT_S = 60.0
"""How long a new buffer waits for the one before it, whose process may still be going down."""


def lock_folder(folder: Path) -> Any:
    """The folder's lock file, held until it is closed or its process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return lock(folder / ".lock", LOCK_WAIT_S)
    except BlockingIOError:
        raise RuntimeError(f"another process writes to {folder}") from None
