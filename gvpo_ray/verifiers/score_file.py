"""`gvpo-ray verify` scores a file of responses with a run's verifiers, and compares them with labels.

Every row of INPUT gives one row of OUT in the same order, with added columns reward, verdict, reason and
seconds. A column of INPUT with one of these names is kept as input_reward and so on. Unfinished work is in
OUT.part, and the same command continues it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.shown import hide, visible
from gvpo_ray.config.verifiers import ReasonKind, VerifiersConfig
from gvpo_ray.files import part_of, repair_lines, replacing
from gvpo_ray.groups import limit_of
from gvpo_ray.sandbox.functions import OutOfReach
from gvpo_ray.verifiers.outages import Failure, Outages, Record, RewardError
from gvpo_ray.verifiers.responses import (
    LABELS,
    PARQUET_ROWS,
    Fields,
    MalformedRow,
    Names,
    NoColumn,
    count_rows,
    first_columns,
    is_given,
    read_row,
    rows_of,
)
from gvpo_ray.verifiers.verifier import Check, Verifier, validate_rewards

ADDED = ("reward", "verdict", "reason", "seconds")
"""Columns that are added to each row."""

TRUTHS = {"true": True, "1": True, "false": False, "0": False}
"""Values of such a column, by their text in lower case; 1.0 and 0.0 count as well."""


def main(
    source: str,
    out: str,
    config: VerifiersConfig,
    num_workers: int | None = None,
    response_column: str | None = None,
    gold_column: str | None = None,
) -> Counter[str]:
    """Score every row of a file, write the scored rows, and print progress and a summary.

    Args:
        source: file to read, in any form of data/files.py.
        out: file to write, .jsonl or .parquet.
        config: the reward functions and limits; reward models are refused.
        num_workers: number of checks at a time; default: the number of CPUs of this machine.
        response_column: column or path of the response; None: the usual names (responses.RESPONSES).
        gold_column: column or path of the gold answer; None: the usual names (responses.GOLDS).

    Returns:
        Counts of rows, malformed, correct, incorrect, unverifiable, and, of rows with a label, labelled,
            agree, false_negative, false_positive.

    Raises:
        ConfigError: a file cannot be read or written, OUT.part belongs to another input or other settings, or
            no row can be scored.
        RewardError: a reward function fails on every row.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if unfit := [name for name, reward in config.rewards.items() if reward.model]:
        raise ConfigError(
            f"verifiers.rewards.{unfit[0]}: a reward model needs a cluster; verify runs functions and URLs"
        )
    num_rows = count_rows(source)
    if any(
        Path(path).exists() and Path(path).samefile(source)
        for path in (out, part_of(Path(out), hidden=False))
    ):
        raise ConfigError(f"--out: {out} is INPUT, which would be lost: name another file")
    names = Names(response_column, gold_column)
    validate_rewards(config, columns=first_columns(source, names))
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    asked = {name: value for name, value in names._asdict().items() if value is not None}
    work = _Work(Path(out), asked | {"input": digest, "verifiers": hide(config.model_dump(mode="json"))})
    summary: Counter[str] = Counter()
    limits: deque[int] = deque(maxlen=10)  # the last lines that hit a limit
    first: MalformedRow | None = None

    def say(line: str) -> None:
        console.print(visible(line), markup=False, emoji=False)

    columns = (
        TextColumn("verify"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with (
        work,
        _Pool(config, names, num_workers or len(os.sched_getaffinity(0)), say) as pool,
        Progress(*columns, console=console) as progress,
    ):
        if work.num_done:
            console.print(f"going on after the {work.num_done} rows of {escape(str(work.part))}")
        bar = progress.add_task("", total=num_rows)

        def count(line: int, row: Fields) -> None:
            summary.update(_counts(row))
            if limit_of(row["reason"]):
                limits.append(line)
            passed = summary["correct"] / max(1, summary["rows"])
            progress.update(
                bar, advance=1, description=f"correct {passed:.3f}, unverifiable {summary['unverifiable']}"
            )

        for line, row in work.done():
            count(line, row)
            if row["reward"] is not None:
                pool.record.worked.update(config.rewards)  # all of them gave a value there
        for line, row, error in pool.score(_skip(rows_of(source), work.num_done)):
            if error:
                first = first or error
                console.print(f"[yellow]malformed:[/] {escape(str(error))}")
            work.write(line, row)
            count(line, row)
        if summary["malformed"] == summary["rows"]:
            is_lacking = first is None or isinstance(first, NoColumn)
            why = names.complaint() if is_lacking else f"no row can be scored: {first}"
            raise ConfigError(f"{source}: {why}")
        if pool.all_faults and summary["unverifiable"] == summary["rows"]:
            raise ConfigError(f"a reward function fails on every row: {pool.all_faults}")
        work.finish()
    _print(Console(highlight=False, soft_wrap=True), out, summary, limits)
    return summary


class _Pool:
    """A _Pool has threads with a Verifier each; the verifiers' child processes do the work."""

    def __init__(
        self, config: VerifiersConfig, names: Names, num_workers: int, say: Callable[[str], None]
    ) -> None:
        self._config, self._names, self._num_workers = config, names, num_workers
        self._say, self._said = say, set[str]()
        self.record, self._ends = Record(), threading.Event()
        self._outages, self._lock = Outages(say, "row"), threading.Lock()
        self._local = threading.local()
        self._verifiers: list[Verifier] = []
        self.all_faults = ""
        """Reason of the last row that has no reward although it hit no limit of time or memory."""

    def __enter__(self) -> _Pool:
        self._threads = ThreadPoolExecutor(self._num_workers, thread_name_prefix="verify")
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._threads.shutdown(cancel_futures=True)
        for verifier in self._verifiers:
            verifier.close()

    def score(
        self, rows: Iterator[tuple[int, Fields | MalformedRow]]
    ) -> Iterator[tuple[int, Fields, MalformedRow | None]]:
        """Score rows, up to 32 per worker ahead of the one that is due.

        Yields:
            (line, row with its verdict, what is malformed or None), in the order of the rows.
        """
        waiting: deque[tuple[int, Future[tuple[Fields, MalformedRow | None]]]] = deque()
        for line, row in rows:
            waiting.append((line, self._threads.submit(self._one, line, row)))
            if len(waiting) >= 32 * self._num_workers:
                first, future = waiting.popleft()
                yield first, *future.result()
        for line, future in waiting:
            yield line, *future.result()

    def _one(self, line: int, row: Fields | MalformedRow) -> tuple[Fields, MalformedRow | None]:
        """Score one row on this thread's verifier; return it with its verdict, and what is malformed."""
        try:
            if isinstance(row, MalformedRow):
                raise row
            scored = read_row(row, self._names, line)
        except MalformedRow as error:
            fields = {} if isinstance(row, MalformedRow) else row
            return self._with(fields, None, "unverifiable", f"malformed: {error}", 0.0), error
        if not hasattr(self._local, "verifier"):
            self._local.verifier = Verifier(self._config, record=self.record)
            self._verifiers.append(self._local.verifier)
            for sentence in self._local.verifier.unprotected:
                self._say_once(f"not protected: {sentence}")
        columns = {name: [value] for name, value in scored.columns.items()}
        check = self._checked(scored.prompt, scored.response, columns)
        if check.reward is None and limit_of(check.reason) in (None, ReasonKind.CRASH):
            self.all_faults = str(check.reason)
        return self._with(row, check.reward, check.verdict, check.reason, round(check.seconds, 6)), None

    def _with(self, row: Fields, *added: Any) -> Fields:
        """Return a row with the values of ADDED; its own columns of these names get others."""
        own = {}
        for name, value in row.items():
            free = name
            while free in ADDED or (free != name and free in row):  # INPUT may be the OUT of another command
                free = f"input_{free}"
            if free != name:
                self._say_once(f"INPUT has a column {name} of its own, which is {free} in OUT")
            own[free] = value
        return own | dict(zip(ADDED, added, strict=True))

    def _checked(self, prompt: str, response: str, columns: dict[str, list[Any]]) -> Check:
        """Score one response; wait while a service that a reward function calls does not answer."""
        verifier: Verifier = self._local.verifier
        failures: dict[str, Failure] = {}
        try:
            while True:
                with self._lock:
                    without = self._outages.without(failures)
                try:
                    (check,) = verifier.check([prompt], [response], columns, without)
                except OutOfReach as error:
                    with self._lock:
                        pause_s = self._outages.failed(error, failures)
                    if self._ends.wait(pause_s):
                        raise
                else:
                    with self._lock:
                        self._outages.answered(
                            name for name, value in check.parts.items() if value is not None
                        )
                    self.record.check()
                    return check
        finally:
            with self._lock:
                self._outages.leave(failures)

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


class _Work:
    """A _Work is the file OUT.part, which becomes OUT at the end.

    Its lines are JSON: first a header with the input's digest and the settings, then [line, row] in order.

    Args:
        out: path of OUT.
        header: the first line; work under another header is refused.

    Raises:
        ConfigError: OUT cannot be written, has another suffix than .jsonl or .parquet, or OUT.part has
            another header.
    """

    def __init__(self, out: Path, header: Fields) -> None:
        if out.suffix not in (".jsonl", ".parquet"):
            raise ConfigError(f"--out: {out} must end in .jsonl or .parquet")
        if out.is_dir():
            raise ConfigError(f"--out: {out} is a folder")
        self.out, self.part = out, part_of(out, hidden=False)
        self.num_done = 0
        head = json.dumps(header).encode() + b"\n"
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            if self.part.exists() and self.part.stat().st_size:
                with open(self.part, "rb") as file:
                    if file.readline() != head:
                        raise ConfigError(
                            f"--out: {self.part} is unfinished work on another input or with other "
                            "settings; remove it first"
                        )
                repair_lines(self.part)
                self.num_done = sum(1 for _ in self.done())
            self._file = open(self.part, "ab")  # noqa: SIM115 - closed by __exit__
            if not self._file.tell():
                self._file.write(head)
                self._file.flush()
        except OSError as error:
            raise ConfigError(f"--out: cannot write {self.part}: {error.strerror}") from error

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is not None and issubclass(kind, (ConfigError, RewardError)):
            self.part.unlink(missing_ok=True)  # all its rows are wrong: nothing to continue

    def done(self) -> Iterator[tuple[int, Fields]]:
        """Yield (line, row) of the rows that are scored so far."""
        with open(self.part, "rb") as file:
            next(file)
            for text in file:
                line, row = json.loads(text)
                yield line, row

    def write(self, line: int, row: Fields) -> None:
        """Append a scored row."""
        self._file.write(json.dumps([line, row], default=str).encode() + b"\n")
        self._file.flush()

    def finish(self) -> None:
        """Write OUT, whole or not at all, and remove OUT.part."""
        with replacing(self.out) as whole:
            if self.out.suffix == ".parquet":
                pq.write_table(_as_table([row for _, row in self.done()]), whole, row_group_size=PARQUET_ROWS)
            else:
                with open(whole, "wb") as file:
                    for _, row in self.done():
                        file.write(json.dumps(row).encode() + b"\n")
        self.part.unlink()


def _as_table(rows: list[Fields]) -> pa.Table:
    """Turn JSON rows into an Arrow table.

    A column of mixed types becomes text; a lone surrogate becomes a question mark.
    """

    def valid(value: Any) -> Any:
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value

    arrays = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [valid(row.get(name)) for row in rows]
        try:
            arrays[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            arrays[name] = pa.array(
                [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
            )
    return pa.table(arrays)


def _skip(rows: Iterator[Any], number: int) -> Iterator[Any]:
    for _ in range(number):
        next(rows)
    return rows


def _counts(row: Fields) -> Counter[str]:
    """Return what one scored row adds to the summary."""
    counts = Counter({"rows": 1, row["verdict"]: 1, "malformed": str(row["reason"]).startswith("malformed:")})
    given = next((row[name] for name in LABELS if is_given(row.get(name))), None)
    label = TRUTHS.get(str(given).strip().lower().removesuffix(".0"))
    counts["no_label"] = int(given is not None and label is None)
    if label is not None:
        correct = row["verdict"] == "correct"
        counts.update(
            {
                "labelled": 1,
                "agree": correct == label,
                "false_negative": label and not correct,
                "false_positive": correct and not label,
            }
        )
    return counts


def _print(console: Console, out: str, summary: Counter[str], limits: deque[int]) -> None:
    table = Table(title=f"verify: {summary['rows']} rows", title_justify="left")
    table.add_column("")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")

    def add(name: str, key: str, total: str) -> None:
        table.add_row(name, str(summary[key]), f"{100 * summary[key] / summary[total]:.2f} %")

    for verdict in ("correct", "incorrect", "unverifiable"):
        add(verdict, verdict, "rows")
    if summary["malformed"]:
        add("  of these malformed", "malformed", "rows")
    if summary["labelled"]:
        table.add_section()
        for name, key in (
            ("agree with the label", "agree"),
            ("false negatives", "false_negative"),
            ("false positives", "false_positive"),
        ):
            add(name, key, "labelled")
    console.print(table)
    if summary["no_label"]:
        columns, values = " or ".join(LABELS), ", ".join(TRUTHS)
        console.print(f"{summary['no_label']} labels are not read: {columns} is none of {values}")
    if limits:
        console.print(f"hit a limit (the last ones): lines {', '.join(map(str, limits))}")
    console.print(f"wrote {escape(out)}")
