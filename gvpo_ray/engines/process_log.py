"""The log of a process is read here, to quote the first cause of what its child processes died of.

vLLM runs in a core process, and perhaps workers, of its own. What goes wrong there reaches the engine's
process as "See root cause above": the cause itself is only in the log that both write to.
"""

from __future__ import annotations

import os
import re
import signal
import stat
from collections.abc import Mapping
from pathlib import Path

TAIL_BYTES = 256 * 1024
"""Size of the end of a log that is read, in bytes."""

FATAL, FAILED = "encountered a fatal error", "output_handler failed"
"""What vLLM's core, and its client in the engine's process, write before the traceback of what ends it. The
client fails as well when the core is killed."""

_ERROR = re.compile(r"(?:^|[\])] )((?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b(?:: .*)?)$")
"""A traceback's last line, as Python prints it or behind the prefix of vLLM's logger."""

_CRASH = re.compile(r"(?:^|[\])] )(?:  what\(\):  |Fatal Python error: )(.+)$")
"""The last words of a process that C++ or the interpreter itself ends."""

_WORKER = re.compile(r"Worker proc (\S+) died unexpectedly \(exit code: (-?\d+)\)")
"""What vLLM's core writes of a worker that has ended without a word to it."""

_POINTERS = ("root cause", "Executor failed", "CancelledError")
"""Texts of errors that only say that something else has failed."""


class ProcessLog:
    """A ProcessLog is what this process and its children write to stdout and stderr from now on.

    It is known only where these are files, as they are in a Ray actor; children inherit them.
    """

    def __init__(self) -> None:
        self._begins = {fd: status.st_size for fd in (1, 2) if stat.S_ISREG((status := os.fstat(fd)).st_mode)}

    @property
    def paths(self) -> list[Path]:
        """The files that stdout and stderr go to, each once."""
        return sorted({Path(f"/proc/self/fd/{fd}").resolve() for fd in self._begins})

    def lines(self) -> list[str]:
        """Return the lines at the end of the log, without colours; those of stderr follow those of stdout."""
        lines = []
        for fd, begin in self._begins.items():
            with open(f"/proc/self/fd/{fd}", "rb") as file:
                file.seek(max(begin, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                text = file.read().decode(errors="replace")
            lines += [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
        return lines


def last_error(lines: list[str]) -> str | None:
    """Return the last line that names an error, without those that only point to another one."""
    found = (error[1] for line in reversed(lines) if (error := _ERROR.search(line)))
    return next((error for error in found if not any(text in error for text in _POINTERS)), None)


def why_it_died(lines: list[str], statuses: Mapping[str, int]) -> str:
    """Return the first cause of the death of vLLM's core, in one line.

    Args:
        lines: what the processes of the engine wrote.
        statuses: exit status, or minus the number of the signal that ended it, of each process that is gone.
    """
    if error := last_error(_behind(FATAL, lines)):
        return error
    workers = {found[1]: int(found[2]) for line in lines if (found := _WORKER.search(line))}
    gone = {**workers, **statuses}
    killed = [name for name, status in gone.items() if status < 0]
    if not killed:
        if error := last_error(_behind(FAILED, lines)):
            return error
        # the core's traceback only points to what stands before it
        if _behind(FATAL, lines) and (error := last_error(lines)):
            return error
    if not gone:
        return "no cause is known, its processes wrote none"
    name = (killed or list(gone))[0]
    last_words = [found[1] for line in lines if (found := _CRASH.search(line))]
    why = f": {last_words[-1]}" if last_words else " and wrote no cause"
    return f"{name} {how_it_ended(gone[name])}{why}"


def _behind(mark: str, lines: list[str]) -> list[str]:
    """Return the lines from the last one on that has the mark; none has: no lines."""
    marked = [i for i, line in enumerate(lines) if mark in line]
    return lines[marked[-1] :] if marked else []


def how_it_ended(status: int) -> str:
    """Say how a process ended, by its exit status or minus the signal's number."""
    if status >= 0:
        return f"ended with status {status}"
    names = {number.value: number.name for number in signal.Signals}
    name = names.get(-status, f"signal {-status}")
    return f"was ended by {name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")
