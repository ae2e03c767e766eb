"""The log of a process is read here, to quote the first cause of what its child processes died of.

vLLM runs in a core process, and perhaps workers, of its own. What goes wrong there reaches the engine's
process as "See root cause above": the cause itself is only in the log that both write to.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

TAIL_BYTES = 256 * 1024
"""Size of the end of a log that is read, in bytes."""

_ERROR = re.compile(r"(?:^|[\])] )((?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b(?:: .*)?)$")
"""A traceback's last line, as Python prints it or behind the prefix of vLLM's logger."""


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

    def last_error(self, after: str = "") -> str | None:
        """Return the last line that names an error, without those that only point to another one.

        Args:
            after: only what stands behind the last mention of this text counts.
        """
        found = None
        for fd, begin in self._begins.items():
            with open(f"/proc/self/fd/{fd}", "rb") as file:
                file.seek(max(begin, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                text = file.read().decode(errors="replace")
            _, mark, tail = text.rpartition(after) if after else ("", "x", text)
            if not mark:
                continue
            for line in re.sub(r"\x1b\[[0-9;]*m", "", tail).splitlines():
                error = _ERROR.search(line.rstrip())
                if error and "root cause" not in error[1]:
                    found = error[1]
        return found
