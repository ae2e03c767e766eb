"""Group tables are stored and sent between processes as Arrow IPC."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from gvpo_ray.files import writing
from gvpo_ray.groups.table import LOGGED_COLUMNS, GroupError, empty, log_columns


def to_wire(groups: pa.Table) -> pa.Buffer:
    """Serialise a table as an Arrow IPC stream, to send it to another process.

    Ray's own pickling of a nested table takes milliseconds.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, groups.schema) as writer:
        writer.write_table(groups)
    return sink.getvalue()


def from_wire(buffer: pa.Buffer) -> pa.Table:
    """Read a table that to_wire serialised, without copying its data."""
    return pa.ipc.open_stream(buffer).read_all()


def save(groups: pa.Table, path: str | Path) -> None:
    """Write a table to one Arrow IPC file."""
    with (
        writing(Path(path)),
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, groups.schema) as writer,
    ):
        writer.write_table(groups)


def segments(folder: Path) -> list[Path]:
    """Return the segments of a log's folder (NNNNN.arrow) in their order; other files there are not its."""
    return sorted(
        (path for path in folder.glob("*.arrow") if re.fullmatch(r"[0-9]+", path.stem)),
        key=lambda path: int(path.stem),
    )


def evaluations(run_dir: Path) -> dict[str, list[tuple[int, Path]]]:
    """Return step and file of a run's evaluations, in order, by the name of their set.

    Other files in the folder, such as copies of these, are a person's.
    """
    found: dict[str, list[tuple[int, Path]]] = {}
    for file in (run_dir / "evaluations").glob("*-step-*.arrow"):
        name, _, step = file.stem.rpartition("-step-")
        if step.isdecimal():
            found.setdefault(name, []).append((int(step), file))
    return {name: sorted(files) for name, files in sorted(found.items())}


def load(path: str | Path) -> pa.Table:
    """Read an Arrow IPC file or stream, or the segments of a log (a run's `groups/`).

    Raises:
        GroupError: there is no such file, it is not Arrow, or the files have different columns.
    """
    path = Path(path)
    files = segments(path) if path.is_dir() else [path]
    if not files or not all(f.is_file() for f in files):
        raise GroupError(f"no Arrow file at {path}")
    batches = [read_batches(file, is_log=path.is_dir()) for file in files]
    tables = [pa.Table.from_batches(of_file) for of_file in batches if of_file]
    if path.is_dir():  # a run begun by an older version has no references in its first segments
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
    """Return the record batches of one IPC file or stream, up to the last whole one.

    A writer that was killed leaves a stream whose tail is not a whole message; what comes before it is
    intact. In a log (`is_log`) even the schema may be missing, if the writer was killed between creating the
    segment and writing it; in other files that is an error.

    Raises:
        GroupError: the file is not Arrow IPC.
        OSError: the file cannot be read; the error names it.
    """
    source = pa.memory_map(str(file)) if file.stat().st_size else pa.BufferReader(b"")
    batches: list[pa.RecordBatch] = []
    with up_to_a_torn_row(file):
        reader = pa.ipc.open_file(source)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    source.seek(0)
    is_stream = False
    with up_to_a_torn_row(file):
        stream = pa.ipc.open_stream(source)
        is_stream = True
        for batch in stream:
            batches.append(batch)
    if not is_stream and not is_log:
        raise GroupError(f"{file} is not an Arrow IPC file")
    return batches


@contextlib.contextmanager
def up_to_a_torn_row(file: Path) -> Iterator[None]:
    """End this block at a row that is not whole, which Arrow calls invalid, or an OSError without a number.

    Raises:
        OSError: the system's, which has a number: the file cannot be read, and there may be more rows. The
            error names the file.
    """
    try:
        yield
    except (pa.ArrowInvalid, EOFError):
        pass
    except OSError as error:
        if error.errno is not None:
            raise OSError(error.errno, error.strerror, str(file)) from error
