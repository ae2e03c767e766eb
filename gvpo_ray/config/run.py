"""GVPOConfig is the pydantic model of a run's YAML file, with every check that concerns two sections.

Functions elsewhere take the section that they need, never the whole config.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from gvpo_ray.config.base import (
    DECIDES_SCORES,
    RESUMABLE,
    TASKSET,
    ConfigError,
    LocalPath,
    Section,
    with_paths,
)
from gvpo_ray.config.data import NO_PROMPTS, PromptsConfig, ReplayConfig, SourceConfig
from gvpo_ray.config.engines import EnginesConfig, PoolConfig, SamplingConfig
from gvpo_ray.config.environment import ENVIRONMENT, EnvironmentConfig
from gvpo_ray.config.evaluation import EvaluationConfig
from gvpo_ray.config.learner import CheckpointConfig, LearnerConfig, check_split
from gvpo_ray.config.loading import one_line, parse_override, read_yaml, set_key
from gvpo_ray.config.loss import GvpoLoss, LossConfig
from gvpo_ray.config.model import ModelConfig, WarmStartConfig
from gvpo_ray.config.shown import hide, know, mask
from gvpo_ray.config.tracking import TrackingConfig
from gvpo_ray.config.verifiers import RewardConfig, VerifiersConfig


class RayConfig(Section):
    """This section names the Ray cluster that a run joins, or sizes the embedded Ray that it starts."""

    address: str | None = None
    """Address of a running cluster; default: RAY_ADDRESS (which `ray job submit` sets), else the run starts
    an embedded Ray."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of the embedded Ray; default: the machine's."""
    object_store_gib: float = Field(default=1.0, gt=0)
    """Size of the object store of the embedded Ray, in GiB."""
    dashboard: bool = False
    """Start the dashboard of the embedded Ray."""


class GVPOConfig(Section):
    """A GVPOConfig is the config of a run. Unknown keys are refused, with the nearest known one."""

    run_dir: Annotated[str, LocalPath("output")] = Field(json_schema_extra=RESUMABLE)
    """Folder of the run: config.yaml, metrics.jsonl, groups/, checkpoints/. Running `train` on it again
    resumes it."""
    root: str | None = Field(default=None, json_schema_extra=RESUMABLE)
    """Folder that relative paths start from; default: the current one. On a cluster it must be on a file
    system that every node sees."""
    seed: int = Field(default=0, ge=0, lt=2**32, json_schema_extra=DECIDES_SCORES)
    """Seed of sampling, of the order of the prompts and of every other random choice (vLLM takes 32 bits)."""
    num_steps: int = Field(ge=1, json_schema_extra=RESUMABLE)
    """Number of training steps; each trains one batch of groups."""
    groups_per_step: int = Field(default=64, ge=1)
    """Number of groups in the batch of one step."""
    max_staleness: int | None = Field(default=0, ge=0, json_schema_extra=RESUMABLE)
    """Maximum staleness (off-policy bound), in steps: a group may start while started // groups_per_step <=
    version + max_staleness. 0: synchronous, 1: one step ahead, n: asynchronous, null: unbounded."""
    model: ModelConfig
    """The model that is trained."""
    prompts: PromptsConfig
    """The prompts that the policy is trained on."""
    sampling: SamplingConfig = SamplingConfig()
    """How engines sample completions."""
    replay: ReplayConfig = Field(default=ReplayConfig(), json_schema_extra=RESUMABLE)
    """Replay of earlier completions."""
    sources: dict[str, SourceConfig] = {}
    """Offline sources by name. A source without template and system_prompt has those of prompts."""
    loss: LossConfig = Field(default=GvpoLoss(), json_schema_extra=RESUMABLE)
    """The objective and its options."""
    engines: EnginesConfig = Field(default=EnginesConfig(), json_schema_extra=RESUMABLE)
    """The engines that sample."""
    verifiers: VerifiersConfig = Field(default=VerifiersConfig(), json_schema_extra=RESUMABLE)
    """The reward functions and the actors that compute them."""
    environment: EnvironmentConfig | None = None
    """What the policy talks to; none: a completion is one turn."""
    learner: LearnerConfig = Field(default=LearnerConfig(), json_schema_extra=RESUMABLE)
    """The learner and its optimizer."""
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), json_schema_extra=RESUMABLE)
    """Evaluations on held-out data sets."""
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), json_schema_extra=RESUMABLE)
    """When checkpoints are written, and how many are kept."""
    ray: RayConfig = Field(default=RayConfig(), json_schema_extra=RESUMABLE)
    """The Ray cluster to join or to start."""
    tracking: TrackingConfig = Field(default=TrackingConfig(), json_schema_extra=RESUMABLE)
    """Trackers that get the metrics."""
    watchdog_s: float = Field(default=300.0, gt=0, json_schema_extra=RESUMABLE)
    """Seconds without a finished group, or without a finished step, after which the run prints who waits for
    whom; it repeats this as often as they pass again."""
    warm_start: WarmStartConfig | None = Field(default=None, json_schema_extra=RESUMABLE)
    """How a small model is made from scratch first; only `gvpo-ray train` and `gvpo-ray warm-start` do so."""

    @model_validator(mode="before")
    @classmethod
    def _offline_only(cls, value: Any) -> Any:
        """Fill in `prompts` where engines.num is 0: without engines no prompts are sampled."""
        if (
            isinstance(value, dict)
            and "prompts" not in value
            and isinstance(value.get("engines"), dict)
            and value["engines"].get("num") == 0
        ):
            return value | {"prompts": {"path": NO_PROMPTS}}
        return value

    @model_validator(mode="before")
    @classmethod
    def _of_taskset(cls, value: Any) -> Any:
        """Fill in `prompts` where the environment is a task set of verifiers, which has its own."""
        if isinstance(value, dict) and "prompts" not in value and isinstance(value.get("environment"), dict):
            name = value["environment"].get("name")
            if isinstance(name, str) and name.startswith(TASKSET):
                return value | {"prompts": {"path": name}}
        return value

    @model_validator(mode="after")
    def _across(self) -> GVPOConfig:
        """Fill in and check everything that concerns two sections."""
        self.sources = {
            name: one.rendered_like(self.prompts, f"sources.{name}") for name, one in self.sources.items()
        }
        if self.evaluation.sets:
            held_out = {
                name: one.rendered_like(self.prompts, f"evaluation.sets.{name}")
                for name, one in self.evaluation.sets.items()
            }
            self.evaluation = self.evaluation.model_copy(update={"sets": held_out})
        self._across_tasksets()
        self._across_environment()
        if self.loss.reference_model is not None:
            if self.environment is not None:
                raise ValueError("loss.reference: another model does not score episodes of an environment")
            if self.sampling.stop:
                raise ValueError(
                    "loss.reference: another model does not score an end by one of the texts of sampling.stop"
                )
        model, engines, learner, n = self.model, self.engines, self.learner, self.groups_per_step
        if learner.num_mini_batches > n:
            raise ValueError(
                f"learner.num_mini_batches ({learner.num_mini_batches}) must not exceed groups_per_step ({n})"
            )
        of_sets = (
            (f"evaluation.sets.{name}.max_completion_tokens", self.evaluation.of(name)[2])
            for name in self.evaluation.sets
        )
        lengths = (
            ("sampling.max_tokens", self.sampling.max_tokens),
            ("evaluation.max_tokens", self.evaluation.max_tokens),
            *of_sets,
        )
        for key, max_tokens in lengths:
            if model.max_length is not None and max_tokens is not None and max_tokens >= model.max_length:
                raise ValueError(
                    f"{key} ({max_tokens}) leaves no room for a prompt in model.max_length "
                    f"({model.max_length})"
                )
        pools = engines.all_pools()
        if engines.weight_transfer == "objects" and any(pool.is_spread for pool in pools.values()):
            raise ValueError(
                "engines.weight_transfer: objects brings weights to one node of an engine, and with "
                "vllm.distributed_executor_backend: ray it may be on several: use nccl or sharded_rdt"
            )
        if (direct := engines.weight_transfer) != "objects":
            key = f"engines.weight_transfer: {direct}"
            if not (all(pool.num_gpus for pool in pools.values()) and learner.num_gpus):
                raise ValueError(f"{key} needs GPUs in engines.num_gpus and learner.num_gpus; use objects")
            if len(pools) > 1 or any(pool.max_num not in (None, pool.num) for pool in pools.values()):
                raise ValueError(f"{key} needs a fixed fleet of one pool; use objects")
            if direct == "ipc" and engines.colocated != "share":
                raise ValueError(f"{key} needs engines on the learner's GPUs: engines.colocated: share")
            # vLLM's buffer is given back once: by a second engine of its GPU it would never be free again
            if direct == "ipc" and any(pool.num > 1 and pool.num_gpus <= 0.5 for pool in pools.values()):
                raise ValueError(
                    f"{key} needs one engine per GPU: engines.num_gpus above 0.5, or engines.num: 1"
                )
            if direct != "ipc" and engines.colocated:
                raise ValueError(
                    f"engines.colocated cannot go with weight_transfer: {direct}, whose ranks need a GPU "
                    "each: use objects, or with share ipc"
                )
            if model.lora is not None:
                raise ValueError(f"model.lora sends adapters, which {key} cannot; use objects")
            # vLLM's engine of it raises with any other executor
            if direct == "sharded_rdt" and not all(pool.is_spread for pool in pools.values()):
                raise ValueError(f"{key} needs vllm.distributed_executor_backend: ray; use nccl")
        if engines.colocated == "share":
            for name, pool in pools.items():
                where = f"engines.pools.{name}" if engines.pools else "engines"
                if pool.num_gpus and pool.kv_cache_gib is None:
                    raise ValueError(
                        f"engines.colocated: share needs {where}.kv_cache_gib: vLLM would measure the GPU's "
                        "memory while the learner takes and frees some"
                    )
                if engines.memory_of_learner <= 0:
                    raise ValueError(
                        f"{where}.memory_fraction ({pool.memory_fraction:g}) leaves the learner no memory"
                    )
        self._across_sources(pools)
        if learner.max_workers is not None and learner.max_workers < learner.num_workers:
            raise ValueError(
                f"learner.max_workers ({learner.max_workers}) is less than learner.num_workers "
                f"({learner.num_workers})"
            )
        check_split(learner, self.model.lora is not None)
        if learner.zero_stage and learner.backend != "deepspeed":
            raise ValueError(
                f"learner.zero_stage ({learner.zero_stage}) needs learner.backend: deepspeed, not "
                f"{learner.backend}"
            )
        least = {"none": 0, "optimizer": 1, "parameters": 3}[learner.offload]
        if learner.zero_stage < least:
            raise ValueError(
                f"learner.offload: {learner.offload} needs learner.zero_stage of at least {least}, not "
                f"{learner.zero_stage}"
            )
        if self.evaluation.every and not self.evaluation.sets:
            raise ValueError("evaluation.every is set but evaluation.sets is empty")
        return self

    def _across_tasksets(self) -> None:
        """Give the data of a task set its settings, and refuse data that do not go with the environment."""
        name = None if self.environment is None or self.environment.taskset is None else self.environment.name
        settings = {} if self.environment is None else self.environment.arguments.get("taskset", {})
        if name is not None and not isinstance(settings, dict):
            raise ValueError("environment.arguments: taskset has the settings of the task set, by name")
        sets = {f"evaluation.sets.{key}": one for key, one in self.evaluation.sets.items()}
        for key, data in ({"prompts": self.prompts} | sets).items():
            if data.path == NO_PROMPTS:
                continue
            given = [data.path] if isinstance(data.path, str) else data.path
            if name is None and any(path.startswith(TASKSET) for path in given):
                raise ValueError(f"{key}.path: {data.path} goes with environment.name: {data.path} alone")
            if name is None and data.taskset:
                raise ValueError(f"{key}.taskset: only a task set of verifiers has such settings")
            if name is not None and data.path != name:
                raise ValueError(f"{key}.path: with environment.name: {name} it can only be that, too")
        if name is not None:
            filled = {key: one.of_taskset(settings) for key, one in self.evaluation.sets.items()}
            self.evaluation = self.evaluation.model_copy(update={"sets": filled})
            self.prompts = self.prompts.of_taskset(settings)

    def _across_environment(self) -> None:
        """Fill in the reward that an environment gives, and refuse what does not go with one."""
        named = self.verifiers.rewards if "rewards" in self.verifiers.model_fields_set else {}
        if self.environment is None:
            if ENVIRONMENT in named and not named[ENVIRONMENT].is_elsewhere:
                raise ValueError("verifiers.rewards: environment needs a section environment")
            return
        if ENVIRONMENT not in named:
            rewards = {ENVIRONMENT: RewardConfig(), **named}
            self.verifiers = self.verifiers.model_copy(update={"rewards": rewards})
        if self.verifiers.rewards[ENVIRONMENT].weight < 0:
            # an episode that brings its environment down is worth no more than its group, which were the best
            raise ValueError("verifiers.rewards.environment: below 0: let get_reward give the negative")
        if self.sources:
            raise ValueError(f"sources.{next(iter(self.sources))}: offline completions are no episodes")
        if self.environment.asks_by_http:
            if not self.engines.serve:
                key = "agent" if self.environment.agent is not None else "name"
                raise ValueError(f"environment.{key}: it asks its model over HTTP: set engines.serve: true")
            if self.replay.share:
                raise ValueError("replay.share: the groups of an agent have prompts of their own")
        if served := [name for name, pool in self.engines.all_pools().items() if pool.url is not None]:
            where = "engines.url" if served == ["engines"] else f"engines.pools.{served[0]}.url"
            raise ValueError(f"{where}: a server makes no episodes")
        first = self.rendered
        for name, one in self.evaluation.sets.items():
            if (one.template, one.system_prompt) != (first.template, first.system_prompt):
                raise ValueError(
                    f"evaluation.sets.{name}.template: with an environment, one holds for all data"
                )

    @property
    def rendered(self) -> PromptsConfig:
        """The section that says how prompts are rendered: `prompts`, or without it an evaluation set's."""
        has_prompts = self.prompts.path != NO_PROMPTS or not self.evaluation.sets
        return self.prompts if has_prompts else next(iter(self.evaluation.sets.values()))

    def _across_sources(self, pools: dict[str, PoolConfig]) -> None:
        if both := sorted(set(self.sources) & set(pools)):
            raise ValueError(f"sources.{both[0]}: a pool has that name too")
        shares = math.fsum(source.group_share for source in self.sources.values())  # 0.6 + 0.3 + 0.1 is 1
        if shares > 1:
            raise ValueError(f"sources: the group_share of all of them is {shares:g}, more than 1")
        has_engines, has_own = self.engines.has_engines, self.engines.has_own_engines
        if not has_engines and shares < 1:
            raise ValueError(
                f"engines.num is 0, and the group_share of sources is {shares:g}: without engines it must "
                "be 1"
            )
        if not has_own and self.evaluation.every:
            only = "all engines are servers (url)" if has_engines else "engines.num is 0"
            raise ValueError(f"evaluation.every needs engines of the policy, and {only}")
        shares_of_groups = {
            "replay.share": self.replay.share,
            **{f"sources.{name}.share": source.share for name, source in self.sources.items()},
        }
        for key, share in shares_of_groups.items():
            if share and round(share * self.sampling.num_completions) < 1:
                raise ValueError(
                    f"{key} ({share:g}) is less than one of sampling.num_completions "
                    f"({self.sampling.num_completions})"
                )
        mixed = self.replay.share + sum(source.share for source in self.sources.values())
        if mixed >= 1:
            raise ValueError(
                f"replay.share and the share of sources are {mixed:g} in all: no completion of a group "
                "would be new"
            )

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        overrides: list[str] | dict[str, Any] | None = None,
        for_evaluation: bool = False,
    ) -> GVPOConfig:
        """Read a YAML file and apply overrides.

        Args:
            path: of the file.
            overrides: `["learner.num_workers=1", …]` or `{"learner.num_workers": 1}`.
            for_evaluation: accept a file that has evaluation.sets but lacks both `prompts` and `num_steps`,
                which only training needs, and that of a run without engines (`engines.num: 0`) with other
                engines.

        Raises:
            ConfigError: one line that names the wrong key.
        """
        data = read_yaml(path)
        own = data.get("evaluation")
        has_sets = (isinstance(own, dict) and bool(own.get("sets"))) or any(
            key.startswith("evaluation.sets") for key in overrides or ()
        )
        # a config with one of the two is a run that lacks the other
        if for_evaluation and has_sets and "prompts" not in data and "num_steps" not in data:
            data |= {"num_steps": 1, "prompts": {"path": NO_PROMPTS}}
        is_offline = isinstance(engines := data.get("engines"), dict) and engines.get("num") == 0
        if for_evaluation and has_sets and is_offline:
            data.setdefault("prompts", {"path": NO_PROMPTS})
        return cls.from_dict(data, overrides, where=str(path))

    @classmethod
    def from_dict(
        cls, data: dict[str, Any], overrides: list[str] | dict[str, Any] | None = None, where: str = "config"
    ) -> GVPOConfig:
        """Make a config from a dictionary and overrides, which stay unchanged.

        Args:
            data: keys and values, as in a YAML file.
            overrides: as in `from_file`.
            where: name of the data in error messages.

        Raises:
            ConfigError: one line that names the wrong key.
        """
        data, overrides = copy.deepcopy((data, overrides))
        items = (
            overrides.items()
            if isinstance(overrides, dict)
            else [parse_override(text, cls) for text in overrides or []]
        )
        for key, value in items:
            set_key(data, key, value)
        know(data)
        try:
            config = cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(mask(f"{where}: {one_line(error, cls)}")) from error
        return config.absolute() if config.root else config

    def absolute(self) -> GVPOConfig:
        """Return a copy in which local paths are absolute, relative ones from `root`.

        Actors do not run in this folder, and a run may be resumed from another one.
        """
        root = Path(self.root or "").expanduser()
        return with_paths(self, lambda text, rule: rule.absolute(text, root))

    def dump(self, with_secrets: bool = True) -> str:
        """Return the resolved config as YAML, in the order of the fields; secrets only for the run itself."""
        data = self.model_dump(mode="json")
        data = data if with_secrets else hide(data)
        text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        return text

    def build(self, **rewards: Any) -> Any:
        """Start (or resume) the run, and return it as a `gvpo_ray.run.algorithm.GVPO`.

        Args:
            rewards: keyword arguments of `GVPO`, such as `reward`, a function or several by name.
        """
        # the only place where config imports a room above it: a convenience for users
        from gvpo_ray.run.algorithm import GVPO

        return GVPO(self, **rewards)


def verifiers_config(overrides: list[str]) -> VerifiersConfig:
    """Return the section `verifiers` alone: its defaults with overrides such as "timeout_s=3".

    Raises:
        ConfigError: one line that names the wrong key.
    """
    data: dict[str, Any] = {}
    for text in overrides:
        key, value = parse_override(text, VerifiersConfig)
        set_key(data, key, value)
    needed = {"run_dir": "", "num_steps": 1, "model": {"path": ""}, "prompts": {"path": ""}}
    return GVPOConfig.from_dict({**needed, "verifiers": data}, where="overrides").absolute().verifiers
