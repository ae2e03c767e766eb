"""`gvpo-ray bench chaos` kills processes of a real run, and checks that nothing is lost.

The run is the command `gvpo-ray train CONFIG` in a process of its own, which is started again when its driver
is killed. Each kind of process that the config has is killed in turn, at random moments; a seed fixes both.
At the end no group may be in the log twice, none that was begun before the last quarter of the run may be
missing there, every step must have trained the next groups of the log and left none out, and learning from
the log alone, undisturbed, must give the same weights bit for bit.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from gvpo_ray.buffer.log import GroupLog
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.files import read_lines

TITLES = {
    "engine": "ray::_EngineActor",
    "engine core": "VLLM::EngineCore",
    "verifier": "ray::_VerifierActor",
    "environment": "ray::_EnvironmentActor",
    "reward model": "ray::RewardModel",
    "reference": "ray::_ReferenceActor",
    "buffer": "ray::_BufferActor",
    "learner worker": "ray::RayTrainWorker",
    "learner controller": "ray::TrainController",
}
"""Beginning of the process title of each kind; the driver is the command itself."""

OPTIONAL = ("environment", "reward model", "reference")
"""Kinds of which only some runs have processes."""

KINDS = (*(kind for kind in TITLES if kind not in OPTIONAL), "driver")
"""Kinds of processes that every run has."""


def kinds_of(config: GVPOConfig) -> tuple[str, ...]:
    """Return the kinds of processes that a run has."""
    has = (
        config.environment is not None,
        any(reward.model for reward in config.verifiers.rewards.values()),
        config.loss.reference_model is not None,
    )
    return (*KINDS, *(kind for kind, is_there in zip(OPTIONAL, has, strict=True) if is_there))


@dataclass
class Kill:
    """A Kill is one planned kill, and what became of it. Times are in seconds since the epoch."""

    kind: str
    """Kind of process, of KINDS or OPTIONAL."""
    step: int
    """Steps trained when the kill is due."""
    part: float
    """Time to wait after that step, as a share of the duration of a step."""
    due: float = 0.0
    """When that step was seen; 0: the run ended before."""
    at: float = 0.0
    """When the process was killed; 0: the run ended before."""
    until_step: float = 0.0
    """Seconds from the kill to the end of the next step."""


@dataclass
class Outcome:
    """An Outcome is the end of a run whose processes were killed."""

    kills: list[Kill]
    status: int
    """Exit status of the last command."""
    output: str
    """Output of all commands."""
    run_dir: Path
    seconds: float
    """Duration from the start of the first command to the end of the last."""
    problems: list[str] = field(default_factory=list)
    """One line per thing that went wrong."""


def schedule(num_kills: int, num_steps: int, seed: int, kinds_of_run: Sequence[str] = KINDS) -> list[Kill]:
    """Plan kills: the kinds in turn, each round in a new order, at random steps.

    No kill falls into the last tenth of the run, so that there is something left to recover for.
    """
    rng = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < num_kills:
        kinds += rng.sample(kinds_of_run, len(kinds_of_run))
    last = max(1, round(0.9 * num_steps))
    # One kill per stretch of the run, so that they do not all hit the same start.
    steps = [round((i + rng.random()) * last / num_kills) for i in range(num_kills)]
    return [Kill(kind, step, rng.random()) for kind, step in zip(kinds, steps, strict=False)]


def descendants(pid: int, title: str) -> list[int]:
    """Return the processes below `pid` whose title begins with `title`.

    psutil's Process.children() compares start times, and omits processes when the clock was adjusted.
    """
    children = defaultdict(list)
    for process in psutil.process_iter(["ppid", "cmdline"]):
        children[process.info["ppid"]].append(process)
    found, above = [], [pid]
    while above:
        for process in children.pop(above.pop(), []):
            above.append(process.pid)
            if " ".join(process.info["cmdline"] or []).startswith(title):
                found.append(process.pid)
    return sorted(found)


class Command:
    """A Command is a `gvpo-ray` command as a process; `on_line` gets each line of its output at once."""

    def __init__(self, arguments: Sequence[str], on_line: Callable[[str], None]) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gvpo_ray", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._on_line = on_line
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._on_line(line)

    def wait(self) -> int:
        """Wait for the end of the process and of its output; return its exit status."""
        status = self.process.wait()
        self._thread.join(timeout=30)
        return status


def run(
    config_file: str,
    overrides: Sequence[str],
    run_dir: Path,
    num_kills: int,
    seed: int,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Train while processes are killed, and check the result.

    Args:
        config_file: of the run.
        overrides: of its keys, as "key=value".
        run_dir: of the run.
        num_kills: number of processes to kill.
        seed: fixes kinds, moments and victims.
        say: gets lines about steps, kills and recoveries.
    """
    config = GVPOConfig.from_file(config_file, [*overrides, f"run_dir={run_dir}"])
    kills, rng = schedule(num_kills, config.num_steps, seed, kinds_of(config)), random.Random(seed + 1)
    lines: list[str] = []
    steps: list[tuple[float, int]] = [(time.time(), 0)]

    def on_line(line: str) -> None:
        lines.append(line)
        if line.startswith("step "):
            steps.append((time.time(), int(line[5:].split("/")[0])))
        if line.startswith(("step ", "recovery", "watchdog", "resuming", "error")):
            say(line.rstrip())

    began = time.time()
    arguments = ["train", config_file, *overrides, f"run_dir={run_dir}"]
    command = Command(arguments, on_line)
    for kill in kills:
        if not _wait(partial(_reached, steps, kill.step), command):
            break
        kill.due = time.time()
        time.sleep(kill.part * min(3.0, steps[-1][0] - steps[-2][0] if len(steps) > 1 else 3.0))
        began_to_look = time.monotonic()
        while command.process.poll() is None:
            found = (
                [command.process.pid]
                if kill.kind == "driver"
                else descendants(command.process.pid, TITLES[kill.kind])
            )
            if found:
                break
            time.sleep(0.2)  # a process that was killed just now may not be back yet
        if (waited := time.monotonic() - began_to_look) > 5:
            say(f"chaos: no {kill.kind} was there for {waited:.0f} s")
        if command.process.poll() is not None:
            break
        victim, kill.at = rng.choice(found), time.time()
        say(f"chaos: kill -9 {kill.kind} ({victim}) after step {steps[-1][1]}")
        os.kill(victim, signal.SIGKILL)
        if kill.kind == "driver":
            command.wait()
            command = Command(arguments, on_line)
    status = command.wait()
    for kill in kills:
        kill.until_step = next((at - kill.at for at, _ in steps if at > kill.at), 0.0) if kill.at else 0.0
    outcome = Outcome(kills, status, "".join(lines), run_dir, time.time() - began)
    outcome.problems = list(problems(outcome, config))
    return outcome


def _reached(steps: Sequence[tuple[float, int]], step: int) -> bool:
    """Return whether one of the steps, with its time, is `step` or a later one."""
    return max(number for _, number in steps) >= step


def _wait(condition: Callable[[], bool], command: Command) -> bool:
    """Wait for a condition while the command runs; return whether it came to hold."""
    while not condition():
        if command.process.poll() is not None:
            return False
        time.sleep(0.05)
    return True


def problems(outcome: Outcome, config: GVPOConfig) -> list[str]:
    """Return a line for each promise that the run has broken; none: all is well."""
    found = []
    if outcome.status != 0:
        return [f"the command ended with status {outcome.status}: {outcome.output[-2000:]}"]
    if outcome.kills and not any(kill.at for kill in outcome.kills):
        found.append(
            f"no process was killed: the run was over before the first of {len(outcome.kills)} kills"
        )
    log = GroupLog(outcome.run_dir / "groups")
    if twice := [group_id for group_id, number in Counter(log.group_ids).items() if number > 1]:
        found.append(f"groups that are in the log twice: {twice[:10]}")
    rows = [row for step in sorted(log.assigned) for row in range(*log.assigned[step])]
    if sorted(log.assigned) != list(range(1, config.num_steps + 1)) or rows != list(
        range(config.num_steps * config.groups_per_step)
    ):
        found.append(f"not every step has trained its own groups: {log.assigned}")
    if not _quarantined(outcome) and (lost := lost_groups(log, config.num_steps)):
        found.append(f"groups that were begun and have never come: {sorted(lost)[:10]}")
    lines = read_lines(outcome.run_dir / "metrics.jsonl")
    if [line["step"] for line in lines if "loss" in line] != list(range(1, config.num_steps + 1)):
        found.append("metrics.jsonl does not hold each step once")
    return found


def _quarantined(outcome: Outcome) -> int:
    """Return the number of prompts whose groups the run skips: it then has groups that never come."""
    return len(read_lines(outcome.run_dir / "quarantine.jsonl"))


def praise(outcome: Outcome) -> str:
    """Say what held in a run that was checked and without problems."""
    made = sum(kill.at > 0 for kill in outcome.kills)
    skipped = _quarantined(outcome)
    left_out = (
        f"whether others were left out was not checked ({skipped} prompts are quarantined)"
        if skipped
        else "none was left out"
    )
    return (
        f"after {made} of {len(outcome.kills)} kills every group is in the log once, every step has trained "
        f"its own, {left_out}, and learning from the log gives the same weights bit for bit"
    )


def lost_groups(log: GroupLog, num_steps: int) -> set[int]:
    """Return the groups that have never come, though the last quarter of the run trained younger ones only.

    Groups have the numbers from 0 on in the order in which they are begun, and those that are under way when
    a run ends are among its youngest.
    """
    late = [log.assigned[step] for step in log.assigned if step > 0.75 * num_steps]
    trained = [log.group_ids[row] for begin, end in late for row in range(begin, end)]
    return set(range(min(trained, default=0))) - set(log.group_ids)


def replays_bit_for_bit(
    config_file: str, overrides: Sequence[str], outcome: Outcome, config: GVPOConfig, folder: Path
) -> list[str]:
    """Learn from the run's log in another folder; return what differs in the last checkpoint.

    That is the file, and which of its tensors.
    """
    arguments = [
        "learn",
        config_file,
        "--groups",
        str(outcome.run_dir / "groups"),
        *overrides,
        f"run_dir={folder}",
    ]
    output: list[str] = []
    if (status := Command(arguments, output.append).wait()) != 0:
        return [f"learn ended with status {status}: {''.join(output)[-2000:]}"]
    last = f"checkpoints/step-{config.num_steps}"
    ours, other = (_weights(run / last) for run in (outcome.run_dir, folder))
    assert len(ours) >= 2  # the model and the optimizer
    return [
        f"{name}: {', '.join(_unequal(other[name], ours[name]))}"
        if name in ours and name in other
        else f"{name}: it is in one of them alone"
        for name in sorted({*ours, *other})
        if name not in ours or name not in other or ours[name].read_bytes() != other[name].read_bytes()
    ]


def _weights(checkpoint: Path) -> dict[str, Path]:
    return {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*.safetensors")}


def _unequal(one: Path, other: Path) -> list[str]:
    """Return the names of the tensors that differ between two safetensors files."""
    import torch
    from safetensors.torch import load_file

    def content(tensor: torch.Tensor | None) -> object:
        return None if tensor is None else (tensor.shape, tensor.dtype, bytes(tensor.untyped_storage()))

    first, second = load_file(one), load_file(other)
    both = sorted({*first, *second})
    names = [name for name in both if content(first.get(name)) != content(second.get(name))]
    return names or ["no tensor, but the files' headers"]


def main(config_file: str, overrides: Sequence[str], num_kills: int, seed: int) -> int:
    """Run the benchmark and print its table; return how many things went wrong."""
    with tempfile.TemporaryDirectory(prefix="gvpo_chaos_") as folder:
        config = GVPOConfig.from_file(config_file, [*overrides, f"run_dir={folder}/run"])
        outcome = run(config_file, overrides, Path(folder) / "run", num_kills, seed)
        different = (
            []
            if outcome.problems
            else replays_bit_for_bit(config_file, overrides, outcome, config, Path(folder) / "replay")
        )
        table = Table(
            title=f"bench chaos: seed {seed}, {config.num_steps} steps in {outcome.seconds / 60:.1f} min",
            title_justify="left",
        )
        for column in ("killed", "after step", "next step ended after"):
            table.add_column(column, justify="left" if column == "killed" else "right")
        for kill in outcome.kills:
            table.add_row(
                kill.kind, str(kill.step), f"{kill.until_step:.1f} s" if kill.at else "the run was over"
            )
        console = Console(highlight=False)
        console.print(table)
        lines = read_lines(outcome.run_dir / "metrics.jsonl")
        evaluations = {
            name: [line[name] for line in lines if name in line]
            for line in lines
            for name in line
            if name.endswith("/pass@1")
        }
        for name, values in evaluations.items():
            print(f"{name}: {values[0]:.3f} → {values[-1]:.3f}")
        trained = [line for line in lines if "loss" in line]
        if trained:
            counts = {
                key.split("/")[1]: value
                for key, value in trained[-1].items()
                if key.startswith("recoveries/")
            }
            print("recoveries: " + ", ".join(f"{who} {number:.0f}" for who, number in counts.items()))
        for text in outcome.problems:
            print(f"WRONG: {text}")
        if different:
            print(f"WRONG: learning from the log gives other weights: {different}")
        elif not outcome.problems:
            print(praise(outcome))
        return len(outcome.problems) + len(different)
