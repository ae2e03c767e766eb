"""Completions that have hurt other verifiers, at least 60 of each kind, mixed into groups with honest
neighbours.

Text goes to `math` and to the other built-in reward functions; code goes to a user's reward function that
does what it is told. None may be scored correct, cost a neighbour its reward, or leave a process, a file, a
connection or a descriptor behind.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
import pytest

from gvpo_ray import groups
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.verifiers import score_file as verify
from gvpo_ray.verifiers.verifier import Verifier

NUM = 60
"""Of every kind."""
GOLD = "42"
RIGHT = (
    "We get 84 / 2, so \\boxed{42}",
    "The answer is $42$.",
    "Thus $x = \\frac{84}{2}$, that is $\\boxed{\\frac{84}{2}}$.",
)
WRONG = ("Therefore \\boxed{41}.", "I do not know.")
MATH_LIMITS: dict[str, Any] = {"timeout_s": 20.0, "cpu_s": 1, "memory_gib": 1.0}
CODE_LIMITS: dict[str, Any] = {"timeout_s": 0.3, "cpu_s": 2, "memory_gib": 0.25}


class Traps(NamedTuple):
    """What hostile code aims at."""

    canary: Path
    """It creates this, by this name or with a suffix, or its like in the working directory."""
    precious: Path
    """It changes or removes this."""
    port: int
    """It connects to this, over TCP or UDP."""


Kind = Callable[[random.Random, Traps], list[str]]


# --- text ---------------------------------------------------------------------------------------------------

FORMS = (
    "\\boxed{@}",
    "$@$",
    "@",
    "The final answer is $\\boxed{@}$.",
    "Hence \\[ @ \\]",
    "**Answer:** @",
    "$x = @$",
    "\\(@\\)",
)
"""Ways to give an answer."""


def _in_forms(values: list[str]) -> list[str]:
    return [FORMS[i % len(FORMS)].replace("@", value) for i, value in enumerate(values)]


def towers_of_exponents(rng: random.Random, _: Traps) -> list[str]:
    def tower(style: str) -> str:
        text = rng.choice(("9", GOLD))
        for _ in range(rng.randint(3, 12)):
            text = style.replace("@", text).replace("#", str(rng.randint(3, 9)))
        return text

    styles = (
        "#^{@}",
        "#**@",
        "(#^{@})^{#}",
        "\\left(\\frac{#}{7}\\right)^{@}",
        "\\exp(@)",
        "10^{#^{@}}",
        "{#^@}",
        "\\sqrt{#}^{@}",
        "#^(-@)",
        "1-#^{@}",
        "(@)^{#}",
        "{@}^#",
        "@**#",
    )
    return _in_forms([tower(styles[i % len(styles)]) for i in range(NUM)])


def factorials_of_factorials(rng: random.Random, _: Traps) -> list[str]:
    def one(i: int) -> str:
        n, big = rng.randint(5, 99), f"10^{{{rng.randint(7, 12)}}}"
        return [
            f"{'(' * 5}{n}!{')!' * 5}",
            f"{n}{'!' * rng.randint(3, 60)}",
            f"({big})!",
            f"\\frac{{({big})!}}{{(({n})!)!}}",
            f"\\binom{{{big}}}{{{big[:-1]}-1}} }}",
            f"\\Gamma({big})",
            f"\\prod_{{k=1}}^{{{big}}} k",
            f"\\sum_{{k=1}}^{{{big}}} k^k",
            f"factorial(factorial({n}))",
            f"\\lim_{{n \\to \\infty}} \\frac{{n!}}{{({n}n)^n}}!",
        ][i % 10]

    return _in_forms([one(i) for i in range(NUM)])


def numbers_of_a_million_digits(rng: random.Random, _: Traps) -> list[str]:
    def one(i: int) -> str:
        digits = "".join(rng.choices("123456789", k=1000)) * 1000
        return [
            digits,
            f"-{digits}",
            f"0.{digits}",
            f"{digits[:500_000]}.{digits[:500_000]}",
            f"\\frac{{{digits[:500_000]}}}{{{digits[500_000:]}7}}",
            ",".join([digits[:3]] * 333_333),
            "0" * 1_000_000 + "43",
            f"{digits}e{digits[:9]}",
            f"1e{digits}",
            f"2^{{{digits}}}",
        ][i % 10]

    return _in_forms([one(i) for i in range(NUM)])


def a_megabyte_of_nested_brackets(rng: random.Random, _: Traps) -> list[str]:
    def one(i: int) -> str:
        opening, closing = [
            ("(", ")"),
            ("{", "}"),
            ("[", "]"),
            ("\\{", "\\}"),
            ("\\left(", "\\right)"),
            ("\\boxed{", "}"),
        ][i % 6]
        half = 500_000 // len(opening)
        core = rng.choice(("43", "x", "", "1,2"))
        return [
            opening * 2 * half,
            closing * 2 * half,
            opening * half + core + closing * half,
            opening * half + core + closing * (half - 1),
            (opening + closing) * half,
            "".join(rng.choices("(){}[]", k=1000)) * 1000,
        ][i // 6 % 6]

    return _in_forms([one(i) for i in range(NUM)])


def catastrophic_for_regular_expressions(rng: random.Random, _: Traps) -> list[str]:
    pieces = (
        "$",
        "\\boxed{",
        "\\boxed",
        "answer is ",
        "the final answer is $",
        "1,",
        "1,000,",
        "0.",
        "1.1.",
        "1/",
        "-",
        "\\frac",
        "\\frac{1",
        "{}",
        " ",
        "\t",
        "\n",
        "\\ ",
        "\\text{",
        "\\text{a}",
        "a",
        "=",
        "= 1 ",
        "1 ",
        "x_",
        "%",
        "\\%",
        "\\\\",
        "{",
        "$$",
        "\\[",
        "\\(",
        "**",
        "(a)",
        "A. ",
        "or ",
        "and ",
        "10^",
        "\\sqrt",
        "\\cdot",
        "<think>",
        "</think>",
        "\\left",
        "!",
        "'",
        '"',
        "#### ",
    )
    chosen = [pieces[i % len(pieces)] for i in range(NUM)]
    return [
        piece * (rng.randint(20_000, 60_000) // len(piece)) + rng.choice(("x", "!", "}", "", "43"))
        for piece in chosen
    ]


def deep_latex(rng: random.Random, _: Traps) -> list[str]:
    def one(i: int) -> str:
        depth, n = rng.choice((100, 1000, 20_000)), str(rng.randint(3, 9))
        before, after = [
            ("\\frac{1}{1+", "}"),
            ("\\sqrt{1+", "}"),
            ("x^{", "}"),
            ("x_{", "}"),
            ("\\left(1+", "\\right)"),
            ("\\text{", "}"),
            ("\\begin{pmatrix}1&", "\\end{pmatrix}"),
            ("\\sin(", ")"),
            ("\\int_0^1 ", "dx"),
            ("\\left|-", "\\right|"),
            ("\\begin{cases}", ""),
            ("\\mathrm{\\mathbf{", "}}"),
        ][i % 12]
        return before * depth + n + after * depth

    return _in_forms([one(i) for i in range(NUM)])


def bytes_that_are_no_text(rng: random.Random, _: Traps) -> list[str]:
    """As a detokenizer hands them over: with U+FFFD in the place of what is not UTF-8. Half a surrogate pair:
    see the file test below.
    """
    return _in_forms(
        [
            rng.randbytes(rng.randint(1, 400)).replace(b"42", b"43").decode("utf-8", "replace")
            for _ in range(NUM)
        ]
    )


def nul_and_control_characters(rng: random.Random, _: Traps) -> list[str]:
    controls = [chr(code) for code in (*range(32), 127, *range(128, 160))]

    def one(i: int) -> str:
        some = "\0" * (i % 7 + 1) + "".join(rng.choices(controls, k=rng.randint(0, 20)))
        return [
            f"{some}43{some}",
            f"5{some}7",
            f"{some}",
            f"\\frac{{{some}1}}{{3}}",
            f'{{"part": 1.0, "reason": null}}\n{some}',
        ][i % 5]

    return _in_forms([one(i) for i in range(NUM)])


def right_to_left_and_zero_width(rng: random.Random, _: Traps) -> list[str]:
    marks = "\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u2060\u2066\u2067\u2069"
    marks += "\ufeff\u00ad\u034f\u061c"

    def one(i: int) -> str:
        some = "".join(rng.choices(marks, k=rng.randint(1, 50)))
        zalgo = "4" + "".join(chr(rng.randint(0x300, 0x36F)) for _ in range(500)) + "3"
        # 24 after a right-to-left override looks like 42.
        return [
            "\u202e24\u202c",
            f"4{some}3",
            some,
            f"\u202e{some}24",
            f"{some}43{some}",
            zalgo,
            "\u05d0\u05d1 24",
            f"\\fr{some}ac{{1}}{{3}}",
        ][i % 8]

    return _in_forms([one(i) for i in range(NUM)])


def empty(_: random.Random, __: Traps) -> list[str]:
    blank = (
        "\\boxed{}",
        "$$",
        "$ $",
        "\\boxed{ }",
        "\\boxed{\\text{}}",
        "\\[\\]",
        "\\(\\)",
        "$\\boxed{}$",
        "{}",
        "The answer is",
        "The answer is .",
        "\\boxed",
    )
    return [""] * NUM + list(blank)


def only_white_space(rng: random.Random, _: Traps) -> list[str]:
    spaces = " \t\n\r\v\f\x1c\x85\xa0\u1680\u2000\u2003\u2007\u2009\u2028\u2029\u202f\u205f\u3000"
    return ["".join(rng.choices(spaces, k=rng.choice((1, 2, 10, 1000, 100_000)))) for _ in range(NUM)]


def python_in_the_answer(_: random.Random, traps: Traps) -> list[str]:
    write, connect = (
        f"open({str(traps.canary)!r}, 'w')",
        f"__import__('socket').create_connection(('127.0.0.1', {traps.port}))",
    )
    shell = f"__import__('os').system('touch {traps.canary}.shell')"
    expressions = (
        shell,
        write,
        connect,
        f"exec({write!r})",
        f"eval({connect!r})",
        f"exec('import os\\nos.remove({str(traps.precious)!r})')",
        "().__class__.__bases__[0].__subclasses__()[104].load_module('os').abort()",
        "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0](['touch', "
        f"'{traps.canary}.chain'])",
        f"f'{{{write}}}'",
        f'f"{{{shell}}}"',
        "'{0.__class__.__init__.__globals__}'.format(x)",
        f"(lambda: {write})()",
        f"[{write} for _ in range(3)]",
        "sympy.sympify('__import__(\"os\").abort()')",
        f"Integer(1)+{shell}",
        f"S({write!r})",
        f"1 if {write} else 2",
        f"getattr(__import__('os'), 'sys'+'tem')('touch {traps.canary}.getattr')",
        "breakpoint()",
        "exit()",
        "input()",
        "globals()['__builtins__']",
        "__import__('os').kill(__import__('os').getppid(), 9)",
        "lambda: (yield)",
        "while True: pass",
        "(lambda f: f(f))(lambda f: f(f))",
        "[0]*10**12",
        "'a'*10**12",
        "10**10**10",
        "import os; os.fork()",
    )
    forms = ("\\boxed{@}", "$@$", "@", "```python\n@\n```", "The answer is @.", "\\boxed{\\text{@}}")
    return [
        forms[(i + i // len(expressions)) % len(forms)].replace("@", expressions[i % len(expressions)])
        for i in range(3 * len(expressions))
    ]


TEXT: dict[str, Kind] = {
    kind.__name__.replace("_", " "): kind
    for kind in (
        towers_of_exponents,
        factorials_of_factorials,
        numbers_of_a_million_digits,
        a_megabyte_of_nested_brackets,
        catastrophic_for_regular_expressions,
        deep_latex,
        bytes_that_are_no_text,
        nul_and_control_characters,
        right_to_left_and_zero_width,
        empty,
        only_white_space,
        python_in_the_answer,
    )
}


# --- code that a user's reward function runs ----------------------------------------------------------------


def _variations(programs: tuple[str, ...]) -> list[str]:
    """Each program as it is, in a thread that is waited for, in a try that swallows, with signals blocked."""

    def indented(program: str) -> str:
        return program.replace("\n", "\n    ")

    ways: tuple[Callable[[str], str], ...] = (
        lambda program: program,
        lambda program: f"try:\n    {indented(program)}\nexcept BaseException:\n    pass",
        lambda program: f"import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))\n{program}",
        lambda program: (
            f"import asyncio\nasync def main():\n    exec({program!r}, {{}})\nasyncio.run(main())"
        ),
        lambda program: (
            f"import threading\nthread = threading.Thread(target=exec, args=({program!r}, "
            f"{{}}))\nthread.start()\nthread.join()"
        ),
    )
    made = [way(program) for way in ways for program in programs]
    assert len(made) >= NUM
    return made[:NUM]


def memory_bombs(_: random.Random, __: Traps) -> list[str]:
    return _variations(
        (
            "bytearray(2**40)",
            "[0] * 10**12",
            "'a' * 10**12",
            "kept = []\nwhile True:\n    kept.append(bytearray(2**20))",
            "kept = 'a'\nwhile True:\n    kept += kept",
            "kept = {}\nwhile True:\n    kept[len(kept)] = 'a' * 10**5",
            "list(range(10**12))",
            "f'{1:>1000000000000}'",
            "kept = []\nwhile True:\n    kept = [kept, kept, bytes(10**6)]",
            "import mmap\nkept = []\nwhile True:\n    kept.append(mmap.mmap(-1, 2**22))",
            "import itertools\nlist(itertools.product(range(1000), repeat=4))",
            "import os\nkept = []\nwhile True:\n    kept.append(os.memfd_create('x'))",
        )
    )


def fork_bombs(_: random.Random, traps: Traps) -> list[str]:
    return _variations(
        (
            "import os\nwhile True:\n    os.fork()",
            "import os\nfor _ in range(50):\n    try:\n        os.fork()\n    except OSError:\n        pass",
            f"import subprocess\nsubprocess.Popen(['touch', '{traps.canary}.popen'])",
            "import os\nfor _ in range(20):\n    os.system(':(){ :|:& };:')",
            f"import os\nos.posix_spawnp('touch', ['touch', '{traps.canary}.spawn'], {{}})",
            "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
            "import multiprocessing\nmultiprocessing.get_context('spawn').Process(target=print).start()",
            "from concurrent.futures import "
            "ProcessPoolExecutor\nProcessPoolExecutor(4).submit(print).result()",
            "import pty\npty.fork()",
            f"import os\nos.popen('touch {traps.canary}.popen2').read()",
            f"import os\nos.execvp('touch', ['touch', '{traps.canary}.exec'])",
            "import os\nos.setsid()\nos.fork()",
        )
    )


def infinite_loops(_: random.Random, __: Traps) -> list[str]:
    return _variations(
        (
            "while True:\n    pass",
            "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n     "
            "   pass",
            "import time\ntime.sleep(10**6)",
            "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
            "10 ** 10 ** 9",
            "import itertools\nsum(itertools.count())",
            "import threading\nthreading.Event().wait()",
            "import os\nread, write = os.pipe()\nos.read(read, 1)",
            "import signal\nwhile True:\n    signal.sigwait([signal.SIGUSR1])",
            "def again():\n    try:\n        again()\n    finally:\n        again()\nagain()",
            "class Again:\n    def __del__(self):\n        Again()\nAgain()\nwhile True:\n    Again()",
            "import os\nos.kill(os.getpid(), 19)",
        )
    )


def network(_: random.Random, traps: Traps) -> list[str]:
    here = f"('127.0.0.1', {traps.port})"
    return _variations(
        (
            f"import socket\nsocket.create_connection({here})",
            f"import socket\nsocket.socket().connect({here})",
            f"import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', {here})",
            f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{traps.port}')",
            f"import http.client\nhttp.client.HTTPConnection('127.0.0.1', {traps.port}).request('GET', '/')",
            f"import os\nos.system('exec 3<>/dev/tcp/127.0.0.1/{traps.port}')",
            f"import subprocess\nsubprocess.run(['bash', '-c', 'echo > /dev/tcp/127.0.0.1/{traps.port}'])",
            "import socket\nsocket.create_server(('127.0.0.1', 0))",
            f"import socket\nserver = socket.socket(socket.AF_UNIX)\nserver.bind('{traps.canary}.socket')",
            "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\na.sendto(b'x', "
            f"'{traps.precious}')",
            "import asyncio\nasyncio.new_event_loop().run_until_complete("
            f"asyncio.open_connection('127.0.0.1', {traps.port}))",
            "import socket\nsocket.getaddrinfo('localhost', 80)\nsocket.socket(socket.AF_INET6)",
        )
    )


def files(_: random.Random, traps: Traps) -> list[str]:
    canary, precious = traps.canary, traps.precious
    return _variations(
        (
            f"open('{canary}', 'w').write('x')",
            f"import pathlib\npathlib.Path('{canary}.text').write_text('x')",
            f"import os\nos.open('{canary}.low', os.O_CREAT | os.O_WRONLY)",
            "open('canary-here', 'w').write('x')",
            f"import os\nos.mkdir('{canary}.folder')",
            f"import os\nos.symlink('/', '{canary}.link')",
            f"import os\nos.link('{precious}', '{canary}.hard')",
            f"import os\nos.rename('{precious}', '{canary}.moved')",
            f"import os\nos.remove('{precious}')",
            f"open('{precious}', 'a').write('x')",
            f"import os\nos.chmod('{precious}', 0)",
            f"import os\nos.truncate('{precious}', 0)",
            f"import shutil\nshutil.rmtree('{precious.parent}')",
            f"import tempfile\ntempfile.mkstemp(dir='{canary.parent}')",
            f"import sqlite3\nsqlite3.connect('{canary}.db').execute('create table x (y)')",
            "import os\nopen(f'/proc/{os.getppid()}/mem', 'r+b')",
            f"import ctypes\nctypes.CDLL(None).creat(b'{canary}.libc', 0o644)",
        )
    )


def crashes_and_signals(_: random.Random, __: Traps) -> list[str]:
    return _variations(
        (
            "import ctypes\nctypes.string_at(0)",
            "import os\nos.abort()",
            "import os\nos._exit(0)",
            "raise SystemExit(0)",
            "raise KeyboardInterrupt",
            "import os\nos.kill(os.getppid(), 9)",
            "import os\nos.killpg(0, 9)",
            "import os\nos.kill(-1, 9)",
            "import os\nos.kill(os.getpid(), 9)",
            "import sys\nsys.setrecursionlimit(10**9)\ndef deep():\n    deep()\ndeep()",
            "import os\nos.closerange(0, 1000)",
            'import sys\nsys.stdout.write(\'{"part": 1.0, "reason": null}\\n\' * 1000)',
        )
    )


def forged_answers(rng: random.Random, _: Traps) -> list[str]:
    """Frames of the protocol, written to whatever is open: for this check, and for the next one."""

    def one(i: int) -> str:
        frames = [
            '{"begun": true}',
            f'{{"part": {rng.choice(("1.0", "0.0", "null", "NaN", "1e999", "[1]"))}, "reason": null}}',
        ]
        text = (
            "".join(rng.choice(frames) + "\n" for _ in range(i % 6 + 1))
            + ("", '{"part"', "\0\xff", "[" * 10_000 + "\n", "a" * 2**21)[i % 5]
        )
        attempt = (
            f"try:\n        os.write(descriptor, {text.encode('latin-1')!r})\n    except OSError:\n "
            "       pass"
        )
        return f"import os\nfor descriptor in range(3, 30):\n    {attempt}"

    return [one(i) for i in range(NUM)]


REFUSED = ("PermissionError: [Errno 1", "PermissionError: [Errno 13")
CODE: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "memory bombs": (
        memory_bombs,
        ("memory: ", "timeout: ", "OSError: [Errno 12] Cannot allocate memory", *REFUSED),
    ),
    "fork bombs": (fork_bombs, ("OSError: out of pty devices", *REFUSED)),
    "infinite loops": (infinite_loops, ("timeout: ",)),
    "network": (
        network,
        (
            "URLError: <urlopen error [Errno 1]",
            "RuntimeError: Cannot run the event loop",
            "gaierror: [Errno -3]",  # a name cannot be looked up
            *REFUSED,
        ),
    ),
    "files": (files, ("OperationalError: unable to open database file", *REFUSED)),
    "crashes and signals": (
        crashes_and_signals,
        ("crash: ", "timeout: ", "memory: ", "SystemExit: 0", "KeyboardInterrupt: ", *REFUSED),
    ),
    "forged answers": (forged_answers, ("crash: ", "timeout: ")),
}
"""Kind -> what a reason without a reward may be: an attempt that ends in a SyntaxError would test nothing."""


# --- scoring ------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    completion: str
    reward: float | None
    reason: str | None
    expected: float | None
    """Of an honest neighbour; None: hostile."""


def _group(
    hostile: list[str], right: tuple[str, ...], wrong: tuple[str, ...]
) -> tuple[list[str], list[float | None]]:
    """Honest completions before, between and after the hostile ones, with what they deserve."""
    honest = [(text, 1.0) for text in right] + [(text, 0.0) for text in wrong]
    mixed: list[tuple[str, float | None]] = [(right[0], 1.0)]
    for i, text in enumerate(hostile):
        mixed += [(text, None), honest[i % len(honest)]]
    return [text for text, _ in mixed], [expected for _, expected in mixed]


class _Fleet:
    """Two verifiers, each used from a thread of its own."""

    def __init__(
        self, config: VerifiersConfig, functions: dict[str, Callable[..., Any]] | None = None
    ) -> None:
        self._threads = [ThreadPoolExecutor(1) for _ in range(2)]
        self._verifiers = [thread.submit(Verifier, config, functions) for thread in self._threads]

    def score(
        self, hostile: list[str], right: tuple[str, ...] = RIGHT, wrong: tuple[str, ...] = WRONG
    ) -> list[Scored]:
        """Ten to a group."""
        waiting = []
        for i in range(0, len(hostile), 10):
            completions, expected = _group(hostile[i : i + 10], right, wrong)
            table = groups.table(
                [{"group_id": i, "prompt": "What?", "answer": GOLD, "completions": completions}]
            )
            turn = i // 10 % 2
            waiting.append(
                (
                    completions,
                    self._threads[turn].submit(self._verifiers[turn].result().score, table),
                    expected,
                )
            )
        scored = []
        for completions, future, expected in waiting:
            (row,) = groups.rows(future.result())
            scored += [
                Scored(*each)
                for each in zip(completions, row["rewards"], row["reward_reasons"], expected, strict=True)
            ]
        return scored

    def close(self) -> None:
        for thread, verifier in zip(self._threads, self._verifiers, strict=True):
            thread.submit(verifier.result().close).result()
            thread.shutdown()


def _processes(folder: Path) -> set[int]:
    """Descendants of this process, and whatever ran away from them: it has the folder for temporary files in
    its environment.
    """
    found = {process.pid for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR", "").startswith(str(folder)):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found - {os.getpid()}


class World:
    """A folder for temporary files, a working directory and listeners of our own, and what there is in and of
    them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("temporary", "working", "outside"):
            (root / name).mkdir()
        precious = root / "outside" / "precious"
        precious.write_text("as it was")
        self._tcp, self._udp = (
            socket.create_server(("127.0.0.1", 0)),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        )
        port = self._tcp.getsockname()[1]
        self._udp.bind(("127.0.0.1", port))
        for listener in (self._tcp, self._udp):
            listener.setblocking(False)
        self.traps = Traps(root / "outside" / "canary", precious, port)

    def count(self) -> dict[str, Any]:
        gc.collect()
        return {
            "processes": _processes(self.root / "temporary"),
            "files": sorted(
                (str(path), path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
                for path in self.root.rglob("*")
            ),
            "descriptors": psutil.Process().num_fds(),
            "sockets": sorted((c.family, c.type, c.status) for c in psutil.Process().net_connections("all")),
        }

    def num_visitors(self) -> int:
        """Connections and datagrams that have arrived."""
        num = 0
        try:
            while True:
                self._tcp.accept()[0].close()
                num += 1
        except BlockingIOError:
            pass
        try:
            while True:
                self._udp.recv(1)
                num += 1
        except BlockingIOError:
            return num


class Report(NamedTuple):
    """What there is when a kind has been scored, all verifiers closed."""

    scored: list[Scored]
    before: dict[str, Any]
    after: dict[str, Any]
    num_visitors: int
    most_processes: int


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """`apart(check, …)`: a function of this file, called with a World in a process of its own, in which
    nobody else opens or closes anything.
    """
    root = tmp_path_factory.mktemp("world")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (root,)) as process:
        yield lambda check, *arguments: process.submit(_call, check, arguments).result()


_world: World


def _begin(root: Path) -> None:
    global _world
    _world = World(root)
    os.environ["TMPDIR"], tempfile.tempdir = str(root / "temporary"), None
    os.chdir(root / "working")


def _call(check: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    check(_world, *arguments)


def _report(
    world: World,
    kind: Kind,
    config: VerifiersConfig,
    functions: dict[str, Callable[..., Any]] | None = None,
    **honest: Any,
) -> Report:
    hostile = kind(random.Random(kind.__name__), world.traps)
    assert len(hostile) >= NUM
    before = world.count()
    fleet = _Fleet(config, functions)
    try:
        scored = fleet.score(hostile, **honest)
        most = len(_processes(world.root / "temporary") - before["processes"])
    finally:
        fleet.close()
    return Report(scored, before, world.count(), world.num_visitors(), most)


def _assert_harmless(report: Report) -> None:
    assert [
        each for each in report.scored if each.expected is not None and each.reward != each.expected
    ] == []
    hostile = [each for each in report.scored if each.expected is None]
    assert [
        (each.completion[:200], each.reward, each.reason)
        for each in hostile
        if each.reward not in (0.0, None)
    ] == []
    assert len(hostile) >= NUM
    for what, before in report.before.items():
        assert report.after[what] == before, what
    assert report.num_visitors == 0
    assert report.most_processes <= 4  # a template and a child of each verifier


@pytest.mark.parametrize("kind", TEXT)
def test_hostile_text_is_harmless_to_math(apart: Callable[..., None], kind: str) -> None:
    apart(_text_to_math, kind)


def _text_to_math(world: World, kind: str) -> None:
    _assert_harmless(_report(world, TEXT[kind], VerifiersConfig(**MATH_LIMITS)))


def test_hostile_text_is_harmless_to_the_other_reward_functions_and_meets_no_limit(
    apart: Callable[..., None],
) -> None:
    apart(_text_to_others)


def _text_to_others(world: World) -> None:
    def all_kinds(rng: random.Random, traps: Traps) -> list[str]:
        return [text for kind in TEXT.values() for text in kind(rng, traps)[::4]]

    # The last two look at form and say nothing of right and wrong: they are here for their time and their
    # memory.
    rewards: Any = {"numeric": 0.5, "exact_match": 0.5, "format": 0.0, "length": 0.0}
    report = _report(
        world,
        all_kinds,
        VerifiersConfig(rewards=rewards, **MATH_LIMITS),
        right=("\\boxed{42}", "I find \\boxed{ 42 }."),
    )
    _assert_harmless(report)
    assert [(each.completion[:200], each.reason) for each in report.scored if each.reward is None] == []


@pytest.mark.parametrize("kind", CODE)
def test_hostile_code_in_a_users_function_is_harmless(apart: Callable[..., None], kind: str) -> None:
    apart(_code, kind)


def _code(world: World, kind: str) -> None:
    def obeys(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
        if not completions[0].isdigit():
            exec(completions[0], {})
        return [float(completions[0] == answer[0])]

    make, endings = CODE[kind]
    report = _report(
        world, make, VerifiersConfig(**CODE_LIMITS), {"math": obeys}, right=(GOLD,), wrong=("41",)
    )
    _assert_harmless(report)
    reasons = [each.reason for each in report.scored if each.expected is None and each.reward is None]
    assert len(reasons) >= NUM // 3
    assert [
        reason for reason in reasons if not (reason or "").removeprefix("math raised ").startswith(endings)
    ] == []


def test_the_traps_work(apart: Callable[..., None]) -> None:
    """Without confinement the same programs leave what the tests above look for."""
    apart(_traps)


def _traps(world: World) -> None:
    traps = world.traps._replace(canary=world.traps.canary.with_name("control"))
    before = world.count()["files"]
    for program in (files(random.Random(0), traps)[0], network(random.Random(0), traps)[0]):
        subprocess.run([sys.executable, "-c", program], check=True)
    assert world.num_visitors() == 1
    assert world.count()["files"] != before
    traps.canary.unlink()
    assert world.count()["files"] == before


# --- half a surrogate pair, and bytes that are not UTF-8 ----------------------------------------------------


def test_a_table_does_not_take_half_a_surrogate_pair() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        groups.table([{"prompt": "What?", "answer": GOLD, "completions": ["\\boxed{4\ud8002}"]}])


def test_rows_of_a_file_with_half_surrogate_pairs_and_invalid_utf8_cost_only_themselves(
    apart: Callable[..., None],
) -> None:
    """JSON can escape half a pair; a line that is not UTF-8 is malformed."""
    apart(_file)


def _file(world: World) -> None:
    rng = random.Random("surrogates")
    halves = [chr(rng.randint(0xD800, 0xDFFF)) for _ in range(NUM)]
    hostile = [
        form.replace("43", f"4{half}3") for half, form in zip(halves, _in_forms(["43"] * NUM), strict=True)
    ]
    lines, expected = [], []
    for text in hostile:
        broken = (
            json.dumps({"response": "\\boxed{@}", "gold": GOLD})
            .encode()
            .replace(b"@", b"42" + rng.randbytes(3) + b"\xff")
        )
        lines += [
            json.dumps({"response": text, "gold": GOLD}).encode(),
            json.dumps({"response": RIGHT[0], "gold": GOLD}).encode(),
            broken,
            json.dumps({"response": WRONG[0], "gold": GOLD}).encode(),
        ]
        expected += ["incorrect", "correct", "unverifiable", "incorrect"]
    source, out = world.root / "in.jsonl", world.root / "out.jsonl"
    before = world.count()
    source.write_bytes(b"\n".join(line.replace(b"\n", b"") for line in lines))
    summary = verify.main(str(source), str(out), VerifiersConfig(**MATH_LIMITS), num_workers=2)
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    source.unlink()
    out.unlink()
    assert [row["verdict"] for row in scored] == expected
    assert summary["malformed"] == NUM
    assert [row["response"] for row in scored[::4]] == hostile
    assert world.count() == before
