"""Whole programs run in children of the sandbox, and are judged outside of them.

    Programs (in the verifier) ─ program, input ──────────────► guest: runs it
        │                      ◄───── what it printed ────────
        ├─ program; calls, one after the other ───────────────► guest: runs it, calls its functions
        │                      ◄───── values, as data ────────
        └─ asserts ► guest: runs them ─ calls ► (this process) ► guest with the program ► values, back again

What is expected never enters a process that runs a program, so nothing in such a process is worth reading,
patching or forging: whatever a program does there can only change its own answers. What it cannot change is
asked of the kernel: how it ended, and the time that it used.

Not excluded: a program that knows the tests by heart (any answer is as good as a computed one); asserts that
compare what a class of the program makes with nothing else; a name of Python's that all asserts call and
nothing else (`sum`), which is then the program's; and, where the kernel has no Landlock, reading this
process's memory.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from gvpo_ray.config.verifiers import ReasonKind
from gvpo_ray.errors import GvpoError
from gvpo_ray.sandbox import guest, watch
from gvpo_ray.sandbox.channel import GoneError, Printed
from gvpo_ray.sandbox.process import MAX_SCRATCH_FILE_BYTES, Sandbox, _Stage
from gvpo_ray.sandbox.values import encode

MAX_ANSWER_BYTES = 16 << 20
"""Largest value that a function of a program may return, as JSON."""

PATIENCE = 4
"""How many times its limit on time a program may be left waiting for a processor."""

Found = TypeVar("Found")


class StoppedError(GvpoError):
    """A guest came to its end before it had answered.

    Args:
        text: how, in one line.
        is_fault: whether this may be our own machinery's fault, so that nothing is known of the program.
        exit_status: the exit status, or minus the signal's number; None: it was killed here.
    """

    def __init__(self, text: str, is_fault: bool = False, exit_status: int | None = None) -> None:
        super().__init__(text)
        self.is_fault, self.exit_status = is_fault, exit_status


class Result(NamedTuple):
    """A Result says what became of a row's tests."""

    num_passed: int
    num_tests: int
    fault: str | None = None
    """Why nothing is known of the program."""
    remark: str | None = None
    """How the first test failed that did."""


class Output(Printed):
    """An Output keeps what a guest prints, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self.data, self._max_bytes, self.may_raise = bytearray(), max_bytes, True

    def take(self, output: socket.socket) -> bool:
        """Take what there is, without waiting; raise GoneError where it is too much."""
        try:
            data = output.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.data += data[: max(0, self._max_bytes + 1 - len(self.data))]
        if self.may_raise and len(self.data) > self._max_bytes:
            raise GoneError(f"it printed more than {self._max_bytes} bytes")
        return bool(data)


class Guest:
    """A Guest is a child for one request of guest.serve; its limits are per test, if the caller says so.

    The clock of its limit on time stands still while it waits for a processor that others have. So a busy
    machine changes no reward: a program that computes comes to its limit on CPU time, as on an idle one, and
    one that sleeps to its limit on time. Nothing is known of a program only where it was left waiting for
    PATIENCE times the limit. None can choose that: it may not choose its processor nor give one up
    (confine.py), and what it waits after a sleep does not count (watch.py).

    What it holds is looked at every LOOK_S, and as it ends.

    Args:
        programs: the sandbox.
        request: one of guest.py's forms.
        max_bytes: how much it may print.
        beside: another guest, which is looked at as well while this one is awaited.
    """

    def __init__(
        self,
        programs: Programs,
        request: Mapping[str, Any],
        max_bytes: int = 0,
        beside: Guest | None = None,
    ) -> None:
        self._programs, self.beside = programs, beside
        self.output = programs._printed = Output(max_bytes)
        self._child, _ = programs._begin(_Stage([], False), {"guest": dict(request), "columns": {}})
        self._child.channel.max_bytes = MAX_ANSWER_BYTES
        self.has_ended, self._num_answers, self._watched_at = False, 0, time.monotonic()
        self._max_written = watch.MAX_WRITTEN_BYTES + len(request.get("stdin", "").encode("utf-8", "replace"))
        self.allow()

    def allow(self) -> None:
        """Give the guest its time anew."""
        self._cpu_begun = self._child.limit_cpu(self._programs._cpu_s, is_hard=False)
        self._before = watch.times(self._child.pid, self._cpu_begun)
        self._elapsed, self._longest, self._most_waited = 0.0, 0.0, 0.0
        self._own_wait = self._looked_at = watch.own_wait()
        self._is_excused = False

    def ask(self, frame: Mapping[str, Any]) -> dict[str, Any]:
        """Send a frame and return the answer; raise StoppedError if there is none."""
        channel = self._child.channel
        steps = iter([lambda deadline: channel.send(frame, deadline)])
        self._wait_for(lambda deadline: next(steps, channel.flush)(deadline))
        return self.receive()

    def receive(self) -> dict[str, Any]:
        """Return the next frame; raise StoppedError if there is none."""
        answer = self._wait_for(self._child.channel.receive)
        self._num_answers, self._is_excused = self._num_answers + 1, False
        self._stop_if_too_slow()
        return answer

    def used_s(self) -> float:
        """Return the seconds that the guest had for itself; a time before the first look is none."""
        if self._longest < watch.LOOK_S:
            return 0.0
        return self._elapsed - (self._waited() or 0.0)

    def stop_if_too_much(self) -> None:
        """Look at what the guests hold; end one that holds too much, and raise StoppedError."""
        self._watched_at = time.monotonic()
        for one in (self.beside, self):
            if one is not None and (text := one._excess()):
                raise one._stopped(text)

    def _excess(self) -> str | None:
        return watch.excess(self._child.pid, self._programs._scratch.folder, self._max_written)

    def end(self) -> tuple[int, float]:
        """End the guest; return its exit status and its seconds of CPU time."""
        if self.has_ended:
            return 0, 0.0
        self.has_ended, self.output.may_raise = True, False
        self._programs.used_s = self.used_s()
        return self._programs._end(self._child)

    def _wait_for(self, step: Callable[[float], Found]) -> Found:
        """Return what comes of a step of the channel; look at the guest while it takes long."""
        begun = counted = time.monotonic()
        while True:
            error: GoneError | TimeoutError | None = None
            try:
                found = step(counted + watch.LOOK_S)
            except (GoneError, TimeoutError) as raised:
                error = raised
            now = time.monotonic()
            self._elapsed, self._longest = self._elapsed + now - counted, max(self._longest, now - begun)
            counted = now
            if isinstance(error, GoneError):
                raise self._gone(str(error)) from None
            if error is not None:
                self._stop_if_too_slow()
            if error is not None or now - self._watched_at >= watch.LOOK_S:
                self.stop_if_too_much()
            if error is None:
                return found
            self._look()

    def _look(self) -> None:
        """Look at a guest that has not answered for a while; raise StoppedError if it is out of time."""
        own_wait = watch.own_wait()
        if self._own_wait is not None and self._looked_at is not None and own_wait is not None:
            # Between two looks at a guest that is silent, it is not we for whom it waits.
            self._own_wait += own_wait - self._looked_at
        self._looked_at = own_wait
        elapsed, limit_s = self._elapsed, self._programs._timeout_s
        if elapsed <= limit_s:
            return
        if not self._is_excused and self._child.channel.is_ready():
            self._is_excused = True  # the answer came while we had no processor ourselves
            return
        waited = self._waited()
        if waited is not None and elapsed - waited > limit_s:
            raise self._stopped(f"it took more than {limit_s:g} s")
        if waited is None or elapsed > PATIENCE * limit_s:
            text = (
                f"{ReasonKind.TIMEOUT}: no answer within {elapsed:.0f} s, and this machine is too busy to say"
            )
            raise self._stopped(f"{text} whether the program is slow", True)

    def _waited(self) -> float | None:
        """Return the seconds for which the guest, and we with its answers, waited for others' processes."""
        own_wait = watch.own_wait()
        if self._before is None or self._own_wait is None or own_wait is None:
            return None
        waited = watch.waited(self._child.pid, self._before, self._child.cpu_used(), self._num_answers)
        if waited is None:
            return None
        self._most_waited = max(self._most_waited, waited)  # the thread that has waited may be gone now
        return self._most_waited + own_wait - self._own_wait

    def _stop_if_too_slow(self) -> None:
        if self._child.cpu_used() - self._cpu_begun > self._programs._cpu_s + 2:  # it ignores SIGXCPU
            raise self._stopped(self._too_slow())

    def _stopped(self, text: str, is_fault: bool = False) -> StoppedError:
        """End the guest; return why."""
        self.end()
        return StoppedError(text, is_fault)

    def _gone(self, text: str) -> StoppedError:
        """Return what the end of the guest's channel means, or `text` if it says that."""
        is_ending = watch.is_ending(self._child.pid)
        text = self._excess() or text
        status, cpu_s = self.end()
        if text or not is_ending:
            return StoppedError(text or "it closed its channel")
        if status == -signal.SIGXCPU or (
            status == -signal.SIGKILL and cpu_s - self._cpu_begun >= self._programs._cpu_s
        ):
            return StoppedError(self._too_slow())
        if status == -signal.SIGKILL:  # the kernel's, where the machine has no memory left
            text = f"{ReasonKind.CRASH}: killed by SIGKILL, as the kernel does where memory runs out"
            return StoppedError(text, True)
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
        return StoppedError(f"the program was {how}" if status < 0 else how, exit_status=status)

    def _too_slow(self) -> str:
        return f"it used more than {self._programs._cpu_s} s of CPU time"


class Programs(Sandbox):
    """Programs is a sandbox for whole programs; it must be used from one thread.

    Args:
        timeout_s: seconds that a program may take for one test, without those for which it waits for a
            processor; with asserts, for all of them.
        cpu_s: seconds of CPU time for the same.
        memory_gib: GiB that a program may allocate.

    Raises:
        SandboxError: the processes do not start.
    """

    def __init__(self, *, timeout_s: float, cpu_s: int, memory_gib: float) -> None:
        place = {"place": guest.PLACE, "arguments": {}, "is_strict": True}
        super().__init__(
            {"program": place}, timeout_s=timeout_s, cpu_s=cpu_s, memory_gib=memory_gib, max_checks=1
        )
        self.used_s = 0.0
        """Seconds that the last test took, as its limit counts them."""

    def run(self, program: str, stdin: str, max_bytes: int) -> str:
        """Run a program with an input; return what it printed.

        Args:
            program: its text.
            stdin: its input.
            max_bytes: how much it may print.

        Raises:
            StoppedError: it raised an error, exited with another status than 0 or came to a limit.
        """
        if len(stdin) > MAX_SCRATCH_FILE_BYTES // 4:  # characters have up to 4 bytes
            raise StoppedError(f"the input has {len(stdin)} characters, which is too much for a test", True)
        child = Guest(self, {"program": program, "stdin": stdin}, max_bytes)
        try:
            answer = child.receive()
        except StoppedError as stopped:
            if stopped.exit_status != 0:
                raise
            return child.output.data.decode("utf-8", "replace")
        finally:
            child.end()
        raise StoppedError(_error(answer))

    def call(self, program: str, name: str, calls: list[list[Any]]) -> Iterator[Any]:
        """Run a program and call one of its functions; yield for each call what came of it.

        What came of a call is a value of JSON's types, or a StoppedError. After a StoppedError that ends the
        guest, there is nothing more.

        Args:
            program: its text.
            name: name of a global function, or of a method of a class Solution.
            calls: the arguments of each call.
        """
        child = Guest(self, {"program": program})
        try:
            ready = child.receive()
            if "error" not in ready:
                ready = child.ask({"do": "entry", "arguments": [name]})
            if "error" in ready:
                raise StoppedError(_error(ready))
            for number, arguments in enumerate(calls, 1):
                child.allow()
                self.used_s = 0.0
                sent = [ready.get("value"), *(encode(value, _no_object) for value in arguments)]
                answer = child.ask({"do": "call", "arguments": sent})
                self.used_s = child.used_s()
                if number == len(calls):
                    child.stop_if_too_much()
                try:
                    yield StoppedError(_error(answer)) if "error" in answer else _plain(answer.get("value"))
                except (ValueError, TypeError, KeyError, RecursionError, ArithmeticError):
                    yield StoppedError("it returned no data")
        except StoppedError as stopped:
            yield stopped
        finally:
            child.end()

    def test(
        self, program: str, tests: list[str], entry_point: str | None, stop: bool, helpers: list[str]
    ) -> Result:
        """Run a program and asserts about it.

        Args:
            program: its text.
            tests: Python texts; every statement of them but definitions, imports and assignments is a test.
            entry_point: name of the function under test, which a function `check` of the tests gets.
            stop: whether to stop at the first test that fails.
            helpers: Python texts with functions for the tests; where one does not run, the row is at fault.
        """
        child = Guest(self, {"program": program})
        asserts: Guest | None = None
        num_passed, num_tests, num_done, remark, has_answered = 0, 1, 0, None, False
        try:
            request = {"tests": tests, "entry_point": entry_point, "helpers": helpers}
            asserts = Guest(self, request, beside=child)
            ready = child.receive()
            if "error" in ready:
                return Result(0, num_tests, None, _error(ready))
            frame = self._tests_say(asserts, False)
            while "end" not in frame:
                if "fault" in frame:
                    return Result(0, num_tests, str(frame["fault"]))
                if "do" in frame:
                    answer = child.ask(frame)
                    known: dict[str, Any] = {
                        name: answer[name] for name in ("value", "changed", "error", "told") if name in answer
                    }
                    if "error" not in known and "value" not in known:
                        raise StoppedError("an answer that is none")  # the asserts would wait for another
                    has_answered = True
                    frame = self._tests_say(asserts, has_answered, known)
                    continue
                if "total" in frame:
                    num_tests = frame["total"]
                    if not num_tests:
                        return Result(0, 0, "the tests hold no test")
                if "stopped" in frame:
                    remark = remark or f"before test {num_done + 1}: {frame['stopped']}"
                if "test" in frame:
                    num_done, num_passed = num_done + 1, num_passed + frame["test"]
                    if not frame["test"]:
                        remark = remark or f"test {num_done}: {frame['text']}"
                        if stop:
                            break
                frame = self._tests_say(asserts, has_answered)
            child.stop_if_too_much()
        except StoppedError as stopped:
            if stopped.is_fault:
                return Result(0, num_tests, str(stopped))
            num_passed = min(num_passed, num_tests - 1)  # it may have been stopped behind the last one
            remark = remark or f"test {min(num_done + 1, num_tests)}: {stopped}"
        finally:
            child.end()
            if asserts is not None:
                asserts.end()
        return Result(num_passed, num_tests, None, remark)

    def _tests_say(
        self, asserts: Guest, has_answered: bool, answer: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the next frame of the asserts' guest.

        Its end is the tests' own fault where it has no values of the program. Where it has, they may be what
        takes it so long, such as range(10**12), and a program must not choose to have no reward.
        """
        try:
            return asserts.receive() if answer is None else asserts.ask(answer)
        except StoppedError as stopped:
            if asserts.beside and asserts.beside.has_ended:  # it was the program, which held too much
                raise
            is_fault = stopped.is_fault or not has_answered
            raise StoppedError(f"the tests themselves: {stopped}", is_fault) from None


def _error(answer: Mapping[str, Any]) -> str:
    """Return the error in a guest's answer as one line of valid Unicode; a program may have written it."""
    error = answer.get("error")
    text = str(error[1] if isinstance(error, list) and len(error) == 2 else "an answer that is none")
    return " ".join(text[:300].encode("utf-8", "replace").decode().split())


def _plain(data: Any) -> Any:
    """Return data as JSON's own types would have it: tuples are lists, and names of dicts are texts.

    Other types are not made here, out of what a program may have written itself: Fraction("1e999999999")
    would never end, and Decimal("sNaN") cannot be compared.

    Raises:
        ValueError, TypeError, KeyError, RecursionError, ArithmeticError: the data is of no such form.
    """
    if isinstance(data, dict) and "tuple" in data:
        data = data["tuple"]
    if isinstance(data, dict) and "named" in data:
        data = data["named"][1]
    if isinstance(data, list):
        return [_plain(entry) for entry in data]
    if not isinstance(data, dict):
        return data
    if "int" in data:
        return int(data["int"], 16)
    if "dict" in data:
        return {name if isinstance(name, str) else str(name): _plain(entry) for name, entry in data["dict"]}
    top, _, bottom = str(data.get("Decimal") or data["Fraction"]).partition("/")
    return float(top) / float(bottom or 1)


def _no_object(value: Any) -> Any:
    raise TypeError("an object that is no data")
