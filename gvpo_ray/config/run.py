"""A run is one file: GVPOConfig, the pydantic model behind a YAML file, and every check that concerns two
sections.

Unknown keys are refused with the nearest right one. Functions elsewhere take the part they need, never the
whole config.
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
    ConfigError,
    LocalPath,
    Section,
    with_paths,
)
from gvpo_ray.config.data import NO_PROMPTS, PromptsConfig, ReplayConfig, SourceConfig
from gvpo_ray.config.engines import EnginesConfig, PoolConfig, SamplingConfig
from gvpo_ray.config.evaluation import EvaluationConfig
from gvpo_ray.config.learner import CheckpointConfig, LearnerConfig
from gvpo_ray.config.loading import one_line, parse_override, read_yaml, set_key
from gvpo_ray.config.loss import GvpoLoss, LossConfig
from gvpo_ray.config.model import ModelConfig, WarmStartConfig
from gvpo_ray.config.tracking import TrackingConfig
from gvpo_ray.config.verifiers import VerifiersConfig


class RayConfig(Section):
    address: str | None = None
    """Address of a running cluster; default: RAY_ADDRESS (set under `ray job submit`), else an embedded
    Ray of the run's own."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of the embedded Ray; default: the machine's."""
    object_store_gib: float = Field(default=1.0, gt=0)
    """Size of the object store of the embedded Ray, in GiB."""
    dashboard: bool = False
    """Whether the embedded Ray has its dashboard."""


class GVPOConfig(Section):
    run_dir: Annotated[str, LocalPath("output")] = Field(json_schema_extra=RESUMABLE)
    """Folder of the run: config.yaml, metrics.jsonl, groups/, checkpoints/. Running `train` on it again
    resumes it."""
    root: str | None = Field(default=None, json_schema_extra=RESUMABLE)
    """Folder that relative paths begin at; default: the current one. On a cluster: of a file system that
    every node sees."""
    seed: int = Field(default=0, json_schema_extra=DECIDES_SCORES)
    """Seed of sampling, of the prompts' order and of every other random choice."""
    num_steps: int = Field(ge=1, json_schema_extra=RESUMABLE)
    """Training steps; one step trains one batch of groups."""
    groups_per_step: int = Field(default=64, ge=1)
    """n: groups in the batch of one step."""
    max_staleness: int | None = Field(default=0, ge=0, json_schema_extra=RESUMABLE)
    """Maximum staleness (off-policy bound), in steps: a group may start while started // groups_per_step <=
    version + max_staleness. 0: synchronous, 1: one step ahead, n: asynchronous, null: unbounded."""
    model: ModelConfig
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    replay: ReplayConfig = Field(default=ReplayConfig(), json_schema_extra=RESUMABLE)
    sources: dict[str, SourceConfig] = {}
    """Offline sources by name; what one does not say about its prompts' template is as in prompts."""
    loss: LossConfig = Field(default=GvpoLoss(), json_schema_extra=RESUMABLE)
    engines: EnginesConfig = Field(default=EnginesConfig(), json_schema_extra=RESUMABLE)
    verifiers: VerifiersConfig = Field(default=VerifiersConfig(), json_schema_extra=RESUMABLE)
    learner: LearnerConfig = Field(default=LearnerConfig(), json_schema_extra=RESUMABLE)
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), json_schema_extra=RESUMABLE)
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), json_schema_extra=RESUMABLE)
    ray: RayConfig = Field(default=RayConfig(), json_schema_extra=RESUMABLE)
    tracking: TrackingConfig = Field(default=TrackingConfig(), json_schema_extra=RESUMABLE)
    watchdog_s: float = Field(default=300.0, gt=0, json_schema_extra=RESUMABLE)
    """When no group finishes or no step ends for so many seconds, say who waits for whom; and again after as
    many."""
    warm_start: WarmStartConfig | None = Field(default=None, json_schema_extra=RESUMABLE)

    @model_validator(mode="before")
    @classmethod
    def _offline_only(cls, value: Any) -> Any:
        """Without engines there is nobody to ask: no prompts are needed."""
        if (
            isinstance(value, dict)
            and "prompts" not in value
            and isinstance(value.get("engines"), dict)
            and value["engines"].get("num") == 0
        ):
            return value | {"prompts": {"path": NO_PROMPTS}}
        return value

    @model_validator(mode="after")
    def _across(self) -> GVPOConfig:
        """Every check that concerns two keys."""
        model, engines, learner, n = self.model, self.engines, self.learner, self.groups_per_step
        if learner.num_mini_batches > n:
            raise ValueError(
                f"learner.num_mini_batches ({learner.num_mini_batches}) must not exceed groups_per_step ({n})"
            )
        sets = (
            (f"evaluation.sets.{name}.max_completion_tokens", self.evaluation.of(name)[2])
            for name in self.evaluation.sets
        )
        lengths = (
            ("sampling.max_tokens", self.sampling.max_tokens),
            ("evaluation.max_tokens", self.evaluation.max_tokens),
            *sets,
        )
        for key, max_tokens in lengths:
            if model.max_length is not None and max_tokens is not None and max_tokens >= model.max_length:
                raise ValueError(
                    f"{key} ({max_tokens}) leaves no room for a prompt in model.max_length "
                    f"({model.max_length})"
                )
        pools = engines.all_pools()
        if engines.weight_transfer == "nccl":
            if not (all(pool.num_gpus for pool in pools.values()) and learner.num_gpus):
                raise ValueError(
                    "engines.weight_transfer: nccl needs GPUs in engines.num_gpus and learner.num_gpus; "
                    "use objects"
                )
            if len(pools) > 1 or any(pool.max_num not in (None, pool.num) for pool in pools.values()):
                raise ValueError("engines.weight_transfer: nccl needs a fixed fleet of one pool; use objects")
        self._across_sources(pools)
        if learner.max_workers is not None and learner.max_workers < learner.num_workers:
            raise ValueError(
                f"learner.max_workers ({learner.max_workers}) is less than learner.num_workers "
                f"({learner.num_workers})"
            )
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
        if model.lora is not None and engines.weight_transfer == "nccl":
            raise ValueError(
                "model.lora sends adapters, which engines.weight_transfer: nccl cannot; use objects"
            )
        if self.evaluation.every and not self.evaluation.sets:
            raise ValueError("evaluation.every is set but evaluation.sets is empty")
        return self

    def _across_sources(self, pools: dict[str, PoolConfig]) -> None:
        if both := sorted(set(self.sources) & set(pools)):
            raise ValueError(f"sources.{both[0]}: a pool has that name too")
        shares = math.fsum(source.group_share for source in self.sources.values())  # 0.6 + 0.3 + 0.1 is 1
        if shares > 1:
            raise ValueError(f"sources: the group_share of all of them is {shares:g}, more than 1")
        has_engines = any(pool.num or pool.max_num for pool in pools.values())
        if not has_engines and shares < 1:
            raise ValueError(
                f"engines.num is 0, and the group_share of sources is {shares:g}: without engines it must "
                "be 1"
            )
        if not has_engines and self.evaluation.every:
            raise ValueError("evaluation.every needs engines, and engines.num is 0")
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
        """Read a YAML file and apply overrides: `["learner.num_workers=1", …]` or `{"learner.num_workers":
        1}`.

        for_evaluation: a file with evaluation.sets but neither `prompts` nor `num_steps`, which only training
        needs, will do.

        Raises:
            ConfigError: one line that names the key.
        """
        data = read_yaml(path)
        own = data.get("evaluation")
        has_sets = (isinstance(own, dict) and bool(own.get("sets"))) or any(
            key.startswith("evaluation.sets") for key in overrides or ()
        )
        # with one of them it is a run that lacks the other
        if for_evaluation and has_sets and "prompts" not in data and "num_steps" not in data:
            data |= {"num_steps": 1, "prompts": {"path": NO_PROMPTS}}
        return cls.from_dict(data, overrides, where=str(path))

    @classmethod
    def from_dict(
        cls, data: dict[str, Any], overrides: list[str] | dict[str, Any] | None = None, where: str = "config"
    ) -> GVPOConfig:
        """As from_file, from a dictionary. It and the overrides stay as they are."""
        data, overrides = copy.deepcopy((data, overrides))
        items = (
            overrides.items()
            if isinstance(overrides, dict)
            else [parse_override(text) for text in overrides or []]
        )
        for key, value in items:
            set_key(data, key, value)
        try:
            config = cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{where}: {one_line(error, cls)}") from error
        return config.absolute() if config.root else config

    def absolute(self) -> GVPOConfig:
        """With local paths made absolute: actors do not run in this folder, and a run may be taken up from
        another one.
        """
        root = Path(self.root or "").expanduser()
        return with_paths(self, lambda text, rule: rule.absolute(text, root))

    def dump(self) -> str:
        """The resolved config as YAML, in the order of the fields."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return text

    def build(self, **rewards: Any) -> Any:
        """Start (or resume) the run: returns a `GVPO`. See `gvpo_ray.run.algorithm.GVPO`."""
        # the only place where config looks up the layers: a convenience for users
        from gvpo_ray.run.algorithm import GVPO

        return GVPO(self, **rewards)


def verifiers_config(overrides: list[str]) -> VerifiersConfig:
    """The verifiers section alone, its defaults with overrides such as "timeout_s=3".

    Raises:
        ConfigError: one line that names the key.
    """
    data: dict[str, Any] = {}
    for key, value in map(parse_override, overrides):
        set_key(data, key, value)
    needed = {"run_dir": "", "num_steps": 1, "model": {"path": ""}, "prompts": {"path": ""}}
    return GVPOConfig.from_dict({**needed, "verifiers": data}, where="overrides").absolute().verifiers
