"""Files that outlive a kill: JSON lines, files and folders that are whole or absent, locks among processes.

No other file of the package knows how a file under way is called, or asks the system for a lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

# ------------------------------------------------------------------------------------------------ JSON lines


def read_lines(path: Path, skip_malformed: bool = False) -> list[Any]:
    """Return the values of a file of JSON lines; a file that is absent has none.

    A last line without its end is left out: a writer that was killed leaves one.

    Args:
        skip_malformed: leave out what is not a JSON object, too, and take a last line that lacks only its
            end: for files that a person may have edited.

    Raises:
        ValueError: a line that has its end is not JSON.
    """
    *lines, last = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    if not skip_malformed:
        return [json.loads(line) for line in lines]
    values = []
    for line in (*lines, last):
        with contextlib.suppress(ValueError):
            values.append(json.loads(line.decode(errors="replace")))
    return [value for value in values if isinstance(value, dict)]


def append_line(path: Path, value: Any, sync: bool = False) -> None:
    """Write one more JSON line, in the place of a torn last one. `sync`: it is on the disk on return."""
    with open(path, "ab+") as file:
        _cut_torn_line(file)
        file.write(json.dumps(value).encode() + b"\n")
        if sync:
            file.flush()
            os.fsync(file.fileno())


def repair_lines(path: Path) -> None:
    """Cut off a torn last line, if there is one."""
    if path.is_file():
        with path.open("rb+") as file:
            _cut_torn_line(file)


def _cut_torn_line(file: IO[bytes]) -> None:
    if size := file.seek(0, os.SEEK_END):
        file.seek(size - 1)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)


# -------------------------------------------------------------------------------------------- whole or absent


def part_of(path: Path, hidden: bool = True) -> Path:
    """Return the path beside `path` under which it is written until it is whole."""
    return path.with_name(f"{'.' if hidden else ''}{path.name}.part")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of the file `path` when the block ends without error."""
    part = part_of(path)
    try:
        yield part
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, that a reader sees as it was or as it is now, and never half of it."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which becomes `path` when the block ends without error.

    Raises:
        OSError: it cannot be made, or `path` is there already.
    """
    part = part_of(path)
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


# ------------------------------------------------------------------------------------------------------ locks

LOCK_POLL_S = 0.1
"""How often a lock that another process holds is tried again."""


def lock(path: Path, wait_s: float | None = 0.0) -> IO[str]:
    """Take the lock of a file, which is made if it is absent. Close what is returned to give the lock back;
    the end of the process does it, too.

    Args:
        wait_s: how long to wait for another process that holds it; None: for ever.

    Raises:
        BlockingIOError: another process still holds it.
        OSError: the file cannot be written.
    """
    file = open(path, "a")  # noqa: SIM115 - the caller closes it
    deadline = time.monotonic() + (wait_s or 0.0)
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait_s is None else fcntl.LOCK_NB))
                return file
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(LOCK_POLL_S)
    except BaseException:
        file.close()
        raise


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file. Needs to read it only; a file that is absent is not
    locked.
    """
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
