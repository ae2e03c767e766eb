"""Group tables as Arrow IPC: in files, and on their way between processes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from gvpo_ray.groups.table import LOGGED_COLUMNS, GroupError, empty, log_columns


def to_wire(groups: pa.Table) -> pa.Buffer:
    """A table on its way between processes, as an Arrow IPC stream. Ray's own pickling takes a nested table
    apart for milliseconds.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, groups.schema) as writer:
        writer.write_table(groups)
    return sink.getvalue()


def from_wire(buffer: pa.Buffer) -> pa.Table:
    """The table again, without a copy of its data."""
    return pa.ipc.open_stream(buffer).read_all()


def save(groups: pa.Table, path: str | Path) -> None:
    """Write one Arrow IPC file."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, groups.schema) as writer:
        writer.write_table(groups)


def load(path: str | Path) -> pa.Table:
    """Read an Arrow IPC file, an IPC stream, or a folder of them (a run's `groups/`), in order of their
    names.

    Raises:
        GroupError: nothing there, or not Arrow, or files with different columns.
    """
    path = Path(path)
    files = sorted(path.glob("*.arrow")) if path.is_dir() else [path]
    if not files or not all(f.is_file() for f in files):
        raise GroupError(f"no Arrow file at {path}")
    batches = [read_batches(file, is_log=path.is_dir()) for file in files]
    tables = [pa.Table.from_batches(of_file) for of_file in batches if of_file]
    if path.is_dir():  # a run that an older version began has no references in its first segments
        tables = [
            log_columns(table) if set(LOGGED_COLUMNS) <= {*table.schema.names} else table for table in tables
        ]
    try:
        return pa.concat_tables(tables) if tables else empty()
    except pa.ArrowInvalid as error:
        raise GroupError(
            f"the files at {path} have different columns: {' '.join(str(error).split())}"
        ) from error


def read_batches(file: Path, is_log: bool = False) -> list[pa.RecordBatch]:
    """The record batches of one IPC file or stream, up to the last whole one.

    A writer that was killed leaves a stream whose tail is not a whole message: what came before it is intact.
    In a log even the head may be missing (killed between creating the segment and writing its schema);
    elsewhere that is an error.
    """
    source = pa.memory_map(str(file)) if file.stat().st_size else pa.BufferReader(b"")
    try:
        reader = pa.ipc.open_file(source)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (pa.ArrowInvalid, OSError):
        source.seek(0)
    try:
        stream = pa.ipc.open_stream(source)
    except (pa.ArrowInvalid, OSError) as error:
        if is_log:
            return []
        raise GroupError(f"{file} is not an Arrow IPC file: {error}") from error
    batches: list[pa.RecordBatch] = []
    try:
        for batch in stream:
            batches.append(batch)
    except (pa.ArrowInvalid, OSError):
        pass
    return batches
