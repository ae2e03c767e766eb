import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.observe.metrics import batch_metrics
from gvpo_ray.sandbox.channel import GoneError
from gvpo_ray.sandbox.functions import Part
from gvpo_ray.sandbox.process import Sandbox, _stages
from gvpo_ray.verifiers.math.reward import math_reward
from gvpo_ray.verifiers.outages import RewardError
from gvpo_ray.verifiers.verifier import Verifier, validate_rewards

SAMPLE = Path(__file__).parent / "data" / "gsm8k_math_sample.parquet"
LIMIT_S = 2.0
START_UP_S = 20.0
"""Generous: two cores, shared."""


def _group(answer: str, completions: list[str], **more: Any) -> pa.Table:
    return groups.table(
        [
            {
                "group_id": 7,
                "prompt": "What?",
                "answer": answer,
                "dataset": "d",
                "completions": completions,
                **more,
            }
        ]
    )


def _rewards(scored: pa.Table) -> list[float | None]:
    return scored["rewards"][0].as_py()


def _reasons(scored: pa.Table) -> list[str | None]:
    return scored["reward_reasons"][0].as_py()


def _score_with(function: Callable[..., Any], completions: list[str], **config: Any) -> pa.Table:
    """Score with `function` in the place of `math`, weight 1."""
    with Verifier(VerifiersConfig(**{"timeout_s": LIMIT_S, **config}), {"math": function}) as verifier:
        return verifier.score(_group("1", completions))


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + START_UP_S
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not _is_running(pid)


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(VerifiersConfig(timeout_s=LIMIT_S)) as verifier:
        yield verifier


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (
            "85",
            ["\\boxed{85}", "So 80 + 5 = 85. The answer is 85.", "$85.0$"],
            ["\\boxed{84}", "The answer is 58."],
        ),
        (
            "\\frac{1}{2}",
            ["\\boxed{\\frac12}", "The answer is 0.5", "$\\frac{2}{4}$"],
            ["\\boxed{2}", "$\\frac{1}{3}$"],
        ),
        ("1,234", ["\\boxed{1234}"], ["\\boxed{1.234}"]),
        ("x^2 - 1", ["$(x - 1)(x + 1)$"], ["$x^2 + 1$"]),
        ("(3, -1)", ["$(3,-1)$"], ["$(-1,3)$"]),
        ("\\$36", ["\\boxed{36}"], ["\\boxed{63}"]),
        ("$\\sqrt{8}$", ["\\boxed{2\\sqrt{2}}"], ["\\boxed{2}"]),
    ],
)
def test_right_answers_get_1_and_wrong_ones_0(
    verifier: Verifier, answer: str, right: list[str], wrong: list[str]
) -> None:
    scored = verifier.score(_group(answer, right + wrong))
    assert _rewards(scored) == [1.0] * len(right) + [0.0] * len(wrong)
    assert _reasons(scored) == [None] * len(right + wrong)


def test_every_real_gold_answer_is_right_when_boxed_and_a_neighbours_answer_is_wrong(
    verifier: Verifier,
) -> None:
    answers = pq.read_table(SAMPLE)["answer"].to_pylist()
    assert len(set(answers)) == 20
    for answer, neighbour in zip(answers, answers[1:] + answers[:1], strict=True):
        completions = [f"Therefore the answer is $\\boxed{{{text}}}$." for text in (answer, neighbour)]
        assert _rewards(verifier.score(_group(answer, completions))) == [1.0, 0.0], answer


def test_a_completion_without_an_answer_is_wrong_and_says_so(verifier: Verifier) -> None:
    scored = verifier.score(_group("85", ["", "\\boxed{8", "\\boxed{85"]))
    assert _rewards(scored) == [0.0, 0.0, 0.0]
    assert _reasons(scored) == ["math: no answer found in the completion"] * 3


def test_what_was_cut_at_the_token_limit_is_not_right_by_luck(verifier: Verifier) -> None:
    completions = ["First, 80 + 5 is 85", "So it is \\boxed{85}. Check:"]
    scored = verifier.score(_group("85", completions, finish_reasons=["length", "length"]))
    assert _rewards(scored) == [0.0, 1.0]


def test_a_gold_answer_that_does_not_parse_is_not_scored_unless_the_text_is_the_same(
    verifier: Verifier,
) -> None:
    scored = verifier.score(_group("\\frac{", ["\\boxed{1}", "\\boxed{2}"]))
    assert _rewards(scored) == [None, None]
    assert _reasons(scored) == ["math: the gold answer '\\\\frac{' cannot be understood"] * 2


def test_a_scored_table_is_a_valid_group_table_and_keeps_what_it_had(verifier: Verifier) -> None:
    two = pa.concat_tables([_group("1", ["\\boxed{1}", "\\boxed{2}", "none"]), _group("2", ["\\boxed{2}"])])
    scored = verifier.score(two)
    groups.validate(scored, ("group_id", "answer", "completions", *groups.REWARD_COLUMNS))
    assert scored.select(two.column_names).equals(two)
    assert scored["rewards"].to_pylist() == [[1.0, 0.0, 0.0], [1.0]]
    assert [row["reward_parts"] for row in groups.rows(scored)] == [
        {"math": [1.0, 0.0, 0.0]},
        {"math": [1.0]},
    ]


def test_hostile_text_arrives_as_it_is(verifier: Verifier) -> None:
    completions = [
        "\x00\x00 The answer is $5$.",
        "\u2028\r\n\x1b[0m \\boxed{5}",
        "𝔘 is \\boxed{5}",
        '{"part": 1.0, "reason": null}\n',
        "\\boxed{" * 200,
        "(" * 5000,
    ]
    assert _rewards(verifier.score(_group("5", completions)))[:3] == [1.0, 1.0, 1.0]
    assert 1.0 not in _rewards(verifier.score(_group("5", completions)))[3:]


def test_a_function_that_never_returns_is_killed_and_its_neighbours_keep_their_rewards() -> None:
    def loops(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import signal

        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        while completions[0] == "loop":
            pass
        return [0.5]

    scored = _score_with(loops, ["a", "loop", "b", "loop", "c"], timeout_s=0.5)
    assert _rewards(scored) == [0.5, None, 0.5, None, 0.5]
    assert _reasons(scored) == [
        None,
        "timeout: math took more than 0.5 s",
        None,
        "timeout: math took more than 0.5 s",
        None,
    ]


def test_a_check_that_computes_too_long_is_ended_by_its_cpu_time_whatever_the_clock_says() -> None:
    def loops(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        while completions[0] == "loop":
            pass
        return [0.5]

    scored = _score_with(loops, ["a", "loop", "b"], cpu_s=1, timeout_s=600)
    assert _rewards(scored) == [0.5, None, 0.5]
    assert _reasons(scored) == [None, "timeout: math used more than 1 s of CPU time", None]


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
            pids.append(_shared_pid(verifier))
            verifier.score(_group("1", ["a"]))
    # the first is None: a child starts with the first check that needs it, and its last check ends it
    assert [pids.index(pid) for pid in pids] == [0, 1, 1, 0, 4, 4, 0]


@pytest.mark.parametrize(
    "attempt",
    [
        "__import__('subprocess').run(['true'])",
        "__import__('os').fork()",
        "__import__('socket').create_connection(('127.0.0.1', 9))",
        "open(outside, 'w')",
        "__import__('os').remove(__file__)",
        "__import__('os').kill(__import__('os').getppid(), 9)",
    ],
)
def test_a_function_can_only_compute(tmp_path: Path, attempt: str) -> None:
    (tmp_path / "mine.py").write_text(
        f"outside = {str(tmp_path / 'outside')!r}\n"
        "def reward(prompts, completions, **columns):\n"
        f"    {attempt}\n"
        "    return [1.0]\n"
    )
    with Verifier(
        VerifiersConfig(timeout_s=LIMIT_S, rewards={f"{tmp_path}/mine.py:reward": 1.0})
    ) as verifier:
        scored = verifier.score(_group("1", ["a"]))
    assert _rewards(scored) == [None]
    assert "PermissionError" in (_reasons(scored)[0] or "")
    assert (tmp_path / "mine.py").exists() and not (tmp_path / "outside").exists()


def test_a_function_may_write_into_its_scratch_folder_which_goes_with_it() -> None:
    def writes(prompts: list[str], completions: list[str], **_: Any) -> list[Any]:
        import tempfile

        with tempfile.NamedTemporaryFile("w", delete=False) as file:
            file.write(completions[0])
        with open(file.name) as written:
            return [(float(len(written.read())), file.name)]

    scored = _score_with(writes, ["abc"])
    assert _rewards(scored) == [3.0]
    assert not Path(_reasons(scored)[0] or "").exists()


def test_the_scratch_folder_of_a_killed_verifier_is_removed_by_the_next_one() -> None:
    program = (
        "import os, signal; from gvpo_ray.config.run import VerifiersConfig; from "
        "gvpo_ray.verifiers.verifier import Verifier\n"
        "verifier = Verifier(VerifiersConfig(rewards={'format': 1}))\n"
        "print(verifier._sandbox._scratch.folder, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    left = Path(killed.stdout.strip())
    assert killed.returncode == -signal.SIGKILL and left.is_dir()
    with Verifier(VerifiersConfig(rewards={"format": 1})):
        assert not left.exists() and not left.with_suffix(".lock").exists()


def test_a_memory_bomb_is_a_crash_and_its_neighbours_keep_their_rewards() -> None:
    def hoards(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(len(bytearray(2**31 if completions[0] == "bomb" else 2**20)) > 0)]

    scored = _score_with(hoards, ["a", "bomb", "b"], memory_gib=1.0)
    assert _rewards(scored) == [1.0, None, 1.0]
    assert _reasons(scored) == [None, "memory: math needed more than 1 GiB", None]


def test_math_that_runs_out_of_memory_is_a_crash_though_sympy_swallows_the_error() -> None:
    def swallows(prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        from gvpo_ray.verifiers.math import compare
        from gvpo_ray.verifiers.math.reward import math_reward

        def equal(*_: Any) -> bool:
            try:
                return (
                    len([bytearray(2**20) for _ in range(2**20)]) == 0 if "bomb" in completions[0] else False
                )
            except MemoryError:
                return False

        compare.sympy_equal = equal
        return math_reward(prompts, completions, **{**columns, "answer": ["z + 1"]})  # numbers need no sympy

    scored = _score_with(
        swallows, ["\\boxed{x}", "bomb \\boxed{x}", "\\boxed{y}"], memory_gib=1.0, timeout_s=START_UP_S
    )
    assert _rewards(scored) == [0.0, None, 0.0]
    assert _reasons(scored) == [None, "memory: math needed more than 1 GiB", None]


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

    scored = _score_with(crashes, ["a", how, "b"])
    assert _rewards(scored) == [1.0, None, 1.0]
    assert _reasons(scored) == [None, f"crash: math: {ending}", None]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("[None]", "math gave no reward (None)"),
        ("[(None, 'no unit')]", "no unit"),
        ("[float('nan')]", "math returned nan, not a finite float32"),
        ("[1e39]", "math returned 1e+39, not a finite float32"),
        ("['1']", "math returned str '1', not a number"),
        ("[]", "math returned 0 rewards for 1 completion"),
        ("[1.0, 2.0]", "math returned 2 rewards for 1 completion"),
        ("1.0", "math returned float '1.0', not a list of rewards"),
        ("1 / 0", "math raised ZeroDivisionError: division by zero"),
        ("exec('raise SystemExit(1)')", "math raised SystemExit: 1"),
        ("exec(r'raise ValueError(\"\\ud800\\n!\")')", "math raised ValueError: ? !"),
    ],
)
def test_a_result_that_is_no_reward_leaves_the_completion_out_with_the_reason(
    result: str, reason: str
) -> None:
    scored = _score_with(
        lambda prompts, completions, **_: eval(result) if completions == ["bad"] else [1.0], ["a", "bad", "b"]
    )
    assert _rewards(scored) == [1.0, None, 1.0]
    assert _reasons(scored) == [None, reason, None]


@pytest.mark.parametrize(
    ("result", "reward"), [("[True]", 1.0), ("(2,)", 2.0), ("__import__('numpy').array([0.25])", 0.25)]
)
def test_numbers_of_other_kinds_are_rewards(result: str, reward: float) -> None:
    assert _rewards(_score_with(lambda prompts, completions, **_: eval(result), ["a"])) == [reward]


def test_several_rewards_are_a_weighted_sum_and_a_part_without_reward_leaves_none(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def length(prompts, completions, **columns):\n"
        "    return [None if 'skip' in text else len(text) for text in completions]\n"
    )
    length = f"{tmp_path / 'mine.py'}:length"
    with Verifier(VerifiersConfig(timeout_s=LIMIT_S, rewards={"math": 2.0, length: -0.5})) as verifier:
        scored = verifier.score(_group("85", ["$85$", "$84$", "$85$ skip"]))
    # 2 * 1 - 0.5 * 4 = 0; 2 * 0 - 0.5 * 4 = -2; 2 * 1 - nothing
    assert _rewards(scored) == [0.0, -2.0, None]
    assert next(groups.rows(scored))["reward_parts"] == {"math": [1.0, 0.0, 1.0], length: [4.0, 4.0, None]}
    assert _reasons(scored) == [None, None, f"{length} gave no reward (None)"]


def test_a_weighted_sum_beyond_float32_is_no_reward() -> None:
    scored = _score_with(lambda prompts, completions, **_: [3e38], ["a"], rewards={"math": 2.0})
    assert _rewards(scored) == [None]
    assert _reasons(scored) == ["the weighted sum is not a finite float32"]


def test_parts_before_a_timeout_are_kept_and_the_slow_function_is_named() -> None:
    def sleeps(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import time

        time.sleep(600)
        return [1.0]

    with Verifier(VerifiersConfig(timeout_s=0.5), {"sleeps": sleeps}) as verifier:
        scored = verifier.score(_group("85", ["$85$"]))
    assert next(groups.rows(scored))["reward_parts"] == {"math": [1.0], "sleeps": [None]}
    assert _reasons(scored) == ["timeout: sleeps, with what ran before it, took more than 0.5 s"]


def test_a_callable_is_added_with_weight_1_and_sees_one_completion_with_its_columns() -> None:
    def columns(prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        import json

        return [(1.0, json.dumps([prompts, completions, columns]))]

    table = _group(
        "85", ["$85$", "\\boxed{5}"], completion_ids=[[1, 2], [3]], finish_reasons=["stop", "length"]
    )
    with Verifier(VerifiersConfig(timeout_s=LIMIT_S), {"columns": columns}) as verifier:
        scored = verifier.score(table)
    assert _rewards(scored) == [2.0, 1.0]
    seen = json.loads(_reasons(scored)[1])
    expected = {
        "group_id": [7],
        "answer": ["85"],
        "dataset": ["d"],
        "completion_ids": [[3]],
        "finish_reasons": ["length"],
    }
    assert seen == [["What?"], ["\\boxed{5}"], expected]


def test_what_a_function_prints_and_reads_does_not_touch_the_protocol(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def talks(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import os
        import sys

        print('{"part": 0.0, "reason": null}', flush=True)
        os.write(1, b'{"part": 0.0, "reason": null}\n')
        return [1.0 if sys.stdin.read() == "" else 0.0]

    assert _rewards(_score_with(talks, ["a", "b"])) == [1.0, 1.0]
    assert capfd.readouterr().err.count('{"part": 0.0') == 4


def test_the_child_gets_no_secrets_and_a_scratch_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")

    def environment(prompts: list[str], completions: list[str], **_: Any) -> list[Any]:
        import os

        return [(1.0, " ".join(["leak" if "HF_TOKEN" in os.environ else "clean", os.environ["HOME"]]))]

    status, home = (_reasons(_score_with(environment, ["a"]))[0] or "").split()
    assert status == "clean"
    assert home != os.environ.get("HOME") and not Path(home).exists()  # removed by close


def _shared_pid(verifier: Verifier) -> int | None:
    """The pid of the child that serves many checks."""
    assert verifier._sandbox is not None
    return verifier._sandbox._child and verifier._sandbox._child.pid


def _template_pid(verifier: Verifier) -> int:
    assert verifier._sandbox is not None and verifier._sandbox._template is not None
    return verifier._sandbox._template._process.pid


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_functions_of_ours_share_a_child_and_none_is_left_after_close() -> None:
    rewards = {"math": 1, "format": 1, "gvpo_ray.verifiers.rewards:in_place": 1}
    with Verifier(VerifiersConfig(timeout_s=LIMIT_S, rewards=rewards)) as verifier:
        pids = []
        for _ in range(3):
            verifier.score(_group("1", ["a", "b"]))
            pids.append(_children(_template_pid(verifier)))
        assert pids == [[_shared_pid(verifier)]] * 3
    assert not _is_running(pids[0][0])


def test_a_check_of_a_users_function_has_a_child_of_its_own_which_ends_with_it() -> None:
    def own(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(os.getpid())]

    with Verifier(
        VerifiersConfig(timeout_s=LIMIT_S, rewards={"own": 1, "math": 1, "also": 1}),
        {"own": own, "also": own},
    ) as verifier:
        (row,) = groups.rows(verifier.score(_group("1", ["a", "b", "c"])))
        pids = {int(pid) for name in ("own", "also") for pid in row["reward_parts"][name]}
        assert len(pids) == 6
        assert _children(_template_pid(verifier)) == [_shared_pid(verifier)]


def test_a_child_that_died_while_idle_is_replaced_without_loss() -> None:
    with Verifier(VerifiersConfig(timeout_s=LIMIT_S)) as verifier:
        assert _rewards(verifier.score(_group("1", ["\\boxed{1}"]))) == [1.0]
        first = _shared_pid(verifier)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        assert _rewards(verifier.score(_group("1", ["\\boxed{1}"]))) == [1.0]
        assert _shared_pid(verifier) != first


@pytest.mark.parametrize("functions", [{}, {"also": lambda prompts, completions, **_: [0.0]}])
def test_a_template_that_died_is_replaced_without_loss(functions: dict[str, Callable[..., Any]]) -> None:
    with Verifier(VerifiersConfig(timeout_s=LIMIT_S), functions) as verifier:
        verifier.score(_group("1", ["a"]))
        child = _shared_pid(verifier)
        os.kill(_template_pid(verifier), signal.SIGKILL)
        assert child is not None and _wait_until_gone(child)  # it dies with the template
        assert _rewards(verifier.score(_group("1", ["\\boxed{1}"]))) == [1.0]


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
    deadline = time.monotonic() + START_UP_S
    while not (children := _children(template)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (child,) = children
    while time.clock_gettime((~child << 3) | 2) < 0.5:  # until it computes
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    assert _wait_until_gone(child) and _wait_until_gone(template)


def test_a_completion_that_is_run_changes_no_later_verdict() -> None:
    def runs(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
        scope: dict[str, Any] = {}
        exec(completions[0], scope)
        return [float(scope.get("result") == int(answer[0]))]

    poison = (
        "import builtins, os, tempfile\n"
        "import gvpo_ray.verifiers.math.reward as reward\n"
        "import gvpo_ray.sandbox.template as template\n"
        "reward.grade = lambda *_, **__: reward.Grade(True, None, 'x')\n"
        "builtins.int = lambda text: 7\n"
        "open(os.environ['TMPDIR'] + '/left', 'w').close()\n"
        "os.chdir(os.environ['TMPDIR'])\n"
        "os.set_blocking(1, False)\n"
        "result = 0\n"
    )
    innocent = "import os; print('x' * 2**20); result = 8 if os.listdir(os.environ['TMPDIR']) == [] else 9"
    with Verifier(
        VerifiersConfig(timeout_s=START_UP_S, rewards={"runs": 1, "math": 1}), {"runs": runs}
    ) as verifier:
        scored = verifier.score(_group("8", ["result = 7", poison, "result = 7", "\\boxed{7}", innocent]))
    (row,) = groups.rows(scored)
    assert row["reward_parts"]["runs"][:3] == [0.0, 0.0, 0.0]
    assert row["reward_parts"]["math"][:3] == [0.0, 0.0, 0.0]
    assert row["reward_parts"]["runs"][4] == 1.0


def test_a_limit_counts_whichever_reason_names_it() -> None:
    def sleeps(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import time

        time.sleep(600)
        return [1.0]

    with Verifier(VerifiersConfig(timeout_s=0.5), {"sleeps": sleeps}) as verifier:
        scored = verifier.score(
            _group("8", ["\\boxed{"] * 2, completion_ids=[[1], [2]], finish_reasons=["stop"] * 2)
        )
    no_answer = "math: no answer found in the completion"
    limit = "timeout: sleeps, with what ran before it, took more than 0.5 s"
    assert _reasons(scored) == [f"{no_answer}\n{limit}"] * 2
    assert groups.all_cut_off(scored)
    (row,) = groups.rows(scored)
    metrics = batch_metrics([{**row, "version_min": [0, 0]}], 0)
    assert (metrics["unverifiable/timeout"], metrics["unverifiable/other"]) == (1.0, 0.0)


def test_completions_that_bring_a_reward_are_correct_by_it(verifier: Verifier) -> None:
    graded = _group(
        "8", ["a", "b"], rewards=[1.0, 0.0], completion_ids=[[1], [2]], finish_reasons=["stop"] * 2
    )
    (row,) = groups.rows(verifier.score(graded))
    metrics = batch_metrics([{**row, "version_min": [None, None]}], 0)
    assert (metrics["reward/mean"], metrics["completions/correct"]) == (0.5, 0.5)


def test_a_print_costs_no_reward_and_little_of_it_reaches_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    def talks(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import os

        print("\x1b[31mred", completions[0])
        for _ in range(64):
            os.write(1, b"x" * 2**20)
            os.write(2, b"y" * 2**20)
        if completions[0] == "closes":
            os.close(1)
            os.close(2)
        return [1.0]

    scored = _score_with(talks, ["a", "closes", "b"], timeout_s=START_UP_S)
    assert _rewards(scored) == [1.0, 1.0, 1.0]
    printed = capfd.readouterr()
    assert printed.out == "" and len(printed.err) < 100_000
    assert printed.err.count("\\x1b[31mred") == 3 and "\x1b" not in printed.err
    assert printed.err.count("the rest of what this reward function prints is left out") == 3


def test_what_all_checks_print_is_limited_as_well(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gvpo_ray.sandbox.channel.MAX_PRINTED_BYTES_IN_ALL", 100)

    def talks(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        print(completions[0] * 40)
        return [1.0]

    assert _rewards(_score_with(talks, ["a", "b", "c", "d"])) == [1.0] * 4
    printed = capfd.readouterr().err
    assert [printed.count(letter * 20) for letter in "abcd"] == [2, 2, 0, 0]
    assert printed.count("left out") == 1


def test_no_descriptor_of_a_check_is_a_file_of_the_verifier() -> None:
    def looks(prompts: list[str], completions: list[str], **_: Any) -> list[Any]:
        import os
        import stat

        tried = []
        for descriptor in range(256):
            try:
                is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
                tried.append(is_file)
                os.ftruncate(descriptor, 0)
                tried.append(True)
            except OSError:
                pass
        return [(float(any(tried)), str(tried))]

    assert _rewards(_score_with(looks, ["a"])) == [0.0]


@pytest.mark.parametrize("result", ["10**400", "-10**400", "__import__('fractions').Fraction(10**400)"])
@pytest.mark.parametrize("trusted", [False, True])
def test_a_number_beyond_all_limits_is_a_fault(result: str, trusted: bool) -> None:
    scored = _score_with(
        lambda prompts, completions, **_: [eval(result) if text == "bad" else 1.0 for text in completions],
        ["a", "bad"],
        rewards={"math": {"trusted": trusted}},
    )
    assert _rewards(scored) == [1.0, None]
    assert _reasons(scored) == [None, "math returned a number beyond 1e308, not a finite float32"]


@pytest.mark.parametrize("trusted", [False, True])
def test_half_a_surrogate_pair_in_a_reason_is_replaced(trusted: bool) -> None:
    scored = _score_with(
        lambda prompts, completions, **_: [(0.5, "half \ud83d\nof it")] * len(completions),
        ["a"],
        rewards={"math": {"trusted": trusted}},
    )
    assert (_rewards(scored), _reasons(scored)) == ([0.5], ["half ? of it"])

    def raises(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        raise ValueError("half \ud83d")

    scored = _score_with(raises, ["a"], rewards={"math": {"trusted": trusted}})
    assert _reasons(scored) == ["math raised ValueError: half ?"]


@pytest.mark.parametrize(
    "part",
    ["1" + "0" * 400, "1" + "0" * 5000, "1e999", "NaN", "[1.0]", '"1.0"', "true", "{}", '1.0, "reason": 3'],
)
def test_a_forged_answer_costs_its_own_check_alone(part: str) -> None:
    def forges(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import os
        import sys

        frame = sys._getframe()
        while frame is not None and "check" not in frame.f_locals:
            frame = frame.f_back  # type: ignore[assignment]
        if completions[0] == "forge":
            check, channel = frame.f_locals["check"], frame.f_locals["channel"]
            channel.sendall(f'{{"number": "{check["number"]}", "part": {part}}}\n'.encode() * 3)
            os._exit(0)
        return [1.0]

    scored = _score_with(forges, ["a", "forge", "b"])
    assert _rewards(scored) == [1.0, None, 1.0]
    assert (_reasons(scored)[1] or "").startswith("crash: math: an answer that is not ")


def test_a_check_that_ignores_the_signal_is_killed_a_second_after_its_cpu_time() -> None:
    def ignores(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import signal

        signal.signal(signal.SIGXCPU, signal.SIG_IGN)
        while completions[0] == "loop":
            pass
        return [1.0]

    scored = _score_with(ignores, ["a", "loop", "b"], cpu_s=1, timeout_s=600)
    assert _rewards(scored) == [1.0, None, 1.0]
    assert _reasons(scored)[1] == "timeout: math used more than 1 s of CPU time"


@pytest.mark.parametrize(
    "take", [lambda scratch: scratch.folder.rmdir(), lambda scratch: Path(scratch._lock.name).unlink()]
)
def test_a_scratch_folder_that_a_cleaner_took_is_made_again(take: Callable[[Any], None]) -> None:
    def writes(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import tempfile

        tempfile.TemporaryDirectory().cleanup()
        if completions[0] == "ends":
            os._exit(1)
        return [1.0]

    with Verifier(VerifiersConfig(timeout_s=LIMIT_S), {"math": writes}) as verifier:
        assert verifier._sandbox is not None
        for completion, reward in (("a", 1.0), ("ends", None), ("b", 1.0)):
            take(verifier._sandbox._scratch)
            assert _rewards(verifier.score(_group("1", [completion]))) == [reward]
        folder = verifier._sandbox._scratch.folder
        assert folder.is_dir()
    assert not folder.exists() and not folder.with_suffix(".lock").exists()


def test_a_template_that_is_gone_is_started_once_again_with_its_shared_child(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def own(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [1.0]

    with Verifier(
        VerifiersConfig(timeout_s=LIMIT_S, rewards={"own": 1, "math": 1}), {"own": own}
    ) as verifier:
        sandbox = verifier._sandbox
        assert sandbox is not None
        assert _rewards(verifier.score(_group("1", ["1"]))) == [2.0]  # from now on math has a child
        sandbox._scratch.folder.rmdir()
        assert _rewards(verifier.score(_group("1", ["1"]))) == [2.0]
    assert "Traceback" not in capfd.readouterr().err  # another template cannot wait for that child


def test_whatever_a_check_leaves_in_the_scratch_folder_is_gone_for_the_next() -> None:
    def leaves(prompts: list[str], completions: list[str], **_: Any) -> list[Any]:
        import os

        here = os.environ["TMPDIR"]
        found = os.listdir(here)
        os.chdir(here)
        open(b"\xff name", "w").close()
        os.symlink("/", "link")
        os.mkfifo("pipe")
        os.mkdir("closed", 0o000)
        for _ in range(3000):  # deeper than recursion goes
            os.mkdir("d")
            os.chdir("d")
        return [(float(len(found)), str(found))]

    scored = _score_with(leaves, ["a", "b", "c"], timeout_s=START_UP_S)
    assert _rewards(scored) == [0.0, 0.0, 0.0]


def test_an_argument_of_the_config_holds_where_the_data_have_a_column_of_its_name() -> None:
    with Verifier(VerifiersConfig(rewards={"length": {"arguments": {"limit": 10}}})) as verifier:
        (check,) = verifier.check(["p"], ["a b c d e"], {"limit": [1000]})
    assert check.reward == -0.5


def test_validate_rewards_accepts_what_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helper_of_mine.py").write_text("HALF = 0.5\n")
    (tmp_path / "module_of_mine.py").write_text(
        "from dataclasses import dataclass\nfrom helper_of_mine import HALF\n"
        "@dataclass\nclass Parameters:\n    value: float = HALF\n"
        "def reward(prompts, completions, **columns):\n    return [Parameters().value for _ in completions]\n"
    )
    validate_rewards(VerifiersConfig())
    validate_rewards(VerifiersConfig(rewards={f"{tmp_path}/module_of_mine.py:reward": 1.0}))
    monkeypatch.syspath_prepend(str(tmp_path))
    validate_rewards(VerifiersConfig(rewards={"module_of_mine:reward": 1.0}))
    monkeypatch.chdir(tmp_path)
    with Verifier(
        VerifiersConfig(rewards={"module_of_mine.py:reward": 1.0, "module_of_mine:reward": 1.0})
    ) as verifier:
        assert _rewards(verifier.score(_group("1", ["a"]))) == [1.0]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("{folder}/no.py:reward", "no file {folder}/no.py"),
        ("no_such_module.inner:reward", "no module named no_such_module"),
        ("{folder}/bad.py:reword", "{folder}/bad.py has no function 'reword'"),
        ("{folder}/bad.py:LIMIT", "LIMIT is int, not a function"),
        ("json:reward", "json has no function 'reward'"),
        ("{folder}/broken.py:reward", "ModuleNotFoundError: No module named 'no_such_dependency'"),
    ],
)
def test_validate_rewards_names_what_cannot_be_loaded(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / "bad.py").write_text("LIMIT = 1\ndef reward(prompts, completions, **columns): return [1.0]\n")
    (tmp_path / "broken.py").write_text("import no_such_dependency\n")
    name, complaint = name.format(folder=tmp_path), complaint.format(folder=tmp_path)
    with pytest.raises(ConfigError) as caught:
        validate_rewards(VerifiersConfig(rewards={name: 1.0}))
    assert str(caught.value) == f"verifiers.rewards.{name}: {complaint}"


def test_the_math_reward_is_a_reward_function_like_any_other() -> None:
    assert math_reward(["p", "p"], ["$0.5$", "$2$"], answer=["\\frac{1}{2}", "3"], dataset=["d", "d"]) == [
        1.0,
        0.0,
    ]


def test_a_reward_name_that_is_neither_built_in_nor_passed_is_a_config_error_before_any_child_starts() -> (
    None
):
    with pytest.raises(
        ConfigError, match=r"verifiers\.rewards\.brevity: unknown reward; built in is math, exact_match"
    ):
        validate_rewards(VerifiersConfig(rewards={"brevity": 1.0}))


def test_an_argument_that_a_built_in_function_does_not_have_is_a_config_error() -> None:
    with pytest.raises(
        ConfigError,
        match=r"verifiers\.rewards\.numeric: no argument 'tolerance'; it takes absolute_tolerance, answer, "
        r"relat",
    ):
        validate_rewards(VerifiersConfig(rewards={"numeric": {"arguments": {"tolerance": 1}}}))


def test_a_function_that_fails_on_every_row_stops_the_run_and_one_that_fails_now_and_then_does_not() -> None:
    def fails(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float("nan") if completions[0] == "bad" else 1.0]

    with (
        Verifier(VerifiersConfig(timeout_s=LIMIT_S), {"math": fails}) as verifier,
        pytest.raises(RewardError) as caught,
    ):
        verifier.score(_group("1", ["bad"] * 40))
    assert str(caught.value) == (
        "verifiers.rewards.math fails on every row (40 so far), last on completion 39 of group 7: math "
        "returned nan, not a finite float32"
    )
    assert _rewards(_score_with(fails, ["good"] + ["bad"] * 40)) == [1.0] + [None] * 40


def test_a_trusted_function_sees_whole_groups_and_has_the_network_and_files(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, socket\n"
        "async def reward(prompts, completions, answer, **columns):\n"
        "    socket.socket().close()\n"
        "    return [float(len(completions) + (text == gold) + os.getpid()) for text, gold in "
        "zip(completions, answer)]\n"
    )
    with Verifier(VerifiersConfig(rewards={f"{tmp_path}/mine.py:reward": {"trusted": True}})) as verifier:
        assert _rewards(verifier.score(_group("1", ["1", "2", "3"]))) == [
            4.0 + os.getpid(),
            3.0 + os.getpid(),
            3.0 + os.getpid(),
        ]


def test_a_coroutine_function_is_a_reward_function() -> None:
    async def waits(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import asyncio

        await asyncio.sleep(0.01)
        return [float(len(completions[0]))]

    assert _rewards(_score_with(waits, ["a", "bb"])) == [1.0, 2.0]


def test_completions_that_have_a_reward_keep_it_and_only_the_others_are_checked() -> None:
    def seen(prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        import json

        return [
            (0.5, json.dumps([prompts, completions, columns["finish_reasons"], columns["group_id"]]))
        ] * len(completions)

    more = {
        "finish_reasons": ["stop", "length", "stop", "length"],
        "rewards": [2.0, None, 0.0, None],
        "reward_parts": {"math": [1.0, None, 0.0, 1.0], "gone": [1.0, None, 1.0, 1.0]},
        "reward_reasons": ["as it was", "timeout: math took more than 1 s", None, None],
    }
    config = VerifiersConfig(rewards={"math": {"trusted": True}, "new": {"trusted": True}})
    with Verifier(config, {"math": seen, "new": seen}) as verifier:
        scored = verifier.score(_group("85", ["a", "b", "c", "d"], **more))
    # b and d alone, by both: 0.5 + 0.5 = 1
    assert _rewards(scored) == [2.0, 1.0, 0.0, 1.0]
    assert next(groups.rows(scored))["reward_parts"] == {
        "math": [1.0, 0.5, 0.0, 0.5],
        "new": [None, 0.5, None, 0.5],
    }
    call = json.dumps([["What?", "What?"], ["b", "d"], ["length", "length"], [7, 7]])
    assert _reasons(scored) == ["as it was", f"{call}\n{call}", None, f"{call}\n{call}"]


def test_a_group_that_has_all_of_its_rewards_goes_to_no_reward_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def fails(prompts, completions, **columns): raise AssertionError\n")
    name = f"{tmp_path}/mine.py:fails"
    offline = _group("85", ["a", "b"], rewards=[0.25, 1.0])
    for config in (VerifiersConfig(rewards={name: {"trusted": True}}), VerifiersConfig(rewards={name: 1.0})):
        with Verifier(config) as verifier:
            scored = verifier.score(offline)
            assert _rewards(verifier.score(_group("85", ["a", "b"], rewards=[None, 1.0]))) == [None, 1.0]
        groups.validate(scored, groups.REWARD_COLUMNS)
        assert _rewards(scored) == [0.25, 1.0] and _reasons(scored) == [None, None]
        assert next(groups.rows(scored))["reward_parts"] == {name: [None, None]}


def test_a_row_of_several_whose_rewards_are_null_is_checked_like_any_other(verifier: Verifier) -> None:
    two = pa.concat_tables(
        [_group("1", ["\\boxed{1}", "none"], rewards=rewards) for rewards in (None, [0.5, None])]
    )
    assert verifier.score(two)["rewards"].to_pylist() == [[1.0, 0.0], [0.5, 0.0]]


USED = {
    "arrays": "import numpy; numpy.linalg.svd(numpy.random.rand(100, 100))",
    "formulas": "import sympy; assert sympy.integrate(sympy.Symbol('x')) == sympy.sympify('x**2/2')",
    "optimisation": "import scipy.optimize; scipy.optimize.minimize(lambda x: (x**2).sum(), [1.0, 2.0])",
    "tables": "import pandas; pandas.DataFrame({'a': [1]}).to_string()",
    "tensors": "import torch; assert (torch.ones(9, 9) @ torch.ones(9, 9)).sum() == 729",
    "threads": "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool:\n"
    "    assert list(pool.map(int, '123')) == [1, 2, 3]",
    "a database": "import os, sqlite3\ndatabase = sqlite3.connect(os.environ['TMPDIR'] + '/x.db')\n"
    "database.execute('create table t (a)')\ndatabase.commit()",
    "archives": "import shutil, tempfile, zipfile\nwith tempfile.TemporaryDirectory() as folder:\n"
    "    with zipfile.ZipFile(folder + '/a.zip', 'w') as file:\n        file.writestr('a', 'b')\n"
    "    shutil.copyfile(folder + '/a.zip', folder + '/b')\n    shutil.move(folder + '/b', folder + '/c')",
    "time zones": "import datetime, zoneinfo\ndatetime.datetime.now(zoneinfo.ZoneInfo('Europe/Berlin'))",
    "an alarm": "import signal, time\n"
    "def rings(*_): raise TimeoutError\nsignal.signal(signal.SIGALRM, rings)\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.05)\ntry:\n    time.sleep(60)\nexcept TimeoutError:\n    pass\n"
    "else:\n    raise AssertionError",
}


def test_what_reward_functions_use_works_in_the_sandbox() -> None:
    def runs(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        exec(completions[0], {})
        return [1.0]

    scored = _score_with(runs, list(USED.values()), timeout_s=60, cpu_s=30, memory_gib=8.0)
    assert dict(zip(USED, _reasons(scored), strict=True)) == dict.fromkeys(USED)
    assert _rewards(scored) == [1.0] * len(USED)
