"""The fork server has loaded the environment's class, and forks a world's process for each episode.

It knows worlds by the numbers that the host gives them. It alone waits for the end of their processes, once
the host has had them killed, so no other process has the pid of one before.

It runs as `python -m gvpo_ray.environments.fork_server`, and only forks.py starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import select
import signal
import socket
import struct
import tempfile
from collections.abc import Mapping
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from gvpo_ray.data.calls import Call
from gvpo_ray.environments.world import Limits, World
from gvpo_ray.sandbox.functions import describe
from gvpo_ray.sandbox.landlock import Files, files_of_python
from gvpo_ray.sandbox.template import _confine, _die_with_parent

SIZE = struct.Struct("!Q")
"""What comes before each frame between a world and its host: its size."""

MEMORY_GIB = 2
"""GiB that a confined world may allocate."""

REAP_S = 0.02
"""Seconds between two looks at whether killed processes have ended."""


def main() -> None:
    """Load the environment's class, then fork worlds until the host closes the socket."""
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    _, (setup,), _, _ = socket.recv_fds(control, 64, 1)
    try:
        with open(setup, "rb") as pipe:
            cls, arguments, limits, is_confined = cloudpickle.loads(pipe.read())
    except BaseException as error:  # importing a user's module may raise anything
        control.send(f"the environment's class cannot be loaded: {describe(error)}".encode()[: 1 << 15])
        return
    server, files = os.getpid(), files_of_python() if is_confined else None
    gc.freeze()  # the worlds share these pages as long as nobody writes into them
    control.send(b"ready")
    living, killed = dict[int, int](), list[int]()
    while True:
        killed = [pid for pid in killed if not _has_ended(pid)]
        if killed and not select.select([control], [], [], REAP_S)[0]:
            continue
        command, descriptors, _, _ = socket.recv_fds(control, 1 << 14, 1)
        if not command:
            return
        verb, number, folder = command.split(b" ", 2)
        if verb == b"end":
            if (pid := living.pop(int(number), None)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            continue
        if not descriptors:  # this process may have no more: the host reads that nobody is there
            continue
        end = socket.socket(fileno=descriptors[0])
        try:
            pid = os.fork()
        except OSError as error:
            with contextlib.suppress(OSError):  # who asked for it may be gone
                end.sendall(framed(start_raised(error)))
            end.close()
            continue
        if pid == 0:
            control.close()
            try:
                _die_with_parent(server)
                _live_in(os.fsdecode(folder), files, end)
                asyncio.run(_serve(end, cls, arguments, limits))
            finally:
                os._exit(0)
        living[int(number)] = pid
        end.close()


def _has_ended(pid: int) -> bool:
    """Return whether a child has ended, and wait for it no more."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return True


def _live_in(folder: str, files: Files | None, end: socket.socket) -> None:
    """Give this process a folder for temporary files; with `files` it is confined for good.

    The folder is then its home too and the one place where it may write, and it prints nowhere.
    """
    os.environ["TMPDIR"], tempfile.tempdir = folder, None
    if files is None:
        return
    null = os.open(os.devnull, os.O_WRONLY)
    for standard in (1, 2):
        os.dup2(null, standard)
    os.environ["HOME"] = folder
    try:
        os.chdir(folder)
        _confine({"memory_bytes": MEMORY_GIB << 30, "scratch": folder}, files, is_guest=False)
    except (OSError, ValueError) as error:  # a limit that cannot be set is a ValueError
        end.sendall(framed(start_raised(error)))
        os._exit(1)


async def _serve(end: socket.socket, cls: type, arguments: Mapping[str, Any], limits: Limits) -> None:
    """Be a world until the host closes the socket."""
    reader, writer = await asyncio.open_connection(sock=end)
    world = World(cls, arguments, limits, lambda: writer.write(framed(None)))
    writer.write(framed(os.getpid()))
    while True:
        try:
            (size,) = SIZE.unpack(await reader.readexactly(SIZE.size))
            method, args = json.loads(await reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError):
            return
        if method == "act":
            args[0] = [Call(*call) for call in args[0]]
        writer.write(framed(await getattr(world, method)(*args)))
        await writer.drain()


def framed(value: Any) -> bytes:
    """Return a value as a frame: its size, and it as JSON."""
    data = json.dumps(value, default=dataclasses.asdict).encode()
    return SIZE.pack(len(data)) + data


def start_raised(error: Exception) -> str:
    """Return why a world does not start."""
    return f"the start of its process raised {describe(error)}"


if __name__ == "__main__":
    main()
