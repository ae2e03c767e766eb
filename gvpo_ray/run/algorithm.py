"""A run: Ray and what is started on it (`Session`), and what users call (`GVPO`, `evaluate`, `rollout`).

The first exception anywhere closes the buffer with its cause, and whoever waits is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from gvpo_ray import groups
from gvpo_ray.actors import resources_of
from gvpo_ray.buffer.actor import Buffer
from gvpo_ray.buffer.buffer import ORDERS, steps_metrics
from gvpo_ray.buffer.log import GroupLog, Quarantine
from gvpo_ray.config.run import ConfigError, GVPOConfig, RayConfig, RewardConfig, SamplingConfig, check_resources, cluster_address
from gvpo_ray.engines.pools import EngineGroup, engine_maker
from gvpo_ray.evaluation.folder import EvaluationDir
from gvpo_ray.failures import RunError, cause_of, first_of
from gvpo_ray.learner.checkpoints import latest_checkpoint
from gvpo_ray.learner.workers import LearnerGroup
from gvpo_ray.observe.metrics import MetricsLog, evaluation_metrics
from gvpo_ray.observe.trackers import Tracking, check_trackers
from gvpo_ray.run.inputs import (
    checkpoint_folder,
    evaluation_name,
    import_groups,
    machine_resources,
    open_run_dir,
    read_evaluation_sets,
    read_inputs,
    read_model,
    read_recorded,
)
from gvpo_ray.run.rollouts import EventLog, Ring, Say, run_through
from gvpo_ray.verifiers.pool import VerifierGroup
from gvpo_ray.verifiers.rewards import Rewards
from gvpo_ray.verifiers.verifier import validate_rewards


class Session:
    """Ray, an event loop in a thread, and what was started on them; `stop` ends all of it, and only that."""

    def __init__(self, config: RayConfig) -> None:
        self._closers: list[Callable[[], Coroutine[Any, Any, Any]]] = []
        """Run together at the end; what does not answer in time goes down with Ray."""
        self.cause: BaseException | None = None
        self._stopped = False
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            address = cluster_address(config)
            embedded: dict[str, Any] = {
                "num_cpus": config.num_cpus,
                "object_store_memory": int(config.object_store_gib * 2**30),
                "include_dashboard": config.dashboard,
            }
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            # A call to an engine that died has two answers, of which the driver takes one: the other's error is no news.
            os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
            handler = signal.getsignal(signal.SIGTERM)
            ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else embedded))
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # ray.init takes it for a handler of its own that prints a stack trace
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="ring", daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, Any] | Any, timeout_s: float | None = None) -> Any:
        """Run a coroutine (or await an object ref) on the loop and wait for its result."""

        async def run() -> Any:
            return await coroutine

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(timeout_s)

    def spawn(self, coroutine: Coroutine[Any, Any, Any], on_error: Callable[[BaseException], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine in the background; its exception, if it is the first, becomes the cause of the run's end."""

        if self._stopped:
            coroutine.close()
            return

        async def run() -> None:
            try:
                await coroutine
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # supervision: recorded as the cause and raised in the driver's thread
                if self.cause is None and not self._stopped:
                    self.cause = error
                    await on_error(error)

        asyncio.run_coroutine_threadsafe(run(), self.loop)

    def guard(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine that would wait for ever if something in the background broke meanwhile.

        Raises:
            RunError: the first cause of either.
        """

        async def watched() -> Any:
            work = asyncio.ensure_future(coroutine)
            while not work.done() and self.cause is None:
                await asyncio.wait([work], timeout=1.0)
            if not work.done():
                work.cancel()
                return None
            return work.result()

        try:
            result = self.call(watched())
        except (ray.exceptions.RayError, RunError, BaseExceptionGroup) as error:
            self.cause, result = self.cause or first_of(error), None
        if result is None:
            assert self.cause is not None
            raise RunError(cause_of(self.cause)) from self.cause
        return result

    def on_stop(self, close: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._closers.append(close)

    def stop(self) -> None:
        """Close what was started, within seconds, and then Ray, if it is ours."""
        if self._stopped:
            return
        self._stopped = True

        async def close() -> None:
            await asyncio.wait([asyncio.ensure_future(closer()) for closer in self._closers] or [asyncio.ensure_future(asyncio.sleep(0))], timeout=4)
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.loop.shutdown_default_executor()  # a thread that asks Ray something while Ray goes down would crash

        with contextlib.suppress(TimeoutError):
            self.call(close(), timeout_s=6)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=3)
        if self._owns_ray:
            ray.shutdown()


# --- the algorithm ------------------------------------------------------------------------------------------------------


class GVPO:
    """A run, in RLlib's manner: `train()` is one more trained step, and the ring goes on sampling meanwhile as far as the dial allows.

    Takes up `config.run_dir` where it stands. A context manager.

        with GVPOConfig.from_file("jobs/quickstart.yaml").build() as algo:
            while algo.step < algo.config.num_steps:
                metrics = algo.train()

    Args:
        reward: a reward function of one's own, or several by name: `reward(prompts, completions, **columns) -> list[float | None]`.
            It takes the place of `verifiers.rewards`.
        groups_file: train on recorded groups alone, with no engines and no verifiers (`gvpo-ray learn`).
        say: gets lines of the run's story: recoveries, and what the watchdog sees.

    Raises:
        ConfigError: before any actor starts.
    """

    def __init__(
        self, config: GVPOConfig, reward: Callable[..., Any] | Rewards | None = None, groups_file: str | None = None, say: Say = print
    ) -> None:
        rewards: Rewards = {} if reward is None else reward if isinstance(reward, Mapping) else {_name_of(reward): reward}
        if rewards:
            known = {name: config.verifiers.rewards.get(name, RewardConfig()) for name in rewards}
            config = config.model_copy(update={"verifiers": config.verifiers.model_copy(update={"rewards": known})})
        config = config.absolute()
        self.config, self._rewards, self.run_dir, self.say = config, rewards, Path(config.run_dir), say
        self.replays = groups_file is not None
        check_trackers(config.tracking)
        if cluster_address(config.ray) is None and not ray.is_initialized():
            check_resources(config, *machine_resources(config), engines=not self.replays)
        if self.replays:
            read_model(config)
            recorded, assigned, num_recorded_steps = read_recorded(Path(str(groups_file)), config.groups_per_step, self.run_dir / "groups")
        else:
            self.inputs = read_inputs(config, rewards)
        self._open = contextlib.ExitStack()
        self._open.enter_context(open_run_dir(config))
        try:
            self.num_steps = config.num_steps
            if self.replays:
                self.num_steps = min(config.num_steps, num_recorded_steps)
                import_groups(recorded, assigned, self.run_dir / "groups")
            checkpoint = latest_checkpoint(self.run_dir)
            self.step = checkpoint[0] if checkpoint else 0
            """Steps that are trained: also the version of the weights."""
            self.resumed_from = self.step if checkpoint else None
            self.log_size = len(GroupLog(self.run_dir / "groups"))
            """Groups that were in the log when this process took the run up."""
            self.metrics = MetricsLog(self.run_dir / "metrics.jsonl", self.step)
            written = {line["step"] for line in self.metrics.lines if "loss" in line}
            for step, metrics in sorted(steps_metrics(self.run_dir / "groups").items()):
                if max(written, default=0) < step <= self.step:  # the driver was killed before it wrote them
                    self.metrics.write(step, metrics)
            self.quarantine = Quarantine(self.run_dir / "quarantine.jsonl")
            self.events = EventLog(self.run_dir / "events.jsonl")
        except OSError as error:
            self._open.close()
            raise ConfigError(f"run_dir: {self.run_dir}: {error.strerror}") from error
        except BaseException:
            self._open.close()
            raise
        self._session: Session | None = None
        self.learners: LearnerGroup | None = None
        self._doing = "starting"

    @classmethod
    def from_run_dir(cls, path: str | Path, reward: Callable[..., Any] | Rewards | None = None) -> GVPO:
        """Take up a run where its directory stands."""
        return cls(GVPOConfig.from_file(Path(path) / "config.yaml", {"run_dir": str(path)}), reward)

    @property
    def done(self) -> bool:
        return self.step >= self.num_steps

    @property
    def evaluation_due(self) -> bool:
        """Whether the config asks for an evaluation of this step that the log does not have."""
        every = 0 if self.replays else self.config.evaluation.every
        if not every or not (self.step % every == 0 or self.done):
            return False
        return not any(key.startswith("eval/") for line in self.metrics.lines if line["step"] == self.step for key in line)

    def story(self) -> Iterator[str]:
        """What a person should know before the first step."""
        if self.done:
            yield f"{self.run_dir}: complete, {self.step} of {self.num_steps} steps are trained"
        elif self.resumed_from is not None or (self.log_size and not self.replays):
            start = f"checkpoint of step {self.resumed_from}" if self.resumed_from is not None else f"{self.config.model.path} (no checkpoint yet)"
            yield f"resuming {self.run_dir} from the {start}, with {self.log_size} finished groups in its log"
        if not self.replays:
            yield from self.inputs.story()

    def start(self) -> GVPO:
        """Bring the ring up (the first `train`, `evaluate` or `save` does it too)."""
        if self._session is not None:
            return self
        config = self.config
        tracking = Tracking(config, self.metrics.lines, self.say)
        self._open.callback(tracking.close)
        self.metrics.on_line = tracking.line
        session = self._session = Session(config.ray)
        self._open.callback(session.stop)
        if self.events.was_cut_off:
            why = f"ended without a word; goes on from the checkpoint of step {self.step}" if self.step else "ended without a word; begins again"
            self._note("driver", "driver", why)
        self.events.add(self.step, "run", "started")
        self._allowed = self.step
        (self.run_dir / "groups" / ORDERS).unlink(missing_ok=True)
        self._buffer = Buffer(
            self._for_a_new_buffer, self._note, self.run_dir / "groups", config.groups_per_step, self.num_steps, config.max_staleness, self.step,
            config.replay, config.seed,
        )  # fmt: skip
        model, engines = config.model, config.engines
        self.verifiers = None
        if self.replays:
            engines = engines.model_copy(update={"num": 0, "max_num": None, "pools": {}})
        else:
            model = model.model_copy(update={"max_length": self.inputs.max_length})
            self.verifiers = VerifierGroup(config.verifiers, self._rewards, self._note)
            session.on_stop(self.verifiers.close)
        make = engine_maker(model, engines, config.seed, False, config.prompts.system_prompt)
        self.engines = EngineGroup(
            engines, config.sampling.num_completions, make, lambda version: self._buffer.call("weights", version), self._note,
            lambda: self._buffer.call("waits"), self._learners_placed if cluster_address(config.ray) else None,
        )  # fmt: skip
        session.on_stop(self.engines.close)
        for text in placement_notes(config, engines=not self.replays):
            self.say(text)
        fixed = [seat.engine for seat in self.engines.seats if seat.engine is not None]
        self.learners = LearnerGroup(config, self.run_dir, self._buffer.actor, fixed, self.num_steps)
        self.learners.start()
        self.learners.ended.add_done_callback(lambda ended: session.spawn(self._learners_ended(ended), self._fail))
        session.on_stop(self._close_buffer)
        self._ring = Ring(
            None if self.replays else self.inputs, self.engines, self.verifiers, self._buffer, self.quarantine, config.sampling, config.replay,
            config.watchdog_s, self.run_dir, self._state, self._note, self.say,
        )  # fmt: skip
        self._ring.show = tracking.status
        session.spawn(self._ring.watch() if self.replays else self._ring.run(), self._fail)
        return self

    # --- supervision -----------------------------------------------------------------------------------------------------

    def _note(self, who: str, name: str, why: str) -> None:
        """A recovery, or a pool that changes its size: in events.jsonl, and so in the metrics and the report."""
        self.events.add(self.step, who, name, why)
        self.say(f"pool {name} {why}" if who == "pool" else f"recovery at step {self.step}: {name}: {why}")

    def _state(self) -> dict[str, Any]:
        return {"step": self.step, "num_steps": self.num_steps, "doing": self._doing, "recoveries": dict(self.events.counts())}

    def _for_a_new_buffer(self) -> tuple[list[int], int, bool, str | None]:
        """What the log does not tell a buffer that was started again."""
        assert self._session is not None
        cause = self._session.cause
        return list(self._ring.running), self._allowed, cause is not None, cause_of(cause) if cause else None

    async def _learners_placed(self) -> None:
        """Engines of a cluster come after the learners, which need all of their places at once and would wait for ever for the last one."""
        while not await asyncio.to_thread(self.learners.has_places):
            await asyncio.sleep(0.5)

    async def _learners_ended(self, ended: Future[None]) -> None:
        ended.result()

    async def _fail(self, error: BaseException) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            await self._buffer.call("close", cause_of(error))

    async def _close_buffer(self) -> None:
        await self._buffer.actor.close.remote()
        await asyncio.to_thread(self.learners.join, 4.0)
        ray.kill(self._buffer.actor, no_restart=True)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """An answer of the buffer; None means that the run was closed under us: raise why."""
        assert self._session is not None
        cause: BaseException | None = None
        try:
            answer = self._session.call(self._buffer.call(method, *arguments))
            if answer is not None:
                return answer
            closed = self._session.call(self._buffer.call("status"))["error"]
        except ray.exceptions.RayError as error:
            cause, closed = error, None
        cause = self._session.cause = self._session.cause or cause
        raise RunError(cause_of(cause) if cause else closed or "the run was stopped") from cause

    # --- what users call ---------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Run until one more step is trained; returns its metrics (with those of an evaluation, where one was due).

        Raises:
            RunError: with the first cause.
            StopIteration: all steps are trained.
        """
        if self.done:
            raise StopIteration(f"all {self.num_steps} steps are trained")
        self.start()
        assert self._session is not None
        if self.evaluation_due:
            self.evaluate()  # before the first step, or cut off by the end of the process that trained the last one
        self._allowed, self._doing = self.step + 1, "training"
        self._session.call(self._buffer.call("allow", self._allowed))
        metrics = self._ask("trained", self.step + 1)
        self.step += 1
        with contextlib.suppress(ray.exceptions.RayError):  # whatever it is, the next question to the buffer says so
            self._session.call(self._ring.note_learner())
        recoveries = {f"recoveries/{who}": float(self.events.counts()[who]) for who in RECOVERIES}
        line = self.metrics.write(self.step, {**metrics, **self._ring.rates(), **recoveries})
        if self.evaluation_due:
            line = line | self.evaluate()
        if self.done:
            self.save()  # the learner does by itself: this waits for it
        return line

    def evaluate(self, *names: str) -> dict[str, float]:
        """pass@1 on the held-out sets (those named, or all), by the same engines and verifiers, with the weights of the last trained step."""
        self.start()
        assert self._session is not None
        config = self.config.evaluation
        whole = self.step == 0 or self.done or not config.every_limit
        results: dict[str, float] = {}
        folder = self.run_dir / "evaluations"
        folder.mkdir(exist_ok=True)
        self._doing = "evaluating"
        for name in names or self.inputs.evaluation:
            prompts = self.inputs.evaluation[name]
            table = self._session.guard(self._evaluate(name, prompts.all(None if whole else config.every_limit)))
            groups.save(table, folder / f"{name}-step-{self.step:06d}.arrow")
            results |= evaluation_metrics(name, list(groups.rows(table)), config.pass_k)
        if results:
            self.metrics.write(self.step, results)
        return results

    async def _evaluate(self, name: str, prompts: pa.Table) -> pa.Table:
        assert self.verifiers is not None
        return await run_through(prompts, self.engines, self.verifiers, evaluation_sampling(self.config, name), self.step)

    def num_finished(self) -> int:
        """Groups in the log so far: those that are trained, and those that wait for the learner."""
        self.start()
        assert self._session is not None
        return int(self._session.call(self._buffer.call("status"))["num_finished"])

    def save(self) -> Path:
        """A checkpoint of the last trained step, written now if there is none; its folder."""
        self.start()
        step = self._ask("save")
        return self.run_dir / "checkpoints" / f"step-{step}"

    def stop(self) -> None:
        """End everything that was started. The run directory can be taken up again."""
        try:
            if self._session is not None:
                self.events.add(self.step, "run", "stopped")
                self._doing = "complete" if self.done else "stopped"
                if self.learners is not None:
                    with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                        self._session.call(self._ring.last_words(), 5.0)
                        self._session.call(self._buffer.actor.close.remote(), 5.0)
                    self.learners.join(LEARNERS_END_S)  # a thread that asks Ray something while Ray goes down crashes, or asks for ever
        finally:
            self._open.close()
            self._session = None

    def __enter__(self) -> GVPO:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


LEARNERS_END_S = 20.0
"""How long the end of a run waits for Ray Train to end: seconds, or the step that it is in."""

RECOVERIES = ("engine", "verifier", "learner", "buffer", "driver")
"""Whose deaths are counted, as recoveries/<who>."""


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def placement_notes(config: GVPOConfig, engines: bool) -> Iterator[str]:
    """What no node of the cluster, as it is now, has room for even when it is empty: it waits for the autoscaler, or for ever."""
    wanted = {"learner worker": resources_of(config.learner)}
    if engines:
        wanted |= {f"engine of pool {name}": resources_of(pool) for name, pool in config.engines.all_pools().items() if pool.num or pool.max_num}
        wanted["verifier"] = {"CPU": config.verifiers.num_cpus, **config.verifiers.resources}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for who, resources in wanted.items():
        if not any(all(node.get(name, 0.0) >= number for name, number in resources.items()) for node in nodes):
            text = ", ".join(f"{name}: {number:g}" for name, number in resources.items() if number)
            yield (
                f"placement: no node of this cluster has {{{text}}} for a{'n' if who[0] in 'aeiou' else ''} {who}: it waits until the "
                "autoscaler brings one; if the cluster has no autoscaler, or no such node type, for ever"
            )


def evaluation_sampling(config: GVPOConfig, name: str) -> SamplingConfig:
    """How a held-out set is sampled."""
    num_samples, temperature, max_tokens = config.evaluation.of(name)
    values = {"num_completions": num_samples, "temperature": temperature, "max_tokens": max_tokens or config.sampling.max_tokens}
    return config.sampling.model_copy(update=values)


def evaluate(config: GVPOConfig, checkpoint: str | None = None, out: str | None = None, reward: Rewards | None = None) -> dict[str, Any]:
    """Sample and verify evaluation.sets with one model, as far as `out` does not hold them yet, and write the numbers there. No learner.

    Args:
        checkpoint: a run directory (its newest checkpoint) or a checkpoint's folder; default: model.path.
        out: default: run_dir/eval/<name of the model's folder>, with its run's name before it where that is another run.

    Returns:
        What eval.json holds (evaluate.py), its folder, and num_sampled: prompts that were not there before.

    Raises:
        ConfigError: before any actor starts.
        RunError: with the first cause; what was finished is kept.
    """
    from gvpo_ray.observe.console import evaluation_progress

    config = config.absolute()
    if not config.evaluation.sets:
        raise ConfigError("evaluation.sets: name at least one prompt file")
    if checkpoint is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": checkpoint_folder(checkpoint)})})
    if cluster_address(config.ray) is None and not ray.is_initialized():
        check_resources(config, *machine_resources(config), learner=False)
    max_length, tokenizer = read_model(config)
    sets = read_evaluation_sets(config, max_length, tokenizer)
    validate_rewards(config.verifiers, reward)
    model = config.model.path
    folder = Path(out) if out is not None else Path(config.run_dir) / "eval" / evaluation_name(Path(model), Path(config.run_dir))
    with EvaluationDir(folder, config, model, {name: prompts.digest() for name, prompts in sets.items()}) as kept:
        missing = {name: kept.missing(name, prompts.all()) for name, prompts in sets.items()}
        if any(map(len, missing.values())):
            session = Session(config.ray)
            try:
                engines, verifiers = _without_learner(session, config, max_length, reward)
                with evaluation_progress({name: (len(sets[name]), len(rows)) for name, rows in missing.items()}) as advance:
                    for name, prompts in missing.items():

                        def on_done(group: pa.Table, name: str = name) -> None:
                            kept.add(name, group)
                            advance(name)

                        if len(prompts):
                            sampling = evaluation_sampling(config, name)
                            session.guard(run_through(prompts, engines, verifiers, sampling, 0, config.seed, on_done))
            finally:
                session.stop()
        left_out = {name: prompts.num_too_long for name, prompts in sets.items()}
        return {"num_sampled": sum(map(len, missing.values())), **kept.finish(config, model, left_out)}


def rollout(config: GVPOConfig, out: str | Path, num_groups: int | None = None, reward: Rewards | None = None) -> pa.Table:
    """Sample and verify groups with the weights of model.path, and write them to one Arrow file. No learner."""
    config = config.absolute()
    if cluster_address(config.ray) is None and not ray.is_initialized():
        check_resources(config, *machine_resources(config), learner=False)
    if num_groups is not None and num_groups < 1:
        raise ConfigError(f"--groups: {num_groups}: must be at least 1")
    inputs = read_inputs(config, reward)
    part = Path(f"{out}.part")
    if Path(out).is_dir():
        raise ConfigError(f"--out: {out} is a folder")
    try:
        part.write_bytes(b"")  # rather now than after the sampling
    except OSError as error:
        raise ConfigError(f"--out: {out}: {error.strerror}") from error
    session = Session(config.ray)
    try:
        engines, verifiers = _without_learner(session, config, inputs.max_length, reward)
        if inputs.prompts is None:
            raise ConfigError("prompts: required, and not given")
        prompts = pa.concat_tables([inputs.prompts.group(i) for i in range(num_groups or config.groups_per_step)])
        table = session.guard(run_through(prompts, engines, verifiers, config.sampling, 0))
        groups.save(table.select(list(groups.LOGGED_COLUMNS)), part)
        part.replace(out)
        return table
    finally:
        session.stop()
        part.unlink(missing_ok=True)


def _without_learner(session: Session, config: GVPOConfig, max_length: int, rewards: Rewards | None) -> tuple[EngineGroup, VerifierGroup]:
    """Engines with the weights of model.path, and verifiers."""

    def note(who: str, name: str, why: str) -> None:
        print(f"recovery of {name}: {why}", file=sys.stderr)

    async def fail(error: BaseException) -> None:
        """It is the session's cause already."""

    make = engine_maker(config.model.model_copy(update={"max_length": max_length}), config.engines, config.seed, True, None)
    engines = EngineGroup(config.engines, config.sampling.num_completions, make, None, note)
    session.on_stop(engines.close)
    verifiers = VerifierGroup(config.verifiers, rewards, note)
    session.on_stop(verifiers.close)
    session.spawn(engines.run(), fail)
    return engines, verifiers
