"""`gvpo-ray bench ring` measures how fast the parts of one real run are.

The benchmark trains `num_steps` steps of the config, at least 5 and at most 24, in a folder of its own. It
makes no evaluations and leaves nothing behind.
"""

from __future__ import annotations

import tempfile
import time

import psutil
from rich.console import Console
from rich.table import Table

from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.observe.metrics import mean
from gvpo_ray.run.algorithm import GVPO

MAX_STEPS, WARM_STEPS = 24, 4
"""Largest number of steps, and number of first steps that do not count: sampling is slower at first."""


def main(config: GVPOConfig) -> None:
    """Run the benchmark and print its table."""
    me = psutil.Process()
    with tempfile.TemporaryDirectory(prefix="gvpo_bench_") as folder:
        num_steps = max(WARM_STEPS + 1, min(MAX_STEPS, config.num_steps))
        evaluation = config.evaluation.model_copy(update={"every": 0})
        config = config.model_copy(
            update={"run_dir": folder, "num_steps": num_steps, "evaluation": evaluation}
        )
        with GVPO(config) as algo:
            lines = [algo.train()]
            first_step = time.time() - me.create_time()
            memory = [tree_memory(me)]
            cpu = began = 0.0
            while not algo.done:
                if algo.step == WARM_STEPS:
                    cpu, began = sum(me.cpu_times()[:2]), time.perf_counter()
                lines.append(algo.train())
                memory.append(tree_memory(me))
            wall, cpu = time.perf_counter() - began, sum(me.cpu_times()[:2]) - cpu
    lines = lines[WARM_STEPS:]
    groups = len(lines) * config.groups_per_step

    def average(name: str) -> float:
        return mean([line[name] for line in lines])

    title = (
        f"bench ring: {len(lines)} steps of {config.groups_per_step} groups x "
        f"{config.sampling.num_completions}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in (
        ("from the command to the first trained step", f"{first_step:.1f} s"),
        ("step", f"{wall / len(lines):.2f} s"),
        (
            "learner waits for groups",
            f"{100 * average('time/wait_for_groups') / average('time/step'):.0f} % of a step",
        ),
        ("tokens generated", f"{sum(line['tokens/generated'] for line in lines) / wall:,.0f} per s"),
        ("tokens trained", f"{sum(line['tokens/trained'] for line in lines) / wall:,.0f} per s"),
        ("weights of one version", f"{average('weights/bytes') / 2**20:.2f} MiB"),
        ("weight update: gather and publish (learner)", f"{1000 * average('time/publish'):.0f} ms"),
        (
            "weight update: copy to the engine (generation goes on)",
            f"{1000 * average('weights/copy_s'):.0f} ms",
        ),
        ("weight update: generation paused", f"{1000 * average('weights/pause_s'):.0f} ms"),
        ("driver CPU time per group", f"{1000 * cpu / groups:.2f} ms"),
        ("memory of all processes, at most", f"{max(memory) / 2**30:.2f} GiB"),
    ):
        table.add_row(name, value)
    Console(highlight=False).print(table)


def tree_memory(process: psutil.Process) -> float:
    """Return the bytes that a process and its descendants hold, with shared pages counted once.

    The sum is that of the proportional set sizes.
    """
    total = 0.0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total
