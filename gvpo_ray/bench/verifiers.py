"""`gvpo-ray bench verifiers` compares checks per second of the verifiers and of plain math-verify.

It prints a row for each of these:

    n plain      math_verify.parse and verify with their own limits, as most trainers call them, in n
                 processes: 1, 2, ... up to the number of CPUs
    in process   our grading without a sandbox; the further time of a verifier is the sandbox's overhead
    n verifiers  n verifiers with their sandboxes, each in a thread
    poisoned     one verifier, with 1 % of the rows replaced by completions that run into the time limit
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.verifiers import RewardConfig, VerifiersConfig
from gvpo_ray.verifiers.responses import MalformedRow, Names, count_rows, read_row, rows_of
from gvpo_ray.verifiers.verifier import Verifier

POISON_SHARE = 0.01
"""Share of the rows that are poisoned."""

Rows = list[tuple[str, str]]
WARM_UP: Rows = [("The answer is $\\frac{1}{2}$.", "0.5")] * 8
"""Rows that are checked first, because the first call imports modules and compiles tables."""


def loops(prompts: list[str], completions: list[str], **columns: list[str]) -> list[float]:
    """Never end on the completion "poison": a reward function.

    A completion that is hard for sympy would not do, because the next version may solve it.
    """
    while completions[0] == "poison":
        pass
    return [1.0]


def main(source: str, num_rows: int = 2000) -> None:
    """Run the benchmark and print its table.

    Args:
        source: JSONL file with a response and a gold answer in each row.
        num_rows: rows to check, spread evenly over the file.

    Raises:
        ConfigError: the file cannot be read, or lacks these columns.
    """
    rows = _read(source, num_rows)
    table = Table(
        title=f"bench verifiers: {len(rows)} rows of {os.path.basename(source)}", title_justify="left"
    )
    table.add_column("")
    for column in ("checks per s", "/ n x plain", "/ n plains", "ms per check"):
        table.add_column(column, justify="right", no_wrap=True)

    def add(name: str, seconds: float, n: int = 1) -> None:
        ratios = (f"{plain[1] / seconds / n:.2f}", f"{plain[n] / seconds:.2f}")
        table.add_row(name, f"{len(rows) / seconds:,.0f}", *ratios, f"{1000 * seconds * n / len(rows):.2f}")

    counts = _counts(len(os.sched_getaffinity(0)))
    plain = {n: _in_processes(_plain, rows, n) for n in counts}
    for n, seconds in plain.items():
        add(f"{n} plain math-verify", seconds, n)
    in_process = _in_processes(_in_process, rows, 1)
    add("ours in process, no sandbox", in_process)
    ours = {n: _fleet(rows, VerifiersConfig(), n) for n in counts}
    for n, seconds in ours.items():
        add(f"{n} verifier{'s' * (n > 1)}", seconds, n)
    Console(highlight=False).print(table)
    print(
        "(n plains: as many plain processes at once. Where they do not scale, cores share something, and "
        "no verifier can.)"
    )
    print(
        f"overhead of the sandbox: {1000 * (ours[1] - in_process) / len(rows):.2f} ms per check (1 "
        "verifier against in process)"
    )

    config = VerifiersConfig(
        timeout_s=1.0, rewards={"math": RewardConfig(), f"{__name__}:loops": RewardConfig()}
    )
    bad = set(random.Random(0).sample(range(len(rows)), max(1, round(POISON_SHARE * len(rows)))))
    clean = _fleet(rows, config, 1)
    poisoned = _fleet(
        [("poison", gold) if i in bad else (text, gold) for i, (text, gold) in enumerate(rows)], config, 1
    )
    print(
        f"{len(bad)} poisonous rows of {len(rows)}, limit {config.timeout_s:g} s: {poisoned - clean:.2f} s "
        f"more than without them, {(poisoned - clean) / (len(bad) * config.timeout_s):.3f} of their own "
        "limits"
    )


def _read(source: str, num_rows: int) -> Rows:
    """Return (response, gold) of rows spread evenly over a file of responses."""
    count_rows(source)
    names, texts = Names(), []
    for line, row in rows_of(source):
        try:
            if isinstance(row, MalformedRow):
                raise row
            found = read_row(row, names, line)
        except MalformedRow as error:
            raise ConfigError(f"INPUT: {source}: {error}") from error
        texts.append((found.response, str(found.columns["answer"])))
    return texts[:: max(1, len(texts) // num_rows)][:num_rows]


def _counts(num_cpus: int) -> list[int]:
    return sorted({n for n in (1, 2, 4, 8, 16, 32, 64) if n <= num_cpus} | {num_cpus})


def _in_processes(work: Callable[[Rows], None], rows: Rows, n: int) -> float:
    """Return the seconds that n fresh processes need for all rows, without their start.

    The processes are fresh, so that what one measurement has cached does not help the next.
    """
    with multiprocessing.get_context("spawn").Pool(n) as pool:
        shares = [rows[i::n] for i in range(n)]
        pool.map(work, [WARM_UP] * n, chunksize=1)
        begin = time.perf_counter()
        pool.map(work, shares, chunksize=1)
        return time.perf_counter() - begin


def _plain(rows: Rows) -> None:
    from math_verify import parse, verify

    for text, gold in rows:
        verify(parse(gold if "$" in gold or "\\boxed" in gold else f"\\boxed{{{gold}}}"), parse(text))


def _in_process(rows: Rows) -> None:
    from gvpo_ray.verifiers.math.grade import grade

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off

    for text, gold in rows:
        grade(text, gold)


def _fleet(rows: Rows, config: VerifiersConfig, num_workers: int) -> float:
    """Return the seconds that verifiers, each in a thread, need for all rows, without their start."""
    left = iter(rows)
    lock = threading.Lock()
    ready = threading.Barrier(num_workers + 1)

    def work() -> None:
        with Verifier(config) as verifier:
            verifier.check([""], ["\\boxed{1}"], {"answer": ["1"]})
            ready.wait()
            while True:
                with lock:
                    row = next(left, None)
                if row is None:
                    return
                verifier.check([""], [row[0]], {"answer": [row[1]]})

    threads = [threading.Thread(target=work) for _ in range(num_workers)]
    for thread in threads:
        thread.start()
    ready.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin
