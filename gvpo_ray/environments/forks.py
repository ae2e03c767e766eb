"""Each world has a process of its own, forked from one that has loaded the environment's class.

    host ─ "fork", a socket ──────► fork server ──fork──► world
      │                                                     │
      └── method, arguments ─────── the socket ────────────►│
        ◄── "a call begins", …, the result ─────────────────┘

So a call that hangs, also one that keeps Python's lock for itself, one that ends the process, and what it
leaves behind, are of one episode alone. The processes are neither confined nor limited: whoever starts a run
trusts the environment.

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
from gvpo_ray.sandbox.functions import describe
from gvpo_ray.sandbox.template import _die_with_parent

START_S = 60.0
"""Seconds within which a world's process must have started."""

GRACE_S = 15.0
"""Seconds that a world has beside the time limit of a call, before its process is killed."""

SIZE = struct.Struct("!Q")
"""What comes before each frame: its size."""


class BrokenError(Exception):
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
        self._timeout_s = limits.timeout_s
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
        with open(writer, "wb") as pipe, contextlib.suppress(BrokenPipeError):
            pipe.write(setup)
        if (said := self._control.recv(1 << 16)) != b"ready":
            self.close()
            raise RuntimeError(said.decode() or "the process that worlds are forked from does not start")

    async def world(self) -> WorldProcess:
        """Start a world.

        Raises:
            BrokenError: it does not start.
            OSError: the fork server is gone.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
        world = WorldProcess(self, *await asyncio.open_connection(sock=ours), self._timeout_s + GRACE_S)
        try:
            await world.start()
        except BrokenError:
            await world.close()
            raise
        return world

    def end(self, pid: int) -> None:
        """Kill a world's process, which may have ended."""
        with contextlib.suppress(OSError):  # its worlds end with the server
            self._control.send(b"end %d" % pid)

    def close(self) -> None:
        """End all processes."""
        self._control.close()
        self._server.kill()
        self._server.wait()


class WorldProcess:
    """A WorldProcess calls a world in its process; the methods are those of World.

    Each of them raises BrokenError, and ends the process, where it gives no sign of life.
    """

    def __init__(
        self, forks: Forks, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit_s: float
    ) -> None:
        self._forks, self._reader, self._writer, self.limit_s = forks, reader, writer, limit_s
        self.pid: int | None = None

    async def start(self) -> None:
        """Wait until it has started."""
        self.pid = await self._frame(START_S)

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
        """End the process."""
        self._writer.close()
        if self.pid is not None:
            self._forks.end(self.pid)
            self.pid = None

    async def _ask(self, method: str, *args: Any) -> Any:
        if self.pid is None:
            raise BrokenError("its process has ended")
        try:
            _write(self._writer, (method, args))
            while (frame := await self._frame(self.limit_s)) is None:  # a call begins
                pass
        except BrokenError:
            await self.close()
            raise
        return frame[0]

    async def _frame(self, limit_s: float) -> Any:
        try:
            async with asyncio.timeout(limit_s):
                return await _read(self._reader)
        except TimeoutError:
            raise BrokenError("its process gave no sign of life and was killed") from None
        except (asyncio.IncompleteReadError, OSError):
            raise BrokenError("its process died") from None


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
    """Be a world until the host closes the socket."""
    reader, writer = await asyncio.open_connection(sock=end)
    world = World(cls, arguments, limits, lambda: _write(writer, None))
    _write(writer, os.getpid())
    while True:
        try:
            method, args = await _read(reader)
        except (asyncio.IncompleteReadError, OSError):
            return
        _write(writer, (await getattr(world, method)(*args),))
        await writer.drain()


if __name__ == "__main__":
    main()
