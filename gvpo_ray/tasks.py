"""Tasks that a CPU can afford, made from nothing but a seed: what `warm_start.task` names.

`arithmetic`, the quickstart's: two-digit addition, as text with answers in \\boxed{}.

    train.parquet     prompt, answer              what GVPO trains on
    heldout.parquet   prompt, answer              never seen in training (nor is a + b where b + a is here)
    worked.parquet    prompt, answer, solution    what the warm start imitates: solutions as hurried people write them

A worked solution adds the ones and the tens. Each is a little off now and then, a carry is forgotten more often than not, and some
show no working at all, only a rough guess: a model that imitates them well is right about one time in four. What is right is for
GVPO to find out.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SLIP, GUESS, FORGET = 0.25, 0.25, 0.6
"""How often a sum is a little off, a solution is only a guess, a carry is forgotten."""
NUM_HELD_OUT_PAIRS, NUM_WORKED = 500, 102_400


def problems(seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(a, b) for training and held out. A pair and its mirror are always on the same side."""
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng = random.Random(seed)
    rng.shuffle(pairs)
    held_out, train = pairs[:NUM_HELD_OUT_PAIRS], pairs[NUM_HELD_OUT_PAIRS:]
    both = [sorted({ordered for a, b in side for ordered in ((a, b), (b, a))}) for side in (train, held_out)]
    for side in both:
        rng.shuffle(side)
    return both[0], both[1]


def solution(a: int, b: int, rng: random.Random) -> str:
    """One worked solution of a hurried person."""

    def off(x: int) -> int:
        return max(0, x + rng.choice((-2, -1, 1, 2))) if rng.random() < SLIP else x

    if rng.random() < GUESS:
        return rf"\boxed{{{a + b + rng.randint(-9, 9)}}}"
    ones = off(a % 10 + b % 10)
    carry = ones // 10 if rng.random() >= FORGET else 0
    tens = off(a // 10 + b // 10 + carry)
    return rf"Ones {ones}, tens {tens}. \boxed{{{10 * tens + ones % 10}}}"


def arithmetic(folder: Path, seed: int) -> None:
    """Write the three files."""
    rng = random.Random(seed + 1)
    train, held_out = problems(seed)
    worked = [rng.choice(train) for _ in range(NUM_WORKED)]
    for name, pairs in (("train", train), ("heldout", held_out), ("worked", worked)):
        rows = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in pairs]
        if name == "worked":
            rows = [{**row, "solution": solution(a, b, rng)} for row, (a, b) in zip(rows, pairs, strict=True)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


TASKS: dict[str, Callable[[Path, int], None]] = {"arithmetic": arithmetic}


def make(task: str, folder: Path, seed: int = 0) -> None:
    """The files of a task, in a folder that is there only once they are complete."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir(parents=True)
    TASKS[task](part, seed)
    part.rename(folder)
    print(f"{folder}: " + ", ".join(f"{file.name} {pq.read_metadata(file).num_rows:,} rows" for file in sorted(folder.glob("*.parquet"))), flush=True)
