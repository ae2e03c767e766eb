"""Wrong programs earn nothing by ways that would earn with a plain checker, and right ones lose nothing."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from typing import Any

import pytest
from unprotected import earns

from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.verifiers.code_tests import helpers
from gvpo_ray.verifiers.verifier import Verifier

OUTPUT = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
CALLS = {"inputs": [[1, 2], [3, 4]], "outputs": [3, 7], "fn_name": "add"}
ASSERTS = ["assert add(1, 2) == 3", "assert add(3, 4) == 7"]
ROWS = {"output": OUTPUT, "calls": CALLS, "asserts": ASSERTS}
RIGHT = {
    "output": "a, b = map(int, input().split())\nprint(a + b)\n",
    "calls": "def add(a, b): return a + b\n",
    "asserts": "def add(a, b): return a + b\n",
}


@pytest.fixture(scope="module")
def verifiers() -> Iterator[dict[bool, Verifier]]:
    """With the reward for all tests, and for the share of them."""
    made = {
        share: Verifier(
            VerifiersConfig.model_validate(
                {
                    "rewards": {"code": {"arguments": {"share": share}}},
                    "timeout_s": 60,
                    "cpu_s": 10,
                    "memory_gib": 1.0,
                }
            )
        )
        for share in (False, True)
    }
    yield made
    for verifier in made.values():
        verifier.close()


def score(verifier: Verifier, program: str, prompt: str = "?", **row: Any) -> float | None:
    columns = {name: [value] for name, value in row.items()}
    (check,) = verifier.check([prompt], [f"```python\n{program}\n```"], columns)
    return check.reward


# What a program does beside computing the right answer, which it then gives.
FORBIDDEN = {
    "another process": "import os\npid = os.fork()\nif not pid: os._exit(0)\nos.waitpid(pid, 0)\n",
    "another program": "import subprocess\nsubprocess.run(['true'], check=True)\n",
    "memory": "data = bytes(3 << 29)\n",
    "the verifier's signals": "import os\nos.kill(os.getppid(), 0)\n",
    "the verifier's environment": "import os\nopen(f'/proc/{os.getppid()}/environ', 'rb').read()\n",
    "files": "import os\nos.listdir('/')\n",
    "the network": "import socket\nsocket.socket().bind(('127.0.0.1', 0))\n",
}

FRAMES = "import sys\nframe = sys._getframe()\nwhile frame.f_code.co_name != 'main': frame = frame.f_back\n"
LIAR = "class Any_:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\n"
FORGED = "\\n".join(
    json.dumps(frame)
    for frame in ({"passed": True}, {"value": 3}, {"test": True, "text": None}, {"end": True}, {"total": 0})
)
FORGES = (
    "import os\nfor descriptor in range(1, 64):\n"
    f"    try: os.write(descriptor, b'{FORGED}\\n')\n    except OSError: pass\n"
)
NOTHING = "def add(a, b): return 0\n"

# Wrong programs: form -> what they do.
WRONG = {
    "output": {
        "exit": "import os\nos._exit(0)\n",
        "the end of a script": "import sys\nsys.exit(0)\n",
        "reading what is expected": FRAMES + "print(end=frame.f_locals['gold'])\n",
        "reading all objects": "import gc\nrow = next(o for o in gc.get_objects() if type(o) is dict and "
        "'outputs' in o)\nprint(end=dict(zip(row['inputs'], row['outputs']))[input() + '\\n'])\n",
        "patching the checker": FRAMES + "frame.f_globals['same'] = lambda *_: True\n",
        "an output that is equal to all": LIAR
        + "import sys\nsys.stdout = type('Out', (), {'getvalue': lambda self: Any_(), "
        "'flush': lambda self: 0, 'write': lambda *_: 0})()\n",
        "forging answers": FORGES,
    },
    "calls": {
        "exit": "import os\nos._exit(0)\n",
        "exit when called": "def add(a, b): __import__('os')._exit(0)\n",
        "reading what is expected": "def add(a, b):\n    "
        + FRAMES.replace("\n", "\n    ").rstrip()
        + "\n    return frame.f_locals['gold']\n",
        "reading all objects": "import gc\nrow = next((o for o in gc.get_objects() if type(o) is dict and "
        "'outputs' in o and 'inputs' in o), None)\n"
        "def add(a, b): return row['outputs'][row['inputs'].index([a, b])]\n",
        "patching the checker": FRAMES + "frame.f_globals['same'] = lambda *_: True\n" + NOTHING,
        "a value that is equal to all": LIAR + "def add(a, b): return Any_()\n",
        "forging answers": FORGES + NOTHING,
        "patching what writes answers": "import json\njson.dumps = lambda *a, **k: '{\"passed\": true}'\n"
        + NOTHING,
    },
    "asserts": {
        "exit": "import os\nos._exit(0)\n",
        "the end of a script": "import sys\nsys.exit(0)\n",
        "exit when called": "def add(a, b): raise SystemExit(0)\n",
        "reading what is expected": "def add(a, b):\n    "
        + FRAMES.replace("\n", "\n    ").rstrip()
        + "\n    return int(frame.f_locals['test'].split('==')[1])\n",
        "emptying the tests": FRAMES + "frame.f_locals['row'].clear()\n",
        "a value that is equal to all": LIAR + "def add(a, b): return Any_()\n",
        "forging answers": FORGES + "import os\nos._exit(0)\n",
        "other integers": "class Int(int):\n    def __eq__(self, other): return True\n"
        "def add(a, b): return Int()\n",
    },
}


@pytest.mark.parametrize("form", ROWS)
def test_what_earns_with_a_plain_checker_earns_nothing_here(
    verifiers: dict[bool, Verifier], form: str
) -> None:
    row, right = ROWS[form], RIGHT[form]
    assert score(verifiers[True], right, answer=json.dumps(row)) == 1 and earns(right, row)
    for name, program in {
        **{name: attack + right for name, attack in FORBIDDEN.items()},
        **WRONG[form],
    }.items():
        assert earns(program, row), f"{name}: it is no attack"
        assert score(verifiers[True], program, answer=json.dumps(row)) == 0, name
    assert score(verifiers[True], right, answer=json.dumps(row)) == 1


# ----------------------------------------------------------------------------------------- errors that vanish

# In each of these one of Python's own constructs takes some error of f for something else than a failure.
VANISHES = """
import asyncio, collections, itertools
class Items:
    def __getitem__(self, i):
        if i == 3: raise IndexError
        return f(i)
class Property:
    @property
    def p(self): return f(1)
class Lookup:
    def __getattr__(self, name): return f(1)
class Later:
    n = 0
    def __aiter__(self): return self
    async def __anext__(self):
        self.n += 1
        if self.n == 3: raise StopAsyncIteration
        return f(self.n) == 2 * self.n
class Missing(dict):
    def __missing__(self, key): return f(key)
class Hint:
    def __iter__(self): return iter(())
    def __length_hint__(self): return 0 if f(1) == 2 else 1 / 0
def generated():
    for x in (1, 2): yield f(x)
async def run(): return [each async for each in Later()]
for found, gold in zip(map(f, [1, 2, 3]), [2, 4, 6]):
    assert found == gold
assert all(map(lambda x: f(x) == 2 * x, [1, 2]))
assert not any(map(lambda x: f(x) != 2 * x, [1, 2]))
assert [x for x in filter(lambda x: f(x) != 2 * x, [1, 2])] == []
assert next(map(f, [1]), 2) == 2
assert list(itertools.islice(iter(lambda: f(1), 2), 3)) == []
assert all(found == gold for found, gold in zip(generated(), [2, 4]))
assert all(found == 2 * i for i, found in enumerate(Items()))
assert getattr(Property(), "p", 2) == 2
assert not hasattr(Lookup(), "x") or Lookup().x == 2
assert all(asyncio.run(run()))
assert collections.ChainMap(Missing(), {1: 2})[1] == 2
assert list(Hint()) == []
"""
ERRORS = [
    name
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException) and not name.endswith("Warning")
]
RAISES = """
class Own({0}): pass
def f(x):
    for make in (lambda: Own(), lambda: Own("x"), lambda: Own("x", [ValueError()]), lambda: Own.__new__(Own)):
        try: error = make()
        except TypeError: continue
        raise error
"""
PLAIN = {"StopIteration", "StopAsyncIteration", "IndexError", "KeyError", "AttributeError", "TypeError"}


def test_an_error_of_a_program_passes_no_test_whatever_python_takes_it_for(
    verifiers: dict[bool, Verifier],
) -> None:
    assert score(verifiers[True], "def f(x): return 2 * x", answer=VANISHES) == 1
    assert score(verifiers[True], "def f(x): return 3", answer=VANISHES) == 0
    own = {name: RAISES.format(name) for name in ERRORS}
    plain = {f"plain {name}": f"def f(x): raise {name}" for name in ERRORS if name in PLAIN}
    rewards = {
        name: score(verifiers[True], program, answer=VANISHES) for name, program in (own | plain).items()
    }
    assert {name: reward for name, reward in rewards.items() if reward != 0} == {}


def test_a_plain_checker_takes_some_of_these_errors_for_an_end() -> None:
    program = "import sys\n{}\ndef f(x): raise {}\n"
    for name, test in (
        ("StopIteration", "for found, gold in zip(map(f, [1]), [2]): assert found == gold"),
        ("IndexError", "class I:\n    def __getitem__(self, i): return f(i)\nassert list(I()) == []"),
        (
            "AttributeError",
            "class L:\n    def __getattr__(self, n): return f(1)\nassert not hasattr(L(), 'x')",
        ),
    ):
        assert earns(program.format("", name), [test]), name


@pytest.mark.parametrize(
    ("program", "test"),
    [
        (
            "def f(x): raise ValueError('negative')",
            "try:\n    f(-1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'negative'",
        ),
        ("def f(x): raise TypeError('no')", "try:\n    f(-1)\n    assert False\nexcept TypeError:\n    pass"),
        (
            "class Own(KeyError): pass\ndef f(x): raise Own(5)",
            "try:\n    f(-1)\n    assert False\nexcept KeyError as e:\n    assert e.args == (5,)",
        ),
        ("def f(x): raise IndexError", "import unittest\nunittest.TestCase().assertRaises(IndexError, f, 1)"),
        (
            "def f(x): return x[5]",
            "import contextlib\nwith contextlib.suppress(IndexError):\n    f([])\n    assert False",
        ),
        (
            "class A:\n    b = 1\ndef f(): return A()",
            "assert hasattr(f(), 'b') and not hasattr(f(), 'c') and getattr(f(), 'c', 3) == 3",
        ),
        (
            "class A:\n    def __iter__(self): return iter([1, 2])\ndef f(): return A()",
            "assert list(f()) == [1, 2] and 2 in f()",
        ),
    ],
)
def test_errors_that_tests_expect_are_those_of_the_program(
    verifiers: dict[bool, Verifier], program: str, test: str
) -> None:
    assert earns(program, [test])
    assert score(verifiers[False], program, test=test) == 1
    assert score(verifiers[False], "def f(*_): return None", test=test) == 0


def test_what_prepares_a_test_and_fails_is_named(verifiers: dict[bool, Verifier]) -> None:
    test = "assert f(1) == 1\ny = f(-1)\nassert y == 1"
    program = "def f(x):\n    if x < 0: raise ValueError('negative')\n    return x"
    (check,) = verifiers[True].check(["?"], [f"```\n{program}\n```"], {"test": [test]})
    assert (check.reward, check.reason) == (0.5, "code: before test 2: ValueError: negative")


# ----------------------------------------------------------------------------------------- helpers, arguments

HELPER = '''import math

def poly(xs: list, x: float):
    """
    Evaluates a polynomial.
    """
    return sum([coeff * math.pow(x, i) for i, coeff in enumerate(xs)])


def find_zero(xs: list):
    """ The zero of a polynomial of degree 1. """
'''
ZERO = {
    "test": "def check(candidate):\n    for xs in ([1, 2], [3, 4]):\n"
    "        assert abs(poly(xs, candidate(list(xs)))) < 1e-4\n",
    "entry_point": "find_zero",
}


@pytest.mark.parametrize(
    "prompt", [HELPER, f"Complete this:\n\n{HELPER}", f"Do it.\n```python\n{HELPER}```\nNow!"]
)
def test_functions_that_a_prompt_gives_are_the_tests_own(
    verifiers: dict[bool, Verifier], prompt: str
) -> None:
    wrong = "def poly(xs, x): return 0\ndef find_zero(xs): return 0"
    assert earns(wrong, [ZERO["test"] + "check(find_zero)"])
    assert score(verifiers[False], wrong, prompt, **ZERO) == 0
    assert score(verifiers[False], "def find_zero(xs): return -xs[0] / xs[1]", prompt, **ZERO) == 1
    setup = HELPER.partition("\n\ndef find_zero")[0]
    assert score(verifiers[False], wrong, **ZERO, test_setup_code=setup) == 0
    # a prompt that shows a wrong one, to be mended
    shown = prompt.replace("math.pow(x, i)", "1")
    assert score(verifiers[False], "def find_zero(xs): return -xs[0] / xs[1]", shown, **ZERO) == 0
    right = {**ZERO, "test_setup_code": setup}
    assert score(verifiers[False], "def find_zero(xs): return -xs[0] / xs[1]", shown, **right) == 1
    assert score(verifiers[False], wrong, shown, **right) == 0


FAULT = "functions of the prompt that the tests call do not run: "


@pytest.mark.parametrize(
    ("beside", "fault"),
    [
        ("EXAMPLE = undefined_name\nRESULT = f(2)\nimport no_such_module", None),
        ("def main(x=f(2)): return undefined_name", None),
        ("from math import *\nimport operator as op\nONE, TWO = 1, 2\nONE_MORE = op.add", None),
        ("ONE = undefined_name", "NameError: name 'undefined_name' is not defined"),
        ("ONE = f(0)", "NameError: name 'f' is not defined"),
        ("from no_such_module import ONE", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_of_a_prompt_only_what_helpers_use_is_taken_and_where_that_does_not_run_nobody_is_judged(
    verifiers: dict[bool, Verifier], beside: str, fault: str | None
) -> None:
    one = "ONE" if "ONE" in beside else "1"
    add = "ONE_MORE(x, ONE) + floor(0.5)" if "math" in beside else f"x + {one}"
    prompt = f"Write f.\n```python\n{beside}\ndef g(x): return {add}\ndef f(x): ...\n```"
    row = {"test": "def check(candidate):\n    assert candidate(3) == g(3)\n", "entry_point": "f"}
    right = "def g(x): return x + 1\ndef f(x): return x + 1\nONE = undefined_name = 1"
    wrong = right.replace("x + 1", "0")
    for program, reward in ((right, 1), (wrong, 0)):
        columns = {name: [value] for name, value in row.items()}
        (check,) = verifiers[False].check([prompt], [f"```python\n{program}\n```"], columns)
        assert check.reward == (None if fault else reward)
        assert not fault or check.reason == FAULT + fault
    # what the row itself says counts before the prompt, which then runs
    row["test_setup_code"] = "ONE = 1"
    assert score(verifiers[False], right, prompt, **row) == 1
    assert score(verifiers[False], wrong, prompt, **row) == 0


LEANS = """
def poly(xs: List[Number], x: "Number") -> Number:
    op = lambda a, b: add(a, b)
    return reduce(op, [c * math.pow(x, i) * (lambda ONE: ONE)(ONE) for i, c in enumerate(xs)])

def find_zero(xs: List[Number]):
    "The zero of a polynomial of degree 1."
"""


@pytest.mark.parametrize(
    ("given", "row"),
    [
        ("ONE = 1", {}),
        ("ONE, Number = 1, undefined_name", {"test_setup_code": "Number = float\nONE = 1"}),
        ("", {"test_imports": ["from decimal import Decimal as Number"], "test_setup_code": "ONE = 1.0"}),
        ("", {"test_setup_code": "def poly(xs, x): return xs[0] + xs[1] * x"}),
        (
            "from datetime import datetime\nONE = datetime(1, 1, 1).day",
            {"test_imports": ["import datetime", "from bisect import bisect as List"]},
        ),
        ("ONE = 1", {"test_setup_code": "ZERO = poly([1, 2], -0.5)\nassert ZERO == 0"}),
    ],
)
def test_functions_of_a_prompt_find_what_programs_find_imported_and_what_the_row_sets_up(
    verifiers: dict[bool, Verifier], given: str, row: dict[str, Any]
) -> None:
    right = "def find_zero(xs): return -xs[0] / xs[1]\nadd = reduce = 0"
    wrong = "def find_zero(xs): return 0\ndef poly(xs, x): return 0\nadd = reduce = lambda *a: 0"
    prompt = given + LEANS
    assert earns(wrong, [ZERO["test"] + "check(find_zero)"])
    assert score(verifiers[False], right, prompt, **ZERO, **row) == 1
    assert score(verifiers[False], wrong, prompt, **ZERO, **row) == 0


def test_what_a_prompt_imports_for_its_functions_does_not_stand_for_the_function_under_test(
    verifiers: dict[bool, Verifier],
) -> None:
    prompt = "from math import *\ndef half(x): return floor(x / 2)\ndef sqrt(x): ..."
    row = {"test": "def check(candidate):\n    assert candidate(9) == half(6)\n", "entry_point": "sqrt"}
    assert score(verifiers[False], "def sqrt(x): return x ** 0.5", prompt, **row) == 1
    assert score(verifiers[False], "def sqrt(x): return 2", prompt, **row) == 0


def test_the_function_under_test_and_those_to_be_written_are_never_the_prompts() -> None:
    prompt = "Mend it:\n```\ndef f(x): return x + 1\ndef g(x): ...\ndef h(x): return 2\n```"
    (text,) = helpers(prompt, [], ["assert f(1) == g(1) == h(1)"], "f")
    assert text == "def h(x):\n    return 2"
    assert helpers(prompt, [], ["assert f(1) == g(1)"], "f") == []
    assert helpers(prompt, [], ["assert f(1) == h(1)"], None) == []
    g = "def g(x, op=op):\n    return op.add(x, (lambda ONE: ONE)(0) + ONE)"
    prompt = f"import operator as op\nONE = 1\n{g}\ndef f(x): ..."
    assert helpers(prompt, [], ["assert f(1) == g(1)"], "f") == [f"import operator as op\nONE = 1\n{g}"]
    assert helpers("no code: def x", [], ["assert f(1) == h(1)"], "f") == []


EMPTIES = "def f(x):\n    x.clear()\n    return []"


@pytest.mark.parametrize(
    ("test", "wrong", "right"),
    [
        ("x = [3, 1, 2]\nassert f(x) == sorted(x)", EMPTIES, "def f(x):\n    x.sort()\n    return x"),
        (
            "def ref(x): return sorted(x)\ndef check(candidate):\n    for given in [[[3, 1]], [[5, 4]]]:\n"
            "        assert candidate(*given) == ref(*given)\ncheck(f)",
            EMPTIES,
            "f = sorted",
        ),
        ("x = [1, 2]\nif f(x) != x[::-1]:\n    assert False", EMPTIES, "def f(x): return x[::-1]"),
        ("x = [2, 1]\nf(x)\nassert x == [1, 2]", "f = sorted", "def f(x): x.sort()"),
        (
            "x = [2, 2, 1]\nk = f(x)\nassert x[:k] == [2, 1]",
            EMPTIES.replace("[]", "2"),
            "def f(x):\n    del x[0]\n    return 2",
        ),
        (
            "x = [1, 2, 3]\nassert [f(x), f(x)] == [3, 2]\nassert x == [1]",
            "def f(x): return x[-1]",
            "def f(x): return x.pop()",
        ),
        ("for x in ([2, 1], [3, 2]):\n    f(x)\n    assert x[0] < x[1]", "f = sorted", "def f(x): x.sort()"),
        (
            "import collections\nx = collections.deque([1, 2])\nf(x)\nassert list(x) == [2, 1]",
            "f = list",
            "def f(x): x.reverse()",
        ),
        ("x = bytearray(b'ab')\nf(x)\nassert x == b'ba'", "f = list", "def f(x): x.reverse()"),
        ("x = {1}\nf(x)\nassert x == {1, 2}", "f = list", "def f(x): x.add(2)"),
        (
            "x = {1: 1}\nwhile f(x):\n    assert x == {1: 1, 2: 2}\n    break\nassert 2 in x",
            "f = dict",
            "def f(x):\n    x[2] = 2\n    return 1",
        ),
    ],
)
def test_what_a_program_does_to_its_arguments_is_seen_from_the_next_statement_on(
    verifiers: dict[bool, Verifier], test: str, wrong: str, right: str
) -> None:
    assert score(verifiers[False], wrong, test=test) == 0
    assert score(verifiers[False], right, test=test) == 1


SORTS = "def f(x):\n    x.sort()\n    return x"


@pytest.mark.parametrize("right", ["f = sorted", SORTS], ids=["new", "in place"])
@pytest.mark.parametrize(
    "wrong", [EMPTIES, SORTS.replace("x.sort()", "x[:] = x[:1]")], ids=["empties", "cuts"]
)
@pytest.mark.parametrize(
    "test",
    [
        "x = [3, 1, 2]\ny = f(x)\nassert y == sorted(x)",
        "x = [3, 1, 2]\ny = f(x)\nwant = sorted(x)\nassert y == want",
        "x = [3, 1, 2]\ny = f(x)\nassert len(y) == len(x)",
        "x = [3, 1, 2]\ny = f(x)\nassert all(a in y for a in x) and not [a for a in x if a not in y]",
        "x = [3, 1, 2]\ny = f(x)\nassert abs(sum(y) - sum(x)) < 1e-6",
        "x = [3, 1, 2]\ny = f(x)\ntry:\n    assert x == [1]\nexcept AssertionError:\n    pass\n"
        "assert y == sorted(x)",
        "x = [3, 1, 2]\ny = f(x)\nassert x == x or x == [7]\nassert y == sorted(x)",
        "def test():\n    x = [3, 1, 2]\n    y = f(x)\n    for a in x:\n        assert a in y\n"
        "    assert y == sorted(x)\ntest()",
        "x = [3, 1, 2]\ny = f(x)\nz = f(x)\nassert y == sorted(x)",
        "x = [3, 1, 2]\ny = f(x)\nassert sum(y) - sum(x) == 0",
        "x = [3, 1, 2]\ny = f(x)\nassert len(set(map(len, (x, y)))) == 1",
        "z = [1, 2, 3]\nx = z\ny = f(x)\nassert y == z",
    ],
)
def test_what_is_expected_of_a_result_is_computed_from_arguments_that_the_program_has_not_changed(
    verifiers: dict[bool, Verifier], test: str, wrong: str, right: str
) -> None:
    """Of a call that returns something, changes are seen beside values that are written there alone."""
    namespace: dict[str, Any] = {}
    exec(f"{wrong}\n{test}", namespace)  # in Python itself these tests pass
    assert score(verifiers[False], wrong, test=test) == 0
    assert score(verifiers[False], right, test=test) == 1


SHIFTS = "def f(x):\n    del x[0]\n    return len(x)"


@pytest.mark.parametrize(
    ("test", "right"),
    [
        ("x = [2, 1]\nwant = [1, 2]\nf(x)\nassert x == want", SORTS),
        ("def check(g):\n    x = [2, 1]\n    g(x)\n    assert x == sorted([2, 1])\ncheck(f)", SORTS),
        ("x = [2, 2, 1]\nwant = [2, 1]\nk = f(x)\nassert x[:k] == want", SHIFTS),
        ("x = [2, 2, 1]\nk = f(x)\nassert x.pop() == 1\nassert x == [2] and f(x) == 0", SHIFTS),
        (
            "x = [2, 2, 1]\nwant = [2, 1]\nk = f(x)\nassert k == len(want)\n"
            "for i in range(k):\n    assert x[i] == want[i]",
            SHIFTS,
        ),
        (
            "x = [2, 2, 1]\nk = f(x)\nassert (k, x) == (2, [2, 1])\nassert len(x) == 2",
            SHIFTS,
        ),
        (
            "x = [2, 2, 1]\nwant = [2, 1]\nk = f(x)\nassert all(x[i] == want[i] for i in range(len(want)))",
            SHIFTS,
        ),
    ],
)
def test_what_a_program_did_in_place_is_seen_though_it_returns_something(
    verifiers: dict[bool, Verifier], test: str, right: str
) -> None:
    exec(f"{right}\n{test}", {})
    assert score(verifiers[False], right, test=test) == 1
    for wrong in (EMPTIES.replace("[]", "2"), "def f(x): return 2", "def f(x): return x"):
        assert score(verifiers[False], wrong, test=test) == 0


# --------------------------------------------------------------------------------------------- right programs

VECTOR = """
class V:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
    def __hash__(self): return hash(self.x)
    def __lt__(self, other): return self.x < other.x
    def __add__(self, other): return V(self.x + other.x)
    def __neg__(self): return V(-self.x)
    def __float__(self): return float(self.x)
    def __bool__(self): return self.x != 0
    def __len__(self): return self.x
    def __round__(self, digits=0): return round(self.x, digits)
"""
SHOWN = """
class P:
    def __init__(self, x): self.x = x
    def __repr__(self): return f'P({self.x})'
    def __format__(self, form): return f'<{form}>'
    def __setitem__(self, key, value): self.x = value
    def __delitem__(self, key): self.x = -key
"""
COLORS = "import enum\nclass C(enum.Enum): RED, BLUE = 1, 2\n"
ADDRESS = "def f():\n    return type('A', (), {'__array__': lambda self, *a, **k: [1.0, 2.0]})()"


@pytest.mark.parametrize(
    ("right", "wrong", "test"),
    [
        (VECTOR, VECTOR.replace("self.x + other.x", "self.x"), "assert V(1) + V(2) == V(3)"),
        (VECTOR, VECTOR.replace("== other.x", "is not other.x"), "assert V(1) == V(1) and V(1) != V(2)"),
        (VECTOR, VECTOR.replace("hash(self.x)", "id(self)"), "assert len({V(1), V(1), V(2)}) == 2"),
        (VECTOR, VECTOR.replace("<", ">"), "assert min([V(2), V(1)]).x == 1 and [V(1)] < [V(2)]"),
        (
            VECTOR,
            VECTOR.replace("-self.x", "self.x"),
            "import math\nassert (-V(1)).x == -1 and math.fabs(-V(2)) == 2",
        ),
        (VECTOR, VECTOR.replace("!= 0", "== 0"), "assert V(1) and not V(0) and len(V(2)) == 2"),
        (VECTOR, VECTOR.replace("round(self.x, digits)", "0"), "assert round(V(1.25), 1) == 1.2"),
        (
            VECTOR,
            "class A: pass\ndef V(x): return A()",
            "assert isinstance(V(1), V) and not isinstance(1, V)",
        ),
        (
            "from collections import namedtuple\nP = namedtuple('P', 'x count')\ndef f(): return P(1, 2)\n"
            "def g(p): return p.count",
            "def f(): return (1, 2)\ng = len",
            "assert f().x == 1 and f() == (1, 2) and f().count == 2 and g(f()) == 2 and "
            "f()._asdict()['x'] == 1",
        ),
        (
            "f = lambda p: p[0]",
            "f = len",
            "import collections\nassert f(collections.namedtuple('P', 'x')(7)) == 7",
        ),
        (
            "import datetime\ndef f(d): return d + datetime.timedelta(1)",
            "f = id",
            "from datetime import date\nassert f(date(2024, 2, 28)) == date(2024, 2, 29)",
        ),
        (
            "import datetime\ndef f(d): return d - d",
            "f = id",
            "from datetime import datetime, timedelta, timezone\n"
            "assert f(datetime(2024, 1, 1, tzinfo=timezone.utc)) == timedelta()",
        ),
        (
            "def f(n): return 10**n",
            "def f(n): return 10**n + 1",
            "assert f(3010) == 10**3010 and f(9000) == 10**9000 and len(str(f(5000))) == 5001",
        ),
        ("def f(x): return [1.0, 2.0]", ADDRESS, "import numpy\nassert numpy.allclose(f(1), [1.0, 2.0])"),
        (
            VECTOR + "    def plus(self, other): return self + other\n",
            VECTOR + "    plus = max\n",
            "assert V(1).plus(V(2)) == V(3) and V(3) != V(2).plus(V(2))",
        ),
        (VECTOR + "most = max", VECTOR + "most = min", "assert most([V(1), V(3), V(2)]) == V(3)"),
        (
            VECTOR + "def f(x): x.sort()",
            VECTOR + "def f(x): pass",
            "x = [V(2), V(1)]\nf(x)\nassert x == [V(1), V(2)]",
        ),
        (SHOWN, SHOWN.replace("P({", "Q({"), "assert repr(P(1)) == 'P(1)' and str([P(1)]) == '[P(1)]'"),
        (SHOWN, SHOWN.replace("P({", "Q({"), "assert str(P(1)) == 'P(1)' and f'{P(2)!r}' == 'P(2)'"),
        (SHOWN, SHOWN.replace("{form}>", ">"), "assert f'{P(1):a}' == '<a>' and '{}'.format(P(1)) == '<>'"),
        (
            SHOWN,
            SHOWN.replace("= value", "= 0"),
            "p = P(1)\np[0] = 5\nassert p.x == 5\ndel p[0]\nassert p.x == 0",
        ),
        (SHOWN, SHOWN.replace("= -key", "= 0"), "p = P(1)\ndel p[3]\nassert p.x == -3"),
        (
            COLORS + "def f(x): return C(x)",
            COLORS + "def f(x): return C(3 - x)",
            "assert f(1) == C.RED and f(2) != C.RED and f(2) in [C.BLUE]",
        ),
    ],
)
def test_what_right_programs_return_works_in_their_tests(
    verifiers: dict[bool, Verifier], right: str, wrong: str, test: str
) -> None:
    assert score(verifiers[False], right, test=test) == 1
    assert score(verifiers[False], wrong, test=test) == 0


SAYS_YES = """
class Yes:
    def __getattr__(self, name): return lambda *a: True
    def _(self, *a): return True
    def zero(self, *a): return 0
    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = _
    __sub__ = __rsub__ = __add__ = __radd__ = __mul__ = __rmul__ = __truediv__ = __mod__ = __xor__ = zero
    __hash__ = zero
def f(*a): return Yes()
"""


@pytest.mark.parametrize(
    "test",
    [
        *("f(1) == 3", "3 == f(1)", "f(1) <= 3", "3 > f(1)", "3 in f(1)", "f(1) in [1, 2]", "f(1) in {1: 2}"),
        *(
            "abs(f(1) - 3) < 1e-6",
            "abs(3 - f(1)) < 1e-6",
            "f(1) % 3 == 0",
            "f(1) ^ 3 == 0",
            "not (f(1) != 3)",
        ),
        *("[f(1)] == [3]", "f(1) * 2 == 0", "not abs(f(1) - 3) > 1e-6", "isinstance(f(1), int)"),
    ],
)
def test_a_program_says_nothing_about_a_value_of_the_tests(
    verifiers: dict[bool, Verifier], test: str
) -> None:
    assert score(verifiers[False], SAYS_YES, answer=[f"assert {test}"]) == 0


RELATIONS = ["f(1) < f(2)", "f(3) != f(4)", "f(2, 3) == f(3, 2)", "f(5) > f(4) >= f(4)"]


@pytest.mark.parametrize(
    "program",
    [
        SAYS_YES,
        "class f:\n    def __init__(self, *_): pass\n    def __eq__(self, other): return True\n"
        "    __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __eq__",
        "f = lambda *x: object()",
        "f = lambda *x: 0",
    ],
)
@pytest.mark.parametrize("call", ["f", "Solution().f"])
def test_results_that_are_compared_with_each_other_are_not_asked_how_they_compare(
    verifiers: dict[bool, Verifier], program: str, call: str
) -> None:
    tests = [f"assert {relation}".replace("f(", f"{call}(") for relation in RELATIONS]
    right = "def f(x, y=1): return x * y"
    solution = "\nclass Solution: f = staticmethod(f)"
    assert earns(SAYS_YES + solution, tests)
    assert score(verifiers[False], right + solution, answer=tests) == 1
    assert score(verifiers[False], program + solution, answer=tests) == 0


ORDERS = [each for each in RELATIONS if "!=" not in each]  # two objects always differ
YES = SAYS_YES.partition("def f")[0]
ORDERED = """
class Yes:
    def __init__(self, *x): self.f(*x)
    def f(self, *x):
        self.x = sorted(x)
        return self
    def __eq__(self, other): return self.x == other.x
    def __lt__(self, other): return True
    __gt__ = __le__ = __ge__ = __lt__
"""
MADE = {
    "itself": "class Solution(Yes):\n    def f(self, *x): return self",
    "itself, which knows its arguments": "class Solution(Yes): pass",
    "new ones of its class": "class Solution(Yes):\n    def f(self, *x): return Solution(*x)",
    "itself, a class that the tests use": "class Solution(Yes): pass\nNode = Solution",
    "another class's": "class Solution:\n    def f(self, *x): return Yes(*x)",
    "a function in CapWords": "def Sum(*x): return Yes(*x)",
    "an object in CapWords": "Sum = (lambda *x: Yes(*x)).__call__",
}


@pytest.mark.parametrize(
    "kind", [YES.replace("class Yes:", "class Yes:\n    def __init__(self, *x): pass"), ORDERED]
)
@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_results_of_functions_are_not_asked_how_they_compare_whatever_made_them(
    verifiers: dict[bool, Verifier], kind: str, made: str
) -> None:
    node = "class Node:\n    def __init__(self, *x): pass\n"
    for call in ("Solution().f", "s.f") if "Solution" in made else ("Sum",):
        tests = [f"assert {relation}".replace("f(", f"{call}(") for relation in ORDERS]
        if call == "s.f":
            tests.insert(0, "n = Node(1)\ns = Solution()")
        assert score(verifiers[False], kind + node + made, answer=tests) == 0
        right = "def Sum(x, y=1): return x * y\nclass Solution: f = staticmethod(Sum)"
        assert score(verifiers[False], node + right, answer=tests) == 1


@pytest.mark.parametrize("kind", [YES, ORDERED])
def test_what_the_row_tests_the_results_of_is_no_class(verifiers: dict[bool, Verifier], kind: str) -> None:
    right, wrong = "def Sum(x, y=1): return x * y", kind.replace("Yes", "Sum")
    check = "def check(candidate):\n" + "\n".join(f"    assert {each}" for each in ORDERS)
    row = {"test": check.replace("f(", "candidate("), "entry_point": "Sum"}
    assert score(verifiers[True], right, **row) == 1 and score(verifiers[True], wrong, **row) == 0
    tests = [f"assert {each}".replace("f(", "Sum(") for each in (*ORDERS, "f(2, 3) == 6")]
    assert score(verifiers[True], right, answer=tests) == 1
    assert score(verifiers[True], wrong, answer=tests) == 0


VALUE = """
from dataclasses import dataclass
@dataclass(order=True, frozen=True)
class V:
    x: int
    def plus(self, o): return V(self.x + o.x)
    @classmethod
    def of(cls, t): return cls(int(t))
    def parts(self): return [V(i) for i in range(self.x)]
    @property
    def next(self): return V(self.x + 1)
    def __iter__(self): return iter(self.parts())
    @dataclass(frozen=True)
    class Inner: x: int
V.ZERO = V(0)
def f(x): return x
"""


@pytest.mark.parametrize(
    "test",
    [
        "V(1).plus(V(2)) == V(2).plus(V(1))",
        "V(1).plus(V(2)) != V(2).plus(V(2))",
        "V.of('1') == V.of('1')",
        "V.of('1') == V(1) and V(1) == V.of('1')",
        "not V.of('1') != V.of('1')",
        "V(3).parts() == V(3).parts()",
        "sorted(V(3).parts()[::-1]) == V(3).parts()",
        "max(V(3).parts()) == V(2)",
        "V.Inner(1) == V.Inner(1) and V.Inner(1) != V.Inner(2)",
        "V(1).plus(V(2)) < V(3).plus(V(1))",
        "V(1) is not None and V(1) != None and V(1) != 1 and V(1) == V(1)",
        "V(1).next == V.of('1').next and V(1).next > V(0).next",
        "list(V(2)) == list(V(2)) and V(2) in V(3)",
        "f(V(3).parts()) == [V(0), V(1), V(2)] and V.ZERO == V(0)",
    ],
)
def test_what_comes_out_of_objects_that_the_tests_make_may_be_compared(
    verifiers: dict[bool, Verifier], test: str
) -> None:
    namespace: dict[str, Any] = {}
    exec(f"{VALUE}\nassert {test}", namespace)
    assert score(verifiers[False], VALUE, answer=[f"assert {test}"]) == 1
    both = VALUE.replace("    x: int\n    def", "    x: int\n    __eq__ = __ne__ = lambda *_: True\n    def")
    of_inner = both.replace(
        "class Inner: x: int", "class Inner:\n        x: int\n        __eq__ = __ne__ = lambda *_: True"
    )
    if "==" in test:
        assert score(verifiers[False], of_inner, answer=[f"assert {test}"]) == 0


def test_members_of_a_class_are_told_apart_without_asking_them(verifiers: dict[bool, Verifier]) -> None:
    tests = ["assert f(1) == C.RED", "assert f(2) == C.BLUE", "assert f(1) == C.RED"]
    liar = (
        "class C:\n    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n    __hash__ = lambda *_: 1\n"
    )
    liar += "C.RED, C.BLUE = C(), C()\ndef f(x): return C.RED"
    assert earns(liar, tests) and score(verifiers[False], liar, answer=tests) == 0
    assert score(verifiers[False], COLORS + "def f(x): return C(x)", answer=tests) == 1


CLASS = "class V:\n    def __init__(self, x): pass\n    def __eq__(self, other): return True\n"
LATER = """    def __ne__(self, other): return Later()
class Later:
    asked = 0
    def __bool__(self):
        self.asked += 1
        return self.asked > 1
"""


@pytest.mark.parametrize("program", [CLASS, CLASS + "    __ne__ = __eq__", CLASS + LATER])
def test_objects_of_a_class_are_not_both_equal_and_not_equal(
    verifiers: dict[bool, Verifier], program: str
) -> None:
    tests = ["assert V(1) == V(1)", "assert V(1) != V(2)"]
    assert score(verifiers[True], VECTOR, answer=tests) == 1
    assert score(verifiers[False], program, answer=tests) == 0


@pytest.mark.parametrize(
    "test",
    [
        "class B(A):\n    pass\nassert B().go() == 1",
        "try:\n    go()\nexcept A:\n    pass",
        "try:\n    go()\nexcept (ValueError, A):\n    pass",
        "import unittest\nunittest.TestCase().assertRaises(A, go)",
    ],
)
def test_tests_that_need_a_class_of_the_program_in_their_own_process_judge_nobody(
    verifiers: dict[bool, Verifier], test: str
) -> None:
    for program in ("class A(Exception):\n    def go(self): return 1\ndef go(): raise A", "A = go = None"):
        assert score(verifiers[False], program, test=test) is None


@pytest.mark.parametrize(
    "program",
    [
        "import os\na, b = map(int, os.read(0, os.fstat(0).st_size).split())\nprint(a + b)",
        "a, b = map(int, open('/dev/stdin').read().split())\nprint(a + b)",
        "import sys\nfirst = sys.stdin.read()\nsys.stdin.seek(0)\nassert first == sys.stdin.read()\n"
        "print(sum(map(int, first.split())))",
        "import mmap\ndata = mmap.mmap(0, 0, prot=mmap.PROT_READ)\nprint(sum(map(int, data.read().split())))",
        "a, b = map(int, input().split())\ntry: input()\nexcept EOFError: print(a + b)",
    ],
)
def test_the_input_of_a_program_is_a_file(verifiers: dict[bool, Verifier], program: str) -> None:
    assert score(verifiers[False], program, answer=json.dumps(OUTPUT)) == 1
