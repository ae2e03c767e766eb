"""This environment has one tool, `python`, which runs a program in the sandbox.

environment: {name: "gvpo_ray.environments.python:Python", arguments: {cpu_s: 5}}
verifiers: {rewards: {math: 1}}                                # it gives no reward of its own
"""

from __future__ import annotations

import threading

from gvpo_ray.environments.world import readable
from gvpo_ray.sandbox.confine import unprotected
from gvpo_ray.sandbox.programs import Programs, StoppedError

MAX_OUTPUT = 4000
"""Characters of what a program prints that the policy reads; it also reads that there are more."""

MAX_PRINTED = 1 << 20
"""Bytes that a program may print; one that prints more is stopped."""


class Python:
    """This environment runs each program anew, in a child without network and files of its own.

    The process that the children are forked from, which takes most of a second to start, is the episode's.

    Args:
        timeout_s: seconds that a program may take.
        cpu_s: seconds of CPU time that it may take.
        memory_gib: GiB that it may allocate.
    """

    def __init__(self, timeout_s: float = 10.0, cpu_s: int = 5, memory_gib: float = 1.0) -> None:
        self._limits = {"timeout_s": timeout_s, "cpu_s": cpu_s, "memory_gib": memory_gib}
        # a sandbox belongs to the thread that has made it, and a World makes the calls after one that hangs
        # in another thread
        self._of_thread = threading.local()

    def reset(self, **row: object) -> None:
        """Begin an episode; programs leave nothing behind."""

    def python(self, code: str) -> str:
        """Run a Python program and return what it prints.

        Args:
            code: The whole program; variables of earlier programs are gone.
        """
        if not hasattr(self._of_thread, "programs"):
            self._of_thread.programs = Programs(**self._limits)  # type: ignore[arg-type]
        try:
            printed = self._of_thread.programs.run(code, "", MAX_PRINTED)
        except StoppedError as stopped:
            raise RuntimeError(str(stopped)) from None
        return readable(printed, MAX_OUTPUT) or "(the program printed nothing)"

    @staticmethod
    def _unprotected() -> list[str]:
        """Return what this machine's kernel does not protect; an environment actor says so at the start."""
        return unprotected()
