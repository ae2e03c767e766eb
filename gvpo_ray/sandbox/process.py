"""The sandbox: reward functions run in a child process under hard limits, forked from a template process.

A completion is hostile text: sympy evaluates what a model wrote, and a user's function may do anything with
it. So a check runs in a child that can only compute. It has limits on wall-clock time, CPU time and memory,
no network, no other processes, no files but in a scratch folder, and none of the environment's secrets
(confine.py). Whatever goes wrong costs that one check.

    Sandbox (in the verifier) ── spawn, wait ──► template: fork server with the reward functions loaded
        │                                            │ fork: 10 ms instead of a second of imports
        └─ {"prompt", "completion", columns} ──► child: calls the reward functions one after the other
        ◄─ {"begun"}, {"part", "reason"}, ... ───── or no answer: killed at its limit, and forked anew

Frames are lines of ASCII JSON over a socket pair. They are JSON because the child's answers are untrusted,
and unpickling would run code. The template reaps children only on request, so a pid cannot be reused before
the sandbox has killed it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gvpo_ray.config.base import ConfigError, GvpoError
from gvpo_ray.config.verifiers import ReasonKind
from gvpo_ray.files import lock
from gvpo_ray.sandbox.functions import Part, fits_float32

START_TIMEOUT_S = 120.0
"""Seconds that a template may take to import the reward functions, also on a busy machine."""

KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
"""The only variables that a child inherits, because the environment also holds tokens and keys."""

SCRATCH_PREFIX = "gvpo-verifier-"
"""Start of the scratch folders' names, and of their lock files'."""

MAX_FRAME_BYTES = 1 << 20
"""Size at which an answer without an end is refused."""

MAX_SCRATCH_FILE_BYTES = 64 << 20
"""Largest file that a child may write."""

MAX_OPEN_FILES = 256
"""Largest number of files that a child may have open."""

OUT_OF_MEMORY = 86
"""Exit status of a child whose reward function ran into its memory limit."""


class SandboxError(GvpoError, RuntimeError):
    """The sandbox's processes do not start, or keep dying before a check begins."""


class _GoneError(Exception):
    """The process at the other end is gone, or it wrote something that our code never writes.

    Without a message it is gone, and its exit status says why.
    """


class Sandbox:
    """Runs reward functions on completions in a child process.

    A sandbox must be used from one thread. It starts at once, so that a bad function fails here.

    Args:
        functions: name -> verifiers.rewards.source_of(...), in the order in which they run.
        timeout_s: seconds that one check of all functions together may take.
        cpu_s: seconds of CPU time that one check may take.
        memory_gib: GiB that a child may allocate beside the loaded functions.
        max_checks: number of checks after which a child is replaced.

    Raises:
        ConfigError: a reward function cannot be loaded; the message names verifiers.rewards.<name>.
        SandboxError: the processes do not start.
    """

    def __init__(
        self,
        functions: Mapping[str, Mapping[str, Any]],
        *,
        timeout_s: float,
        cpu_s: int,
        memory_gib: float,
        max_checks: int,
    ) -> None:
        self._names = list(functions)
        self._timeout_s, self._cpu_s, self._memory_gib, self._max_checks = (
            timeout_s,
            cpu_s,
            memory_gib,
            max_checks,
        )
        self._scratch, self._lock = _new_scratch()
        self._setup = {
            "functions": dict(functions),
            "memory_bytes": int(memory_gib * 2**30),
            "scratch": str(self._scratch),
        }
        self._template: _Template | None = None
        self._child: _Child | None = None
        try:
            self._living_child()
        except BaseException:
            self.close()
            raise

    def check(self, prompt: str, completion: str, columns: Mapping[str, Any]) -> dict[str, Part]:
        """Run every function on one completion; return their parts by name.

        A function that gave no answer has a reason that starts with its limit ("timeout", "memory") or with
        "crash". The functions after it do not run, and their parts have neither value nor reason.

        Raises:
            SandboxError: no child can be started that takes up the check.
        """
        parts: dict[str, Part] = dict.fromkeys(self._names, Part(None))
        child, number = self._begin({"prompt": prompt, "completion": completion, "columns": dict(columns)})
        deadline = time.monotonic() + self._timeout_s
        child.limit_cpu(self._cpu_s)
        name = self._names[0]
        try:
            for name in parts:
                parts[name] = _parse_part(child.channel.receive(deadline), number)
            child.num_checks += 1
            if child.num_checks >= self._max_checks:
                self._end_child()
        except TimeoutError:
            self._end_child()
            parts[name] = Part(None, f"{ReasonKind.TIMEOUT}: {name} took more than {self._timeout_s:g} s")
        except _GoneError as error:
            status = self._end_child()
            parts[name] = Part(
                None, f"{ReasonKind.CRASH}: {name}: {error}" if str(error) else self._ending(name, status)
            )
        return parts

    def close(self) -> None:
        """Kill both processes and remove the scratch folder."""
        if self._child is not None:
            self._end_child()  # waits for its end
        if self._template is not None:
            self._template.kill()
        self._template = self._child = None
        shutil.rmtree(self._scratch, ignore_errors=True)
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()

    def _begin(self, request: Mapping[str, Any]) -> tuple[_Child, str]:
        """Give a check to a living child; return the child, and the number that its answers must carry.

        A child that died before it took up the check, idle or on receipt, is replaced. Only from here on is
        a child's death the completion's fault.

        Raises:
            SandboxError: three children in a row died before they took up the check.
        """
        for _ in range(3):
            child = self._living_child()
            deadline = time.monotonic() + START_TIMEOUT_S
            # Answers that an earlier check has left in the channel, forged ones included, lack this number.
            number = secrets.token_hex(8)
            with contextlib.suppress(_GoneError, TimeoutError):
                child.channel.send({**request, "number": number}, deadline)
                if child.channel.receive(deadline) == {"begun": number}:
                    return child, number
            self._end_child()
        raise SandboxError("the verifier's child process dies before it takes up a check")

    def _living_child(self) -> _Child:
        """Return the child; start one, and a template, if there is none."""
        if self._child is None:
            if self._template is None or not self._template.is_alive():
                if self._template is not None:
                    self._template.kill()
                self._template = _Template(self._setup)
            self._child = self._template.spawn()
        return self._child

    def _end_child(self) -> int:
        """Kill the child and empty its scratch folder.

        Returns:
            Exit status of the child; minus the signal's number, if a signal ended it.
        """
        assert self._template is not None and self._child is not None
        child, self._child = self._child, None
        try:
            status = self._template.end(child)
        except _GoneError:  # the template died too, and its children die with it
            self._template.kill()
            self._template, status = None, -signal.SIGKILL
        for entry in self._scratch.iterdir():
            shutil.rmtree(
                entry, ignore_errors=True
            ) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)
        return status

    def _ending(self, name: str, status: int) -> str:
        """Return the reason for a child that died with this status while the function `name` ran."""
        if status == OUT_OF_MEMORY:
            return f"{ReasonKind.MEMORY}: {name} needed more than {self._memory_gib:g} GiB"
        if status == -signal.SIGXCPU:
            return f"{ReasonKind.TIMEOUT}: {name} used more than {self._cpu_s} s of CPU time"
        return f"{ReasonKind.CRASH}: {name}: {_ending(status)}"


def _new_scratch() -> tuple[Path, Any]:
    """Make a scratch folder; return it with the lock that marks it as in use.

    Folders whose owner was killed, so that nobody holds their lock, are removed.
    """
    for old in Path(tempfile.gettempdir()).glob(SCRATCH_PREFIX + "*.lock"):
        with contextlib.suppress(OSError), lock(old):
            shutil.rmtree(old.with_suffix(""), ignore_errors=True)
            old.unlink()
    while True:
        descriptor, name = tempfile.mkstemp(prefix=SCRATCH_PREFIX, suffix=".lock")
        os.close(descriptor)
        held = lock(Path(name), wait_s=None)
        if os.path.exists(name):
            break
        held.close()  # another process removed the file as an old one before it was locked
    folder = Path(name).with_suffix("")
    folder.mkdir(mode=0o700)
    return folder, held


class Channel:
    """One end of a socket pair, over which JSON objects are sent and received, one per line.

    Deadlines are times of time.monotonic(). An end that is gone, or a line that is no JSON object, raises
    _GoneError; a missed deadline raises TimeoutError.
    """

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._received = b""

    def send(self, frame: Mapping[str, Any], deadline: float) -> None:
        """Send one object."""
        self.socket.settimeout(_remaining(deadline))
        try:
            self.socket.sendall(as_frame(frame))
        except TimeoutError:
            raise
        except OSError as error:
            raise _GoneError from error

    def receive(self, deadline: float) -> dict[str, Any]:
        """Wait for the next object and return it."""
        while b"\n" not in self._received:
            if len(self._received) > MAX_FRAME_BYTES:
                raise _GoneError("an answer without end")
            self.socket.settimeout(_remaining(deadline))
            try:
                data = self.socket.recv(1 << 16)
            except TimeoutError:
                raise
            except OSError as error:
                raise _GoneError from error
            if not data:
                raise _GoneError
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _GoneError("an answer that is not JSON") from error
        if not isinstance(answer, dict):
            raise _GoneError("an answer that is not an object")
        return answer


class _Child:
    """The verifier's handle of a forked child."""

    def __init__(self, pid: int, channel: Channel) -> None:
        self.pid, self.channel, self.num_checks = pid, channel, 0

    def limit_cpu(self, seconds: int) -> None:
        """Allow the child `seconds` of CPU time from now on; the child itself may not change its limits."""
        # CPUCLOCK_SCHED of a whole process, as clock_getcpuclockid(3) computes it
        cpu_clock = (~self.pid << 3) | 2
        with contextlib.suppress(OSError):  # the child is gone, which the channel will report
            used = time.clock_gettime(cpu_clock)
            hard = resource.prlimit(self.pid, resource.RLIMIT_CPU)[1]
            resource.prlimit(self.pid, resource.RLIMIT_CPU, (int(used) + 1 + seconds, hard))


class _Template:
    """The verifier's handle of the template process, the fork server of the children.

    Args:
        setup: `functions` (name -> source), `memory_bytes` and `scratch`.

    Raises:
        ConfigError: a reward function cannot be loaded; the message names verifiers.rewards.<name>.
        SandboxError: the process does not start, or is not ready within START_TIMEOUT_S.
    """

    def __init__(self, setup: Mapping[str, Any]) -> None:
        control, theirs = socket.socketpair()
        self._control = Channel(control)
        scratch = setup["scratch"]
        environment = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
        environment |= {
            "HOME": scratch,
            "TMPDIR": scratch,
            # users' modules are found as in this process
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
            "PYTHONHASHSEED": "0",  # sympy orders terms by hash, and verdicts must be reproducible
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gvpo_ray.sandbox.template", str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=2,  # what user code prints goes to the log; the protocol has descriptors of its own
                env=environment,
                start_new_session=True,  # a process group of its own: killed with all that it started
            )
        try:
            answer = self._ask(setup)
        except _GoneError as error:
            raise SandboxError(
                f"the verifier's child process did not start ({str(error) or _ending(self.kill())})"
            ) from error
        except TimeoutError as error:
            self.kill()
            raise SandboxError(
                f"the verifier's child process was not ready after {START_TIMEOUT_S:g} s"
            ) from error
        if "error" in answer:
            self.kill()
            raise ConfigError(
                f"verifiers.rewards.{answer['name']}: {answer['error']}"
                if "name" in answer
                else str(answer["error"])
            )

    def is_alive(self) -> bool:
        """Return whether the process runs."""
        return self._process.poll() is None

    def spawn(self) -> _Child:
        """Fork a child; raise SandboxError if the template is gone."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._control.socket.settimeout(START_TIMEOUT_S)
                socket.send_fds(self._control.socket, [as_frame({"do": "spawn"})], [theirs.fileno()])
                child = _Child(
                    self._control.receive(time.monotonic() + START_TIMEOUT_S)["pid"], Channel(ours)
                )
            except (_GoneError, OSError) as error:
                raise SandboxError(
                    f"the verifier's template process is gone ({_ending(self.kill())})"
                ) from error
        return child

    def end(self, child: _Child) -> int:
        """Kill a child if it still lives; return its exit status (minus the signal's number).

        The child's pid cannot be reused before the template reaps the child, which happens here.
        """
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        child.channel.socket.close()
        try:
            return int(self._ask({"do": "wait", "pid": child.pid})["status"])
        except TimeoutError as error:
            raise _GoneError from error

    def kill(self) -> int:
        """Kill the template and its process group; return its exit status.

        The group holds the child and whatever the import of the functions started.
        """
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._control.socket.close()
        return self._process.wait()

    def _ask(self, frame: Mapping[str, Any]) -> dict[str, Any]:
        """Send a command to the template; return the answer."""
        deadline = time.monotonic() + START_TIMEOUT_S
        self._control.send(frame, deadline)
        return self._control.receive(deadline)


def _ending(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


def as_frame(message: Mapping[str, Any]) -> bytes:
    """Encode a message as one line of ASCII JSON; NUL, newlines and lone surrogates are escaped."""
    return json.dumps(message, default=str).encode("ascii") + b"\n"


def _remaining(deadline: float) -> float:
    """Return the seconds to a deadline; raise TimeoutError if there are none left.

    Zero must not be returned: for a socket it means "do not wait".
    """
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


def _parse_part(answer: Mapping[str, Any], number: str) -> Part:
    """Check a child's answer and make a Part of it; a completion may have taken the child over.

    Raises:
        _GoneError: the answer belongs to another check, or holds no reward.
    """
    if answer.get("number") != number:
        raise _GoneError("an answer to another question")
    value, reason = answer.get("part"), answer.get("reason")
    if not (value is None or (type(value) in (int, float) and fits_float32(value))) or not (
        reason is None or isinstance(reason, str)
    ):
        raise _GoneError("an answer that is not a reward")
    # Arrow holds valid Unicode only.
    return Part(
        value, (reason.encode("utf-8", "replace").decode() if reason else None), answer.get("fault") is True
    )
