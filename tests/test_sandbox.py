"""The limits of a check, and the processes that serve checks: when they end, and what then goes on."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scoring import (
    LIMIT_S,
    SHORT_S,
    children_of,
    group_of,
    is_running,
    reasons_of,
    rewards_of,
    score_with,
    shared_pid,
    template_pid,
    wait_until_gone,
)

from gvpo_ray import groups
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.observe.metrics import batch_metrics
from gvpo_ray.sandbox.channel import GoneError
from gvpo_ray.sandbox.functions import Part
from gvpo_ray.sandbox.process import Sandbox, SandboxError, _stages
from gvpo_ray.sandbox.scratch import Scratch
from gvpo_ray.verifiers.math.reward import math_reward
from gvpo_ray.verifiers.verifier import Verifier

pytestmark = pytest.mark.usefixtures("no_child_left")

OURS: Any = {"exact_match": 1}
"""A function of ours that shares a child, as `math` does, and starts without the seconds of its parser."""


def test_a_function_that_never_returns_is_killed_and_its_neighbours_keep_their_rewards() -> None:
    def loops(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import signal

        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        while completions[0] == "loop":
            pass
        return [0.5]

    scored = score_with(loops, ["a", "loop", "b", "loop", "c"], timeout_s=SHORT_S)
    assert rewards_of(scored) == [0.5, None, 0.5, None, 0.5]
    assert reasons_of(scored) == [
        None,
        "timeout: math took more than 3 s",
        None,
        "timeout: math took more than 3 s",
        None,
    ]


def test_a_check_that_computes_too_long_is_ended_by_its_cpu_time_whatever_the_clock_says() -> None:
    def loops(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        while completions[0] == "loop":
            pass
        return [0.5]

    scored = score_with(loops, ["a", "loop", "b"], cpu_s=1, timeout_s=600)
    assert rewards_of(scored) == [0.5, None, 0.5]
    assert reasons_of(scored) == [None, "timeout: math used more than 1 s of CPU time", None]


@pytest.mark.parametrize(
    ("seconds", "reason"),
    [
        (2.5, "timeout: b, with what ran before it, used more than 5 s of CPU time"),
        (0.5, "crash: b: killed by SIGKILL"),
    ],
)
def test_the_cpu_time_of_a_check_is_that_of_all_its_functions(
    monkeypatch: pytest.MonkeyPatch, seconds: float, reason: str
) -> None:
    """The first function has used 4 of 5 s; the second ignores the signal, and is killed."""

    class Child:
        num_checks = 0

        def __init__(self, seconds: float, is_killed: bool) -> None:
            self.cpu_used, self.is_killed, self.channel = lambda: seconds, is_killed, self

        def limit_cpu(self, seconds: float, is_hard: bool) -> float:
            return 0.0

        def receive(self, deadline: float) -> dict[str, Any]:
            if self.is_killed:
                raise GoneError
            return {"number": "n", "part": 1.0, "reason": None}

    children = [Child(4.0, False), Child(seconds, True)]
    sandbox = Sandbox.__new__(Sandbox)
    sandbox._functions, sandbox._stages = {"a": {}, "b": {}}, _stages({"a": {}, "b": {}})
    sandbox._timeout_s, sandbox._cpu_s, sandbox._max_checks = 10.0, 5, 10
    monkeypatch.setattr(sandbox, "_begin", lambda *_: (children.pop(0), "n"))
    monkeypatch.setattr(sandbox, "_end", lambda child: (-signal.SIGKILL, child.cpu_used()))
    assert sandbox.check("p", "c", {}) == {"a": Part(1.0), "b": Part(None, reason)}


def test_a_child_is_replaced_after_its_number_of_checks() -> None:
    pids = []
    with Verifier(VerifiersConfig(timeout_s=LIMIT_S, max_checks=3, rewards={"format": 1})) as verifier:
        for _ in range(7):
            pids.append(shared_pid(verifier))
            verifier.score(group_of("1", ["a"]))
    # the first is None: a child starts with the first check that needs it, and its last check ends it
    assert [pids.index(pid) for pid in pids] == [0, 1, 1, 0, 4, 4, 0]


def test_a_memory_bomb_is_a_crash_and_its_neighbours_keep_their_rewards() -> None:
    def hoards(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(len(bytearray(2**31 if completions[0] == "bomb" else 2**20)) > 0)]

    scored = score_with(hoards, ["a", "bomb", "b"], memory_gib=1.0)
    assert rewards_of(scored) == [1.0, None, 1.0]
    assert reasons_of(scored) == [None, "memory: math needed more than 1 GiB", None]


def test_math_that_runs_out_of_memory_is_a_crash_though_sympy_swallows_the_error() -> None:
    def swallows(prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        from gvpo_ray.verifiers.math import compare

        def equal(*_: Any) -> bool:
            try:
                return (
                    len([bytearray(2**20) for _ in range(2**20)]) == 0 if "bomb" in completions[0] else False
                )
            except MemoryError:
                return False

        compare.sympy_equal = equal
        return math_reward(prompts, completions, **{**columns, "answer": ["z + 1"]})  # numbers need no sympy

    scored = score_with(swallows, ["\\boxed{x}", "bomb \\boxed{x}", "\\boxed{y}"], memory_gib=1.0)
    assert rewards_of(scored) == [0.0, None, 0.0]
    assert reasons_of(scored) == [None, "memory: math needed more than 1 GiB", None]


@pytest.mark.parametrize(
    ("how", "ending"),
    [("exit", "exited with status 3"), ("segfault", "killed by SIGSEGV"), ("kill", "killed by SIGKILL")],
)
def test_a_crash_costs_one_completion(how: str, ending: str) -> None:
    def crashes(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import ctypes
        import os

        if completions[0] == "exit":
            os._exit(3)
        if completions[0] == "segfault":
            ctypes.string_at(0)
        if completions[0] == "kill":
            os.kill(os.getpid(), 9)
        return [1.0]

    scored = score_with(crashes, ["a", how, "b"])
    assert rewards_of(scored) == [1.0, None, 1.0]
    assert reasons_of(scored) == [None, f"crash: math: {ending}", None]


def test_parts_before_a_timeout_are_kept_and_the_slow_function_is_named() -> None:
    def sleeps(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import time

        time.sleep(600)
        return [1.0]

    with Verifier(VerifiersConfig(timeout_s=SHORT_S, rewards=OURS), {"sleeps": sleeps}) as verifier:
        scored = verifier.score(group_of("85", ["85"]))
    assert next(groups.rows(scored))["reward_parts"] == {"exact_match": [1.0], "sleeps": [None]}
    assert reasons_of(scored) == ["timeout: sleeps, with what ran before it, took more than 3 s"]


def test_functions_of_ours_share_a_child_and_none_is_left_after_close() -> None:
    rewards = {**OURS, "format": 1, "gvpo_ray.verifiers.rewards:in_place": 1}
    with Verifier(VerifiersConfig(timeout_s=LIMIT_S, rewards=rewards)) as verifier:
        pids = []
        for _ in range(3):
            verifier.score(group_of("1", ["a", "b"]))
            pids.append(children_of(template_pid(verifier)))
        assert pids == [[shared_pid(verifier)]] * 3
    assert not is_running(pids[0][0])


def test_a_check_of_a_users_function_has_a_child_of_its_own_which_ends_with_it() -> None:
    def own(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(os.getpid())]

    with Verifier(
        VerifiersConfig(timeout_s=LIMIT_S, rewards={"own": 1, **OURS, "also": 1}),
        {"own": own, "also": own},
    ) as verifier:
        (row,) = groups.rows(verifier.score(group_of("1", ["a", "b", "c"])))
        pids = {int(pid) for name in ("own", "also") for pid in row["reward_parts"][name]}
        assert len(pids) == 6
        assert children_of(template_pid(verifier)) == [shared_pid(verifier)]


def test_a_child_that_died_while_idle_is_replaced_without_loss() -> None:
    with Verifier(VerifiersConfig(timeout_s=LIMIT_S, rewards=OURS)) as verifier:
        assert rewards_of(verifier.score(group_of("1", ["\\boxed{1}"]))) == [1.0]
        first = shared_pid(verifier)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        assert rewards_of(verifier.score(group_of("1", ["\\boxed{1}"]))) == [1.0]
        assert shared_pid(verifier) != first


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("main._confine = fail", "cannot confine itself: OSError: [Errno 16] a filter of its own"),
        ("main._confine = lambda *_: int('a limit')", "cannot confine itself: ValueError"),
        ("os.fork = fail", "before it takes up a check: no process can be forked: OSError: [Errno 16]"),
        ("main._serve = lambda *_: os.kill(os.getpid(), 9)", "takes up a check: killed by SIGKILL"),
    ],
)
def test_a_child_that_cannot_begin_says_why(tmp_path: Path, broken: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, sys\nmain = sys.modules['__main__']\n"
        "def fail(*_): raise OSError(16, 'a filter of its own')\n"
        f"if hasattr(main, '_confine'): {broken}\n"
        "def reward(prompts, completions): return [1.0]\n"
    )
    verifier = Verifier(VerifiersConfig(rewards={f"{tmp_path}/mine.py:reward": 1.0}))
    with verifier, pytest.raises(SandboxError, match=re.escape(said)):
        verifier.score(group_of("1", ["a"]))


@pytest.mark.parametrize("functions", [{}, {"also": lambda prompts, completions, **_: [0.0]}])
def test_a_template_that_died_is_replaced_without_loss(functions: dict[str, Callable[..., Any]]) -> None:
    with Verifier(VerifiersConfig(timeout_s=LIMIT_S, rewards=OURS), functions) as verifier:
        verifier.score(group_of("1", ["a"]))
        child = shared_pid(verifier)
        os.kill(template_pid(verifier), signal.SIGKILL)
        assert child is not None and wait_until_gone(child)  # it dies with the template
        assert rewards_of(verifier.score(group_of("1", ["\\boxed{1}"]))) == [1.0]


def test_a_child_that_never_returns_dies_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "loops.py").write_text("def reward(prompts, completions, **columns):\n    while True: pass\n")
    program = (
        "from gvpo_ray import groups; from gvpo_ray.config.run import VerifiersConfig; from "
        "gvpo_ray.verifiers.verifier import Verifier\n"
        "verifier = Verifier(VerifiersConfig(timeout_s=600, cpu_s=600, "
        f"rewards={{{str(tmp_path / 'loops.py') + ':reward'!r}: 1}}))\n"
        "print(verifier._sandbox._template._process.pid, flush=True)\n"
        "verifier.score(groups.table([{'prompt': 'p', 'answer': '1', 'completions': ['a']}]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    template = int(parent.stdout.readline())
    deadline = time.monotonic() + LIMIT_S
    while not (children := children_of(template)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (child,) = children
    while time.clock_gettime((~child << 3) | 2) < 0.5:  # until it computes
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    assert wait_until_gone(child) and wait_until_gone(template)


def test_a_limit_counts_whichever_reason_names_it() -> None:
    def sleeps(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import time

        time.sleep(600)
        return [1.0]

    with Verifier(VerifiersConfig(timeout_s=SHORT_S), {"sleeps": sleeps}) as verifier:
        scored = verifier.score(
            group_of("8", ["\\boxed{"] * 2, completion_ids=[[1], [2]], finish_reasons=["stop"] * 2)
        )
    no_answer = "math: no answer found in the completion"
    limit = "timeout: sleeps, with what ran before it, took more than 3 s"
    assert reasons_of(scored) == [f"{no_answer}\n{limit}"] * 2
    assert groups.all_cut_off(scored)
    (row,) = groups.rows(scored)
    metrics = batch_metrics([{**row, "version_min": [0, 0]}], 0)
    assert (metrics["unverifiable/timeout"], metrics["unverifiable/other"]) == (1.0, 0.0)


def test_a_check_that_ignores_the_signal_is_killed_a_second_after_its_cpu_time() -> None:
    def ignores(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import signal

        signal.signal(signal.SIGXCPU, signal.SIG_IGN)
        while completions[0] == "loop":
            pass
        return [1.0]

    scored = score_with(ignores, ["a", "loop", "b"], cpu_s=1, timeout_s=600)
    assert rewards_of(scored) == [1.0, None, 1.0]
    assert reasons_of(scored)[1] == "timeout: math used more than 1 s of CPU time"


def test_a_template_that_is_gone_is_started_once_again_with_its_shared_child(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def own(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [1.0]

    with Verifier(VerifiersConfig(timeout_s=LIMIT_S, rewards={"own": 1, **OURS}), {"own": own}) as verifier:
        sandbox = verifier._sandbox
        assert sandbox is not None
        assert rewards_of(verifier.score(group_of("1", ["1"]))) == [2.0]  # from now on ours has a child
        sandbox._scratch.folder.rmdir()
        assert rewards_of(verifier.score(group_of("1", ["1"]))) == [2.0]
    assert "Traceback" not in capfd.readouterr().err  # another template cannot wait for that child


def test_a_scratch_folder_that_two_remove_at_once_goes_and_one_that_stays_keeps_its_lock(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def shared() -> Scratch:
        made = Scratch()
        for name in "ab":
            (made.folder / name).mkdir()
            (made.folder / name / "file").touch()
        return made

    unlink, first, second = os.unlink, shared(), shared()

    def after_another(path: Any) -> None:
        unlink(path)
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", after_another)
        first.remove()
    assert {*tmp_path.iterdir()} == {second.folder, Path(second._lock.name)}

    def busy(path: Any) -> None:
        raise OSError(errno.EBUSY, "busy")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", busy)
        second.remove()
        other = Scratch()  # which cannot remove it either
        assert second.folder.exists() and Path(second._lock.name).exists()
    last = Scratch()
    assert {*tmp_path.iterdir()} == {one for s in (other, last) for one in (s.folder, Path(s._lock.name))}
    other.remove()
    last.remove()
    assert not [*tmp_path.iterdir()]
