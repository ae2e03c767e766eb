"""Reward functions, and the child process that runs them under hard limits.

A completion is hostile text: sympy evaluates what a model wrote, and a user's function may do anything with it. So no check
runs in this process. One child per Verifier answers one check after the other; whatever goes wrong there costs that one
completion its reward (null with a reason, never 0), and the child is killed and replaced.

    Verifier.score ── {"prompt", "completion", columns} ──► child: reward functions, one after the other
                   ◄── {"part": 1.0, "reason": null} ─────  one answer per function, or silence: killed at timeout_s

Frames are lines of ASCII JSON over a socket pair. JSON, because the child's answers are untrusted and pickle would run them.
Not here yet: no network, no file writes, no system calls (a child started by `_Child` is the place to confine).
"""

from __future__ import annotations

import base64
import ctypes
import functools
import importlib
import importlib.util
import json
import logging
import math
import numbers
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import pyarrow as pa

from gvpo_ray import groups as group_tables
from gvpo_ray.config import ConfigError, VerifiersConfig

Score = float | None | tuple[float | None, str]
"""Of one completion: the reward, None for "cannot be verified", or either with a remark for `reward_reasons`."""

RewardFunction = Callable[..., list[Score]]
"""`reward(prompts, completions, **columns) -> one Score per completion`; columns are lists of the same length."""

COLUMNS = ("group_id", "answer", "dataset", "completion_ids", "finish_reasons")
"""What a reward function gets beside prompts and completions, as far as the table has it."""

START_TIMEOUT_S = 60.0
"""For a new child to import its reward functions, on a busy machine."""

KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
"""All that a child inherits: tokens and keys live in the environment too."""

MAX_FRAME_BYTES = 1 << 20
OUT_OF_MEMORY = 86
"""Exit status of a child whose reward function ran into RLIMIT_AS."""


class VerifierError(RuntimeError):
    """The child process does not start."""


def math_reward(prompts: list[str], completions: list[str], *, answer: list[str], **_: Any) -> list[Score]:
    """1 if math-verify finds an answer in the completion and it equals the gold answer, else 0.

    A gold answer that does not parse can only be compared as text: equal text is right, anything else is not verifiable.
    """
    return [_math_score(completion, gold) for completion, gold in zip(completions, answer, strict=True)]


def _math_score(completion: str, gold: str) -> Score:
    from math_verify import parse, verify  # type: ignore[import-untyped]  # 0.5 s, and only the child needs it

    expected = _parse_gold(gold)
    # math-verify's own limits are off (None): they would score 0 where the parent's limit leaves the completion out.
    peak_before = _peak_memory()
    found = parse(completion, parsing_timeout=None)
    if found and verify(expected, found, timeout_seconds=None):
        return 1.0
    # sympy and math-verify swallow MemoryError and say "not equal": a check that came near the limit has no verdict.
    # Three quarters, because one large request fails long before the last page is used.
    if (peak := _peak_memory()) > peak_before and peak > 0.75 * resource.getrlimit(resource.RLIMIT_AS)[0]:
        raise MemoryError
    if not found:
        return 0.0, "math: no answer found in the completion"
    if all(isinstance(item, str) for item in expected):
        return None, f"math: the gold answer {gold[:100]!r} cannot be parsed"
    return 0.0


def _peak_memory() -> int:
    """Most address space that this process ever had, in bytes; 0 where there is no limit on it, as outside of a child."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return 0
    return int(Path("/proc/self/status").read_text().partition("VmPeak:")[2].split()[0]) * 1024


@functools.lru_cache(maxsize=64)
def _parse_gold(gold: str) -> list[Any]:
    """sympy expressions and texts of a bare answer ("85", "\\frac{1}{2}") or of one that brings its own delimiters."""
    from math_verify import parse

    text = gold.strip()
    if not re.search(r"\\boxed|\\\(|\\\[|(?<!\\)\$", text):  # an escaped dollar is money
        text = "\\boxed{" + text.rstrip(".") + "}"
    return list(parse(text, parsing_timeout=None))


BUILT_IN: dict[str, RewardFunction] = {"math": math_reward}


def validate_rewards(config: VerifiersConfig, functions: Mapping[str, RewardFunction] | None = None) -> None:
    """Load every reward function once, in a child as the verifiers will; a second, and nothing when all are built in.

    Raises:
        ConfigError: names verifiers.rewards.<name>: no such file, module or function, or its import fails.
    """
    for name in config.rewards:
        if name not in BUILT_IN and ":" not in name and name not in (functions or {}):
            raise ConfigError(
                f"verifiers.rewards.{name}: unknown reward; built in is {', '.join(BUILT_IN)}, your own is module:function or "
                "path.py:function, and a callable is passed as reward= from Python"
            )
    if functions or any(name not in BUILT_IN for name in config.rewards):
        Verifier(config, functions).close()


class Verifier:
    """Scores groups. Use it from one thread; it starts its child at once, so that a bad function fails here.

    Args:
        config: the reward functions with their weights, and the limits.
        functions: callables by name. One with the name of a configured reward takes its place and its weight,
            any other is added with weight 1. They travel to the child with cloudpickle.

    Raises:
        ConfigError: a reward function cannot be loaded; names verifiers.rewards.<name>.
        VerifierError: the child does not start, for example because memory_gib is too small for its imports.
    """

    def __init__(self, config: VerifiersConfig, functions: Mapping[str, RewardFunction] | None = None) -> None:
        functions = functions or {}
        self.weights = {**config.rewards, **{name: 1.0 for name in functions if name not in config.rewards}}
        self._timeout_s = config.timeout_s
        self._memory_gib = config.memory_gib
        self._setup = {
            "functions": {
                name: {"pickle": base64.b64encode(cloudpickle.dumps(functions[name])).decode()} if name in functions else {"spec": name}
                for name in self.weights
            },
            "memory_bytes": int(config.memory_gib * 2**30),
        }
        self._scratch = tempfile.TemporaryDirectory(prefix="gvpo-verifier-")
        self._child: _Child | None = None
        try:
            self._living_child()
        except BaseException:
            self.close()
            raise

    def score(self, groups: pa.Table) -> pa.Table:
        """Add rewards, reward_parts and reward_reasons to a table with prompts and completions.

        One check is one completion, so a reward function sees lists of one. A reward is the weighted sum of the parts,
        null if any part is null; its reason begins with "timeout" or "crash" where the child had to be replaced.
        """
        names = [name for name in ("prompt", "completions", *COLUMNS) if name in groups.column_names]
        rewards, all_parts, all_reasons = [], [], []
        for row in groups.select(names).to_pylist():
            checks = [self._check(row, i) for i in range(len(row["completions"]))]
            rewards.append([reward for reward, _, _ in checks])
            all_parts.append([(name, [parts[name] for _, parts, _ in checks]) for name in self.weights])
            all_reasons.append([reason for _, _, reason in checks])
        return group_tables.with_columns(groups, rewards=rewards, reward_parts=all_parts, reward_reasons=all_reasons)

    def close(self) -> None:
        """Kill the child and remove its scratch folder. Scoring again would start a new child."""
        if self._child is not None:
            self._child.kill()
            self._child = None
        self._scratch.cleanup()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, row: Mapping[str, Any], i: int) -> tuple[float | None, dict[str, float | None], str | None]:
        """Reward of completion i (None: none), its parts, and what there is to say about them."""
        request = {
            "prompt": row["prompt"],
            "completion": row["completions"][i],
            # Columns about the prompt hold one entry per group, columns about completions one per completion.
            "columns": {
                name: row[name][i] if name in group_tables.COMPLETION_COLUMNS and row[name] is not None else row[name]
                for name in COLUMNS
                if name in row
            },
        }
        parts: dict[str, float | None] = dict.fromkeys(self.weights)
        reasons: list[str] = []
        child = self._living_child()
        deadline = time.monotonic() + self._timeout_s
        name = next(iter(parts))
        try:
            child.send(request, deadline)
            for name in parts:
                parts[name], reason = _parse_answer(child.receive(deadline))
                reasons += [reason] if reason else []
        except TimeoutError:
            child.kill()
            reasons.append(f"timeout: {name} took more than {self._timeout_s:g} s")
        except _CrashError as error:
            status = child.kill()
            ending = f"ran out of memory ({self._memory_gib:g} GiB)" if status == OUT_OF_MEMORY else _ending(status)
            reasons.append(f"crash: {name}: {str(error) or ending}")
        known = [self.weights[name] * part for name, part in parts.items() if part is not None]
        reward = sum(known) if len(known) == len(parts) else None
        if reward is not None and not _fits_float32(reward):
            reward = None
            reasons.append("the weighted sum is not a finite float32")
        return reward, parts, "; ".join(reasons) or None

    def _living_child(self) -> _Child:
        """The child, or a new one in the place of one that was killed or died while it was idle."""
        if self._child is not None and self._child.is_alive():
            return self._child
        if self._child is not None:
            self._child.kill()
        self._child = _Child(Path(self._scratch.name))
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            self._child.send(self._setup, deadline)
            answer = self._child.receive(deadline)
        except TimeoutError as error:
            raise VerifierError(f"the verifier's child process was not ready after {START_TIMEOUT_S:g} s") from error
        except _CrashError as error:
            ending = str(error) or _ending(self._child.kill())
            raise VerifierError(f"the verifier's child process did not start ({ending}); is verifiers.memory_gib too small?") from error
        if "error" in answer:
            raise ConfigError(f"verifiers.rewards.{answer['name']}: {answer['error']}")
        return self._child


class _CrashError(Exception):
    """The child is gone (no message: its exit status tells), or it wrote what no child of ours writes."""


class _Child:
    """The parent's end of one child process: frames out, frames in, each with a deadline (of time.monotonic)."""

    def __init__(self, scratch: Path) -> None:
        self._channel, theirs = socket.socketpair()
        self._received = b""
        environment = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
        environment |= {
            "HOME": str(scratch),
            "TMPDIR": str(scratch),
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),  # users' modules import as they do here
            "PYTHONHASHSEED": "0",  # sympy orders terms by hash: the same check, the same answer
            "OMP_NUM_THREADS": "1",
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gvpo_ray.verifiers", str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=2,  # what user code prints goes to the log; the protocol has a descriptor of its own
                env=environment,
                start_new_session=True,  # a process group of its own: killed with all that it started
            )

    def is_alive(self) -> bool:
        """Looks without reaping: the process number, which is its group's too, stays its own until `kill`."""
        if self._process.returncode is not None:
            return False
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def send(self, frame: Mapping[str, Any], deadline: float) -> None:
        """Raises TimeoutError, or _CrashError if the child is gone."""
        self._channel.settimeout(_remaining(deadline))
        try:
            self._channel.sendall(_frame(frame))
        except ConnectionError as error:
            raise _CrashError from error

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next frame. Raises TimeoutError, or _CrashError if the child is gone or what it wrote is not a frame."""
        while b"\n" not in self._received:
            if len(self._received) > MAX_FRAME_BYTES:
                raise _CrashError("an answer without end")
            self._channel.settimeout(_remaining(deadline))
            try:
                data = self._channel.recv(1 << 16)
            except ConnectionError as error:
                raise _CrashError from error
            if not data:
                raise _CrashError
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _CrashError("an answer that is not JSON") from error
        if not isinstance(answer, dict):
            raise _CrashError("an answer that is not an object")
        return answer

    def kill(self) -> int:
        """End the child and everything in its process group; returns its exit status (minus the signal's number)."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # also where the child has ended by itself: what it started may live
        self._channel.close()
        return self._process.wait()


def _ending(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


def _frame(message: Mapping[str, Any]) -> bytes:
    """One line of ASCII: whatever a completion holds (NUL, newlines, half a surrogate pair) is escaped."""
    return json.dumps(message).encode("ascii") + b"\n"


def _remaining(deadline: float) -> float:
    """Seconds to the deadline; raises TimeoutError when there are none (a socket would take 0 for "do not wait")."""
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


def _fits_float32(value: float) -> bool:
    return math.isfinite(value) and abs(value) <= 3.4028234e38


def _parse_answer(answer: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """(part, reason) of a frame that may come from a child that a completion has taken over."""
    part, reason = answer.get("part"), answer.get("reason")
    if not (part is None or (type(part) in (int, float) and _fits_float32(part))) or not (reason is None or isinstance(reason, str)):
        raise _CrashError("an answer that is not a reward")
    # Arrow holds valid Unicode only.
    return part, (reason.encode("utf-8", "replace").decode() if reason else None)


# ---- the child's side ----------------------------------------------------------------------------------------------


def _main() -> None:
    """Serve checks until the parent closes the channel."""
    _die_with_parent(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The channel moves away from descriptor 0 (dup is not inherited by what user code starts): reading stdin finds nothing.
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    lines = channel.makefile("rb")
    setup = json.loads(lines.readline())
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"],) * 2)
    reward_functions: dict[str, RewardFunction] = {}
    for name, source in setup["functions"].items():
        try:
            reward_functions[name] = _load(source)
        except BaseException as error:  # importing a user's module may raise anything; the parent turns it into one line
            channel.sendall(_frame({"name": name, "error": _describe(error)}))
            return
    channel.sendall(_frame({"ready": True}))
    for line in lines:
        check = json.loads(line)
        for name, function in reward_functions.items():
            channel.sendall(_frame(_run(name, function, check)))


def _die_with_parent(parent: int) -> None:
    """The kernel kills this process when the parent's thread ends: end of file alone does not reach a check that never returns."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def _run(name: str, function: RewardFunction, check: Mapping[str, Any]) -> dict[str, Any]:
    """The answer frame of one reward function for one completion."""
    try:
        scores: Any = function(
            prompts=[check["prompt"]], completions=[check["completion"]], **{key: [value] for key, value in check["columns"].items()}
        )
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # what the function left behind still fills the address space: only a new process is clean
    except BaseException as error:  # untrusted output is scored here: also SystemExit and math-verify's own TimeoutException
        return {"part": None, "reason": f"{name} raised {_describe(error)}"}
    scores = scores.tolist() if hasattr(scores, "tolist") else scores  # numpy, torch
    if not isinstance(scores, (list, tuple)):
        return {"part": None, "reason": f"{name} returned {type(scores).__name__}, not a list of rewards"}
    if len(scores) != 1:
        return {"part": None, "reason": f"{name} returned {len(scores)} rewards for 1 completion"}
    score, remark = scores[0] if isinstance(scores[0], tuple) and len(scores[0]) == 2 else (scores[0], None)
    remark = None if remark is None else str(remark)[:500]
    if score is None:
        return {"part": None, "reason": remark or f"{name} gave no reward (None)"}
    if not isinstance(score, numbers.Real):
        return {"part": None, "reason": f"{name} returned {type(score).__name__}, not a number"}
    if not _fits_float32(float(score)):
        return {"part": None, "reason": f"{name} returned {float(score)}, not a finite float32"}
    return {"part": float(score), "reason": remark}


def _describe(error: BaseException) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _load(source: Mapping[str, str]) -> RewardFunction:
    """The function behind `math`, `module:function`, `path.py:function` or a pickle, ready to be timed.

    Raises:
        ConfigError: no such file, module or function. Whatever a user's module raises comes through.
    """
    if "pickle" in source:
        return _callable(cloudpickle.loads(base64.b64decode(source["pickle"])), "it")
    spec = source["spec"]
    if spec in BUILT_IN:
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off
        # The first check compiles regular expressions and parser tables for half a second: not on a completion's time.
        BUILT_IN[spec](["1"], ["The answer is $\\frac{1}{2}$."], answer=["0.5"])
        return BUILT_IN[spec]
    place, _, attribute = spec.rpartition(":")
    if place.endswith(".py"):
        module = _load_file(Path(place).expanduser().resolve())
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not (place == error.name or place.startswith(error.name + ".")):
                raise  # the module is there, and something that it imports is not
            raise ConfigError(f"no module named {error.name}") from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{place} has no function {attribute!r}")
    return _callable(getattr(module, attribute), attribute)


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(f"gvpo_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.append(str(path.parent))  # helpers beside the file; last, so that they shadow nothing
    spec.loader.exec_module(module)
    return module


def _callable(value: Any, name: str) -> RewardFunction:
    if not callable(value):
        raise ConfigError(f"{name} is {type(value).__name__}, not a function")
    function: RewardFunction = value
    return function


if __name__ == "__main__":
    _main()
