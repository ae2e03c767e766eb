"""The ring: placement, `ray.remote` wrapping, the rollout loop, supervision. The only file that makes actors.

    prompts ──► engines ──► verifiers ──► buffer ──► learner ──► weights ─┐
      ▲                                                       (pulled by  │
      └── a group may start while started // n <= version + max_staleness ◄┘ engines)

Everything asynchronous runs on one event loop in a thread of the driver (`Session`): one coroutine per free slot of an engine
(`_roll_out`), one per engine that follows the weights (`_follow`). The driver holds object refs only; tables go from actor to actor.
The first exception anywhere closes the buffer with its cause, and whoever waits is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import inspect
import os
import random
import re
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from gvpo_ray import groups
from gvpo_ray.buffer import GroupBuffer, GroupLog, Quarantine, read_assignments
from gvpo_ray.config import (
    NO_PROMPTS,
    ConfigError,
    EnginesConfig,
    GVPOConfig,
    ModelConfig,
    PromptsConfig,
    RayConfig,
    RewardConfig,
    SamplingConfig,
    VerifiersConfig,
    check_resources,
    cluster_address,
    is_local,
)
from gvpo_ray.engines import Engine
from gvpo_ray.evaluate import EvaluationDir, prompt_seed
from gvpo_ray.learner import Settings, learn
from gvpo_ray.metrics import MetricsLog, evaluation_metrics
from gvpo_ray.policy import Policy, latest_checkpoint
from gvpo_ray.prompts import PromptSet
from gvpo_ray.reward_model import RewardModel
from gvpo_ray.verifiers import Verifier, validate_rewards
from gvpo_ray.weights import NcclPublisher, ObjectPublisher

Rewards = Mapping[str, Callable[..., Any]]
"""Reward functions passed as callables, by the name they have in verifiers.rewards."""


class RunError(RuntimeError):
    """The run has stopped; the message is the first cause."""


# --- before any actor starts --------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """What a run reads, checked."""

    prompts: PromptSet
    evaluation: dict[str, PromptSet]
    max_length: int
    """Longest prompt + completion, in tokens."""


def read_inputs(config: GVPOConfig, rewards: Rewards | None = None) -> Inputs:
    """Load tokenizer and prompts and check that model, prompts and rewards are there and fit together.

    Raises:
        ConfigError: one line that names the key.
    """
    max_length, tokenizer = read_model(config)
    room = max_length - config.sampling.max_tokens
    if room < 1:
        raise ConfigError(f"sampling.max_tokens: {config.sampling.max_tokens} tokens leave no room for a prompt in a context of {max_length}")
    validate_rewards(config.verifiers, rewards)

    def prompt_set(section: PromptsConfig, key: str, name: str, room: int) -> PromptSet:
        return PromptSet(section, tokenizer, name=name, max_tokens=room, seed=config.seed, key=key)

    return Inputs(
        prompts=prompt_set(config.prompts, "prompts", Path(config.prompts.path).stem, room),
        evaluation=read_evaluation_sets(config, max_length, tokenizer),
        max_length=max_length,
    )


def read_evaluation_sets(config: GVPOConfig, max_length: int, tokenizer: Any) -> dict[str, PromptSet]:
    """The prompts of evaluation.sets by name.

    Raises:
        ConfigError: one line that names the key.
    """
    prompts = {}
    for name, section in config.evaluation.sets.items():
        key, max_tokens = f"evaluation.sets.{name}", config.evaluation.of(name)[2] or config.sampling.max_tokens
        if max_tokens >= max_length:
            raise ConfigError(f"{key}.max_completion_tokens: {max_tokens} tokens leave no room for a prompt in a context of {max_length}")
        prompts[name] = PromptSet(section, tokenizer, name=name, max_tokens=max_length - max_tokens, seed=config.seed, key=key)
    return prompts


def read_model(config: GVPOConfig) -> tuple[int, Any]:
    """Context length and tokenizer of model.path."""
    from transformers import AutoConfig, AutoTokenizer

    path, trust = config.model.path, config.model.trust_remote_code
    if is_local(path) and not Path(path).is_dir():
        hint = "; make it with: python jobs/warm_start.py CONFIG" if config.warm_start else ""
        raise ConfigError(f"model.path: no folder {path}{hint}")
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ConfigError(f"model.path: {path} has no config.json")
        if not any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")):
            raise ConfigError(f"model.path: {path} has no tokenizer (tokenizer.json): save the model's tokenizer beside it")
        if not any(Path(path).glob("*.safetensors")):
            raise ConfigError(f"model.path: {path} has no weights (*.safetensors)")
    try:
        model = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: cannot load {path}: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer("1 + 2 = 3")["input_ids"]:  # transformers makes an empty one where the vocabulary's file is missing
        raise ConfigError(f"model.path: {path} has no tokenizer (tokenizer.json): the one that loads turns text into no tokens")
    context = getattr(model, "max_position_embeddings", None) or config.model.max_length
    if context is None:
        raise ConfigError(f"model.max_length: {path} does not say its context length: give it here")
    if config.model.max_length and config.model.max_length > context:
        raise ConfigError(f"model.max_length: {config.model.max_length} is more than the model's context of {context}")
    return config.model.max_length or context, tokenizer


def check_paths(config: GVPOConfig) -> Iterator[str]:
    """For `check`: what of the run's inputs is here. Hub names are not looked up."""
    validate_rewards(config.verifiers)
    training = [("prompts.path", config.prompts.path)] if config.prompts.path != NO_PROMPTS else []
    for key, path in (("model.path", config.model.path), *training,
                      *((f"evaluation.sets.{name}.path", section.path) for name, section in config.evaluation.sets.items())):  # fmt: skip
        if Path(path).exists():
            yield f"{key}: {path} is here"
        elif is_local(path):
            hint = "; make it with: python jobs/warm_start.py CONFIG" if key == "model.path" and config.warm_start else ""
            raise ConfigError(f"{key}: nothing at {path}{hint}")
        else:
            yield f"{key}: {path} is a Hugging Face name, looked up when the run starts"


RESUMABLE = ("num_steps", "max_staleness", "engines", "verifiers", "learner", "evaluation", "checkpoint", "ray", "warm_start", "run_dir", "loss")
"""Keys that may change when a run is resumed. The others say what its log and its checkpoints mean."""


@contextlib.contextmanager
def open_run_dir(config: GVPOConfig) -> Iterator[Path]:
    """Make or take up the run directory, alone: writes config.yaml; refuses one that another process uses or that is another run's.

    Raises:
        ConfigError: names the key that differs, or run_dir and why it cannot be written.
    """
    path = Path(config.run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "a")  # noqa: SIM115 - held as long as the run
    except OSError as error:
        raise ConfigError(f"run_dir: cannot write {path}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"run_dir: another process is running in {path}") from error
        kept = path / "config.yaml"
        if kept.exists():
            try:
                old, new = GVPOConfig.from_file(kept).model_dump(mode="json"), config.model_dump(mode="json")
            except ConfigError as error:
                raise ConfigError(f"run_dir: {kept} is not the config of a run ({error}); use another run_dir") from error
            changed = [key for key in new if key not in RESUMABLE and old[key] != new[key]]
            if changed:
                raise ConfigError(f"{changed[0]}: {path} holds a run with other values of it (see its config.yaml); use another run_dir")
        part = path / ".config.yaml.part"
        try:
            part.write_text(config.dump())
        except OSError as error:
            raise ConfigError(f"run_dir: cannot write {path}: {error.strerror}") from error
        part.replace(kept)
        yield path


# --- groups of actors ---------------------------------------------------------------------------------------------------


def _name(text: str) -> str:
    """An actor's name on the dashboard. Ray wants each once: the one of a run that was stopped just now may still be there."""
    return f"{text}-{uuid.uuid4().hex[:6]}"


class EngineGroup:
    """The engine actors. Asynchronous methods run on the session's loop."""

    def __init__(self, model: ModelConfig, config: EnginesConfig, seed: int, load_weights: bool = False) -> None:
        self.config = config
        actor = ray.remote(_EngineActor)
        self.actors = [
            actor.options(
                name=_name(f"engine-{i}"), num_cpus=config.num_cpus, num_gpus=config.num_gpus, max_concurrency=10_000
            ).remote(model, config, seed + i, load_weights)
            for i in range(config.num)
        ]
        self.times: dict[str, float] = {}
        """Of the newest weight update."""

    async def start(self) -> float:
        """Seconds until the slowest engine was up."""
        return max(report["seconds"] for report in await asyncio.gather(*(engine.start.remote() for engine in self.actors)))

    async def num_tokens(self) -> int:
        """Tokens generated since the start."""
        return sum(status["tokens"] for status in await asyncio.gather(*(engine.status.remote() for engine in self.actors)))

    async def close(self) -> None:
        await asyncio.gather(*(engine.close.remote() for engine in self.actors), return_exceptions=True)


class _EngineActor(Engine):
    @ray.method(num_returns=2)
    async def sample(self, group: pa.Table, sampling: SamplingConfig, min_version: int, seed: int | None = None) -> tuple[pa.Table, None]:
        """The sampled group, and nothing: what the driver awaits, so that the table does not come to it."""
        return await self.generate(group, sampling, min_version, seed), None


class VerifierGroup:
    """The verifier actors; a group goes to the one with the fewest in hand.

    A verifier that dies, alone or with its node, is started again by Ray, and what it had in hand is checked again: a check has no
    effect but its answer. With `max_num` the group grows while every verifier has groups waiting, and shrinks when one is idle.
    """

    def __init__(self, config: VerifiersConfig, rewards: Rewards | None) -> None:
        for function in (rewards or {}).values():
            # Functions of the user's own files travel by value: the actors' machines need not have the files.
            module = inspect.getmodule(function)
            if module is not None and module.__name__ != "__main__" and "site-packages" not in (module.__file__ or "site-packages"):
                ray.cloudpickle.register_pickle_by_value(module)
        self.config, self._rewards = config, dict(rewards or {})
        self._models: list[Any] = []
        self._model_rewards = {name: self._reward_model(name, reward) for name, reward in config.rewards.items() if reward.model}
        self._in_hand: dict[Any, int] = {}
        self._idle_since: dict[Any, float] = {}
        self._endings: set[asyncio.Future[None]] = set()
        self._num_started = 0
        for _ in range(config.num):
            self._grow()

    @property
    def actors(self) -> list[Any]:
        return list(self._in_hand)

    async def score(self, sampled: Any) -> Any:
        """Object ref of a sampled group -> ref of the group with its rewards; returns when that is there."""
        if len(self._in_hand) < (self.config.max_num or 0) and min(self._in_hand.values()) >= GROW_AT:
            self._grow()
        verifier = min(self._in_hand, key=lambda actor: self._in_hand[actor])
        self._in_hand[verifier] += 1
        try:
            scored, done = verifier.score_group.remote(sampled)
            await done
            return scored
        finally:
            self._in_hand[verifier] -= 1
            self._shrink(verifier)

    def _grow(self) -> None:
        # A group's table may arrive late (from another node): a later one must not wait for it.
        actor = ray.remote(_VerifierActor).options(
            name=_name(f"verifier-{self._num_started}"), num_cpus=self.config.num_cpus, max_concurrency=1, allow_out_of_order_execution=True,
            scheduling_strategy="SPREAD", max_restarts=-1, max_task_retries=MAX_VERIFIER_DEATHS,
        ).remote(self.config, self._rewards, self._model_rewards)  # fmt: skip
        self._num_started += 1
        self._in_hand[actor] = 0

    def _shrink(self, verifier: Any) -> None:
        """End a verifier beyond `num` that stays idle while others are, too."""
        now = time.monotonic()
        for actor, in_hand in self._in_hand.items():
            if in_hand:
                self._idle_since.pop(actor, None)
            else:
                self._idle_since.setdefault(actor, now)
        for actor, since in list(self._idle_since.items()):
            if len(self._in_hand) > self.config.num and now - since > IDLE_S:
                del self._in_hand[actor], self._idle_since[actor]
                ending = asyncio.ensure_future(self._end(actor))
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)

    async def _end(self, actor: Any) -> None:
        """For good: an actor that ends by itself is started again, and so would be its ending."""
        with contextlib.suppress(ray.exceptions.RayError):
            await actor.close.remote()  # its sandbox
        ray.kill(actor, no_restart=True)

    def _reward_model(self, name: str, config: RewardConfig) -> Callable[..., Any]:
        actor = ray.remote(RewardModel)
        actors = [
            actor.options(
                name=_name(f"reward-model-{name}-{i}"), num_cpus=config.num_cpus, num_gpus=config.num_gpus, max_concurrency=1,
                max_restarts=-1, max_task_retries=MAX_VERIFIER_DEATHS,
            ).remote(config.model, config.batch_size, config.num_gpus > 0)
            for i in range(config.num)
        ]  # fmt: skip
        self._models += actors
        return _RemoteReward(actors)

    async def close(self) -> None:
        await asyncio.gather(*(verifier.close.remote() for verifier in self._in_hand), *self._endings, return_exceptions=True)


GROW_AT = 2
"""Groups in hand of every verifier at which one more is started."""

IDLE_S = 30.0
"""A verifier beyond verifiers.num that has had nothing to do for so long is ended."""

MAX_VERIFIER_DEATHS = 1000
"""Deaths of its verifier that a group survives, those while it waits for its turn included: more are not bad luck but the reward function."""


class _VerifierActor(Verifier):
    @ray.method(num_returns=2)
    def score_group(self, sampled: pa.Table) -> tuple[pa.Table, None]:
        """The scored group, and nothing: what the driver awaits, so that the table does not come to it."""
        return self.score(sampled), None


class _RemoteReward:
    """A reward model's actors as a reward function, called in the verifiers; each verifier goes round."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors
        self._next = random.randrange(len(actors))

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        self._next += 1
        return ray.get(self._actors[self._next % len(self._actors)].score.remote(prompts, completions))


class LearnerGroup:
    """The Ray Train workers, run from a thread: TorchTrainer.fit blocks until the buffer tells the learner to stop."""

    def __init__(self, config: GVPOConfig, run_dir: Path, buffer: Any, engines: list[Any], last_step: int) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        learner = config.learner
        self._scratch = tempfile.mkdtemp(prefix="gvpo_ray_train_")  # Ray Train's own notes; checkpoints are in the run directory
        self._trainer = TorchTrainer(
            train_loop,
            train_loop_config={"config": config, "run_dir": str(run_dir), "buffer": buffer, "engines": engines, "last_step": last_step},
            torch_config=TorchConfig(backend="nccl" if learner.num_gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=learner.num_workers,
                use_gpu=learner.num_gpus > 0,
                resources_per_worker={"CPU": learner.num_cpus, "GPU": learner.num_gpus} if learner.num_gpus else {"CPU": learner.num_cpus},
            ),
            run_config=RunConfig(name="learner", storage_path=self._scratch, failure_config=FailureConfig(max_failures=0)),
        )
        self._thread: threading.Thread | None = None
        self.ended: Future[None] = Future()

    def start(self) -> None:
        def fit() -> None:
            try:
                self._trainer.fit()
                self.ended.set_result(None)
            except BaseException as error:  # carried to the session, which reports it as the cause
                self.ended.set_exception(error)

        self._thread = threading.Thread(target=fit, name="learner", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the workers to end; False when they did not in time."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        shutil.rmtree(self._scratch, ignore_errors=True)
        return self._thread is None or not self._thread.is_alive()


class _LearnersBuffer:
    """The buffer actor as the learner sees it: calls that wait."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def order(self, step: int, saved: bool) -> str:
        return ray.get(self._actor.order.remote(step, saved))

    def batch(self, step: int) -> pa.Table | None:
        return ray.get(self._actor.batch.remote(step))

    def referenced(self, version: int, logprobs: dict[int, list[float | None]]) -> None:
        ray.get(self._actor.referenced.remote(version, logprobs))

    def published(self, version: int, weights: Any, metrics: dict[str, Any] | None) -> None:
        ray.get(self._actor.published.remote(version, weights, metrics))

    def saved(self, step: int) -> None:
        ray.get(self._actor.saved.remote(step))


def train_loop(settings: dict[str, Any]) -> None:
    """What Ray Train runs on each learner worker."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    config: GVPOConfig = settings["config"]
    torch.set_num_threads(config.learner.num_threads)
    torch.manual_seed(config.seed)
    rank = ray.train.get_context().get_world_rank()
    checkpoint = latest_checkpoint(settings["run_dir"])
    policy = Policy(config.model, config.learner, checkpoint[1] if checkpoint else config.model.path, get_device())
    engines = settings["engines"]
    publisher: NcclPublisher | ObjectPublisher
    if config.engines.weight_transfer == "nccl" and engines:

        def call(method: str, arguments: list[tuple[Any, ...]]) -> None:
            ray.get([getattr(engine, method).remote(*args) for engine, args in zip(engines, arguments, strict=True)])

        address = ray.util.get_node_ip_address()
        publisher = NcclPublisher(call, len(engines), config.engines.tensor_parallel_size, rank, address, _free_port(address))
    else:
        # Engines merge an adapter into the model from what the checkpoint's merge starts from too: float32, and it is small.
        dtype = torch.float32 if config.model.lora else getattr(torch, config.model.dtype)
        publisher = ObjectPublisher(ray.put, dtype, is_sender=rank == 0)
    learn(
        policy,
        _LearnersBuffer(settings["buffer"]),
        publisher,
        Settings(
            run_dir=settings["run_dir"],
            num_steps=config.num_steps,
            last_step=settings["last_step"],
            loss=config.loss,
            learner=config.learner,
            checkpoint=config.checkpoint,
            model_path=config.model.path,
            parity_every=config.engines.parity_every,
        ),
        on_checkpoint=ray.train.report,
    )


def _free_port(address: str) -> int:
    import socket

    with socket.socket() as free:
        free.bind((address, 0))
        return int(free.getsockname()[1])


# --- the session --------------------------------------------------------------------------------------------------------


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

        with contextlib.suppress(TimeoutError):
            self.call(close(), timeout_s=6)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=3)
        if self._owns_ray:
            ray.shutdown()


def cause_of(error: BaseException) -> str:
    """One line for what a user should know first: the innermost cause that Ray carried here, without its tracebacks."""
    from ray.exceptions import RayTaskError

    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
            error = error.cause
        elif failures := getattr(error, "worker_failures", None):  # Ray Train: rank -> exception
            error = failures[min(failures)]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if isinstance(error, ray.exceptions.RayError):  # its text is a traceback: the error that it ends with says more than its head
        named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit): ", line)]
        if named:
            return named[-1]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")


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

    Raises:
        ConfigError: before any actor starts.
    """

    def __init__(self, config: GVPOConfig, reward: Callable[..., Any] | Rewards | None = None, groups_file: str | None = None) -> None:
        rewards: Rewards = {} if reward is None else reward if isinstance(reward, Mapping) else {_name_of(reward): reward}
        if rewards:
            known = {name: config.verifiers.rewards.get(name, RewardConfig()) for name in rewards}
            config = config.model_copy(update={"verifiers": config.verifiers.model_copy(update={"rewards": known})})
        config = config.absolute()
        self.config, self._rewards, self.run_dir = config, rewards, Path(config.run_dir)
        self.replays = groups_file is not None
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
            self.quarantine = Quarantine(self.run_dir / "quarantine.jsonl")
        except OSError as error:
            self._open.close()
            raise ConfigError(f"run_dir: {self.run_dir}: {error.strerror}") from error
        except BaseException:
            self._open.close()
            raise
        self._session: Session | None = None
        self._tokens_before = (0, time.perf_counter())
        self._engines_are_up = False

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
            for key, prompts in {"prompts": self.inputs.prompts, **self.inputs.evaluation}.items():
                left_out = f", {prompts.num_too_long} longer than the context allows: left out" if prompts.num_too_long else ""
                yield f"{key}: {len(prompts)} prompts (longest {prompts.longest} tokens{left_out})"

    def start(self) -> GVPO:
        """Bring the ring up (the first `train`, `evaluate` or `save` does it too)."""
        if self._session is not None:
            return self
        config = self.config
        session = self._session = Session(config.ray)
        self._open.callback(session.stop)
        self._buffer = (
            ray.remote(GroupBuffer)
            .options(name=_name("buffer"), num_cpus=0.1, max_concurrency=100_000)
            .remote(self.run_dir / "groups", config.groups_per_step, self.num_steps, config.max_staleness, self.step)
        )
        engines: list[Any] = []
        if not self.replays:
            self.engines = EngineGroup(config.model.model_copy(update={"max_length": self.inputs.max_length}), config.engines, config.seed)
            self.verifiers = VerifierGroup(config.verifiers, self._rewards)
            session.on_stop(self.verifiers.close)
            session.on_stop(self.engines.close)
            engines = self.engines.actors
        self.learners = LearnerGroup(config, self.run_dir, self._buffer, engines, self.num_steps)
        self.learners.start()
        self.learners.ended.add_done_callback(lambda ended: session.spawn(self._learners_ended(ended), self._fail))
        session.on_stop(self._close_buffer)
        if not self.replays:
            session.spawn(self._ring(), self._fail)
        return self

    # --- the ring --------------------------------------------------------------------------------------------------------

    async def _ring(self) -> None:
        """Start the engines, then sample until the buffer is closed. Consumes prompts; waits for slots and for the dial."""
        await self.engines.start()
        self._engines_are_up = True
        async with asyncio.TaskGroup() as tasks:
            for engine in self.engines.actors:
                tasks.create_task(self._follow(engine))
                for _ in range(self.config.engines.max_groups):
                    tasks.create_task(self._roll_out(engine))

    async def _roll_out(self, engine: Any) -> None:
        """One slot of an engine: pull the next group when there is room for it, have it sampled, verified and put into the log.

        Waits for the dial (woken by a new version), then for the group. The driver sees refs alone.
        """
        while (start := await self._buffer.start.remote()) is not None:
            group_id, min_version = start
            prompt = self.inputs.prompts.group(group_id)
            if self.quarantine.holds(prompt):
                await self._buffer.skip.remote(group_id)
                continue
            sampled, done = engine.sample.remote(prompt, self.config.sampling, min_version)
            await done
            if await self._buffer.put.remote(await self.verifiers.score(sampled)):
                self.quarantine.add(prompt)
                if len(self.quarantine) >= len(self.inputs.prompts):
                    raise RunError(f"every prompt is in {self.quarantine.path}: no check ends within the limits of the verifiers section")

    async def _follow(self, engine: Any) -> None:
        """Keep one engine's weights new. Waits for a version newer than the engine's (woken by the learner's publish)."""
        version = -1
        while (news := await self._buffer.weights.remote(version)) is not None:
            version, weights = news
            self.engines.times = await engine.update.remote(version, weights, weights["probe"])

    async def _learners_ended(self, ended: Future[None]) -> None:
        ended.result()

    async def _fail(self, error: BaseException) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            await self._buffer.close.remote(cause_of(_first(error)))

    async def _close_buffer(self) -> None:
        await self._buffer.close.remote()
        await asyncio.to_thread(self.learners.join, 4.0)

    def _ask(self, ref: Any) -> Any:
        """Await an answer of the buffer; None means that the run was closed under us: raise why."""
        assert self._session is not None
        try:
            answer = self._session.call(ref)
        except ray.exceptions.RayError as error:
            self._session.cause = self._session.cause or error
            answer = None
        if answer is None:
            cause = self._session.cause
            raise RunError(cause_of(_first(cause)) if cause else "the run was stopped") from cause
        return answer

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
        self._session.call(self._buffer.allow.remote(self.step + 1))
        metrics = self._ask(self._buffer.trained.remote(self.step + 1))
        self.step += 1
        if self._engines_are_up:  # a run that is taken up may train from its log before they are
            metrics |= self._session.call(self._rates())
        line = self.metrics.write(self.step, metrics)
        if self.evaluation_due:
            line = line | self.evaluate()
        if self.done:
            self.save()  # the learner does by itself: this waits for it
        return line

    def evaluate(self) -> dict[str, float]:
        """pass@1 on the held-out sets, by the same engines and verifiers, with the weights of the last trained step."""
        self.start()
        assert self._session is not None
        config = self.config.evaluation
        whole = self.step == 0 or self.done or not config.every_limit
        results: dict[str, float] = {}
        folder = self.run_dir / "evaluations"
        folder.mkdir(exist_ok=True)
        for name, prompts in self.inputs.evaluation.items():
            table = self._guard(self._evaluate(name, prompts.all(None if whole else config.every_limit)))
            groups.save(table, folder / f"{name}-step-{self.step:06d}.arrow")
            results |= evaluation_metrics(name, list(groups.rows(table)), config.pass_k)
        if results:
            self.metrics.write(self.step, results)
        return results

    async def _evaluate(self, name: str, prompts: pa.Table) -> pa.Table:
        sampling, slots = evaluation_sampling(self.config, name)
        return await run_through(prompts, self.engines, self.verifiers, sampling, self.step, slots)

    def _guard(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine that would wait for ever if the ring broke meanwhile: raises the ring's cause then."""
        assert self._session is not None
        session = self._session

        async def watched() -> Any:
            work = asyncio.ensure_future(coroutine)
            while not work.done() and session.cause is None:
                await asyncio.wait([work], timeout=1.0)
            if not work.done():
                work.cancel()
                return None
            return work.result()

        try:
            result = session.call(watched())
        except (ray.exceptions.RayError, BaseExceptionGroup) as error:
            session.cause = session.cause or error
            result = None
        if result is None:
            assert session.cause is not None
            raise RunError(cause_of(_first(session.cause))) from session.cause
        return result

    def save(self) -> Path:
        """A checkpoint of the last trained step, written now if there is none; its folder."""
        self.start()
        step = self._ask(self._buffer.save.remote())
        return self.run_dir / "checkpoints" / f"step-{step}"

    async def _rates(self) -> dict[str, float]:
        tokens, now = await self.engines.num_tokens(), time.perf_counter()
        before, then = self._tokens_before
        self._tokens_before = (tokens, now)
        times = {f"weights/{name}": value for name, value in self.engines.times.items()}
        times |= {"verifiers/num": float(len(self.verifiers.actors)), "prompts/quarantined": float(len(self.quarantine))}
        return {"tokens/generated": float(tokens - before), "tokens/generated_per_s": (tokens - before) / (now - then), **times}

    def stop(self) -> None:
        """End everything that was started. The run directory can be taken up again."""
        self._open.close()
        self._session = None

    def __enter__(self) -> GVPO:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _first(error: BaseException) -> BaseException:
    """The first of a task group's errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def machine_resources(config: GVPOConfig) -> tuple[float, float]:
    """CPUs and GPUs that an embedded Ray would have."""
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    return float(config.ray.num_cpus or len(os.sched_getaffinity(0))), float(NvidiaGPUAcceleratorManager.get_current_node_num_accelerators())


async def run_through(
    prompts: pa.Table,
    engines: EngineGroup,
    verifiers: VerifierGroup,
    sampling: SamplingConfig,
    min_version: int,
    slots: int,
    seed: int | None = None,
    on_done: Callable[[pa.Table], None] = lambda group: None,
) -> pa.Table:
    """Sample and verify every row once, through `slots` slots of every engine; the rows come back in their order.

    seed: gives every group one of its own. on_done: called with each scored group as it comes.
    """
    rows = iter(range(len(prompts)))
    done: dict[int, pa.Table] = {}

    async def slot(engine: Any) -> None:
        for i in rows:
            own_seed = None if seed is None else prompt_seed(seed, prompts["dataset"][i].as_py(), prompts["group_id"][i].as_py())
            sampled, is_sampled = engine.sample.remote(prompts.slice(i, 1), sampling, min_version, own_seed)
            await is_sampled
            done[i] = await (await verifiers.score(sampled))
            on_done(done[i])

    async with asyncio.TaskGroup() as tasks:
        for engine in engines.actors:
            for _ in range(slots):
                tasks.create_task(slot(engine))
    return pa.concat_tables([done[i] for i in sorted(done)])


def evaluation_sampling(config: GVPOConfig, name: str) -> tuple[SamplingConfig, int]:
    """How a held-out set is sampled, and slots per engine: as many completions in flight as in training, however few a prompt has here."""
    num_samples, temperature, max_tokens = config.evaluation.of(name)
    values = {"num_completions": num_samples, "temperature": temperature, "max_tokens": max_tokens or config.sampling.max_tokens}
    slots = max(1, config.engines.max_groups * config.sampling.num_completions // num_samples)
    return config.sampling.model_copy(update=values), slots


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
    from gvpo_ray.console import evaluation_progress

    config = config.absolute()
    if not config.evaluation.sets:
        raise ConfigError("evaluation.sets: name at least one prompt file")
    if checkpoint is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": _checkpoint_folder(checkpoint)})})
    if cluster_address(config.ray) is None and not ray.is_initialized():
        check_resources(config, *machine_resources(config), learner=False)
    max_length, tokenizer = read_model(config)
    sets = read_evaluation_sets(config, max_length, tokenizer)
    validate_rewards(config.verifiers, reward)
    model = config.model.path
    folder = Path(out) if out is not None else Path(config.run_dir) / "eval" / _evaluation_name(Path(model), Path(config.run_dir))
    with EvaluationDir(folder, config, model, {name: prompts.digest() for name, prompts in sets.items()}) as kept:
        missing = {name: kept.missing(name, prompts.all()) for name, prompts in sets.items()}
        if any(map(len, missing.values())):
            session = Session(config.ray)
            try:
                engines = EngineGroup(config.model.model_copy(update={"max_length": max_length}), config.engines, config.seed, load_weights=True)
                session.on_stop(engines.close)
                verifiers = VerifierGroup(config.verifiers, reward)
                session.on_stop(verifiers.close)
                with evaluation_progress({name: (len(sets[name]), len(rows)) for name, rows in missing.items()}) as advance:
                    session.call(engines.start())
                    for name, prompts in missing.items():
                        sampling, slots = evaluation_sampling(config, name)

                        def on_done(group: pa.Table, name: str = name) -> None:
                            kept.add(name, group)
                            advance(name)

                        if len(prompts):
                            session.call(run_through(prompts, engines, verifiers, sampling, 0, slots, config.seed, on_done))
            except (BaseExceptionGroup, ray.exceptions.RayError) as error:
                raise RunError(cause_of(_first(error))) from error
            finally:
                session.stop()
        left_out = {name: prompts.num_too_long for name, prompts in sets.items()}
        return {"num_sampled": sum(map(len, missing.values())), **kept.finish(config, model, left_out)}


def _evaluation_name(model: Path, run_dir: Path) -> str:
    """step-80, or quickstart-step-80 of another run's checkpoint: one config may evaluate several runs."""
    is_others = model.parent.name == "checkpoints" and model.parent.parent != run_dir
    return f"{model.parent.parent.name}-{model.name}" if is_others else model.name


def _checkpoint_folder(path: str) -> str:
    if (Path(path) / "config.json").is_file():
        return str(Path(path).absolute())
    newest = latest_checkpoint(path)
    if newest is None:
        raise ConfigError(f"--checkpoint: no checkpoint in {path}")
    return str(newest[1].absolute())


def read_recorded(source: Path, groups_per_step: int, folder: Path) -> tuple[pa.Table, dict[int, tuple[int, int]], int]:
    """Recorded groups, their assignment to steps, and how many steps they make. `folder`: the log of the run that is to learn from them.

    The log of a finished run brings its own assignment; a file of groups is cut in its order.

    Raises:
        ConfigError: no groups there, too few, or the folder's log has others.
    """
    try:
        recorded = groups.validate(groups.load(source), groups.LOGGED_COLUMNS)
        here = len(groups.load(folder)) if any(folder.glob("*.arrow")) else 0
    except groups.GroupError as error:
        raise ConfigError(f"--groups: {error}") from error
    except OSError as error:
        raise ConfigError(f"--groups: {source} cannot be read: {error.strerror or error}") from error
    if here not in (0, len(recorded)):
        raise ConfigError(f"run_dir: {folder} holds {here} groups, {source} has {len(recorded)}: use another run_dir")
    assignments = source / "assignments.jsonl"  # only read: the run may still be going on
    assigned = read_assignments(assignments)[0] if assignments.is_file() else {}
    end = max((end for _, end in assigned.values()), default=0)
    steps = max(assigned, default=0) + (len(recorded) - end) // groups_per_step
    if steps == 0:
        raise ConfigError(f"--groups: {source} has {len(recorded)} groups, fewer than groups_per_step ({groups_per_step})")
    return recorded, assigned, steps


def import_groups(recorded: pa.Table, assigned: Mapping[int, tuple[int, int]], folder: Path) -> None:
    """Make recorded groups the log of a run that only learns; a log that has them already stays."""
    log = GroupLog(folder)
    if len(log) == 0:
        for i in range(len(recorded)):
            log.append(recorded.slice(i, 1).select(list(groups.LOGGED_COLUMNS)))
        for step, (begin, end) in assigned.items():
            log.assign(step, begin, end)


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
        model = config.model.model_copy(update={"max_length": inputs.max_length})
        engines = EngineGroup(model, config.engines, config.seed, load_weights=True)
        session.on_stop(engines.close)
        verifiers = VerifierGroup(config.verifiers, reward)
        session.on_stop(verifiers.close)
        session.call(engines.start())
        prompts = pa.concat_tables([inputs.prompts.group(i) for i in range(num_groups or config.groups_per_step)])
        table = session.call(run_through(prompts, engines, verifiers, config.sampling, 0, config.engines.max_groups))
        groups.save(table.select(list(groups.LOGGED_COLUMNS)), part)
        part.replace(out)
        return table
    except BaseExceptionGroup as error:
        raise RunError(cause_of(_first(error))) from error
    finally:
        session.stop()
        part.unlink(missing_ok=True)
