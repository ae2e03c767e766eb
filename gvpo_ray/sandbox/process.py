"""In the sandbox, reward functions run in child processes under hard limits, forked from a template process.

A completion is hostile text: sympy evaluates what a model wrote, and a user's function may do anything with
it. So a check runs in a child that can only compute. It has limits on wall-clock time, CPU time and memory,
no network, no other processes, no capabilities, no secrets, and no files but Python's own to read and a
scratch folder (confine.py, landlock.py). Whatever goes wrong costs that one check.

    Sandbox (in the verifier) ── spawn, wait ──► template: fork server with the reward functions loaded
        │                                            │ fork: 15 ms instead of seconds of imports
        └─ {"prompt", "completion", columns} ──► child: calls the reward functions one after the other
        ◄─ {"begun"}, {"part", "reason"}, ... ───── or no answer: killed at its limit, and forked anew

The functions of this package share a child, because they only look at a completion. A user's function may run
it, and then it could change what the child says of later ones: each check of such a function has a child of
its own, which ends with it, and an empty scratch folder. The template reaps children only on request, so a
pid cannot be reused before the sandbox has killed it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.verifiers import ReasonKind
from gvpo_ray.errors import GvpoError
from gvpo_ray.sandbox.channel import Channel, GoneError, Printed, as_frame
from gvpo_ray.sandbox.confine import unprotected
from gvpo_ray.sandbox.functions import Part, fits_float32
from gvpo_ray.sandbox.scratch import Scratch

START_TIMEOUT_S = 120.0
"""Seconds that a template may take to import the reward functions, also on a busy machine."""

KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
"""The only variables that a child inherits, because the environment also holds tokens and keys."""

MAX_SCRATCH_FILE_BYTES = 64 << 20
"""Largest file that a child may write."""

MAX_OPEN_FILES = 256
"""Largest number of files that a child may have open."""

OUT_OF_MEMORY = 86
"""Exit status of a child whose reward function ran into its memory limit."""


class SandboxError(GvpoError, RuntimeError):
    """The sandbox's processes do not start, or keep dying before a check begins."""


class _Stage(NamedTuple):
    """A _Stage is reward functions that run one after the other in the same child."""

    names: list[str]
    is_shared: bool
    """Whether the child is used for other checks as well."""


def _stages(functions: Mapping[str, Mapping[str, Any]]) -> list[_Stage]:
    """Put the functions into stages, in their order: ours together, each of the user's alone."""
    stages: list[_Stage] = []
    for name, source in functions.items():
        is_ours = str(source.get("place", "")).startswith("gvpo_ray.")
        if is_ours and stages and stages[-1].is_shared:
            stages[-1].names.append(name)
        else:
            stages.append(_Stage([name], is_ours))
    return stages


class Sandbox:
    """A Sandbox runs reward functions on completions in child processes.

    A sandbox must be used from one thread. It starts at once, so that a bad function fails here.

    Args:
        functions: name -> verifiers.rewards.source_of(...), in the order in which they run.
        timeout_s: seconds that one check of all functions together may take.
        cpu_s: seconds of CPU time that one check may take.
        memory_gib: GiB that a child may allocate beside the loaded functions.
        max_checks: number of checks after which a child that serves many is replaced.

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
        self._functions, self._stages = dict(functions), _stages(functions)
        self._timeout_s, self._cpu_s, self._memory_gib, self._max_checks = (
            timeout_s,
            cpu_s,
            memory_gib,
            max_checks,
        )
        self.unprotected = unprotected()
        """What this machine's kernel does not protect, in sentences."""
        self._printed = Printed()
        self._scratch = Scratch()
        self._template: _Template | None = None
        self._child: _Child | None = None
        try:
            self._living_template()
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
        parts: dict[str, Part] = dict.fromkeys(self._functions, Part(None))
        request = {"prompt": prompt, "completion": completion, "columns": dict(columns)}
        left_s, cpu_left = self._timeout_s, float(self._cpu_s)
        for stage in self._stages:
            child, number = self._begin(stage, request)
            begun, cpu_begun = time.monotonic(), child.limit_cpu(cpu_left, is_hard=not stage.is_shared)
            name, failure, cpu_limit = stage.names[0], None, cpu_left
            try:
                for name in stage.names:
                    parts[name] = _parse_part(child.channel.receive(begun + left_s), number)
            except TimeoutError:
                failure = self._late(name, f"took more than {self._timeout_s:g} s")
            except GoneError as error:
                failure = str(error) and f"{ReasonKind.CRASH}: {name}: {error}"
            left_s -= time.monotonic() - begun
            cpu_left = max(0.0, cpu_left - (child.cpu_used() - cpu_begun))
            child.num_checks += 1
            if failure is not None or not stage.is_shared or child.num_checks >= self._max_checks:
                status, cpu_used = self._end(child)
                if failure is not None:
                    failure = failure or self._ending(name, status, cpu_used - cpu_begun >= cpu_limit)
                    parts[name] = Part(None, failure)
                    break
        return parts

    def close(self) -> None:
        """Kill the processes and remove the scratch folder."""
        if self._child is not None:
            self._end(self._child)  # waits for its end
        if self._template is not None:
            self._template.kill()
        self._template = None
        self._scratch.remove()

    def _begin(self, stage: _Stage, request: Mapping[str, Any]) -> tuple[_Child, str]:
        """Give a check to a child; return the child, and the number that its answers must carry.

        A child that died before it took up the check, idle or on receipt, is replaced. Only from here on is
        a child's death the completion's fault.

        Raises:
            SandboxError: the child cannot confine itself, or three children in a row died before they took
                up the check.
        """
        why = ""
        for _ in range(3):
            try:
                child = self._shared_child() if stage.is_shared else self._new_child()
            except GoneError as error:  # the template, which is started anew
                why = str(error) or "the process that forks it is gone"
                continue
            deadline = time.monotonic() + START_TIMEOUT_S
            # Answers that an earlier check has left in the channel, forged ones included, lack this number.
            number = secrets.token_hex(8)
            answer: dict[str, Any] = {}
            with contextlib.suppress(GoneError, TimeoutError):
                child.channel.send({**request, "functions": stage.names, "number": number}, deadline)
                answer = child.channel.receive(deadline)
                if answer == {"begun": number}:
                    return child, number
            why = _ending(self._end(child)[0])
            if "error" in answer:
                raise SandboxError(f"the verifier's child process cannot confine itself: {answer['error']}")
        raise SandboxError(f"the verifier's child process dies before it takes up a check: {why}")

    def _shared_child(self) -> _Child:
        """Return the child that serves many checks; start one if there is none."""
        if self._child is None:
            self._child = self._new_child()
        return self._child

    def _new_child(self) -> _Child:
        """Fork a child; raise GoneError if the template has died just now."""
        return self._living_template().spawn(self._printed)

    def _living_template(self) -> _Template:
        """Return the template, with a scratch folder; start it if there is none."""
        if not self._scratch.is_usable():
            self._kill_template()  # it has the folder's path in its environment
            self._scratch.remove()
            self._scratch = Scratch()
        if self._template is None or not self._template.is_alive():
            self._kill_template()
            setup = {
                "functions": self._functions,
                "memory_bytes": int(self._memory_gib * 2**30),
                "scratch": str(self._scratch.folder),
            }
            self._template = _Template(setup)
        return self._template

    def _kill_template(self) -> None:
        """Kill the template, and with it its children: another template cannot wait for their end."""
        if self._template is not None:
            self._template.kill()
        if self._child is not None:
            self._child.channel.close()
        self._template = self._child = None

    def _end(self, child: _Child) -> tuple[int, float]:
        """End a child and empty the scratch folder; return its exit status and its seconds of CPU time."""
        if child is self._child:
            self._child = None
        assert self._template is not None  # of which it is a child
        try:
            ending = self._template.end(child)
        except GoneError:  # the template died too, and its children die with it
            self._kill_template()
            ending = -signal.SIGKILL, 0.0
        child.channel.close()
        self._scratch.wipe()
        return ending

    def _late(self, name: str, limit: str) -> str:
        """Return the reason for a check that came to a limit of time while the function `name` ran."""
        # what ran before it in this check has used up its part of the limit
        who = name if name == next(iter(self._functions)) else f"{name}, with what ran before it,"
        return f"{ReasonKind.TIMEOUT}: {who} {limit}"

    def _ending(self, name: str, status: int, is_at_limit: bool) -> str:
        """Return the reason for a child that died with this status while the function `name` ran.

        Args:
            name: the function.
            status: the child's exit status, or minus the signal's number.
            is_at_limit: whether the child has used all CPU time that it had for the check.
        """
        if status == OUT_OF_MEMORY:
            return f"{ReasonKind.MEMORY}: {name} needed more than {self._memory_gib:g} GiB"
        # a child that ignores SIGXCPU is killed a second later
        if status == -signal.SIGXCPU or (status == -signal.SIGKILL and is_at_limit):
            return self._late(name, f"used more than {self._cpu_s} s of CPU time")
        return f"{ReasonKind.CRASH}: {name}: {_ending(status)}"


class _Child:
    """A _Child is the verifier's handle of a forked child."""

    def __init__(self, pid: int, channel: Channel) -> None:
        self.pid, self.channel, self.num_checks = pid, channel, 0

    def cpu_used(self) -> float:
        """Return the seconds of CPU time that the child has used; 0 if it is gone."""
        # CPUCLOCK_SCHED of a whole process, as clock_getcpuclockid(3) computes it
        try:
            return time.clock_gettime((~self.pid << 3) | 2)
        except OSError:  # the channel will report it
            return 0.0

    def limit_cpu(self, seconds: float, is_hard: bool) -> float:
        """Allow the child some CPU time from now on, in whole seconds and one; return what it has used.

        The child may not change its limits, but it may ignore the signal that comes with the soft one.

        Args:
            seconds: the CPU time.
            is_hard: whether the child is killed a second later. That is for good, because only root may raise
                a hard limit again.
        """
        used = self.cpu_used()
        with contextlib.suppress(OSError):
            limit = int(used + seconds) + 1
            hard = limit + 1 if is_hard else resource.prlimit(self.pid, resource.RLIMIT_CPU)[1]
            resource.prlimit(self.pid, resource.RLIMIT_CPU, (limit, hard))
        return used


class _Template:
    """A _Template is the verifier's handle of the template process, the fork server of the children.

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
            "PYTHONUNBUFFERED": "1",  # a child ends without a flush
            "OMP_NUM_THREADS": "1",
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gvpo_ray.sandbox.template", str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=2,  # what an import prints goes to the log; the protocol has descriptors of its own
                env=environment,
                start_new_session=True,  # a process group of its own: killed with all that it started
            )
        try:
            answer = self._ask(setup)
        except GoneError as error:
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

    def spawn(self, printed: Printed) -> _Child:
        """Fork a child, and give it what it prints to; raise GoneError if the template is gone."""
        ours, theirs = socket.socketpair()
        # a socket and not a pipe: a pipe could be opened again through /proc, and read
        output, their_output = socket.socketpair()
        printed.begin()
        with theirs, their_output:
            try:
                self._control.socket.settimeout(START_TIMEOUT_S)
                socket.send_fds(
                    self._control.socket,
                    [as_frame({"do": "spawn"})],
                    [theirs.fileno(), their_output.fileno()],
                )
                answer = self._control.receive(time.monotonic() + START_TIMEOUT_S)
                if "pid" not in answer:
                    raise GoneError(answer.get("error", ""))
                child = _Child(answer["pid"], Channel(ours, output, printed))
            except (GoneError, OSError) as error:
                ours.close()
                output.close()
                self.kill()
                raise GoneError(str(error)) from error
        return child

    def end(self, child: _Child) -> tuple[int, float]:
        """Kill a child if it still lives.

        The child's pid cannot be reused before the template reaps the child, which happens here.

        Returns:
            (its exit status, or minus the signal's number; the seconds of CPU time that it used).
        """
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        try:
            answer = self._ask({"do": "wait", "pid": child.pid})
            return int(answer["status"]), float(answer["cpu_s"])
        except TimeoutError as error:
            raise GoneError from error

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


def _parse_part(answer: Mapping[str, Any], number: str) -> Part:
    """Check a child's answer and make a Part of it; a completion may have taken the child over.

    Raises:
        GoneError: the answer belongs to another check, or holds no reward.
    """
    if answer.get("number") != number:
        raise GoneError("an answer to another question")
    value, reason = answer.get("part"), answer.get("reason")
    if not (value is None or (type(value) in (int, float) and fits_float32(value))) or not (
        reason is None or isinstance(reason, str)
    ):
        raise GoneError("an answer that is not a reward")
    # Arrow holds valid Unicode only.
    return Part(
        value, (reason.encode("utf-8", "replace").decode() if reason else None), answer.get("fault") is True
    )
