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
from gvpo_ray.config import ConfigError, VerifiersConfig
from gvpo_ray.verifiers import Verifier, math_reward, validate_rewards

SAMPLE = Path(__file__).parent / "data" / "gsm8k_math_sample.parquet"
LIMIT_S = 2.0
START_UP_S = 20.0
"""Generous: two cores, shared."""


def _group(answer: str, completions: list[str], **more: Any) -> pa.Table:
    return groups.table([{"group_id": 7, "prompt": "What?", "answer": answer, "dataset": "d", "completions": completions, **more}])


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
        ("85", ["\\boxed{85}", "So 80 + 5 = 85. The answer is 85.", "$85.0$"], ["\\boxed{84}", "The answer is 58."]),
        ("\\frac{1}{2}", ["\\boxed{\\frac12}", "The answer is 0.5", "$\\frac{2}{4}$"], ["\\boxed{2}", "$\\frac{1}{3}$"]),
        ("1,234", ["\\boxed{1234}"], ["\\boxed{1.234}"]),
        ("x^2 - 1", ["$(x - 1)(x + 1)$"], ["$x^2 + 1$"]),
        ("(3, -1)", ["$(3,-1)$"], ["$(-1,3)$"]),
        ("\\$36", ["\\boxed{36}"], ["\\boxed{63}"]),
        ("$\\sqrt{8}$", ["\\boxed{2\\sqrt{2}}"], ["\\boxed{2}"]),
    ],
)
def test_right_answers_get_1_and_wrong_ones_0(verifier: Verifier, answer: str, right: list[str], wrong: list[str]) -> None:
    scored = verifier.score(_group(answer, right + wrong))
    assert _rewards(scored) == [1.0] * len(right) + [0.0] * len(wrong)
    assert _reasons(scored) == [None] * len(right + wrong)


def test_every_real_gold_answer_is_right_when_boxed_and_a_neighbours_answer_is_wrong(verifier: Verifier) -> None:
    answers = pq.read_table(SAMPLE)["answer"].to_pylist()
    assert len(set(answers)) == 20
    for answer, neighbour in zip(answers, answers[1:] + answers[:1], strict=True):
        completions = [f"Therefore the answer is $\\boxed{{{text}}}$." for text in (answer, neighbour)]
        assert _rewards(verifier.score(_group(answer, completions))) == [1.0, 0.0], answer


def test_a_completion_without_an_answer_is_wrong_and_says_so(verifier: Verifier) -> None:
    scored = verifier.score(_group("85", ["I do not know.", ""]))
    assert _rewards(scored) == [0.0, 0.0]
    assert _reasons(scored) == ["math: no answer found in the completion"] * 2


def test_a_gold_answer_that_does_not_parse_is_not_scored_unless_the_text_is_the_same(verifier: Verifier) -> None:
    scored = verifier.score(_group("\\frac{", ["\\boxed{1}", "\\boxed{2}"]))
    assert _rewards(scored) == [None, None]
    assert _reasons(scored) == ["math: the gold answer '\\\\frac{' cannot be parsed"] * 2


def test_a_scored_table_is_a_valid_group_table_and_keeps_what_it_had(verifier: Verifier) -> None:
    two = pa.concat_tables([_group("1", ["\\boxed{1}", "\\boxed{2}", "none"]), _group("2", ["\\boxed{2}"])])
    scored = verifier.score(two)
    groups.validate(scored, ("group_id", "answer", "completions", *groups.REWARD_COLUMNS))
    assert scored.select(two.column_names).equals(two)
    assert scored["rewards"].to_pylist() == [[1.0, 0.0, 0.0], [1.0]]
    assert [row["reward_parts"] for row in groups.rows(scored)] == [{"math": [1.0, 0.0, 0.0]}, {"math": [1.0]}]


def test_hostile_text_arrives_as_it_is(verifier: Verifier) -> None:
    completions = ["\x00\x00 $5$", "\u2028\r\n\x1b[0m \\boxed{5}", "𝔘 $5$", '{"part": 1.0, "reason": null}\n', "\\boxed{" * 200, "(" * 5000]
    assert _rewards(verifier.score(_group("5", completions)))[:3] == [1.0, 1.0, 1.0]
    assert 1.0 not in _rewards(verifier.score(_group("5", completions)))[3:]


def test_a_tower_of_exponents_costs_its_time_limit_and_nothing_else() -> None:
    with Verifier(VerifiersConfig(timeout_s=1.0)) as verifier:
        start = time.monotonic()
        scored = verifier.score(_group("85", ["\\boxed{85}", "$9^{9^{9^{9}}}$", "\\boxed{84}"]))
        assert time.monotonic() - start < 1.0 + START_UP_S
    assert _rewards(scored) == [1.0, None, 0.0]
    assert _reasons(scored) == [None, "timeout: math took more than 1 s", None]


def test_a_function_that_never_returns_is_killed_and_its_neighbours_keep_their_rewards() -> None:
    def loops(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import signal

        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        while completions[0] == "loop":
            pass
        return [0.5]

    scored = _score_with(loops, ["a", "loop", "b", "loop", "c"], timeout_s=0.5)
    assert _rewards(scored) == [0.5, None, 0.5, None, 0.5]
    assert _reasons(scored) == [None, "timeout: math took more than 0.5 s", None, "timeout: math took more than 0.5 s", None]


def test_what_a_killed_function_started_is_killed_with_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    def starts_another(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import os
        import subprocess
        import time

        child = subprocess.Popen(["sleep", "600"])
        pid_file.write_text(str(child.pid))
        if completions[0] == "exit":
            os._exit(0)
        time.sleep(600)
        return [1.0]

    for completion in ("wait", "exit"):
        assert _rewards(_score_with(starts_another, [completion], timeout_s=0.5)) == [None]
        assert _wait_until_gone(int(pid_file.read_text()))


def test_a_memory_bomb_is_a_crash_and_its_neighbours_keep_their_rewards() -> None:
    def hoards(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(len(bytearray(2**30 if completions[0] == "bomb" else 2**20)) > 0)]

    scored = _score_with(hoards, ["a", "bomb", "b"], memory_gib=1.0)
    assert _rewards(scored) == [1.0, None, 1.0]
    assert _reasons(scored) == [None, "crash: math: ran out of memory (1 GiB)", None]


def test_math_that_runs_out_of_memory_is_a_crash_though_sympy_swallows_the_error() -> None:
    def swallows(prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        import math_verify

        from gvpo_ray.verifiers import math_reward

        def verify(gold: Any, found: Any, **_: Any) -> bool:
            try:
                return len([bytearray(2**20) for _ in range(2**20)]) == 0 if "bomb" in completions[0] else False
            except MemoryError:
                return False

        math_verify.verify = verify
        return math_reward(prompts, completions, **columns)

    scored = _score_with(swallows, ["$2$", "bomb $2$", "$3$"], memory_gib=1.0, timeout_s=START_UP_S)
    assert _rewards(scored) == [0.0, None, 0.0]
    assert _reasons(scored) == [None, "crash: math: ran out of memory (1 GiB)", None]


@pytest.mark.parametrize(
    ("how", "ending"), [("exit", "exited with status 3"), ("segfault", "killed by SIGSEGV"), ("kill", "killed by SIGKILL")]
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
        ("['1']", "math returned str, not a number"),
        ("[]", "math returned 0 rewards for 1 completion"),
        ("[1.0, 2.0]", "math returned 2 rewards for 1 completion"),
        ("1.0", "math returned float, not a list of rewards"),
        ("1 / 0", "math raised ZeroDivisionError: division by zero"),
        ("exec('raise SystemExit(1)')", "math raised SystemExit: 1"),
        ("exec(r'raise ValueError(\"\\ud800\\n!\")')", "math raised ValueError: ? !"),
    ],
)
def test_a_result_that_is_no_reward_leaves_the_completion_out_with_the_reason(result: str, reason: str) -> None:
    scored = _score_with(lambda prompts, completions, **_: eval(result) if completions == ["bad"] else [1.0], ["a", "bad", "b"])
    assert _rewards(scored) == [1.0, None, 1.0]
    assert _reasons(scored) == [None, reason, None]


@pytest.mark.parametrize(("result", "reward"), [("[True]", 1.0), ("(2,)", 2.0), ("__import__('numpy').array([0.25])", 0.25)])
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
    assert _reasons(scored) == ["timeout: sleeps took more than 0.5 s"]


def test_a_callable_is_added_with_weight_1_and_sees_one_completion_with_its_columns() -> None:
    def columns(prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        import json

        return [(1.0, json.dumps([prompts, completions, columns]))]

    table = _group("85", ["$85$", "$5$"], completion_ids=[[1, 2], [3]], finish_reasons=["stop", "length"])
    with Verifier(VerifiersConfig(timeout_s=LIMIT_S), {"columns": columns}) as verifier:
        scored = verifier.score(table)
    assert _rewards(scored) == [2.0, 1.0]
    seen = json.loads(_reasons(scored)[1])
    expected = {"group_id": [7], "answer": ["85"], "dataset": ["d"], "completion_ids": [[3]], "finish_reasons": ["length"]}
    assert seen == [["What?"], ["$5$"], expected]


def test_what_a_function_prints_and_reads_does_not_touch_the_protocol(capfd: pytest.CaptureFixture[str]) -> None:
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


def test_one_child_serves_many_checks_and_none_is_left_after_close() -> None:
    def pid(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import os

        return [float(os.getpid())]

    with Verifier(VerifiersConfig(timeout_s=LIMIT_S), {"math": pid}) as verifier:
        pids = {int(reward) for _ in range(3) for reward in _rewards(verifier.score(_group("1", ["a", "b"]))) if reward}
        assert len(pids) == 1 and _is_running(min(pids))
    assert not _is_running(min(pids))


def test_a_child_that_died_while_idle_is_replaced_without_loss() -> None:
    def pid(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import os

        return [float(os.getpid())]

    with Verifier(VerifiersConfig(timeout_s=LIMIT_S), {"math": pid}) as verifier:
        first = int(_rewards(verifier.score(_group("1", ["a"])))[0] or 0)
        os.kill(first, signal.SIGKILL)
        assert _wait_until_gone(first)
        second = _rewards(verifier.score(_group("1", ["a"])))[0]
        assert second is not None and second != first


def test_a_child_that_never_returns_dies_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "loops.py").write_text(
        "import os, pathlib\n"
        "def reward(prompts, completions, **columns):\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "    while True: pass\n"
    )
    program = (
        "from gvpo_ray import groups; from gvpo_ray.config import VerifiersConfig; from gvpo_ray.verifiers import Verifier\n"
        f"verifier = Verifier(VerifiersConfig(timeout_s=600, rewards={{{str(tmp_path / 'loops.py') + ':reward'!r}: 1}}))\n"
        "verifier.score(groups.table([{'prompt': 'p', 'answer': '1', 'completions': ['a']}]))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 3 * START_UP_S
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.01)
    child = int((tmp_path / "pid").read_text())
    assert _is_running(child)
    parent.kill()
    parent.wait()
    assert _wait_until_gone(child)


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
    with Verifier(VerifiersConfig(rewards={"module_of_mine.py:reward": 1.0, "module_of_mine:reward": 1.0})) as verifier:
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
    assert math_reward(["p", "p"], ["$0.5$", "$2$"], answer=["\\frac{1}{2}", "3"], dataset=["d", "d"]) == [1.0, 0.0]


def test_a_reward_name_that_is_neither_built_in_nor_passed_is_a_config_error_before_any_child_starts() -> None:
    with pytest.raises(ConfigError, match=r"verifiers\.rewards\.length: unknown reward; built in is math"):
        validate_rewards(VerifiersConfig(rewards={"length": 1.0}))
