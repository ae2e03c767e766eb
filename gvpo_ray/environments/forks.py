"""Each world has a process for itself, forked from one that has loaded the environment's class.

    host ─ "fork", a socket ──────► fork server ──fork──► world
      │                                                     │
      └── method, arguments ─────── the socket ────────────►│
        ◄── "a call begins", …, the result ─────────────────┘

So a call that hangs, also one that keeps Python's lock for itself, one that ends the process, and what it
leaves behind, are of one episode alone. A process in which nothing hung serves another episode afterwards.
The processes are neither confined nor limited: whoever starts a run trusts the environment.

It runs as `python -m gvpo_ray.environments.forks`, and only Forks starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from gvpo_ray.data.calls import Call
from gvpo_ray.environments.world import Answer, Limits, Outcome, World
from gvpo_ray.errors import GvpoError
from gvpo_ray.sandbox.functions import describe
from gvpo_ray.sandbox.template import _die_with_parent

START_S = 300.0
"""Seconds within which a world's process must have started; many start at once."""

GRACE_S = 15.0
"""Seconds that a world has beside the time limit of a call, before its process is killed."""

SIZE = struct.Struct("!Q")
"""What comes before each frame: its size."""


class BrokenError(GvpoError):
    """A world's process is gone, or gave no sign within its time; the message says which."""


class Forks:
    """Forks starts worlds, in processes of their own.

    Args:
        cls: the environment's class.
        arguments: of the class.
        limits: of its calls.

    Raises:
        RuntimeError: the class cannot be loaded in another process.
    """

    def __init__(self, cls: type, arguments: Mapping[str, Any], limits: Limits) -> None:
        self._timeout_s, self._idle = limits.timeout_s, list[_Process]()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own = os.pathsep.join(os.path.abspath(path) for path in sys.path)  # users' modules are found as here
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-m", "gvpo_ray.environments.forks"],
                stdin=theirs.fileno(),
                env={**os.environ, "PYTHONPATH": own},
            )
        setup, (reader, writer) = cloudpickle.dumps((cls, dict(arguments), limits)), os.pipe()
        socket.send_fds(self._control, [b"setup"], [reader])
        os.close(reader)
        with contextlib.suppress(BrokenPipeError), open(writer, "wb") as pipe:
            pipe.write(setup)
        if (said := self._control.recv(1 << 16)) != b"ready":
            self.close()
            raise RuntimeError(said.decode() or "the process that worlds are forked from does not start")

    async def world(self) -> WorldProcess:
        """Return a world, in a process that is free or a new one.

        Raises:
            BrokenError: it does not start, or the fork server is gone.
        """
        if self._idle:
            return WorldProcess(self, self._idle.pop(), self._timeout_s + GRACE_S)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
        except OSError:
            raise BrokenError("the process that worlds are forked from died") from None
        process = _Process(*await asyncio.open_connection(sock=ours))
        try:
            process.pid = await process.frame(START_S)
        except BrokenError:
            process.writer.close()
            raise
        return WorldProcess(self, process, self._timeout_s + GRACE_S)

    def take_back(self, process: _Process, is_clean: bool) -> None:
        """Keep a process for another world, or kill it; it may have ended."""
        if is_clean:
            self._idle.append(process)
            return
        process.writer.close()
        with contextlib.suppress(OSError):  # its worlds end with the server
            self._control.send(b"end %d" % process.pid)

    def wait(self) -> None:
        """Wait until the fork server has ended, and all worlds with it."""
        self._server.wait()

    def close(self) -> None:
        """End all processes."""
        self._control.close()
        self._server.kill()
        self._server.wait()


class _Process:
    """A _Process is the host's end of a world's process."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.pid = reader, writer, 0

    async def frame(self, limit_s: float) -> Any:
        """Return what it sends next."""
        try:
            async with asyncio.timeout(limit_s):
                return await _read(self.reader)
        except TimeoutError:
            raise BrokenError("its process gave no sign of life and was killed") from None
        except (asyncio.IncompleteReadError, OSError):
            raise BrokenError("its process died") from None


class WorldProcess:
    """A WorldProcess calls a world in its process; the methods are those of World.

    Each of them raises BrokenError, and ends the process, where it gives no sign of life.
    """

    def __init__(self, forks: Forks, process: _Process, limit_s: float) -> None:
        self._forks, self.limit_s, self.pid = forks, limit_s, process.pid
        self._process: _Process | None = process
        self._is_clean = True

    async def open(self, row: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """Call World.open."""
        opened: tuple[str | None, str | None] = await self._ask("open", row)
        return opened

    async def act(self, calls: Sequence[Call], message: str) -> Answer:
        """Call World.act."""
        answer: Answer = await self._ask("act", calls, message)
        return answer

    async def score(self) -> Outcome:
        """Call World.score."""
        outcome: Outcome = await self._ask("score")
        return outcome

    async def close(self) -> None:
        """Let the environment go, and its process if a call has hung in it or is under way."""
        process, self._process = self._process, None
        if process is not None:
            self._forks.take_back(process, self._is_clean)

    async def _ask(self, method: str, *args: Any) -> Any:
        if (process := self._process) is None:
            raise BrokenError("its process has ended")
        was_clean, self._is_clean = self._is_clean, False  # until it has answered
        try:
            _write(process.writer, (method, args))
            while (frame := await process.frame(self.limit_s)) is None:  # a call begins
                pass
        except BrokenError:
            await self.close()
            raise
        answer, has_hung = frame
        self._is_clean = was_clean and not has_hung
        return answer


async def _read(reader: asyncio.StreamReader) -> Any:
    (size,) = SIZE.unpack(await reader.readexactly(SIZE.size))
    return pickle.loads(await reader.readexactly(size))


def _write(writer: asyncio.StreamWriter, frame: Any) -> None:
    data = pickle.dumps(frame)
    writer.write(SIZE.pack(len(data)) + data)


def main() -> None:
    """Load the environment's class, then fork worlds until the host closes the socket."""
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    _, (setup,), _, _ = socket.recv_fds(control, 64, 1)
    try:
        with open(setup, "rb") as pipe:
            cls, arguments, limits = cloudpickle.loads(pipe.read())
    except BaseException as error:  # importing a user's module may raise anything
        control.send(f"the environment's class cannot be loaded: {describe(error)}".encode()[: 1 << 15])
        return
    server = os.getpid()
    gc.freeze()  # the worlds share these pages as long as nobody writes into them
    control.send(b"ready")
    while True:
        command, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not command:
            return
        if command.startswith(b"end "):
            pid = int(command[4:])
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)  # until it is waited for, no other process has its number
                os.waitpid(pid, 0)
            continue
        if os.fork() == 0:
            control.close()
            try:
                _die_with_parent(server)
                asyncio.run(_serve(socket.socket(fileno=descriptors[0]), cls, arguments, limits))
            finally:
                os._exit(0)
        os.close(descriptors[0])


async def _serve(end: socket.socket, cls: type, arguments: Mapping[str, Any], limits: Limits) -> None:
    """Be one world after the other until the host closes the socket."""
    reader, writer = await asyncio.open_connection(sock=end)
    world = World(cls, arguments, limits, lambda: _write(writer, None))
    _write(writer, os.getpid())
    while True:
        try:
            method, args = await _read(reader)
        except (asyncio.IncompleteReadError, OSError):
            return
        _write(writer, (await getattr(world, method)(*args), world.has_hung))
        await writer.drain()


if __name__ == "__main__":
    main()
