"""This file writes what must outlive a kill or a power failure: JSON lines, whole files, and file locks.

It also says what is full where a disk is.

No other file of the package knows the name of a file that is still being written, or asks the system for a
lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from gvpo_ray.errors import GvpoError

# ------------------------------------------------------------------------------------------------- full disks


class DiskFull(GvpoError, OSError):
    """A write raises this where its file system, or the user's quota of it, is full; the message names it."""

    def __str__(self) -> str:
        """Return the message alone, without the error's number."""
        return str(self.strerror)


FULL = re.compile(r"No space left on device|Disk quota exceeded|\d+ requested and \d+ written")
"""How libraries say that a disk is full, where they raise no OSError with its number."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the error of a write within this context to a full disk into one that names path and file system.

    Raises:
        DiskFull: there is no room for what is written to `path`.
    """
    try:
        yield
    except Exception as error:  # any library's; all but those that mean a full disk pass through
        number = getattr(error, "errno", None)
        if isinstance(error, DiskFull) or not (
            number in (errno.ENOSPC, errno.EDQUOT) or FULL.search(str(error))
        ):
            raise
        place = path.absolute()
        while not place.exists():
            place = place.parent
        while not os.path.ismount(place):
            place = place.parent
        size, found = shutil.disk_usage(place), os.statvfs(place)
        if number == errno.EDQUOT or "quota" in str(error):
            why = "the quota of this user is used up"
        elif found.f_files and not found.f_favail:
            why = "it has as many files as it can have"
        else:
            why = f"{size.free / 2**20:.0f} of {size.total / 2**20:.0f} MiB are free"
        raise DiskFull(
            number or errno.ENOSPC,
            f"no room for {path} on the file system at {place} ({why}): make room there, and give the same "
            "command again",
        ) from error


def room_in(folder: Path) -> int:
    """Return the bytes that are free in a file system, less what is promised to files without a name.

    Ray's object store is one in /dev/shm: it has its size from the start, and takes room as it is filled.
    Files that only processes of other accounts hold open are not known.
    """
    device = folder.stat().st_dev
    promised: dict[int, int] = {}
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # another account's, or the file is closed at this moment
            if os.readlink(link).endswith(" (deleted)") and (found := os.stat(link)).st_dev == device:
                promised[found.st_ino] = max(0, found.st_size - 512 * found.st_blocks)
    return shutil.disk_usage(folder).free - sum(promised.values())


# ------------------------------------------------------------------------------------------------ JSON lines


def read_lines(path: Path, skip_malformed: bool = False) -> list[Any]:
    """Return the values of a file of JSON lines; a file that is absent has none.

    A last line without its newline is left out: a writer that was killed leaves one.

    Args:
        path: the file.
        skip_malformed: for files that a person may have edited: leave out lines that are not JSON objects,
            and accept a last line without its newline.

    Raises:
        ValueError: a line that has its newline is not JSON.
    """
    *lines, last = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    if not skip_malformed:
        return [json.loads(line) for line in lines]
    values = []
    for line in (*lines, last):
        with contextlib.suppress(ValueError, RecursionError):
            values.append(json.loads(line.decode(errors="replace")))
    return [value for value in values if isinstance(value, dict)]


def append_line(path: Path, value: Any, sync: bool = False) -> None:
    """Append one value as a JSON line, after cutting off a torn last line.

    Args:
        path: the file, made if it is absent.
        value: what is written.
        sync: return only once the line, and the file's name in its folder, are on the disk (fsync).
    """
    append_lines(path, [value], sync)


def append_lines(path: Path, values: Iterable[Any], sync: bool = False) -> None:
    """Append values as JSON lines, after cutting off a torn last line; see append_line."""
    is_new = not path.exists()
    with writing(path), open(path, "ab+") as file:
        _cut_torn_line(file)
        file.write(b"".join(json.dumps(value).encode() + b"\n" for value in values))
        if sync:
            file.flush()
            os.fsync(file.fileno())
    if sync and is_new:
        sync_to_disk(path.parent)


def repair_lines(path: Path) -> None:
    """Cut off a torn last line, if there is one; only a file's sole writer may do that."""
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


# ----------------------------------------------------------------------------------------------- on the disk


def sync_to_disk(path: Path) -> None:
    """Return once a file's content, or the names in a folder, are on the disk (fsync).

    A new file is there after a power failure only if its folder was synced too.
    """
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some file systems cannot sync a folder; they have no more to offer.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP) or not path.is_dir():
            raise
    finally:
        os.close(opened)


def sync_tree(folder: Path) -> None:
    """Return once everything in a folder is on the disk, at any depth."""
    for path in (*folder.rglob("*"), folder):
        sync_to_disk(path)


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are absent, so that they survive a power failure."""
    if not path.is_dir():
        if not path.parent.exists():
            make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_to_disk(path.parent)


# -------------------------------------------------------------------------------------------- whole or absent


def part_of(path: Path, hidden: bool = True) -> Path:
    """Return the path beside `path` under which a file is written until it is whole."""
    return path.with_name(f"{'.' if hidden else ''}{path.name}.part")


@contextlib.contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[Path]:
    """Give a path to write to; the file there replaces `path` when the block ends without error.

    Args:
        path: the file.
        sync: return only once the new file is on the disk. Without it, a power failure may leave it empty.
    """
    part = part_of(path)
    try:
        with writing(path):
            yield part
            if sync:
                sync_to_disk(part)
            part.replace(path)
            if sync:
                sync_to_disk(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_whole(path: Path, text: str, sync: bool = False) -> None:
    """Write a UTF-8 text file atomically: a reader sees the old text or the new one, never a part.

    Args:
        path: the file.
        text: its content.
        sync: see replacing.
    """
    with replacing(path, sync) as part:
        part.write_text(text, encoding="utf-8")


def kept_secret(path: Path, new: str) -> str:
    """Return the text of a file that its owner alone can read; if there is none, it gets `new`."""
    if not path.exists():
        with replacing(path, sync=True) as part:
            part.touch(0o600)
            part.write_text(new, encoding="utf-8")
    return path.read_text(encoding="utf-8")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which becomes `path` when the block ends without error.

    It is on the disk with all its files before it has that name.

    Raises:
        OSError: the folder cannot be made, or `path` exists already.
    """
    part = part_of(path)
    shutil.rmtree(part, ignore_errors=True)  # a process that was killed may have left one
    part.mkdir(parents=True)
    try:
        with writing(path):
            yield part
            sync_tree(part)
            part.rename(path)
            sync_to_disk(path.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


# ------------------------------------------------------------------------------------------------------ locks

LOCK_POLL_S = 0.1
"""Seconds between two attempts to take a lock that another process holds."""


class NoLocks(GvpoError, OSError):
    """The file system has no file locks: NFS without its lock service, or Lustre mounted without `flock`."""


def lock(path: Path, wait_s: float | None = 0.0, shared: bool = False) -> IO[str]:
    """Take the lock of a file and return the open file; closing it releases the lock.

    The file is made if it is absent. The end of the process releases the lock too.

    Args:
        path: the file to lock.
        wait_s: seconds to wait for another process that holds the lock; None: no limit.
        shared: whether others may hold it at the same time, if they take it as shared too.

    Raises:
        BlockingIOError: another process still holds the lock.
        NoLocks: the file system has no locks.
        OSError: the file cannot be written.
    """
    with writing(path):
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - the caller closes it
    deadline = time.monotonic() + (wait_s or 0.0)
    try:
        while True:
            try:
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(file, kind | (0 if wait_s is None else fcntl.LOCK_NB))
                return file
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(LOCK_POLL_S)
            except OSError as error:
                raise NoLocks(
                    error.errno,
                    f"its file system has no file locks (flock: {error.strerror}): mount it with locks, or "
                    "use another file system",
                ) from error
    except BaseException:
        file.close()
        raise


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a file; a file that is absent is not locked.

    Only read access to the file is needed.

    Raises:
        OSError: the file cannot be opened, or its file system has no locks: nobody knows.
    """
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
