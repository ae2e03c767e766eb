"""The training runs of `gvpo-ray bench paper` and `gvpo-ray bench staleness` are called cells, and run here.

A cell is a task, overrides of its config, a seed and the age of its data. It runs in a folder of its own, and
resumes there when it was killed. A finished cell is a row of results.parquet and does not run again; tables
and pictures are made from the rows. Several commands can share a folder: each takes cells that no other
command runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.data.tasks import make
from gvpo_ray.evaluation.run import evaluate
from gvpo_ray.files import lock, replacing
from gvpo_ray.learner.logprobs import CompletionLogprobs, padded_inputs, sequence_sums
from gvpo_ray.run.algorithm import GVPO
from gvpo_ray.run.session import Session

CHECKOUT = Path(__file__).parents[3]
JOBS, MODELS = CHECKOUT / "jobs", CHECKOUT / "docs" / "results" / "models"
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "arithmetic": (
        "quickstart.yaml",
        {
            "groups_per_step": 16,
            "learner.num_workers": 1,
            "learner.backend": "ddp",
            "learner.zero_stage": 0,
            # says the same as `math` does of boxed whole numbers
            "verifiers.num": 1,
            "verifiers.rewards": {"exact_match": 1.0},
        },
    ),
    "chain": ("chain_cpu.yaml", {}),
    "sort": ("sort_cpu.yaml", {"groups_per_step": 16}),
}
"""Config file of each task in jobs/, and overrides of it.

MODELS holds the models that warm starts made (`gvpo-ray warm-start CONFIG`). Another machine's
arithmetic would end in another model (chains: pass@1 of 0.11 and of 0.32), and results from two such models
cannot be compared.
"""
EVERY, TRAIN_LIMIT = 20, 1000
"""Steps between evaluations for the curve (64 held-out prompts, four completions each), and number of
training prompts by which trials are compared. With 256 prompts the standard error would be two points, as
large as the differences between trials."""
MEASURED, COMPARED = ("heldout", "greedy"), ("train",)
"""Sets that are evaluated at the end: those of the tables, and that of trials. Trials are not evaluated on
the held-out sets, so that no choice depends on what the tables report."""


def open_results(folder: Path) -> Results:
    """Return the results in a folder, which is made where it is absent.

    Raises:
        ConfigError: this is no checkout of the repository but a wheel, which lacks the configs and the models
            that cells start from; one line names what is missing.
    """
    for needed in (JOBS, MODELS):
        if not needed.is_dir():
            raise ConfigError(
                f"bench paper and bench staleness run from a checkout of the repository: there is no {needed}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return Results(folder)


@dataclass(frozen=True)
class Cell:
    """A Cell is one training run."""

    task: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    age: int = 0
    """Steps between the sampling of a batch and its training, except for the first batches. Before each step
    the learner waits until all that the maximum staleness allows is sampled."""

    @property
    def key(self) -> str:
        """Name of the cell's folder and row, from a hash of its contents."""
        what = [
            self.task,
            sorted((name, str(value)) for name, value in self.overrides.items()),
            self.seed,
            self.age,
        ]
        return f"{self.task}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}"


ResultRow = dict[str, Any]


class Results:
    """Results is the file results.parquet of a folder, with a row for each finished cell."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "results.parquet"
        self.rows: dict[str, ResultRow] = {}
        self.read()

    def read(self) -> None:
        """Read the file again, with rows that other processes have added."""
        self.rows = {}
        if self.path.exists():
            # pyarrow opens a path twice, and another process may replace it between
            with open(self.path, "rb") as file:
                self.rows = {row["cell"]: row for row in pq.read_table(file).to_pylist()}

    def add(self, row: ResultRow) -> None:
        """Add a row to the file, under a lock."""
        with locked(self.path.with_suffix(".lock")):
            self.read()
            self.rows[row["cell"]] = row
            with replacing(self.path) as part:
                pq.write_table(pa.Table.from_pylist(list(self.rows.values())), part, compression="zstd")

    def of(self, cells: Iterable[Cell]) -> list[ResultRow]:
        """Return the rows of those cells that are finished."""
        return [self.rows[cell.key] for cell in cells if cell.key in self.rows]


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock among processes and yield True; yield False where another holds it and `wait` is false."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(path, wait_s=None if wait else 0.0)
    except BlockingIOError:
        yield False
        return
    with held:
        yield True


@dataclass(frozen=True)
class Method:
    """A Method is an objective with its options, and what is tuned for it."""

    overrides: Mapping[str, Any]
    option: str | None = None
    """Key that is tuned beside the learning rate; None: the learning rate gets all trials."""
    values: tuple[Any, Any] = (None, None)
    """Values of the option to try, the usual one first."""

    def at(self, rate: float, value: Any) -> dict[str, Any]:
        """Return the overrides for a learning rate and a value of the option."""
        if self.option is None:
            return {**self.overrides, "learner.learning_rate": rate}
        options = (
            {"loss.clip_low": value, "loss.clip_high": value}
            if self.option == "loss.clip"
            else {self.option: value}
        )
        return {**self.overrides, **options, "learner.learning_rate": rate}


RATES, TUNING_SEED = (
    {
        "arithmetic": (1e-4, 2e-4, 4e-4, 8e-4),
        "chain": (5e-5, 1e-4, 2e-4, 4e-4),
        "sort": (1e-4, 2e-4, 4e-4, 8e-4),
    },
    1000,
)
NUM_TRIALS = 4
"""Number of trials of each method: the two middle learning rates with the usual value of the option, the rate
beyond the better of them, and the option's other value at the best of the three rates. Without an option, the
last trial is the rate between the best one and the better of its neighbours."""


def tune(tasks: Sequence[str], methods: Mapping[str, Method], age: int, results: Results) -> None:
    """Run the trials of all methods, with a seed that no other cell has."""
    for _ in range(3):  # later trials depend on the results of earlier ones
        run_all(
            [
                cell
                for task in tasks
                for method in methods.values()
                for cell in trials(task, method, age, results)
            ],
            results,
        )


def trials(task: str, method: Method, age: int, results: Results) -> list[Cell]:
    """Return the trials of a method, as far as the results so far determine them."""
    usual, other = method.values

    def at(rate: float, value: Any) -> Cell:
        return Cell(task, method.at(rate, value), TUNING_SEED, age)

    def score(rate: float) -> float:
        return float(results.rows[at(rate, usual).key]["train"])

    least, *rates, most = RATES[task]
    cells = [at(rate, usual) for rate in rates]
    if len(results.of(cells)) < 2:
        return cells
    rates = [least, *rates] if score(rates[0]) >= score(rates[1]) else [*rates, most]
    cells = [at(rate, usual) for rate in rates]
    if len(results.of(cells)) < 3:
        return cells
    best = max(range(3), key=lambda i: score(rates[i]))
    if method.option is not None:
        return [*cells, at(rates[best], other)]
    beside = max((i for i in (best - 1, best + 1) if 0 <= i < 3), key=lambda i: score(rates[i]))
    return [*cells, at(float(f"{math.sqrt(rates[best] * rates[beside]):.2g}"), usual)]


def tuned(task: str, method: Method, age: int, results: Results) -> dict[str, Any] | None:
    """Return the overrides of the trial with the best pass@1 on training prompts.

    None: some trials have no result yet.
    """
    cells = trials(task, method, age, results)
    rows = results.of(cells)
    if len(rows) < NUM_TRIALS:
        return None
    return dict(max(zip(cells, rows, strict=True), key=lambda pair: pair[1]["train"])[0].overrides)


WRITE_EVERY_S = 60.0
"""Seconds between two writes of the tables."""


def run_all(cells: Iterable[Cell], results: Results, write: Callable[[], None] = lambda: None) -> None:
    """Run the cells that have no row yet, and wait for those that other processes run.

    `write` is called about every WRITE_EVERY_S seconds, and at the end.
    """
    todo = {cell.key: cell for cell in cells if cell.key not in results.rows}
    num, began = len(todo), time.monotonic()
    written = began
    while todo:
        for cell in list(todo.values()):
            with locked(results.folder / "cells" / f"{cell.key}.lock", wait=False) as mine:
                results.read()
                if mine and cell.key not in results.rows:
                    done = num - sum(key not in results.rows for key in todo)
                    left = (
                        f", {(time.monotonic() - began) / done * (num - done) / 60:.0f} min left"
                        if done
                        else ""
                    )
                    _run_and_say(cell, results, f"{done + 1}/{num}{left}")
            if time.monotonic() - written > WRITE_EVERY_S:
                write()
                written = time.monotonic()
        todo = {key: cell for key, cell in todo.items() if key not in results.rows}
        time.sleep(1 if todo else 0)
    write()


def _run_and_say(cell: Cell, results: Results, place: str) -> None:
    changes = " ".join(f"{name}={value}" for name, value in cell.overrides.items())
    print(f"[{place}] {cell.task} seed={cell.seed} age={cell.age} {changes}", flush=True)
    row = run(cell, results.folder)
    ends = ", ".join(
        f"{name} {row[name]:.3f}" for name in ("pass@1", "greedy", "train") if row[name] is not None
    )
    print(f"    {ends}; pass@1 began at {row['start']:.3f}, {row['seconds']:.0f} s", flush=True)
    results.add(row)
    for name in ("groups", "checkpoints", "evaluations"):
        shutil.rmtree(results.folder / "cells" / cell.key / name, ignore_errors=True)


def prepare(task: str, folder: Path) -> dict[str, Any]:
    """Make the data of a task, and return the evaluation of the model that its cells start from, by set."""
    with locked(folder / "tasks" / f"{task}.lock"):
        if not (data := folder / "tasks" / task / "data").exists():
            make(task, data)
        result: dict[str, Any] = evaluate(
            config_of(Cell(task), folder), out=str(folder / "tasks" / task / "start")
        )["sets"]
    return result


def config_of(cell: Cell, folder: Path) -> GVPOConfig:
    """Return the config of a cell, whose run directory is below `folder`."""
    file, changes = TASKS[cell.task]
    task = folder / "tasks" / cell.task
    held_out, train = (
        {"path": str(task / "data" / f"{name}.parquet"), "template": "{prompt}\n"}
        for name in ("heldout", "train")
    )
    curve = {**held_out, "limit": 64, "num_samples": 4}
    sets = {
        "heldout": held_out,
        "greedy": {**held_out, "temperature": 0},
        "train": {**train, "limit": TRAIN_LIMIT},
        "curve": curve,
    }
    paths = {
        "run_dir": str(folder / "cells" / cell.key),
        "model.path": str(MODELS / cell.task),
        "prompts.path": str(task / "data" / "train.parquet"),
        "warm_start.data.path": str(task / "data" / "worked.parquet"),
        "evaluation": {"every": 0, "sets": sets},
    }
    here = {
        "seed": cell.seed,
        "max_staleness": cell.age,
        "checkpoint.every": 1000,
        "engines.parity_every": 0,
    }
    # the source is the warm start's worked problems
    if any(name.startswith("sources.people.") for name in cell.overrides):
        paths |= {
            "sources.people.path": paths["warm_start.data.path"],
            "sources.people.completion_column": "solution",
        }
    return GVPOConfig.from_file(JOBS / file, {**changes, **here, **cell.overrides, **paths})


def run(cell: Cell, folder: Path) -> ResultRow:
    """Train one cell, or resume it, and return its row of results."""
    config = config_of(cell, folder)
    final = COMPARED if cell.seed == TUNING_SEED else MEASURED
    if not ray.is_initialized():
        Session(config.ray)  # one Ray for all cells: it ends with this process
    start, began = prepare(cell.task, folder), time.monotonic()
    with GVPO(config, say=lambda line: None) as algo:
        while not algo.done:
            if cell.age:
                wanted = min(algo.step + cell.age + 1, config.num_steps) * config.groups_per_step
                while algo.num_finished() < wanted:
                    time.sleep(0.1)
            algo.train()
            if algo.step % EVERY == 0 and not algo.done:
                algo.evaluate("curve")
        if not any(f"eval/{final[-1]}/pass@1" in line for line in algo.metrics.lines):
            algo.evaluate(*final)
        lines = list(algo.metrics.lines)
    run_dir = Path(config.run_dir)
    trained = [line for line in lines if "loss" in line]
    curve = [{"step": 0, "pass@1": start["heldout"]["pass@1"]["value"], "kl": 0.0}]
    for line, name in itertools.product(lines, ("curve", "heldout")):
        if f"eval/{name}/pass@1" in line:
            kl = divergence(
                config.model.path, run_dir / "evaluations" / f"{name}-step-{line['step']:06d}.arrow"
            )
            curve.append({"step": line["step"], "pass@1": line[f"eval/{name}/pass@1"], "kl": kl})
    # later lines overwrite earlier ones
    ends = {
        name: line[f"eval/{name}/pass@1"] for line in lines for name in final if f"eval/{name}/pass@1" in line
    }
    last = [line["reward/mean"] for line in trained[-10:]]
    return {
        "cell": cell.key,
        "task": cell.task,
        "seed": cell.seed,
        "age": cell.age,
        "overrides": json.dumps(dict(cell.overrides)),
        "start": curve[0]["pass@1"],
        "start_greedy": start["greedy"]["pass@1"]["value"],
        "pass@1": ends.get("heldout"),
        "greedy": ends.get("greedy"),
        "train": ends.get("train"),
        "kl": curve[-1]["kl"],
        "reward": statistics.mean(last),
        "curve": curve,
        "staleness": statistics.mean(line["staleness/mean"] for line in trained),
        "kl_active_share": statistics.mean(line["gvpo/kl_active_share"] for line in trained),
        "steps": json.dumps(
            [
                [None if name not in line else float(f"{line[name]:.4g}") for name in STEP_METRICS]
                for line in trained
            ]
        ),
        "seconds": time.monotonic() - began,
    }


STEP_METRICS = (
    "reward/mean",
    "gvpo/residual_var",
    "gvpo/reward_var",
    "gvpo/implicit_reward_var",
    "gvpo/reward_correlation",
    "gvpo/kl_active_share",
    "gvpo/effective_share",
    "policy/log_ratio_rms",
    "policy/kl_ref",
    "grad_norm",
    "completions/length_mean",
    "staleness/mean",
    "gvpo/likelihood_floor",
    "gvpo/damping",
    "gvpo/beta",
)
"""Metrics of each step that a row keeps, in the column `steps`."""


@torch.inference_mode()
def divergence(model_path: str, evaluation: Path) -> float:
    """Estimate KL(pi || pi_0) in nats per completion.

    The estimate is the mean of log pi - log pi_0 over the completions of an evaluation, which pi sampled.

    Args:
        model_path: folder of pi_0.
        evaluation: Arrow file of the evaluation of pi.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # a bar for each point of a curve would hide the lines about the cells
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    start = CompletionLogprobs(model.eval())
    rows = list(groups.rows(groups.load(evaluation)))
    differences: list[float] = []
    for first in range(0, len(rows), 64):
        batch = rows[first : first + 64]
        inputs, lengths = padded_inputs(batch, "cpu")
        sampled = [sum(logprobs) for row in batch for logprobs in row["sampling_logprobs"]]
        differences += [
            a - b for a, b in zip(sampled, sequence_sums(start(**inputs), lengths).tolist(), strict=True)
        ]
    return statistics.mean(differences)
