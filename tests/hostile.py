"""Completions that have hurt other verifiers, at least 60 of each kind: texts, and programs.

Text goes to `math` and to the other built-in reward functions; code goes to a user's reward function that
does what it is told.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

NUM = 60
"""Of every kind."""
GOLD = "42"
RIGHT = (
    "We get 84 / 2, so \\boxed{42}",
    "The answer is $42$.",
    "Thus $x = \\frac{84}{2}$, that is $\\boxed{\\frac{84}{2}}$.",
)
WRONG = ("Therefore \\boxed{41}.", "I do not know.")


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


def in_forms(one: Callable[[int], str]) -> list[str]:
    """NUM answers, each in one of the forms."""
    return [FORMS[i % len(FORMS)].replace("@", one(i)) for i in range(NUM)]


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
    return in_forms(lambda i: tower(styles[i % len(styles)]))


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

    return in_forms(one)


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

    return in_forms(one)


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

    return in_forms(one)


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

    return in_forms(one)


def bytes_that_are_no_text(rng: random.Random, _: Traps) -> list[str]:
    """As a detokenizer hands them over: with U+FFFD in the place of what is not UTF-8. Half a surrogate pair:
    see the file test below.
    """
    return in_forms(
        lambda _: rng.randbytes(rng.randint(1, 400)).replace(b"42", b"43").decode("utf-8", "replace")
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

    return in_forms(one)


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

    return in_forms(one)


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
