"""Environments whose processes can be brought down, for a fork server that then imports no test."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Fragile:
    """Its process can be brought down by a call."""

    def __init__(self, text: str) -> None:
        self.text = text

    def reset(self, **row: Any) -> str:
        return f"{self.text} {row['answer']}"

    def freeze(self) -> str:
        ctypes.PyDLL(None).pause()  # for ever, with Python's lock
        return "late"

    def die(self) -> None:
        os._exit(3)

    def add(self, a: int) -> int:
        return a + 1

    def smile(self, a: int) -> str:
        return "\N{GRINNING FACE}" * a

    def respond(self, message: str) -> str | None:
        if message == "die":
            self.die()
        return None

    def get_reward(self) -> float:
        return 0.5


class Evil:
    """Its tool is the commonest calculator there is, so it runs whatever the policy writes."""

    def reset(self, **row: Any) -> None:
        self.ok = False

    def compute(self, expression: str) -> Any:
        """Compute.

        Args:
            expression: What to compute.
        """
        space = {
            "self": self,
            "os": os,
            "socket": socket,
            "has": lambda fd: Path(f"/proc/self/fd/{fd}").exists(),
        }
        return eval(expression, space)

    def get_reward(self) -> float:
        return float(self.ok)


class Shared(Evil):
    """It has files open that its module has made, in no folder, and larger than a world may write."""

    def __init__(self, files: list[int]) -> None:
        self.files = files


def large_files() -> list[int]:
    memory, (disk, path) = os.memfd_create("data"), tempfile.mkstemp()
    os.unlink(path)
    for file in (memory, disk):
        for _ in range(70):
            os.write(file, bytes(1 << 20))
    return [memory, disk]


class InServer:
    """Calls a function in the fork server, as that reads the class's arguments; its value is the argument."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments

    def __reduce__(self) -> Any:
        return self._function, self._arguments


def two_forks() -> str:
    real, left = os.fork, [None, None]

    def fork() -> int:
        if not left:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        left.pop()
        return real()

    os.fork = fork
    return "say"


def no_confinement(error: Exception) -> str:
    def confine(*args: Any, **options: Any) -> None:
        raise error

    sys.modules["__main__"]._confine = confine  # type: ignore[attr-defined]
    return "say"
