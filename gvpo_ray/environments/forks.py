"""Each world has a process for itself, forked from one that has loaded the environment's class.

    host ─ "fork", a socket ──────► fork server ──fork──► world
      │                                                     │
      └── method, arguments ─────── the socket ────────────►│
        ◄── "a call begins", …, the result ─────────────────┘

So a call that hangs, also one that keeps Python's lock for itself, one that ends the process, and what it
leaves behind in memory, are of one episode alone: its process serves no other one. It has the environment
variables that programs in the sandbox have, and those that the config names. A confined one has also no
network, no programs and no files to write but in a folder of its own.

Between the processes goes JSON, and what comes back is checked: the code in a process may be the policy's.

It runs as `python -m gvpo_ray.environments.forks`, and only Forks starts it.
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
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle  # type: ignore[import-untyped]
from pydantic import TypeAdapter, ValidationError

from gvpo_ray.data.calls import Call
from gvpo_ray.environments.world import Answer, Limits, Outcome, World
from gvpo_ray.errors import GvpoError
from gvpo_ray.sandbox.functions import describe, fits_float32
from gvpo_ray.sandbox.landlock import Files, files_of_python
from gvpo_ray.sandbox.process import KEPT_ENVIRONMENT
from gvpo_ray.sandbox.scratch import Scratch, _remove
from gvpo_ray.sandbox.template import _confine, _die_with_parent

START_S = 300.0
"""Seconds within which a world's process must have started; many start at once."""

GRACE_S = 15.0
"""Seconds that a world has beside the time limit of a call, before its process is killed."""

SIZE = struct.Struct("!Q")
"""What comes before each frame: its size."""

BEGINS = b"null"
"""The frame that says that a call begins."""

BYTES_PER_CHARACTER = 12
"""Most bytes that JSON needs for a character."""

ROOM = 1 << 20
"""Bytes of a frame beside what the policy reads."""

MEMORY_GIB = 2
"""GiB that a confined world may allocate."""

KEPT = (*KEPT_ENVIRONMENT, "HOME", "TMPDIR", "OMP_NUM_THREADS")
"""Environment variables of a world that is not confined, beside those that the config names."""


class BrokenError(GvpoError):
    """A world's process is gone, or gave no sign within its time; the message says which."""

    is_left = False
    """Whether that was so before the call began, so that what earlier calls have left behind is the cause."""


class NoServerError(BrokenError):
    """The process that worlds are forked from is gone, and all worlds with it: no call of one is to blame."""

    def __init__(self) -> None:
        super().__init__("the process that worlds are forked from died")


class Forks:
    """Forks starts worlds, in processes of their own.

    Args:
        cls: the environment's class.
        arguments: of the class.
        limits: of its calls.
        variables: names of environment variables that the processes have beside KEPT.
        is_confined: whether they are confined as programs in the sandbox are (sandbox/confine.py).

    Raises:
        RuntimeError: the class cannot be loaded in another process.
    """

    def __init__(
        self,
        cls: type,
        arguments: Mapping[str, Any],
        limits: Limits,
        variables: Sequence[str] = (),
        is_confined: bool = False,
    ) -> None:
        self._limits, self._numbers = limits, count()
        self._scratches = [Scratch()] if is_confined else []
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own = os.pathsep.join(os.path.abspath(path) for path in sys.path)  # users' modules are found as here
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-m", "gvpo_ray.environments.forks"],
                stdin=theirs.fileno(),
                env={
                    **{name: os.environ[name] for name in (*KEPT, *variables) if name in os.environ},
                    "PYTHONPATH": own,
                },
            )
        setup, (reader, writer) = cloudpickle.dumps((cls, dict(arguments), limits, is_confined)), os.pipe()
        socket.send_fds(self._control, [b"setup"], [reader])
        os.close(reader)
        with contextlib.suppress(BrokenPipeError), open(writer, "wb") as pipe:
            pipe.write(setup)
        if (said := self._control.recv(1 << 16)) != b"ready":
            self.close()
            raise RuntimeError(said.decode() or "the process that worlds are forked from does not start")

    async def world(self) -> WorldProcess:
        """Return a world, in a new process.

        Raises:
            NoServerError: the fork server is gone.
            BrokenError: it does not start: this machine has no room for it, say.
        """
        folder = ours = None
        try:
            folder = self._new_folder()
            ours, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(self._control, [b"fork " + os.fsencode(folder or "")], [theirs.fileno()])
            process = _Process(*await asyncio.open_connection(sock=ours), self._limits.max_text, folder)
        except OSError as error:
            if ours is not None:
                ours.close()
            if folder is not None:
                _remove(folder)
            raise BrokenError(_start_raised(error)) if self.is_alive() else NoServerError() from None
        try:
            said = json.loads(await process.frame(START_S))
            if not isinstance(said, int):
                raise BrokenError(said)
        except BrokenError:
            process.writer.close()
            if self.is_alive():
                raise
            raise NoServerError from None
        process.pid = said
        return WorldProcess(self, process, self._limits)

    def _new_folder(self) -> Path | None:
        """Make the folder of a world that is to be confined."""
        if not self._scratches:
            return None
        if not self._scratches[-1].is_usable():  # what is left of it is of the worlds that there are
            self._scratches.append(Scratch())
        folder = self._scratches[-1].folder / str(next(self._numbers))
        folder.mkdir(mode=0o700)
        return folder

    def is_alive(self) -> bool:
        """Return whether the fork server lives; it sends nothing, and its socket ends before its worlds."""
        ends = select.poll()
        if self._server.returncode is None:
            ends.register(self._control, select.POLLIN)
            return not ends.poll(0)
        return False

    def end(self, process: _Process) -> None:
        """Kill a world's process, which may have ended, and remove its folder."""
        process.writer.close()
        with contextlib.suppress(OSError):  # its worlds end with the server
            self._control.send(b"end %d" % process.pid)
        if process.folder is not None:  # which may take long: a policy may have filled it
            threading.Thread(target=_clear, args=(process.pid, process.folder), daemon=True).start()

    def wait(self) -> None:
        """Wait until the fork server has ended, and all worlds with it."""
        self._server.wait()

    def close(self) -> None:
        """End all processes."""
        self._control.close()
        self._server.kill()
        self._server.wait()
        for scratch in self._scratches:
            scratch.remove()


def _start_raised(error: OSError) -> str:
    return f"the start of its process raised {describe(error)}"


def _clear(pid: int, folder: Path) -> None:
    """Remove the folder of a world once its process has ended."""
    with contextlib.suppress(OSError):  # it has, and was waited for
        descriptor, ends = os.pidfd_open(pid), select.poll()
        ends.register(descriptor, select.POLLIN)
        ends.poll(10_000)
        os.close(descriptor)
    _remove(folder)


class _Process:
    """A _Process is the host's end of a world's process."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_text: int, folder: Path | None
    ) -> None:
        self.reader, self.writer, self.pid, self.folder = reader, writer, 0, folder
        self._max_bytes = BYTES_PER_CHARACTER * max_text + ROOM

    async def frame(self, limit_s: float) -> bytes:
        """Return what it sends next."""
        try:
            async with asyncio.timeout(limit_s):
                return await _read(self.reader, self._max_bytes)
        except TimeoutError:
            raise BrokenError("its process gave no sign of life and was killed") from None
        except (asyncio.IncompleteReadError, OSError):
            raise BrokenError("its process died") from None


class WorldProcess:
    """A WorldProcess calls a world in its process; the methods are those of World.

    Each of them raises BrokenError, and ends the process, where it gives no sign of life, or an answer that
    is none.
    """

    def __init__(self, forks: Forks, process: _Process, limits: Limits) -> None:
        self._forks, self._limits, self.pid = forks, limits, process.pid
        self.limit_s = limits.timeout_s + GRACE_S
        self._process: _Process | None = process

    async def open(self, row: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """Call World.open."""
        opened: tuple[str | None, str | None] = await self._ask(OPENED, 2, "open", row)
        return opened

    async def act(self, calls: Sequence[Call], message: str) -> Answer:
        """Call World.act."""
        num = min(len(calls), self._limits.max_calls)
        answer: Answer = await self._ask(ANSWER, max(1, num), "act", calls, message)
        if not all(map(_is_message, answer.messages)) or len(answer.messages) > max(1, len(calls)):
            await self._break("its process sent messages that are none")
        # a World says in messages what comes of calls: anything else is code that would end its episode
        is_end = answer.reason is not None or answer.is_over
        if answer.is_broken or (calls and is_end) or max(_counts(answer)) > len(calls):
            await self._break("its process sent an answer that is none")
        return answer

    async def score(self) -> Outcome:
        """Call World.score."""
        outcome: Outcome = await self._ask(OUTCOME, 1, "score")
        if outcome.reward is not None and not fits_float32(outcome.reward):
            await self._break("its process sent a reward that is none")
        return outcome

    async def close(self) -> None:
        """Let the environment go, and its process."""
        process, self._process = self._process, None
        if process is not None:
            self._forks.end(process)

    async def _ask(self, kind: TypeAdapter[Any], num_calls: int, method: str, *args: Any) -> Any:
        """Return what a method of World gives, which calls the environment `num_calls` times at most."""
        if (process := self._process) is None:
            raise BrokenError("its process has ended")
        now = asyncio.get_running_loop().time
        end, has_begun = now() + self.limit_s + (num_calls - 1) * self._limits.timeout_s, False
        try:
            _write(process.writer, (method, args))
            for _ in range(num_calls + 1):
                frame = await process.frame(min(self.limit_s, end - now()))
                if frame != BEGINS:
                    return kind.validate_json(frame)
                has_begun = True
            raise BrokenError("its process began more calls than it has")
        except ValidationError:
            await self._break("its process sent an answer that is none")
        except BrokenError as error:
            await self.close()
            if not self._forks.is_alive():
                raise NoServerError from None
            error.is_left = not has_begun
            raise

    async def _break(self, why: str) -> NoReturn:
        await self.close()
        raise BrokenError(why)


OPENED: TypeAdapter[Any] = TypeAdapter(tuple[str | None, str | None])
ANSWER: TypeAdapter[Any] = TypeAdapter(Answer)
OUTCOME: TypeAdapter[Any] = TypeAdapter(Outcome)


def _is_message(message: Mapping[str, str]) -> bool:
    """Return whether a dict of texts is a message that a dialogue can append."""
    return (
        {"role", "content"} <= message.keys() <= {"role", "content", "name"}
        and message["role"] in ("tool", "user")
        and message.get("name", "unknown").isidentifier()
    )


def _counts(answer: Answer) -> tuple[int, ...]:
    return answer.num_errors, answer.num_hung, answer.num_refused


async def _read(reader: asyncio.StreamReader, max_bytes: int | None = None) -> bytes:
    (size,) = SIZE.unpack(await reader.readexactly(SIZE.size))
    if max_bytes is not None and size > max_bytes:
        raise BrokenError(f"its process sent {size} bytes at once; at most {max_bytes} are read")
    return await reader.readexactly(size)


def _write(writer: asyncio.StreamWriter, frame: Any) -> None:
    writer.write(_framed(frame))


def _framed(frame: Any) -> bytes:
    data = json.dumps(frame, default=dataclasses.asdict).encode()
    return SIZE.pack(len(data)) + data


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
    server, files = os.getpid(), files_of_python() if is_confined else Files([], [])
    gc.freeze()  # the worlds share these pages as long as nobody writes into them
    control.send(b"ready")
    while True:
        command, descriptors, _, _ = socket.recv_fds(control, 1 << 14, 1)
        if not command:
            return
        if command.startswith(b"end "):
            pid = int(command[4:])
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)  # until it is waited for, no other process has its number
                os.waitpid(pid, 0)
            continue
        if not descriptors:  # this process may have no more: the host reads that nobody is there
            continue
        end = socket.socket(fileno=descriptors[0])
        try:
            pid = os.fork()
        except OSError as error:
            end.sendall(_framed(_start_raised(error)))
            end.close()
            continue
        if pid == 0:
            control.close()
            try:
                _die_with_parent(server)
                if folder := os.fsdecode(command.removeprefix(b"fork ")):
                    _live_in(folder, files, end)
                asyncio.run(_serve(end, cls, arguments, limits))
            finally:
                os._exit(0)
        end.close()


def _live_in(folder: str, files: Files, end: socket.socket) -> None:
    """Confine this process for good; the one folder where it may write is its home, and it prints nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    for standard in (1, 2):
        os.dup2(null, standard)
    os.environ.update(HOME=folder, TMPDIR=folder)
    try:
        os.chdir(folder)
        _confine({"memory_bytes": MEMORY_GIB << 30, "scratch": folder}, files, is_guest=False)
    except OSError as error:
        end.sendall(_framed(_start_raised(error)))
        os._exit(1)


async def _serve(end: socket.socket, cls: type, arguments: Mapping[str, Any], limits: Limits) -> None:
    """Be a world until the host closes the socket."""
    reader, writer = await asyncio.open_connection(sock=end)
    world = World(cls, arguments, limits, lambda: _write(writer, None))
    _write(writer, os.getpid())
    while True:
        try:
            method, args = json.loads(await _read(reader))
        except (asyncio.IncompleteReadError, OSError):
            return
        if method == "act":
            args[0] = [Call(*call) for call in args[0]]
        _write(writer, await getattr(world, method)(*args))
        await writer.drain()


if __name__ == "__main__":
    main()
