"""The GVPO class is what users call: a run that is started, trained step by step, evaluated and stopped.

The first exception anywhere closes the buffer with its cause, and whoever waits for the buffer is told.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from gvpo_ray import groups
from gvpo_ray.actors import RunError, cause_of
from gvpo_ray.buffer.buffer import steps_metrics
from gvpo_ray.buffer.control import ORDERS
from gvpo_ray.buffer.log import GroupLog, Quarantine
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.environment import ENVIRONMENT
from gvpo_ray.config.plan import cluster_address
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.config.shown import mask
from gvpo_ray.config.verifiers import RewardConfig
from gvpo_ray.engines.vllm_arguments import check_experts
from gvpo_ray.learner.checkpoints import damaged_checkpoints, settled_checkpoint
from gvpo_ray.learner.families import check_trainable, digest_of
from gvpo_ray.learner.sizes import check_sizes
from gvpo_ray.learner.workers import LearnerGroup
from gvpo_ray.observe.advice import FirstSteps, ParityNoise
from gvpo_ray.observe.computes import read_computes
from gvpo_ray.observe.metrics import evaluation_metrics
from gvpo_ray.observe.metrics_log import MetricsLog
from gvpo_ray.observe.status import RunState
from gvpo_ray.observe.trackers import Tracking, check_trackers
from gvpo_ray.run.events import EventLog
from gvpo_ray.run.inputs import read_inputs
from gvpo_ray.run.machine import check_machine
from gvpo_ray.run.models import check_recorded, check_recorded_tokens, read_model, reference_digest
from gvpo_ray.run.once import evaluation_sampling, run_through
from gvpo_ray.run.rollouts import LineCallback
from gvpo_ray.run.run_dir import check_format, import_groups, open_run_dir, read_recorded
from gvpo_ray.run.session import Session, placement_notes
from gvpo_ray.run.wiring import Driver, assemble
from gvpo_ray.verifiers.rewards import Rewards


class GVPO:
    """A GVPO object is a run, in RLlib's manner: each call of `train()` completes one more step.

    The rollout loop keeps sampling between the calls, as far as the staleness bound allows. A run continues
    `config.run_dir` where it stands. The object is a context manager.

        with GVPOConfig.from_file("jobs/quickstart.yaml").build() as algo:
            while algo.step < algo.config.num_steps:
                metrics = algo.train()

    Args:
        config: the run's config.
        reward: a reward function of your own, or several by name: `reward(prompts, completions, **columns) ->
            list[float | None]`. It replaces `verifiers.rewards`.
        groups_file: train on recorded groups only, with no engines and no verifiers (`gvpo-ray learn`).
        say: called with lines for the user, such as recoveries and what the watchdog sees.

    Raises:
        ConfigError: a mistake of the user; before any actor starts.
    """

    def __init__(
        self,
        config: GVPOConfig,
        reward: Callable[..., Any] | Rewards | None = None,
        groups_file: str | None = None,
        say: LineCallback = print,
    ) -> None:
        rewards: Rewards = (
            {} if reward is None else reward if isinstance(reward, Mapping) else {_name_of(reward): reward}
        )
        if rewards:
            names = [*([ENVIRONMENT] if config.environment else []), *rewards]
            known = {name: config.verifiers.rewards.get(name, RewardConfig()) for name in names}
            config = config.model_copy(
                update={"verifiers": config.verifiers.model_copy(update={"rewards": known})}
            )
        config = config.absolute()
        self.config, self._rewards, self.run_dir, self.say = config, rewards, Path(config.run_dir), say
        self.replays = groups_file is not None
        check_trackers(config.tracking)
        check_machine(config, engines=not self.replays)
        if self.replays:
            _, tokenizer = read_model(config)
            recorded, assigned, num_recorded_steps = read_recorded(
                Path(str(groups_file)), config.groups_per_step, self.run_dir / "groups"
            )
            check_recorded_tokens(config.model, tokenizer, recorded)
            check_recorded(config, recorded)
        else:
            self.inputs = read_inputs(config, rewards)
            check_experts(config.model, config.engines)
        check_trainable(config.model)
        check_sizes(config.model, config.learner)
        self._open = contextlib.ExitStack()
        contents = {} if self.replays else self.inputs.digests()
        contents |= digest_of(config.model) | reference_digest(config)
        self._open.enter_context(open_run_dir(config, contents))
        try:
            self.num_steps = config.num_steps
            if self.replays:
                self.num_steps = min(config.num_steps, num_recorded_steps)
                import_groups(recorded, assigned, self.run_dir / "groups")
            checkpoint = settled_checkpoint(self.run_dir)
            self.step = checkpoint[0] if checkpoint else 0
            """Number of trained steps, which is also the version of the weights."""
            self.resumed_from = self.step if checkpoint else None
            self.log_size = len(GroupLog(self.run_dir / "groups"))
            """Groups that were in the log when this process started or resumed the run."""
            self.metrics = MetricsLog(self.run_dir / "metrics.jsonl", self.step)
            written = {line["step"] for line in self.metrics.lines if "loss" in line}
            for step, metrics in sorted(steps_metrics(self.run_dir / "groups").items()):
                # The last driver may have been killed before it wrote these metrics.
                if max(written, default=0) < step <= self.step:
                    self.metrics.write(step, metrics)
            self.quarantine = Quarantine(
                self.run_dir / "quarantine.jsonl",
                config.verifiers,
                None if config.environment is None else config.environment.timeout_s,
            )
            self.events = EventLog(self.run_dir / "events.jsonl")
        except OSError as error:
            self._open.close()
            raise ConfigError(f"run_dir: {self.run_dir}: {error.strerror}") from error
        except BaseException:
            self._open.close()
            raise
        self._session: Session | None = None
        self.learners: LearnerGroup | None = None
        # recorded groups may be fewer than the config's steps
        self._computes: str | None = None  # how the learner computes, once it is told
        self._parity_noise = ParityNoise(config)
        self._first_steps = FirstSteps(config.model_copy(update={"num_steps": self.num_steps}))
        self._doing = RunState.STARTING

    @classmethod
    def from_run_dir(cls, path: str | Path, reward: Callable[..., Any] | Rewards | None = None) -> GVPO:
        """Continue a run where its directory stands.

        Raises:
            ConfigError: the directory has another format, or its config is not usable.
        """
        check_format(path)
        run_dir = str(Path(path).absolute())  # a relative one would be taken from the config's `root`
        return cls(GVPOConfig.from_file(Path(path) / "config.yaml", {"run_dir": run_dir}), reward)

    @property
    def done(self) -> bool:
        """Return whether all steps are trained."""
        return self.step >= self.num_steps

    @property
    def evaluation_due(self) -> bool:
        """Return whether the config asks for an evaluation at this step that the metrics do not have yet."""
        every = 0 if self.replays else self.config.evaluation.every
        if not every or not (self.step % every == 0 or self.done):
            return False
        return not any(
            key.startswith("eval/")
            for line in self.metrics.lines
            if line["step"] == self.step
            for key in line
        )

    def startup_summary(self) -> Iterator[str]:
        """Yield lines that a person should read before the first step."""
        for found in damaged_checkpoints(self.run_dir):
            yield f"a checkpoint is damaged and not used: {found}"
        if self.done:
            yield f"{self.run_dir}: complete, {self.step} of {self.num_steps} steps are trained"
        elif self.resumed_from is not None or (self.log_size and not self.replays):
            start = (
                f"checkpoint of step {self.resumed_from}"
                if self.resumed_from is not None
                else f"{self.config.model.path} (no checkpoint yet)"
            )
            yield f"resuming {self.run_dir} from the {start}, with {self.log_size} finished groups in its log"
        if not self.replays:
            yield from self.inputs.startup_summary()

    def start(self) -> GVPO:
        """Start the actors and the rollout loop; the first `train`, `evaluate` or `save` does it too."""
        if self._session is not None:
            return self
        config = self.config
        tracking = Tracking(config, self.metrics.lines, self.say)
        self._open.callback(tracking.close)
        self.metrics.on_line = tracking.line
        session = self._session = Session(config.ray)
        self._open.callback(session.stop)
        if self.events.was_cut_off:
            why = (
                f"ended without a word; goes on from the checkpoint of step {self.step}"
                if self.step
                else "ended without a word; begins again"
            )
            self._note("driver", "driver", why)
        self.events.add(self.step, "run", "started")
        self._allowed = self.step
        (self.run_dir / "groups" / ORDERS).unlink(missing_ok=True)
        parts = assemble(
            session,
            config,
            self.run_dir,
            None if self.replays else self.inputs,
            Driver(
                self._note,
                self.say,
                self._state,
                self._state_for_buffer,
                self._learners_placed if cluster_address(config.ray) else None,
            ),
            num_steps=self.num_steps,
            version=self.step,
            quarantine=self.quarantine,
            rewards=self._rewards,
        )
        self._buffer, self.engines, self.verifiers = parts.buffer, parts.engines, parts.verifiers
        self._ring = parts.ring
        for text in placement_notes(config, engines=not self.replays):
            self.say(text)
        fixed = [slot.engine for slot in self.engines.slots if slot.engine is not None]
        probes = [] if self.replays else self.inputs.probes()
        self.learners = LearnerGroup(config, self.run_dir, self._buffer.actor, fixed, self.num_steps, probes)
        self.learners.start()
        self.learners.ended.add_done_callback(
            lambda ended: session.spawn(self._learners_ended(ended), self._fail)
        )
        session.on_stop(self._close_buffer)
        self._ring.show = tracking.status
        session.spawn(self._ring.watch() if self.replays else self._ring.run(), self._fail)
        return self

    # --- supervision ----------------------------------------------------------------------------------------

    def _note(self, who: str, name: str, why: str) -> None:
        """Record a recovery, or a pool that changes its size, in events.jsonl.

        The metrics and the report read it there. That the file cannot be written ends no run: it is said.
        """
        why = mask(why)
        try:
            self.events.add(self.step, who, name, why)
        except OSError as error:
            self.say(f"events.jsonl lacks what follows: {error}")
        self.say(f"pool {name} {why}" if who == "pool" else f"recovery at step {self.step}: {name}: {why}")

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "num_steps": self.num_steps,
            "doing": self._doing,
            "recoveries": dict(self.events.counts()),
        }

    def _state_for_buffer(self) -> tuple[list[int], int, bool, str | None]:
        """Return what the log does not tell a restarted buffer (see GroupBuffer.reconnect)."""
        assert self._session is not None
        cause = self._session.cause
        return list(self._ring.running), self._allowed, cause is not None, cause_of(cause) if cause else None

    async def _learners_placed(self) -> None:
        """Wait until Ray has placed the learner workers, before a cluster's engines are started.

        The workers need all of their places at once, and engines that take one of them would make them wait
        for ever.
        """
        assert self.learners is not None
        while not await asyncio.to_thread(self.learners.has_places):
            await asyncio.sleep(0.5)

    async def _learners_ended(self, ended: Future[None]) -> None:
        ended.result()

    async def _fail(self, error: BaseException) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            await self._buffer.close(cause_of(error))

    async def _close_buffer(self) -> None:
        await self._buffer.close_once()
        assert self.learners is not None
        await asyncio.to_thread(self.learners.join, 4.0)
        self._buffer.kill()

    def _ask(self, question: Coroutine[Any, Any, Any]) -> Any:
        """Return an answer of the buffer.

        Raises:
            RunError: the answer is None, which means that the run was closed; the message is its cause.
        """
        assert self._session is not None
        cause: BaseException | None = None
        try:
            answer = self._session.call(question)
            if answer is not None:
                return answer
            closed = self._session.call(self._buffer.status())["error"]
        except ray.exceptions.RayError as error:
            cause, closed = error, None
        cause = self._session.cause = self._session.cause or cause
        raise RunError(cause_of(cause) if cause else closed or "the run was stopped") from cause

    # --- what users call ------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Run until one more step is trained; return its metrics, and those of an evaluation if one was due.

        Raises:
            RunError: the run has stopped; the message is the first cause.
            StopIteration: all steps are trained.
        """
        if self.done:
            raise StopIteration(f"all {self.num_steps} steps are trained")
        self.start()
        assert self._session is not None
        if self.evaluation_due:
            # It is due before the first step, or the last process ended before it was finished.
            self.evaluate()
        self._allowed, self._doing = self.step + 1, RunState.TRAINING
        self._session.call(self._buffer.permit(self._allowed))
        metrics = self._ask(self._buffer.trained(self.step + 1))
        self.step += 1
        # An error is not lost: the next call to the buffer raises it again.
        with contextlib.suppress(ray.exceptions.RayError):
            self._session.call(self._ring.note_learner())
        recoveries = {f"recoveries/{who}": float(self.events.counts()[who]) for who in RECOVERIES}
        line = self.metrics.write(self.step, {**metrics, **self._ring.rates(), **recoveries})
        if self._computes is None:
            self._computes = read_computes(self.run_dir)
            self.say(f"learner: {self._computes}")
        for judge in (self._first_steps.judge, self._parity_noise.judge):
            if why := judge(line):
                self.say(why)
        if self.evaluation_due:
            line = line | self.evaluate()
        if self.done:
            self.save()  # the learner saves the last step without being asked: this waits for it
        return line

    def evaluate(self, *names: str) -> dict[str, float]:
        """Evaluate the named held-out sets (none named: all) with the weights of the last trained step.

        The run's engines and verifiers do it. Between the first and the last step, at most
        `evaluation.every_limit` prompts of a set are used.

        Returns:
            The metrics of the evaluation (pass@1 and others) by name, as they are written to metrics.jsonl.
        """
        self.start()
        assert self._session is not None
        config = self.config.evaluation
        whole = self.step == 0 or self.done or not config.every_limit
        results: dict[str, float] = {}
        folder = self.run_dir / "evaluations"
        folder.mkdir(exist_ok=True)
        self._doing = RunState.EVALUATING
        for name in names or self.inputs.evaluation:
            prompts = self.inputs.evaluation[name]
            table = self._session.guard(
                self._evaluate(name, prompts.all(None if whole else config.every_limit))
            )
            groups.save(table, folder / f"{name}-step-{self.step:06d}.arrow")
            results |= evaluation_metrics(name, list(groups.rows(table)), config.pass_k)
        if results:
            self.metrics.write(self.step, results)
        return results

    async def _evaluate(self, name: str, prompts: pa.Table) -> pa.Table:
        assert self.verifiers is not None
        return await run_through(
            prompts, self.engines, self.verifiers, evaluation_sampling(self.config, name), self.step
        )

    def num_finished(self) -> int:
        """Return the number of groups in the log: those that are trained, and those that wait."""
        self.start()
        assert self._session is not None
        return int(self._session.call(self._buffer.status())["num_finished"])

    def save(self) -> Path:
        """Return the folder of a checkpoint of the last trained step, which is written now if there is none.

        Raises:
            RunError: the run was closed before the checkpoint was written.
        """
        self.start()
        step = self._ask(self._buffer.save())
        return self.run_dir / "checkpoints" / f"step-{step}"

    def stop(self) -> None:
        """End everything that was started. The run directory can be continued later."""
        try:
            if self._session is not None:
                self._doing = RunState.COMPLETE if self.done else RunState.STOPPED
                with contextlib.suppress(OSError):  # a full disk must keep nobody from being told to stop
                    self.events.add(self.step, "run", "stopped")
                if self.learners is not None:
                    for last in (self._ring.write_final_status, self._buffer.close_once):
                        # a TimeoutError is an OSError
                        with contextlib.suppress(ray.exceptions.RayError, OSError):
                            self._session.call(last(), 5.0)
                    # A thread that calls Ray while Ray shuts down crashes, or never returns.
                    self.learners.join(LEARNERS_END_S)
        finally:
            self._open.close()
            self._session = None

    def __enter__(self) -> GVPO:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


LEARNERS_END_S = 20.0
"""Seconds that the end of a run waits for Ray Train, which first finishes the step that it is in."""

RECOVERIES = ("engine", "verifier", "reference", "environment", "learner", "buffer", "driver")
"""Kinds of processes whose restarts are counted, as the metrics recoveries/<kind>."""


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
