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
The other side is fork_server.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle  # type: ignore[import-untyped]
from pydantic import TypeAdapter, ValidationError

from gvpo_ray.data.calls import Call
from gvpo_ray.environments.fork_server import SIZE, framed, start_raised
from gvpo_ray.environments.world import Answer, Limits, Outcome
from gvpo_ray.errors import GvpoError
from gvpo_ray.sandbox.functions import fits_float32
from gvpo_ray.sandbox.process import KEPT_ENVIRONMENT
from gvpo_ray.sandbox.scratch import Scratch, _remove
from gvpo_ray.sandbox.watch import MAX_WRITTEN_BYTES, excess, unlinked

START_S = 300.0
"""Seconds within which a world's process must have started; many start at once."""

GRACE_S = 15.0
"""Seconds that a world has beside the time limit of a call, before its process is killed."""

LOOK_AGAIN_S = 1.0
"""Seconds that the frames of a request may come late, after all, taken together: they may have come while the
host's loop stood still."""

BEGINS = b"null"
"""The frame that says that a call begins."""

BYTES_PER_CHARACTER = 12
"""Most bytes that JSON needs for a character."""

ROOM = 1 << 20
"""Bytes of a frame beside what the policy reads."""

WATCH_S = 0.25
"""Seconds between two looks at what confined worlds hold."""

NUM_CLEARS, CLEAR_S = 5, 0.1
"""Tries to remove the folder of a world that has ended, and seconds between two: what it had started may go
on for a moment, and write. A folder that stays goes with all others at the end."""

KEPT = (*KEPT_ENVIRONMENT, "HOME", "TMPDIR", "OMP_NUM_THREADS")
"""Environment variables of a world, beside those that the config names."""


class BrokenError(GvpoError):
    """A world's process is gone, or gave no sign within its time; the message says which."""


class NoServerError(BrokenError):
    """The process that worlds are forked from is gone, and all worlds with it: no call of one is to blame."""

    def __init__(self, why: str = "the process that worlds are forked from died") -> None:
        super().__init__(why)


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
        self.missing = [name for name in variables if name not in os.environ]
        """Those of the variables that this machine does not have."""
        # the socket holds some messages: only a thread may wait until the server has read them
        self._sender, self._cleaner = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._scratches = [Scratch()]
        self._living: dict[int, _Process] = {}
        self._closing = threading.Event()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own = os.pathsep.join(os.path.abspath(path) for path in sys.path)  # users' modules are found as here
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-m", "gvpo_ray.environments.fork_server"],
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
        if is_confined:
            threading.Thread(target=self._watch, daemon=True).start()

    async def world(self) -> WorldProcess:
        """Return a world, in a new process.

        Raises:
            NoServerError: the fork server is gone.
            BrokenError: it does not start: this machine has no room for it, say.
        """
        if self._closing.is_set():
            raise NoServerError
        process = _Process(next(self._numbers), self._limits.max_text)
        try:
            process.folder = self._new_folder(process.number)
            ours, theirs = socket.socketpair()
            with ours:  # the connection has a copy of it
                command = b"fork %d %s" % (process.number, os.fsencode(process.folder))
                try:
                    sent = self._sender.submit(self._send, command, theirs)
                except RuntimeError:  # `close` was faster
                    theirs.close()
                    raise NoServerError from None
                await asyncio.shield(asyncio.wrap_future(sent))
                await process.connect(ours.dup())
            said = json.loads(await process.frame(START_S))
            if not isinstance(said, int):
                raise BrokenError(said)
        except (OSError, BrokenError) as error:
            self.end(process)
            if not self.is_alive():
                raise NoServerError from None
            raise error if isinstance(error, BrokenError) else BrokenError(start_raised(error)) from None
        except asyncio.CancelledError:
            self.end(process)
            raise
        process.pid = said
        self._living[process.number] = process
        return WorldProcess(self, process, self._limits)

    def _new_folder(self, number: int) -> Path:
        """Make the folder of a world."""
        if not self._scratches[-1].is_usable():  # what is left of it is of the worlds that there are
            self._scratches.append(Scratch())
        folder = self._scratches[-1].folder / str(number)
        folder.mkdir(mode=0o700)
        return folder

    def _send(self, command: bytes, end: socket.socket | None = None) -> None:
        """Tell the fork server something, and give it the other end of a world's socket."""
        if end is None:
            self._control.send(command)
        else:
            with end:
                socket.send_fds(self._control, [command], [end.fileno()])

    def is_alive(self) -> bool:
        """Return whether the fork server lives.

        Worlds end with its first thread, of which the kernel says before that it is at its end. Its socket
        may end later, with its last thread.
        """
        exiting = 0x4  # PF_EXITING
        try:
            stat = Path(f"/proc/{self._server.pid}/stat").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return False
        except OSError:  # there may be no descriptor for it
            return self._server.poll() is None
        return self._server.returncode is None and not int(stat.rpartition(")")[2].split()[6]) & exiting

    def end(self, process: _Process) -> None:
        """Kill a world's process, which may have ended, and remove its folder."""
        if process.writer is not None:
            process.writer.close()
        self._living.pop(process.number, None)
        with contextlib.suppress(RuntimeError):  # after `close` there are none
            self._sender.submit(self._send, b"end %d " % process.number)
            if process.folder is not None:  # which may take long: a policy may have filled it
                self._cleaner.submit(self._clear, process.pid, process.folder)

    def _clear(self, pid: int, folder: Path) -> None:
        """Remove the folder of a world once its process has ended; others wait for this."""
        with contextlib.suppress(OSError):  # it has, and was waited for
            descriptor, ends = os.pidfd_open(pid), select.poll()
            ends.register(descriptor, select.POLLIN)
            ends.poll(1000)
            os.close(descriptor)
        for _ in range(NUM_CLEARS):
            if _remove(folder) or self._closing.wait(CLEAR_S):
                return

    def _watch(self) -> None:
        while not self._closing.wait(WATCH_S):
            self.look()

    def look(self) -> None:
        """Have each world killed that holds more than a program in the sandbox may (sandbox/watch.py)."""
        inherited = unlinked(self._server.pid)  # what the class's module has open, all worlds have
        for process in [*self._living.values()]:
            if process.excess is None and process.folder is not None:
                process.excess = excess(process.pid, process.folder, MAX_WRITTEN_BYTES, inherited)
                if process.excess is not None:
                    with contextlib.suppress(RuntimeError):  # after `close` there are none
                        self._sender.submit(self._send, b"end %d " % process.number)

    def wait(self) -> None:
        """Wait until the fork server has ended, and all worlds with it."""
        self._server.wait()

    def close(self) -> None:
        """End all processes."""
        self._closing.set()
        self._server.kill()
        self._server.wait()
        for process in [*self._living.values()]:
            self.end(process)  # which has its folder removed after its end
        self._sender.shutdown()
        self._control.close()
        self._cleaner.shutdown()
        for scratch in self._scratches:
            scratch.remove()


class _Process:
    """A _Process is the host's end of a world's process."""

    def __init__(self, number: int, max_text: int) -> None:
        self.number, self.pid = number, 0
        self.folder: Path | None = None
        self.excess: str | None = None
        """What it has held too much of, so that it was killed."""
        self.writer: asyncio.StreamWriter | None = None
        self._late_s = LOOK_AGAIN_S
        self._max_bytes = BYTES_PER_CHARACTER * max_text + ROOM

    async def connect(self, end: socket.socket) -> None:
        """Take the socket's end."""
        self._reader, self.writer = await asyncio.open_connection(sock=end)

    def write(self, frame: Any) -> None:
        """Send a request."""
        assert self.writer is not None
        self._late_s = LOOK_AGAIN_S
        self.writer.write(framed(frame))

    async def frame(self, limit_s: float) -> bytes:
        """Return what it sends next."""
        reading, now = asyncio.ensure_future(self._read()), asyncio.get_running_loop().time
        try:
            if not (await asyncio.wait([reading], timeout=limit_s))[0]:
                late = now()
                if not (await asyncio.wait([reading], timeout=self._late_s))[0]:
                    raise BrokenError("its process gave no sign of life and was killed")
                self._late_s -= now() - late
            data = reading.result()
            if self.excess is None:
                return data
        except (asyncio.IncompleteReadError, OSError):
            if self.excess is None:
                raise BrokenError("its process died") from None
        finally:
            reading.cancel()
        raise BrokenError(f"{self.excess}, and was killed")  # also where its last answer came before that

    async def _read(self) -> bytes:
        (size,) = SIZE.unpack(await self._reader.readexactly(SIZE.size))
        if size > self._max_bytes:
            raise BrokenError(f"its process sent {size} bytes at once; at most {self._max_bytes} are read")
        return await self._reader.readexactly(size)


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
        end = now() + self.limit_s + (num_calls - 1) * self._limits.timeout_s
        try:
            process.write((method, args))
            for _ in range(num_calls + 1):
                frame = await process.frame(min(self.limit_s, end - now()))
                if frame != BEGINS:
                    return kind.validate_json(frame)
            raise BrokenError("its process began more calls than it has")
        except ValidationError:
            await self._break("its process sent an answer that is none")
        except BrokenError:
            await self.close()
            if not self._forks.is_alive():
                raise NoServerError from None
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
