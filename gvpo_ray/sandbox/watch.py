"""A guest is watched from outside: the kernel says how long it waits and what it holds.

Between two looks a program can start more threads, and write more, than its limits say. Then the next look
ends it, and what it wrote counts as well when it has ended.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

LOOK_S = 0.05
"""Seconds between two looks at a guest, whether or not it answers in between."""

MAX_THREADS = 64
"""Number of threads that a program may have."""

MAX_WRITTEN_BYTES = 64 << 20
"""How much a program may write, in all."""

MAX_FILES = 1000
"""Number of files and folders that a program may have in its scratch folder."""

_FREE_SLEEPS = 20
"""How often a program may go to sleep, beside once for each answer: some reads are of a disk."""

PROC = Path("/proc")

FileId = tuple[int, int]
"""Device and inode of a file."""


def excess(pid: int, scratch: Path, num_bytes: int, others: Container[FileId] = ()) -> str | None:
    """Return which limit a guest is beyond; None: none.

    Args:
        pid: the guest.
        scratch: its scratch folder.
        num_bytes: how much it may write.
        others: files in no folder that it has open and that are not its own.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        if int(_stat(f"{PROC}/{pid}")[17]) > MAX_THREADS:
            return f"it had more than {MAX_THREADS} threads"
    num_written = 0
    with contextlib.suppress(OSError, ValueError):
        lines = _read(f"{PROC}/{pid}/io").splitlines()
        said = {name: int(value) for name, _, value in (line.partition(b":") for line in lines)}
        # by system calls, and by memory that is a file's on a disk
        num_written = max(said.get(b"wchar", 0), said.get(b"write_bytes", 0))
    # where files are in memory (tmpfs), no account has what is mapped
    num_held = sum(size for file, size in unlinked(pid).items() if file not in others)
    for number, num_bytes_held in enumerate(_files(scratch), 1):
        num_held += num_bytes_held
        if number > MAX_FILES:
            return f"it made more than {MAX_FILES} files"
    if max(num_written, num_held) > num_bytes:
        return f"it wrote more than {MAX_WRITTEN_BYTES >> 20} MiB"
    return None


def _files(folder: Path) -> Iterator[int]:
    """Yield the bytes of each file and folder in a folder, without end where a path is too long to follow."""
    left = [str(folder)]
    while left:
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # it has just gone, and others have not
                        is_folder = entry.is_dir(follow_symlinks=False)
                        yield 0 if is_folder else _num_bytes(entry.stat(follow_symlinks=False))
                        if is_folder:
                            left.append(entry.path)
        except OSError as error:  # it may be gone, or closed to everybody
            while error.errno == errno.ENAMETOOLONG:
                yield 0


def unlinked(pid: int) -> dict[FileId, int]:
    """Return the files that a process has open, and that are in no folder, with their bytes."""
    found: dict[FileId, int] = {}
    folder = f"{PROC}/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            try:
                status = os.stat(f"{folder}/{name}")
            except OSError:  # it was closed
                continue
            if not status.st_nlink and stat.S_ISREG(status.st_mode):
                found[status.st_dev, status.st_ino] = _num_bytes(status)
    return found


def _num_bytes(status: os.stat_result) -> int:
    """Return how much of a file is really there: holes are not, nor is what fills up its last block."""
    return min(status.st_size, 512 * status.st_blocks)


class Times(NamedTuple):
    """A Times is a guest's at one moment, in seconds."""

    ran: float
    """CPU time of its first thread."""
    waited: float
    """Time for which its first thread could have run, and waited for a processor."""
    others: float
    """CPU time of its other threads."""


def times(pid: int, cpu_s: float) -> Times | None:
    """Return the times of a guest that has used so much CPU time; None: unknown."""
    try:
        ran, waited = _schedule(f"{PROC}/{pid}")
    except (OSError, ValueError):
        return None
    return Times(ran, waited, cpu_s - ran)


def own_wait() -> float | None:
    """Return for how long this thread has waited for a processor; None: unknown."""
    try:
        return _schedule(f"{PROC}/thread-self")[1]
    except (OSError, ValueError):
        return None


def waited(pid: int, before: Times, cpu_s: float, num_answers: int) -> float | None:
    """Return for how long a guest has waited for a processor because others had it; None: unknown.

    That is the longest wait of a thread. Time for which other threads of the guest ran is none of it, since
    they may have kept this one from a processor. Nor is a wait after a sleep: a program that sleeps and wakes
    a thousand times a second waits nearly always on a busy machine, and never runs.

    Args:
        pid: the guest.
        before: its times at the beginning.
        cpu_s: the CPU time that it has used.
        num_answers: the number of its answers, each of which ends in sleep.
    """
    longest = None
    try:
        tasks = list((PROC / str(pid) / "task").iterdir())
    except OSError:
        return None
    for task in tasks:
        is_first = task.name == str(pid)
        _, waited_before, others_before = before if is_first else Times(0.0, 0.0, 0.0)
        try:
            ran, wait = _schedule(str(task))
            status = (task / "status").read_text(encoding="utf-8", errors="replace")
            sleeps, preemptions = (
                int(status.rpartition(f"\n{name}:")[2].split()[0])
                for name in ("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
            )
        except (OSError, ValueError, IndexError):
            continue
        sleeps = max(0, sleeps - _FREE_SLEEPS - (num_answers if is_first else 0))
        share = preemptions / (preemptions + sleeps) if sleeps else 1.0
        others = max(0.0, cpu_s - ran - others_before)
        longest = max(longest or 0.0, (wait - waited_before) * share - others)
    return longest


def is_ending(pid: int) -> bool:
    """Return whether all threads of a process are at their end, as the kernel says it; True: unknown.

    A process that is not has closed its end of the channel.
    """
    exiting = 0x4  # PF_EXITING, which is set before a process's descriptors are closed
    try:
        for task in (PROC / str(pid) / "task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if not int(_stat(str(task))[6]) & exiting:
                    return False
    except (OSError, ValueError, IndexError):
        pass
    return True


def _stat(task: str) -> list[bytes]:
    """Return the fields of a process or thread from its state on."""
    return _read(f"{task}/stat").rpartition(b")")[2].split()


def _read(path: str) -> bytes:
    """Return what a file of the kernel's says, in a third of the time that it takes as text."""
    with open(path, "rb", 0) as file:
        return file.read()


def _schedule(task: str) -> tuple[float, float]:
    """Return the seconds for which a thread ran, and waited for a processor."""
    ran, waiting = _read(f"{task}/schedstat").split()[:2]
    return int(ran) / 1e9, int(waiting) / 1e9
