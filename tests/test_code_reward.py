"""The reward `code`: rows of known data sets, comparison of outputs, and hostile programs."""

from __future__ import annotations

import base64
import json
import os
import pickle
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.sandbox import programs, watch
from gvpo_ray.sandbox.values import decode, encode
from gvpo_ray.verifiers import code_tests
from gvpo_ray.verifiers.code import _spelled, last_block
from gvpo_ray.verifiers.code_tests import APPS, CONTESTS, LIVE, read_tests, same_output, same_value
from gvpo_ray.verifiers.verifier import Verifier

ADD = "a, b = map(int, input().split())\nprint(a + b)"
SUMS = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]})
CALLS = json.dumps({"inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]], "fn_name": "add"})
ASSERTS = ["assert add(1, 2) == 3", "assert add(3, 4) == 7"]


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    made = Verifier(VerifiersConfig.model_validate({"rewards": {"code": 1.0}, "timeout_s": 30, "cpu_s": 1}))
    yield made
    made.close()


def block(program: str) -> str:
    return f"Let me see.\n```python\n{program}\n```\n"


def score(verifier: Verifier, program: str, **row: Any) -> float | None:
    (check,) = verifier.check(["?"], [block(program)], {name: [value] for name, value in row.items()})
    return check.reward


LIVE_TESTS = [{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]
PACKED = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(LIVE_TESTS)))).decode()
SHIFT = (
    "class Solution:\n    def shift(self, values: List[int], by):\n        return [v + by for v in values]"
)
EVAL_PLUS = """
import numpy as np
def check(candidate):
    inputs, results = [[[1, 2]], [[3]]], [[2, 1], [3]]
    for given, expected in zip(inputs, results):
        assert np.allclose(candidate(*given), expected)
"""


@pytest.mark.parametrize(
    "row, right, wrong",
    [
        ({"answer": SUMS}, ADD, "print(3)"),
        ({"input_output": SUMS}, ADD, "print(7)"),
        ({"reward_model": {"ground_truth": SUMS}}, ADD, "print(7)"),
        ({"answer": CALLS}, "def add(a, b): return a + b", "def add(a, b): return 3"),
        (
            {
                "public_tests": {"input": ["1 2"], "output": ["3"]},
                "private_tests": {"input": ["3 4"], "output": ["7"]},
            },
            ADD,
            "print(3)",
        ),
        (
            {"public_test_cases": json.dumps(LIVE_TESTS), "metadata": '{"func_name": "shift"}'},
            SHIFT,
            SHIFT.replace("+", "-"),
        ),
        ({"private_test_cases": PACKED, "metadata": {"func_name": "shift"}}, SHIFT, SHIFT.replace("+", "-")),
        ({"answer": ASSERTS}, "def add(a, b): return a + b", "def add(a, b): return 3"),
        ({"test_list": ["assert sum(1, 2) == 3"]}, "def sum(a, b): return a + b", "def sum(a, b): return 4"),
        ({"test_list": ["assert max(1, 2) == 2"]}, "def max(a, b): return 2", "pass"),
        (
            {"test": "def check(f):\n    assert f(1, 2) == 2", "entry_point": "max"},
            "def max(*a): return 2",
            "import os\nfor fd in range(3, 64):\n    try:\n        "
            'os.write(fd, b\'{"error": ["KeyError", ""]}\\n\' * 9)\n    except OSError: pass',
        ),
        ({"test": "x = []\nput(x)\nassert len(x) == 1"}, "def put(x): x.append(1)", "def put(x): pass"),
        (
            {"test": EVAL_PLUS, "entry_point": "back"},
            "def back(x): return x[::-1]",
            "def back(x): return x",
        ),
    ],
)
def test_rows_of_known_data_sets_score_right_programs_1_and_wrong_ones_0(
    verifier: Verifier, row: dict[str, Any], right: str, wrong: str
) -> None:
    assert score(verifier, right, **row) == 1
    assert score(verifier, wrong, **row) == 0


LIAR = "class Any_:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\n"
HOSTILE = [
    "import os\nwhile True: os.fork()",
    "import subprocess\nsubprocess.run(['true'])",
    "import sys\nsys.exit(0)",
    "import os\nos._exit(0)",
    "x = [0] * 10**10",
    "import builtins\nbuiltins.AssertionError = KeyError\ndef add(a, b): raise SystemExit(0)",
    "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "import os\nprint(open(f'/proc/{os.getppid()}/mem', 'rb').read(9))",
    LIAR + "def add(a, b): return Any_()",
    "import sys\nsys.modules['json'].dumps = lambda *a, **k: '{\"value\": true}'\ndef add(a, b): return 0",
    "import gc\nprint([o['outputs'] for o in gc.get_objects() if type(o) is dict and 'outputs' in o])",
    'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"value": 3}\\n{"end": true}\\n\')\n'
    "    except OSError: pass\ndef add(a, b): return 0",
    "import os, time\nos.closerange(3, 99)\ntime.sleep(9)\ndef add(a, b): return 0",
    "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "import signal, threading\nsignal.pthread_kill(threading.get_ident(), signal.SIGKILL)",
    "def add(a, b): return (x for x in iter(int, 1))",
]


@pytest.mark.parametrize("answer", [SUMS, CALLS, ASSERTS], ids=["output", "calls", "asserts"])
def test_hostile_programs_earn_nothing_and_the_next_one_is_scored_right(
    verifier: Verifier, answer: Any
) -> None:
    for program in HOSTILE:
        assert score(verifier, program, answer=answer) == 0, program
    honest = ADD if answer == SUMS else "def add(a, b): return a + b"
    assert score(verifier, honest, answer=answer) == 1


@pytest.mark.parametrize(
    "value",
    [{"Decimal": "sNaN"}, {"Fraction": "1e999999999"}, {"Fraction": "1/0"}, {"bytes": 5}, {}, {"a": 1}],
)
def test_a_value_that_is_none_costs_its_own_completion_alone(verifier: Verifier, value: Any) -> None:
    frame = json.dumps({"value": value}) + "\n"
    forges = (
        "import os\ndef add(a, b):\n    for fd in range(3, 64):\n"
        f"        try: os.write(fd, {frame.encode()!r})\n        except OSError: pass\n"
    )
    honest = "from decimal import Decimal\ndef add(a, b): return Decimal(a + b)"
    texts = [block(forges), block(honest)]
    checks = verifier.check(["?"] * 2, texts, {"answer": [CALLS] * 2})
    assert [check.reward for check in checks] == [0, 1]


def test_endless_output_is_cut_and_wrong(verifier: Verifier) -> None:
    assert score(verifier, "while True: print('7' * 1000)", answer=SUMS) == 0


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    verifier = Verifier(VerifiersConfig.model_validate({"rewards": {"code": 1.0}}))
    assert score(verifier, "open('/tmp/x', 'w')", answer=SUMS) == 0
    writes = "import os\nopen(os.environ['TMPDIR'] + '/x', 'w').write('x')\n" + ADD
    assert score(verifier, writes, answer=SUMS) == 1
    verifier.close()
    assert {child.pid for child in psutil.Process().children(recursive=True)} == before
    assert os.listdir(tmp_path) == []


def limited(**limits: Any) -> Verifier:
    return Verifier(VerifiersConfig.model_validate({"rewards": {"code": 1.0}, **limits}))


def test_a_program_whose_own_threads_keep_it_from_a_processor_is_wrong() -> None:
    program = (
        "import hashlib, os, signal, threading, time\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
        "data, end = bytes(2**24), time.time() + 3\n"
        "def burn():\n    while time.time() < end: hashlib.sha256(data).digest()\n"
        "for _ in range(12): threading.Thread(target=burn, daemon=True).start()\n"
        "burn()\ntime.sleep(60)"
    )
    verifier = limited(timeout_s=4, cpu_s=1)
    assert score(verifier, program, answer=SUMS) == 0
    verifier.close()


LOOP = "while True: pass"
SLEEP = "import time\ntime.sleep(60)\n" + ADD


@pytest.mark.parametrize(
    ("program", "patience", "is_busy", "reward", "said"),
    [
        (LOOP, 999, True, 0, "it used more than 1 s of CPU time"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n" + LOOP, 999, True, 0, "CPU time"),
        (SLEEP, 999, False, 0, "it took more than 0.5 s"),
        (SLEEP, 2, True, None, "this machine is too busy to say"),
        ("import time\ntime.sleep(2)\n" + ADD, 999, True, 1, ""),
    ],
)
def test_a_busy_machine_changes_no_reward_as_long_as_a_program_gets_its_cpu_time(
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    patience: int,
    is_busy: bool,
    reward: float | None,
    said: str,
) -> None:
    """A busy machine is one on which all time goes by in waiting, here by the kernel's own account."""
    monkeypatch.setattr(programs, "PATIENCE", patience)
    if is_busy:
        monkeypatch.setattr(watch, "waited", lambda *_: 1e9)
    verifier = limited(timeout_s=0.5, cpu_s=1)
    (check,) = verifier.check(["?"], [block(program)], {"answer": [SUMS]})
    verifier.close()
    assert check.reward == reward and said in (check.reason or "")


def test_no_program_may_choose_its_processor_and_to_give_it_up_does_nothing(verifier: Verifier) -> None:
    assert score(verifier, "import os\nos.sched_yield()\n" + ADD, answer=SUMS) == 1
    pins = "import os\nos.sched_setaffinity(0, os.sched_getaffinity(0))\n"
    assert score(verifier, pins + ADD, answer=SUMS) == 0


@pytest.mark.parametrize(("mib", "reward"), [(15, 1), (17, 0)])
def test_an_answer_may_be_as_large_as_the_limit_says(verifier: Verifier, mib: int, reward: float) -> None:
    program = f"def f(): return 'a' * ({mib} << 20)"
    assert score(verifier, program, answer=[f"assert len(f()) == {mib} << 20"]) == reward


@pytest.mark.parametrize(("num_slow", "passed"), [(2, 4), (12, 0)])
def test_all_tests_of_a_row_together_have_ten_times_the_limit_of_one(num_slow: int, passed: int) -> None:
    config = {"rewards": {"code": {"arguments": {"share": True}}}, "timeout_s": 0.3, "cpu_s": 1}
    verifier = Verifier(VerifiersConfig.model_validate(config))
    row = {"inputs": ["slow"] * num_slow + ["1"] * 4, "outputs": ["1"] * (num_slow + 4)}
    program = "import time\nif input() == 'slow': time.sleep(60)\nprint(1)"
    assert score(verifier, program, answer=json.dumps(row)) == pytest.approx(passed / (num_slow + 4))
    program = "import time\ndef f(text):\n    if text == 'slow': time.sleep(0.25)\n    return '1'"
    called = {**row, "inputs": [[text] for text in row["inputs"]], "fn_name": "f"}
    if num_slow == 2:
        assert score(verifier, program, answer=json.dumps(called)) == 1
    verifier.close()


HOLDS = {
    "threads": "import threading\nthreading.stack_size(1 << 16)\nend = threading.Event()\n"
    "for _ in range({}): threading.Thread(target=end.wait, daemon=True).start()\n",
    "MiB": "import os\nfor i in range({}):\n    with open(os.environ['TMPDIR'] + '/x', 'wb', 0) as file:\n"
    "        file.write(bytes(1 << 20))\n        os.unlink(file.name)\n",
    "files": "import os\nfor i in range({}): open(os.environ['TMPDIR'] + f'/{{i}}', 'w').close()\n",
}


@pytest.mark.parametrize(
    ("what", "fits", "too_many"), [("threads", 60, 70), ("MiB", 60, 70), ("files", 990, 1010)]
)
def test_what_a_program_holds_while_it_runs_is_limited(what: str, fits: int, too_many: int) -> None:
    verifier = limited(timeout_s=60, cpu_s=5)
    ends = "import os, sys\nsys.stdout.flush()\nos._exit(0)"
    program = "{}{}import time\ntime.sleep({})\n" + ends
    held = program.format(HOLDS[what].format(fits), ADD + "\n", 0.2)
    assert score(verifier, held, answer=SUMS) == 1
    held = program.format(HOLDS[what].format(too_many), ADD + "\n", 20)  # it is ended at once
    (check,) = verifier.check(["?"], [block(held)], {"answer": [SUMS]})
    verifier.close()
    assert check.reward == 0 and what in (check.reason or "")


EACH = {
    "threads": (60, 70, "threading.Thread(target=end.wait, daemon=True).start()"),
    "MiB": (
        60,
        70,
        "with open(name, 'wb', 0) as file: file.write(bytes(1 << 20))\n    os.unlink(name)",
    ),
    "files": (58, 70, "for j in range(16): open(f'{name}-{j}', 'w').close()"),
}


@pytest.mark.parametrize("what", EACH)
def test_what_a_program_holds_counts_however_soon_it_answers(what: str) -> None:
    fits, too_many, does = EACH[what]
    program = (
        "import os, threading\nthreading.stack_size(1 << 16)\nend = threading.Event()\ndef f(x):\n"
        f"    name = os.environ['TMPDIR'] + f'/{{x}}'\n    {does}\n    return x"
    )
    verifier = limited(timeout_s=60, cpu_s=5)
    for num_calls, reward in ((fits, 1), (too_many, 0)):
        numbers = list(range(num_calls))
        called = {"inputs": [[number] for number in numbers], "outputs": numbers, "fn_name": "f"}
        for row in (json.dumps(called), [f"assert f({number}) == {number}" for number in numbers]):
            (check,) = verifier.check(["?"], [block(program)], {"answer": [row]})
            assert check.reward == reward and (reward or what in (check.reason or ""))
    verifier.close()


@pytest.mark.parametrize(
    ("prints", "reward"),
    [
        ("print('x' * (1 << 20), flush=True)", 1),
        ("sys.stdout.buffer.write(bytes(1 << 20))", 1),
        ("print('x' * (1 << 20), file=sys.stderr)", 1),
        ("os.write(sys.stdout.fileno(), bytes(1 << 20))", 0),
    ],
)
def test_what_a_program_prints_where_nobody_reads_it_does_not_count_as_written(
    prints: str, reward: float
) -> None:
    verifier = limited(timeout_s=60, cpu_s=5)
    program = f"import os, sys\ndef f(x):\n    {prints}\n    return x"
    numbers = list(range(70))
    called = {"inputs": [[number] for number in numbers], "outputs": numbers, "fn_name": "f"}
    asserts = [f"assert f({number}) == {number}" for number in numbers]
    for row in (json.dumps(called), asserts):
        (check,) = verifier.check(["?"], [block(program)], {"answer": [row]})
        assert check.reward == reward and (reward or "64 MiB" in (check.reason or ""))
    if "stderr" in prints:
        program = f"import sys\nfor _ in range(70): {prints}\n{ADD}"
        assert score(verifier, program, answer=SUMS) == 1
    verifier.close()


@pytest.mark.parametrize("kept", [1, 0])
def test_what_a_program_wrote_counts_when_it_has_ended(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 60.0)  # there is no look but the last
    verifier = limited(timeout_s=60, cpu_s=5)
    for mib, reward in ((60, 1), (70, 0)):
        written = f"for i in range({mib}):\n    with open(os.environ['TMPDIR'] + f'/{{i * {kept}}}', 'wb', 0)"
        program = f"import os\n{written} as file:\n        file.write(bytes(1 << 20))\n{ADD}"
        assert score(verifier, program, answer=SUMS) == reward
    verifier.close()


@pytest.mark.parametrize(("num_threads", "held_s", "tests_s", "reward"), [(50, 0.1, 1, 1), (70, 5, 20, 0)])
def test_a_program_is_looked_at_while_the_tests_are_at_work(
    num_threads: int, held_s: float, tests_s: float, reward: float
) -> None:
    program = (
        "import threading, time\nthreading.stack_size(1 << 16)\nend = threading.Event()\n"
        "def later():\n    time.sleep(0.2)\n"
        f"    for _ in range({num_threads}): threading.Thread(target=end.wait, daemon=True).start()\n"
        f"    time.sleep({held_s})\n    end.set()\n"
        "def f():\n    threading.Thread(target=later, daemon=True).start()\n    return 1"
    )
    verifier = limited(timeout_s=60, cpu_s=5)
    tests = f"import time\nassert f() == 1\ntime.sleep({tests_s})"
    (check,) = verifier.check(["?"], [block(program)], {"test": [tests]})
    verifier.close()
    assert check.reward == reward and (reward or "than 64 threads" in (check.reason or ""))


def test_the_share_counts_the_tests_that_passed() -> None:
    config = {"rewards": {"code": {"arguments": {"share": True}}}, "timeout_s": 30, "cpu_s": 1}
    verifier = Verifier(VerifiersConfig.model_validate(config))
    assert score(verifier, "print(3)", answer=SUMS) == 0.5
    assert score(verifier, "def add(a, b): return 3", answer=CALLS) == 0.5
    assert score(verifier, "def add(a, b): return 3", answer=ASSERTS) == 0.5
    assert (
        score(verifier, "def add(a, b):\n    if a > 1: raise SystemExit\n    return 3", answer=ASSERTS) == 0.5
    )
    verifier.close()


@pytest.mark.parametrize(
    "row",
    [
        {"answer": ""},
        {"answer": "assert f(1 =="},
        {"answer": {"inputs": ["1"], "outputs": []}},
        {"answer": ["assert f(lambda: 1) == 2"]},
        {"answer": ["assert 1 == 1"]},
        {"test_list": ["assert f(1) == 2"], "test_setup_code": "import no_such_module"},
        {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(print))).decode()},
        {"answer": SUMS, "language": "cpp"},
    ],
)
def test_a_row_whose_tests_are_at_fault_gives_no_reward(verifier: Verifier, row: dict[str, Any]) -> None:
    assert score(verifier, "def f(x): return 2", **row) is None


def test_asserts_see_lists_that_a_program_changes_and_its_objects(verifier: Verifier) -> None:
    program = (
        "def put(x): x.append(1)\nclass Pair:\n    def __init__(self, a): self.a = a\ndef get(p): return p.a"
    )
    assert score(verifier, program, test="x = []\nput(x)\nassert x == [1]\nassert get(Pair(5)) == 5") == 1


def test_a_program_reads_more_than_a_pipe_holds_and_prints_at_its_exit(verifier: Verifier) -> None:
    big = json.dumps({"inputs": ["1\n" * 200_000], "outputs": ["200000"]})
    program = "import atexit, sys\nn = len(sys.stdin.read().split())\natexit.register(lambda: print(n))"
    assert score(verifier, program, answer=big) == 1


def test_a_program_may_read_lines_as_bytes(verifier: Verifier) -> None:
    lines = json.dumps({"inputs": ["1234567\n" * 100_000], "outputs": ["100000"]})
    program = (
        "import sys\nassert sys.stdin.buffer.peek(1)[:1] == b'1'\n"
        "print(sum(1 for _ in iter(sys.stdin.buffer.readline, b'')))"
    )
    assert score(verifier, program, answer=lines) == 1


@pytest.mark.parametrize(
    "program, tests",
    [
        ("def f(x): return range(10**12)", ["assert sum(f(1)) == 5"]),
        ("class A: pass\ndef f(x): return A()", ["assert f(1)[:2] == [1, 2]"]),
        ("def f(*a, **k): return f\nf.sort = f", ["assert f(1).sort(key=lambda x: x) == 1"]),
        (
            "class A:\n    def sort(self, key): pass\ndef f(x): return A()",
            ["assert f(1).sort(key=lambda x: x) == 1"],
        ),
    ],
)
def test_a_value_that_the_asserts_cannot_use_is_wrong(
    verifier: Verifier, program: str, tests: list[str]
) -> None:
    assert score(verifier, program, answer=tests) == 0


def test_an_object_of_the_program_may_be_sliced(verifier: Verifier) -> None:
    program = "class A:\n    def __getitem__(self, key): return [1, 2, 3][key]\ndef f(): return A()"
    assert score(verifier, program, answer=["assert f()[:2] == [1, 2]"]) == 1


def test_the_last_closed_block_is_the_program() -> None:
    assert last_block("```\na\n```\ntext\n~~~py\nb\n```\n~~~\n```\nopen") == "b\n```"
    assert last_block("<think>\n```\na\n```\n</think> none") is None
    assert last_block("a\n```", "Go on:\n```python\n") == "a"


@pytest.mark.parametrize(
    "found, gold, style, same",
    [
        ("1  2 \n\n3\n", "1 2\n3", APPS, True),
        ("1 2 3", "1 2\n3", APPS, False),
        ("1 2 3", "1 2\n3", CONTESTS, True),
        ("yes", "YES", APPS, False),
        ("yes", "YES", CONTESTS, True),
        ("0.333333", "0.3333334", APPS, True),
        ("0.333333", "0.3333334", LIVE, False),
        ("0.50", "0.5", LIVE, True),
        ("1000001", "1000000", APPS, False),
        ("2.0", "2", APPS, True),
        ("nan", "nan", LIVE, True),
        ("nan", "1.0", APPS, False),
    ],
)
def test_outputs_are_compared_as_each_data_set_does(
    found: str, gold: str, style: code_tests.Style, same: bool
) -> None:
    assert same_output(found, gold, style) is same


def test_values_are_compared_by_json_types_with_a_tolerance_for_fractions() -> None:
    assert same_value([1, 0.1 + 0.2], [1, 0.3], False) and same_value(5, [5], True)
    assert not same_value(5, [5], False) and not same_value("1", 1, False)
    assert not same_value(10**400, 0.5, False)


def test_values_come_out_of_data_as_they_went_in() -> None:
    value = {(1, 2): {3, 4}, "a": [None, 1.5, 1j, b"\xff", frozenset({5})], 6: range(3)}
    assert decode(json.loads(json.dumps(encode(value, id))), id) == value


def test_a_pickle_in_the_data_runs_no_code() -> None:
    packed = base64.b64encode(zlib.compress(pickle.dumps(os.getcwd))).decode()
    with pytest.raises(ValueError, match="cannot be read: UnpicklingError"):
        read_tests({"private_test_cases": packed})


@pytest.mark.parametrize(
    "arguments, columns, said",
    [
        ({"shares": True}, ["answer"], "no argument 'shares'; did you mean share"),
        ({"max_tests": 0}, ["answer"], "max_tests must be a number from 1 on"),
        ({"language": "cpp"}, ["answer"], "need sandbox_fusion"),
        ({}, ["question"], "train has no tests"),
    ],
)
def test_a_mistake_in_the_config_is_one_line(
    arguments: dict[str, Any], columns: list[str], said: str
) -> None:
    config = VerifiersConfig.model_validate({"rewards": {"code": {"arguments": arguments}}})
    with pytest.raises(ConfigError, match=said):
        Verifier(config, columns={"train": columns})


STDIN = [{"input": f"{x} {y}\n", "output": f"{x + y}\n", "testtype": "stdin"} for x, y in ((1, 2), (3, 4))]


@pytest.mark.parametrize(
    "row",
    [
        {"public_test_cases": json.dumps(STDIN), "metadata": "{}"},
        {"public_test_cases": json.dumps(STDIN[:1]), "private_test_cases": json.dumps(STDIN[1:])},
    ],
)
def test_live_code_bench_has_rows_with_standard_input(row: dict[str, Any]) -> None:
    verifier = limited(rewards={"code": {"arguments": {"share": True}}}, timeout_s=60)
    assert score(verifier, ADD, **row) == 1
    assert score(verifier, "print(3)", **row) == 0.5
    assert score(verifier, ADD.replace("a + b", "a + b + 1e-9"), **row) == 0
    verifier.close()


@pytest.mark.parametrize(
    ("language", "spelled"),
    [
        *((name, "python") for name in ("python", "Python", " PYTHON3 ", "Python 3", "py3", "Py")),
        *((name, "python") for name in ("python 3.11", "PyPy 3-64", "CPython")),
        *(("python 2", "python 2"), ("Python2.7", "python2.7"), ("C++", "cpp"), ("CPP", "cpp")),
        *(("JavaScript", "nodejs"), ("R", "R"), ("Rust", "rust"), ("C#", "csharp")),
    ],
)
def test_languages_are_spelled_as_data_sets_do(verifier: Verifier, language: str, spelled: str) -> None:
    assert _spelled(language) == spelled
    reward = score(verifier, ADD, answer=SUMS, language=language)
    assert reward == (1 if spelled == "python" else None)


class Fusion(BaseHTTPRequestHandler):
    """Answers as Sandbox Fusion does; the program says how."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/run_code" and asked["language"] == "cpp" and "expected" not in asked
        done = {"status": "Finished", "return_code": 0, "stdout": "3\n"}
        answer = {
            "right": {"status": "Success", "compile_result": done, "run_result": done},
            "wrong": {"status": "Failed", "compile_result": {"status": "Finished", "return_code": 1}},
            "broken": {"status": "SandboxError", "message": "no disk"},
        }[asked["code"]]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_other_languages_run_on_a_sandbox_fusion_server() -> None:
    server = HTTPServer(("127.0.0.1", 0), Fusion)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    arguments = {"language": "c++", "sandbox_fusion": url}
    verifier = Verifier(VerifiersConfig.model_validate({"rewards": {"code": {"arguments": arguments}}}))
    one = json.dumps({"inputs": [""], "outputs": ["3"]})
    found = [score(verifier, program, answer=one) for program in ("right", "wrong", "broken")]
    verifier.close()
    server.shutdown()
    server.server_close()
    assert found == [1, 0, None]
