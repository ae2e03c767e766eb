"""`gvpo-ray bench scale` runs the training loop without models, with 1 to 256 engines on one machine.

Engines are real Ray actors that make random tokens, after the latency of a heavy-tailed number of tokens.
Verifiers are real and have a reward that costs nothing; the buffer and its log are real; the learner sleeps.
The benchmark measures the driver and the training loop, not a GPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import ray
from rich.console import Console
from rich.table import Table

from gvpo_ray import groups
from gvpo_ray.actors import RunError, actor_name, cause_of
from gvpo_ray.buffer.actor import LearnerBufferClient
from gvpo_ray.config.data import PromptsConfig, ReplayConfig
from gvpo_ray.config.engines import EnginesConfig, PoolConfig, SamplingConfig
from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.loss import GvpoLoss, LossConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.config.verifiers import RewardConfig, VerifiersConfig
from gvpo_ray.engines.actor import ActorMethods, MakeEngine, actor_options
from gvpo_ray.engines.fake_engine import FakeEngine
from gvpo_ray.engines.rollout import Sample
from gvpo_ray.observe.status import EngineState, RunState

SAMPLING = SamplingConfig(num_completions=8, max_tokens=256)


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Reward completions of an odd number of characters, which costs nothing to compute."""
    return [float(len(text) % 2) for text in completions]


class _Learner:
    """A _Learner takes every batch, sleeps, and publishes a version without weights.

    Without a `step_s` it takes no batch before `pace` is called.
    """

    def __init__(self, buffer: Any, num_steps: int, step_s: float | None) -> None:
        self._buffer, self._num_steps = LearnerBufferClient(buffer), num_steps
        self._has_pace = threading.Event()
        if step_s is not None:
            self.pace(step_s)

    def pace(self, step_s: float) -> None:
        """Set the seconds of a step from now on; `waited` counts anew."""
        self._step_s, self._waited, self._began = step_s, 0.0, time.perf_counter()
        self._has_pace.set()

    def waited(self) -> float:
        """Return the share of the time since `pace` in which there was no batch."""
        return self._waited / (time.perf_counter() - self._began)

    def run(self) -> None:
        """Train all steps, or until the buffer has no more batches."""
        self._buffer.published(0, {"probe": None}, None)
        self._has_pace.wait()
        for step in range(1, self._num_steps + 1):
            asked = time.perf_counter()
            if self._buffer.batch(step) is None:
                return
            self._waited += time.perf_counter() - max(asked, self._began)
            time.sleep(self._step_s)
            self._buffer.published(step, {"probe": None}, {})


class Prompts:
    """Prompts is a fake data set: `num` prompts, again and again; 2^40 are practically endless."""

    def __init__(self, num: int = 1 << 40) -> None:
        self._num = num

    def __len__(self) -> int:
        return self._num

    def group(self, group_id: int) -> pa.Table:
        """Return the prompt row of a group."""
        prompt = f"prompt {group_id % self._num}"
        row = {
            "group_id": group_id,
            "prompt": prompt,
            "answer": "7",
            "dataset": "fake",
            "prompt_ids": [1, 2, 3, 4, 5, 6, 7, 8],
        }
        return groups.table([row])


class FakeRun:
    """A FakeRun has no model: fake engines and a fake learner are around the real rest. Tests use it too.

    Args:
        folder: of the logs.
        engines: pools of the fake engines.
        groups_per_step: groups of one batch.
        num_steps: steps after which the run is complete.
        step_s: seconds of a step; None: the learner waits for its method `pace`.
        max_staleness: in steps; None: unbounded.
        sampling: number of completions, and their longest length in tokens.
        make: starts engines other than FakeEngine (see `maker`).
        num_verifiers: number of verifiers.
        watchdog_s: seconds without progress after which the watchdog prints the status.
        replay: of earlier completions; default: none.
        num_prompts: number of prompts before the first comes again.
        reward: `module:function` or `path.py:function`.
        address: of the cluster to join; None: an embedded Ray.
        verifier_resources: custom Ray resources of one verifier.
        learner_resources: custom Ray resources of the learner.
        loss: options of the objective, of which only another model as reference has an effect.
    """

    def __init__(
        self,
        folder: Path,
        engines: EnginesConfig,
        *,
        groups_per_step: int,
        num_steps: int,
        step_s: float | None = 0.0,
        max_staleness: int | None = None,
        sampling: SamplingConfig = SAMPLING,
        make: MakeEngine | None = None,
        num_verifiers: int = 2,
        watchdog_s: float = 300.0,
        replay: ReplayConfig | None = None,
        num_prompts: int = 1 << 40,
        reward: str = f"{__name__}:reward",
        address: str | None = None,
        verifier_resources: dict[str, float] | None = None,
        learner_resources: dict[str, float] | None = None,
        loss: LossConfig | None = None,
    ) -> None:
        # Imported here because they import torch, and every fake engine imports this file.
        from gvpo_ray.buffer.log import Quarantine
        from gvpo_ray.config.run import GVPOConfig, RayConfig
        from gvpo_ray.data.mixture import SourceSchedule
        from gvpo_ray.run.events import EventLog
        from gvpo_ray.run.inputs import Inputs
        from gvpo_ray.run.session import Session
        from gvpo_ray.run.wiring import Driver, assemble

        self.said: list[str] = []
        config = GVPOConfig(
            run_dir=str(folder),
            num_steps=num_steps,
            groups_per_step=groups_per_step,
            max_staleness=max_staleness,
            model=ModelConfig(path="fake"),
            prompts=PromptsConfig(path="fake", template="{prompt}"),
            loss=loss or GvpoLoss(),
            sampling=sampling,
            replay=replay or ReplayConfig(),
            engines=engines,
            verifiers=VerifiersConfig(
                num=num_verifiers,
                num_cpus=0.1,
                rewards={"reward": RewardConfig(function=reward, trusted=True)},
                resources=verifier_resources or {},
            ),
            learner=LearnerConfig(num_mini_batches=1),
            ray=RayConfig(num_cpus=None if address else 1000, object_store_gib=0.5, address=address),
            watchdog_s=watchdog_s,
        )
        self.session = Session(config.ray)
        events = self.events = EventLog(folder / "events.jsonl")
        state = {"step": 0, "num_steps": num_steps, "doing": RunState.TRAINING}
        parts = assemble(
            self.session,
            config,
            folder,
            Inputs(Prompts(num_prompts), {}, 1 << 20, {}, SourceSchedule({}), {}),  # type: ignore[arg-type]
            Driver(
                self._note,
                self.said.append,
                lambda: {**state, "recoveries": dict(events.counts())},
                self._for_a_new_buffer,
            ),
            num_steps=num_steps,
            version=0,
            quarantine=Quarantine(folder / "quarantine.jsonl"),
            make=make or maker(),
        )
        self.buffer, self.engines, self.ring = parts.buffer, parts.engines, parts.ring
        self.session.spawn(self.ring.run(), self._fail)
        learner: Any = ray.remote(_Learner).options(
            num_cpus=0.1, resources=learner_resources, name=actor_name("learner"), max_concurrency=2
        )
        self.learner = learner.remote(self.buffer.actor, num_steps, step_s)
        self.done = self.learner.run.remote()

    def _note(self, who: str, name: str, why: str) -> None:
        self.events.add(0, who, name, why)

    def _for_a_new_buffer(self) -> tuple[list[int], int, bool, str | None]:
        return list(self.ring.running), 0, False, None

    async def _fail(self, error: BaseException) -> None:
        await self.buffer.close(cause_of(error))

    def status(self) -> dict[str, Any]:
        """Return the status of every stage of the run."""
        status: dict[str, Any] = self.session.call(self.ring.status())
        return status

    def num_finished(self) -> int:
        """Return the number of groups that have reached the buffer."""
        return int(self.session.call(self.buffer.status())["num_finished"])

    def check(self) -> None:
        """Raise the error that stopped the training loop, if there was one.

        Raises:
            RunError: with the cause.
        """
        if self.session.cause is not None:
            raise RunError(cause_of(self.session.cause)) from self.session.cause

    def close(self) -> None:
        """Stop the training loop and its actors."""
        self.session.stop()


def maker(engine: type[FakeEngine] = FakeEngine) -> MakeEngine:
    """Return a function that starts actors of FakeEngine, or of a class derived from it.

    The arguments of an engine are those in pool.vllm.
    """

    class Actor(ActorMethods, engine):  # type: ignore[misc,valid-type]
        pass

    Actor.__name__ = f"_{engine.__name__}Actor"

    def make(name: str, pool: PoolConfig, number: int) -> Any:
        options = actor_options(name, pool, number)
        return ray.remote(Actor).options(**options).remote(seed=number, **pool.vllm)

    return make


class Turns(FakeEngine):
    """A Turns engine samples episodes of several turns, as long together as a completion of a FakeEngine.

    Args:
        num_turns: of each.
        median_tokens: of all of them together.
        arguments: of a FakeEngine.
    """

    def __init__(self, num_turns: int, median_tokens: float, **arguments: Any) -> None:
        async def episode(prompt_ids: list[int], sample: Sample) -> list[int]:
            ids = await sample(prompt_ids)
            for _ in range(num_turns - 1):
                ids += [0]  # what the environment says
                ids += await sample(prompt_ids + ids)
            return ids

        super().__init__(median_tokens=median_tokens / num_turns, rollout=episode, **arguments)


def main(sizes: list[int], seconds: float, num_turns: int = 1) -> None:
    """Run the benchmark and print its table.

    Args:
        sizes: numbers of engines, one for each row.
        seconds: time of each of the two measurements of a row.
        num_turns: of a completion.
    """
    of_turns = f" of {num_turns} turns" if num_turns > 1 else ""
    title = (
        f"bench scale: {MAX_GROUPS} groups of {SAMPLING.num_completions}{of_turns} in flight per engine, "
        f"{os.cpu_count()} CPUs"
    )
    table = Table(title=title, title_justify="left")
    columns = (
        "engines",
        "groups/s",
        "CPU per group: driver",
        "all",
        "learner waits at 1/1.2 of that",
        "a dead engine: noticed",
        "replaced",
        "busy",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for size in sizes:
        row = measure(size, seconds, num_turns)
        cells = [
            str(size),
            f"{row['rate']:,.0f}",
            f"{1000 * row['cpu']:.2f} ms",
            f"{1000 * row['total']:.1f} ms",
            f"{100 * row['waited']:.1f} %",
            *(f"{row[name]:.2f} s" for name in ("noticed", "replaced", "busy")),
        ]
        table.add_row(*cells)
        print("; ".join(f"{column} {cell}" for column, cell in zip(columns, cells, strict=True)), flush=True)
    Console(highlight=False, width=140).print(table)
    print(
        "noticed: since the kill -9 of its process; replaced: since then, until a new one runs; busy: "
        "since then, until it has its first group"
    )


MAX_GROUPS, GROUPS_PER_STEP, MAX_STALENESS = 16, 64, 16
LATENCY = {"seconds_per_token": 0.01, "median_tokens": 40.0, "sigma": 1.0}


def measure(size: int, seconds: float, num_turns: int = 1) -> dict[str, float]:
    """Measure one row of the table, with `size` engines and completions of `num_turns` turns.

    Returns:
        rate: groups per second; cpu and total: CPU seconds per group, of the driver and of all processes;
        waited: share of the time that a learner waits which asks for 1/1.2 of that rate; noticed, replaced
        and busy: seconds after an engine was killed.
    """
    with tempfile.TemporaryDirectory(prefix="gvpo_scale_") as folder:
        of_turns = {"num_turns": num_turns} if num_turns > 1 else {}
        arguments = {**LATENCY, **of_turns}
        config = EnginesConfig(num=size, num_cpus=0.1, max_groups=MAX_GROUPS, vllm=arguments)
        # Without a pace the learner takes no batch, so the staleness bound holds the engines back until all
        # have started: on a busy machine the last would otherwise never start.
        run = FakeRun(
            Path(folder),
            config,
            groups_per_step=GROUPS_PER_STEP,
            num_steps=1 << 30,
            step_s=None,
            max_staleness=MAX_STALENESS,
            make=maker(Turns if of_turns else FakeEngine),
        )
        try:
            while any(slot.state != EngineState.RUNNING for slot in run.engines.slots):
                run.check()
                time.sleep(0.2)
            ray.get(run.learner.pace.remote(0.0))
            time.sleep(5)
            rate, cpu, total = _rate(run, seconds)
            ray.get(run.learner.pace.remote(GROUPS_PER_STEP * 1.2 / rate))
            time.sleep(seconds)
            waited = ray.get(run.learner.waited.remote())
            return {"rate": rate, "cpu": cpu, "total": total, "waited": waited, **_kill_one(run)}
        finally:
            run.close()


def _rate(run: FakeRun, seconds: float) -> tuple[float, float, float]:
    """Return groups per second that reach the log, and CPU seconds per group of the driver and of all."""

    def used() -> dict[int, float]:
        times = {}
        for process in [me, *me.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times[process.pid] = sum(process.cpu_times()[:2])
        return times

    me = psutil.Process()
    before, cpu, began = run.num_finished(), used(), time.perf_counter()
    time.sleep(seconds)
    groups_done, wall, after = run.num_finished() - before, time.perf_counter() - began, used()
    spent = {pid: after[pid] - cpu[pid] for pid in after if pid in cpu}
    return groups_done / wall, spent[me.pid] / groups_done, sum(spent.values()) / groups_done


def _kill_one(run: FakeRun) -> dict[str, float]:
    slot = run.engines.slots[0]
    killed = time.perf_counter()
    os.kill(slot.status["pid"], signal.SIGKILL)
    times = {}
    moments: dict[str, Callable[[], bool]] = {
        "noticed": lambda: slot.state != EngineState.RUNNING,
        "replaced": lambda: slot.state == EngineState.RUNNING,
        "busy": lambda: bool(slot.in_flight),
    }
    for name, reached in moments.items():
        while not reached():
            run.check()
            time.sleep(0.005)
        times[name] = time.perf_counter() - killed
    return times
