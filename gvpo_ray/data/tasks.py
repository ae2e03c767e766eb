r"""Synthetic tasks for small models on a CPU are made here from a seed; `warm_start.task` names one.

    arithmetic   two-digit addition with some working: answers of a dozen tokens (the quickstart's)
    chain        a row of digits, each the sum of two before it: answers of 60 to 75 tokens
    sort         the digits of a number in order: each digit in its place is worth its share (`in_place`)

A task is text with answers in \boxed{}, in three files:

    train.parquet     prompt, answer              what GVPO trains on
    heldout.parquet   prompt, answer              never seen in training (nor is a + b where b + a is here,
                                                  nor a number's digits in another order)
    worked.parquet    prompt, answer, solution    what the warm start imitates: solutions of a simulated
                                                  hurried person

A hurried person makes mistakes now and then, mostly in one systematic way: a carry is forgotten, nine is
taken for ten, a digit that comes twice is written once. So a model that imitates these solutions well is
right one time in four to one in two, and its likeliest answer is often wrong. Lowering the temperature does
not help: GVPO has to find out what is right.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gvpo_ray.files import new_folder


@dataclass(frozen=True)
class Problem:
    """A Problem belongs to a task; those with one `key` are on one side of the train/held-out split."""

    prompt: str
    answer: str
    key: Any
    solve: Callable[[random.Random], str]
    """Returns one worked solution, possibly wrong."""


SLIP, GUESS, FORGET = 0.25, 0.25, 0.6
"""Probabilities that a sum is slightly off, that a solution is only a guess, that a carry is forgotten."""


def arithmetic(rng: random.Random) -> list[Problem]:
    """Return every sum of two two-digit numbers as a problem.

    A worked solution adds the ones and the tens, or shows no working at all.
    """
    return [
        Problem(f"What is {a} + {b}?", str(a + b), (min(a, b), max(a, b)), partial(_add, a, b))
        for a in range(10, 100)
        for b in range(10, 100)
    ]


def _add(a: int, b: int, rng: random.Random) -> str:
    def off(x: int) -> int:
        return max(0, x + rng.choice((-2, -1, 1, 2))) if rng.random() < SLIP else x

    if rng.random() < GUESS:
        return rf"\boxed{{{a + b + rng.randint(-9, 9)}}}"
    ones = off(a % 10 + b % 10)
    carry = ones // 10 if rng.random() >= FORGET else 0
    tens = off(a // 10 + b // 10 + carry)
    return rf"Ones {ones}, tens {tens}. \boxed{{{10 * tens + ones % 10}}}"


LINKS, LAG = (13, 16), 4
"""Fewest and most digits of a chain, and its lag.

The first `LAG` digits are given, and each further digit is the sum of the digit before it and the digit
`LAG` before it.
"""
NINE, MISCOUNT = 0.6, 0.02
"""Probabilities that a nine is taken for a ten, and that one digit of a chain is slightly off."""


def chain(rng: random.Random) -> list[Problem]:
    """Return problems that continue a row of digits, each of which has a letter.

    Four digits are given. Each further one is the last digit of the sum of the digit before it and the digit
    four before it. The answer is the last two. A mistake changes all digits after it, so a wrong chain rarely
    has a right end.
    """
    problems = []
    for start in rng.sample(range(10**LAG), 6000):
        digits = [int(digit) for digit in f"{start:0{LAG}d}"]
        length = rng.randint(*LINKS)
        prompt = f"{_links(digits)} to {_letter(length - 1)}"
        *_, second, last = _follow(digits, length, lambda old: 0)
        problems.append(Problem(prompt, f"{second}{last}", start, partial(_hurry, digits, length)))
    return problems


def _letter(i: int) -> str:
    return chr(ord("a") + i)


def _links(digits: list[int]) -> str:
    return " ".join(f"{_letter(i)}={digit}" for i, digit in enumerate(digits))


def _follow(digits: list[int], length: int, off: Callable[[int], int]) -> list[int]:
    """Return the whole chain; `off` maps the older digit of each sum to the mistake that is added."""
    digits = list(digits)
    for _ in range(LAG, length):
        digits.append((digits[-1] + digits[-LAG] + off(digits[-LAG])) % 10)
    return digits


def _hurry(digits: list[int], length: int, rng: random.Random) -> str:
    def off(old: int) -> int:
        slip = int(old == 9 and rng.random() < NINE)
        return slip + (rng.choice((-2, -1, 1, 2)) if rng.random() < MISCOUNT else 0)

    *_, second, last = chained = _follow(digits, length, off)
    return rf"{_links(chained)} \boxed{{{second}{last}}}"


DIGITS = (6, 10)
"""Fewest and most digits of a number."""
ONCE, SWAP = 0.6, 0.04
"""Probabilities that repeated digits are left out, and that two neighbours are swapped."""


def sort(rng: random.Random) -> list[Problem]:
    """Return problems that put the digits of a number in ascending order."""
    problems = []
    for _ in range(6000):
        number = "".join(rng.choice("0123456789") for _ in range(rng.randint(*DIGITS)))
        answer = "".join(sorted(number))
        problems.append(Problem(f"Sort {number}", answer, answer, partial(_arrange, answer)))
    return problems


def _arrange(answer: str, rng: random.Random) -> str:
    digits = sorted(set(answer)) if rng.random() < ONCE else list(answer)
    for i in range(len(digits) - 1):
        if rng.random() < SWAP:
            digits[i], digits[i + 1] = digits[i + 1], digits[i]
    return rf"\boxed{{{''.join(digits)}}}"


TASKS: dict[str, tuple[Callable[[random.Random], list[Problem]], int]] = {
    "arithmetic": (arithmetic, 102_400),
    "chain": (chain, 48_000),
    "sort": (sort, 64_000),
}
"""By name of a task: the function that makes its problems, and the number of worked solutions."""
NUM_HELD_OUT = 1000
"""Fewest held-out problems; there are a few more, because problems with the same key stay together."""


def make(task: str, folder: Path, seed: int = 0) -> None:
    """Write the files of a task into a folder that exists only once it is complete.

    Args:
        task: a key of TASKS.
        folder: made here.
        seed: decides the problems, the split and the worked solutions.

    Raises:
        OSError: the folder exists already or cannot be written.
    """
    problems, num_worked = TASKS[task]
    train, held_out = split(problems(random.Random(seed)), random.Random(seed))
    rng = random.Random(seed + 1)
    worked = [rng.choice(train) for _ in range(num_worked)]
    with new_folder(folder) as part:
        for name, rows in (("train", train), ("heldout", held_out), ("worked", worked)):
            columns = {"prompt": [row.prompt for row in rows], "answer": [row.answer for row in rows]}
            solutions = {"solution": [row.solve(rng) for row in rows]} if name == "worked" else {}
            pq.write_table(pa.table(columns | solutions), part / f"{name}.parquet")
    print(
        f"{folder}: "
        + ", ".join(
            f"{file.name} {pq.read_metadata(file).num_rows:,} rows"
            for file in sorted(folder.glob("*.parquet"))
        ),
        flush=True,
    )


def split(problems: list[Problem], rng: random.Random) -> tuple[list[Problem], list[Problem]]:
    """Return (training, held-out) problems, each in a random order; equal prompts are kept once.

    At least NUM_HELD_OUT problems are held out, if there are as many.
    """
    problems = list({problem.prompt: problem for problem in problems}.values())
    rng.shuffle(problems)
    by_key: dict[Any, list[Problem]] = {}
    for problem in problems:
        by_key.setdefault(problem.key, []).append(problem)
    held_out: list[Problem] = []
    for alike in by_key.values():
        if len(held_out) < NUM_HELD_OUT:
            held_out += alike
    keys = {problem.key for problem in held_out}
    rng.shuffle(held_out)
    return [problem for problem in problems if problem.key not in keys], held_out
