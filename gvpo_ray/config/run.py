"""A run is one file: the pydantic models behind a YAML file, `key=value` overrides, and every cross-field check.

Unknown keys are refused with the nearest right one. Functions elsewhere take the part they need, never the whole config.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class ConfigError(ValueError):
    """A bad key, path, model or data file: one clear line that names it. The command line exits with status 2."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)


Resources = dict[str, Annotated[float, Field(gt=0)]]
"""Of one actor, beside its CPUs and GPUs: names that the cluster's nodes were started with."""


class LoraConfig(Section):
    """Train a low-rank adapter (peft) and leave the model as it is: the reference is the model without it, and engines receive it alone."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's product is scaled by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Names of the linear layers that get one; `all-linear`: all but the head."""


class ModelConfig(Section):
    path: str
    """A Hugging Face model folder or hub name; its tokenizer is beside it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the engines compute in, and the learner's forward pass. Master weights and the optimizer stay in float32."""
    max_length: int | None = Field(default=None, ge=8)
    """Longest prompt + completion in tokens; default: what the model's config.json says."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model folder."""
    lora: LoraConfig | None = None
    """Train an adapter in place of all weights. `{}`: with the defaults."""


class PromptsConfig(Section):
    path: str
    """A Parquet or JSONL file, or the name of a Hugging Face data set."""
    split: str = "train"
    """Split of a Hugging Face data set; files have none."""
    subset: str | None = None
    """Configuration name of a Hugging Face data set ("main" for openai/gsm8k)."""
    prompt_column: str = "prompt"
    """Column of the problem's text."""
    answer_column: str = "answer"
    """Column of the gold answer, as text."""
    template: str | None = None
    """Plain template such as "Question: {prompt}\\nAnswer:"; default: the tokenizer's chat template."""
    system_prompt: str | None = None
    """System message for the chat template."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longer prompts are left out, counted and reported (never cut). Default: what the context leaves beside a completion."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first so many rows."""
    shuffle: bool = True
    """A new order, fixed by the seed, in each epoch. Evaluation always keeps the file's order."""

    @field_validator("template")
    @classmethod
    def _template_has_prompt(cls, value: str | None) -> str | None:
        if value is not None and "{prompt}" not in value:
            raise ValueError("must contain {prompt}")
        return value


class SamplingConfig(Section):
    """How engines sample. GVPO's theory needs the sampler to cover the reference's support: values that cut it are refused."""

    num_completions: int = Field(default=8, ge=2)
    """k: completions per prompt, one group. One alone carries no signal."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest completion, in tokens; one that reaches it has finish_reason "length"."""
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    """0 or -1: no cut."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    allow_truncated_support: bool = False
    """Opt out of the refusal of top_p < 1, top_k and min_p: warns instead. The optimum is then no longer GVPO's."""

    @model_validator(mode="after")
    def _full_support(self) -> SamplingConfig:
        cuts = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_p": self.min_p > 0}
        if any(cuts.values()):
            named = ", ".join(f"{key}={getattr(self, key)}" for key, cut in cuts.items() if cut)
            why = f"{named} cuts the sampler's support, and GVPO's optimum holds only for samplers that cover the reference (Corollary 3.2)"
            if not self.allow_truncated_support:
                raise ValueError(f"{why}; use temperature alone, or set allow_truncated_support: true to accept the bias")
            warnings.warn(f"sampling: {why}", stacklevel=2)
        return self


START_BETA = 0.1
"""Of loss.beta: auto."""


class LossConfig(Section):
    objective: Literal["gvpo", "grpo", "dr_grpo", "rloo", "reinforce"] = "gvpo"
    """`gvpo`; the others are for comparison, on the same data and in the same ring."""
    beta: float | Literal["auto"] = "auto"
    """Reward units per nat of log-ratio: the optimum is pi_ref exp(R / beta) / Z, so 1/beta nats are worth one unit of reward. It is the
    trust region: gvpo/binding says how often it binds, and a run in which it hardly ever does says so. auto: 0.1, the paper's, and with the
    `behaviour` reference moved from there after each step until beta D varies half as much as the rewards do."""
    beta_end: float | None = Field(default=None, gt=0)
    """Move beta linearly from its first value to this one at the last step. Bias: each step then has an optimum of its own, the last one
    that of beta_end."""
    residual_clip: float | None = Field(default=None, gt=0)
    """Clip the residual beta (D - mean D) - (R - mean R) at so many reward units: Huber's loss in place of the square. Bias: where it
    clips, the optimum stays but the pull towards it is weaker; with noisy rewards it is no longer that of their mean."""
    importance_cap: float | None = Field(default=1.0, gt=0)
    """A completion counts min(importance_cap, pi / pi_sampled), relative to its group: what the policy would not write any more counts less. No
    bias: GVPO's optimum is the same for every sampler, and this is to choose one. And where what is right has become less likely since it was
    sampled, less is pushed down (gvpo/kept): no bias where residuals can vanish; where rewards are noisy, completions gain whose rewards vary
    most. null: all alike, as in the paper; the same thing where an update trains what was sampled just before. Old data is then followed where
    the policy no longer goes (README: data of any age)."""
    damped: bool = True
    """With the `behaviour` reference, multiply the learning rate of an update by the squared correlation of its residuals with its rewards
    (gvpo/damping): what is left of a residual beside the reward is where the policy has gone since the completion was sampled, and a step of full
    length after it overshoots. 1 for what was sampled at the start of the step. false: the schedule's learning rate as it is."""
    drop_equal_rewards: bool = False
    """Leave out groups whose rewards are all equal. Bias: they are what pulls the policy back to the reference once D differs from 0;
    without them the optimum holds only on prompts that are sometimes right and sometimes wrong."""
    length_normalised: bool = False
    """Divide each completion's log-ratio by its length in tokens. Bias: the optimum is then pi_ref exp(|y| (R / beta - c(x))): a token, not a
    completion, is worth 1/beta nats, and long right answers gain most."""
    clip_low: float = Field(default=0.2, gt=0)
    """grpo, dr_grpo: the probability ratio is clipped at 1 - clip_low …"""
    clip_high: float = Field(default=0.2, gt=0)
    """… and at 1 + clip_high."""
    old_policy: Literal["behaviour", "previous"] = "behaviour"
    """grpo, dr_grpo: what the ratio is taken to: the policy that sampled the token, or the one at the start of the step, as if that had
    sampled it. Bias: older data then counts as if it were new."""
    kl_coefficient: float = Field(default=0.0, ge=0)
    """All but gvpo: weight of the KL divergence from the reference, which `reference` names."""
    baseline: float = 0.0
    """reinforce: subtracted from every reward."""
    reference: str = "behaviour"
    """Which policy is pi_ref: `behaviour` (the one that sampled the completion; of one from elsewhere the one that the run began with),
    `previous` (the policy at the start of the step), `initial` (frozen), or `every: N` (refreshed every N steps)."""

    @field_validator("beta", mode="plain")
    @classmethod
    def _beta(cls, value: Any) -> float | str:
        if value == "auto":
            return "auto"
        try:
            number = float(math.nan if isinstance(value, bool) else value)  # YAML takes 1e-2 for text
        except (TypeError, ValueError):
            raise ValueError("should be auto or a valid number") from None
        if not math.isfinite(number):
            raise ValueError("should be auto or a finite number")
        if number <= 0:
            raise ValueError("should be auto or greater than 0")
        return number

    @field_validator("reference", mode="before")
    @classmethod
    def _reference(cls, value: Any) -> str:
        if isinstance(value, dict) and set(value) == {"every"}:
            value = f"every: {value['every']}"
        name, _, number = str(value).partition(":")
        if name == "every" and number.strip().isdigit() and int(number) > 0:
            return f"every: {int(number)}"
        if value in ("behaviour", "previous", "initial"):
            return str(value)
        raise ValueError("must be behaviour, previous, initial or every: N")

    @model_validator(mode="after")
    def _of_the_objective(self) -> LossConfig:
        if self.beta == "auto" and self.beta_end is not None:
            raise ValueError("beta_end needs a number for beta to start from")
        options = {
            "gvpo": {"beta", "beta_end", "residual_clip", "importance_cap", "damped", "drop_equal_rewards", "length_normalised", "reference"},
            "grpo": {"clip_low", "clip_high", "old_policy", "kl_coefficient", "reference"},
            "dr_grpo": {"clip_low", "clip_high", "old_policy", "kl_coefficient", "reference"},
            "rloo": {"kl_coefficient", "reference"},
            "reinforce": {"kl_coefficient", "baseline", "reference"},
        }
        for name in sorted(self.model_fields_set - {"objective"} - options[self.objective]):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is not an option of {self.objective}; it has {', '.join(sorted(options[self.objective]))}")
        return self

    def beta_at(self, version: int, num_steps: int) -> float:
        """beta of the step that starts from weights of `version`; of the first one, where it is steered."""
        beta = START_BETA if self.beta == "auto" else self.beta
        end = beta if self.beta_end is None else self.beta_end
        return beta + (end - beta) * min(1.0, version / max(1, num_steps - 1))

    @property
    def steers_beta(self) -> bool:
        """An older reference is what beta is about, and not only where the policy was."""
        return self.objective == "gvpo" and self.beta == "auto" and self.reference == "behaviour"

    @property
    def is_damped(self) -> bool:
        """An older reference is where to go back to, and not only where the policy was."""
        return self.objective == "gvpo" and self.damped and self.reference == "behaviour"

    @property
    def has_reference_model(self) -> bool:
        """Whether the reference has weights of its own."""
        return self.reference not in ("behaviour", "previous")

    @property
    def asks_reference_model_for_sums(self) -> bool:
        """Whether one number per completion is all that is asked of it; a KL term asks for every token."""
        return self.has_reference_model and self.kl_coefficient == 0

    @property
    def reference_every(self) -> int | None:
        """N of `every: N`."""
        return int(self.reference.partition(":")[2]) if self.reference.startswith("every") else None


class PoolConfig(Section):
    """One pool of engines alike. Pools may differ in everything here: GVPO's optimum does not depend on who samples."""

    num: int = Field(default=1, ge=0)
    """Engine actors that are started at once, and replaced when they die. 0 in all pools: train on offline sources alone."""
    max_num: int | None = Field(default=None, ge=1)
    """Elastic: while the learner waits for groups one more is asked for, up to so many, and the run goes on meanwhile; while the buffer stays
    full one is let go, down to num. Default: num."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of one engine (= tensor_parallel_size on GPU); 0: vLLM's CPU build."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs that one engine asks Ray for."""
    accelerator_type: str | None = None
    """Ray's name of the GPU that one engine needs, such as H100 or L4."""
    resources: Resources = {}
    """Custom Ray resources of one engine, such as {spot: 0.001}."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the engines of this pool compute in; default: model.dtype."""
    quantization: str | None = None
    """vLLM's online quantisation of the weights, such as fp8 (GPU only)."""
    max_groups: int = Field(default=64, ge=1)
    """Groups in flight per engine: whoever has room gets the next prompt."""
    memory_fraction: float = Field(default=0.85, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes (GPU only)."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Key-value cache on CPU, in GiB (CPU only)."""
    enforce_eager: bool = True
    """No CUDA graphs and no compilation: starts sooner, decodes slower on GPU."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads of one engine; default: all that the node has."""
    parity_tolerance: float | None = Field(default=None, gt=0)
    """Largest mean difference from the learner's log-probs, in nats per token; default 1e-3 in float32, 0.1 in other precisions."""
    vllm: dict[str, Any] = {}
    """More vLLM engine arguments (`AsyncEngineArgs`), passed as they are."""
    url: str | None = None
    """Of a server with an OpenAI-compatible API that is not ours, up to and with /v1: it gets no weights, and its completions are foreign
    data (source offline:<pool>). max_groups bounds the requests in flight."""
    url_model: str | None = None
    """Its model's name; default: the first one that it lists."""
    url_key_variable: str | None = None
    """Environment variable of the driver that holds its API key."""
    max_restarts_per_hour: int = Field(default=20, ge=0)
    """Deaths of this pool's engines within an hour beyond which none of them is replaced until an hour is over; when no engine of any
    pool is left then, the run stops."""

    @model_validator(mode="after")
    def _of_one_engine(self) -> PoolConfig:
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https:// (got {self.url!r})")
        if self.url is None and (self.url_model or self.url_key_variable):
            raise ValueError("url_model and url_key_variable need a url")
        if self.max_num is not None and self.max_num < self.num:
            raise ValueError(f"max_num ({self.max_num}) is less than num ({self.num})")
        if self.num_gpus and max(self.num_gpus, 1) != self.tensor_parallel_size:  # a part of a GPU holds one shard
            raise ValueError(f"num_gpus ({self.num_gpus:g}) must equal tensor_parallel_size ({self.tensor_parallel_size})")
        if self.quantization and not self.num_gpus and not self.url:
            raise ValueError(f"quantization: {self.quantization} needs GPUs (num_gpus)")
        return self


class EnginesConfig(PoolConfig):
    """One pool, or the defaults of those in `pools`."""

    pools: dict[str, PoolConfig] = {}
    """Pools by name, the cheapest first: it grows first and shrinks last. What one does not say is as in this section. Default: one pool,
    `engines`, of what this section says."""
    scale_window_s: float = Field(default=60.0, gt=0)
    """How long an elastic pool looks on before it asks for one engine more, or lets one go."""
    weight_transfer: Literal["objects", "nccl"] = "objects"
    """`objects`: through Ray's object store and shared memory, once per node, late engines may join. `nccl`: vLLM's broadcast from
    learner rank 0 to a fixed fleet of GPU engines: the death of one ends the run, and the same command resumes it."""
    parity_every: int = Field(default=20, ge=0)
    """Compare engine and learner log-probs after the first weight transfer and then every so many; 0: only the first."""
    hang_s: float = Field(default=300.0, gt=0)
    """An engine with groups in flight that has written no token for so many seconds, or does not answer at all, is replaced."""
    drain_s: float = Field(default=30.0, ge=0)
    """How long an engine whose node is about to leave (SIGTERM, Ray's drain notice) goes on with what it has in flight, if the notice
    does not say; the rest is handed over to other engines as far as it is written."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_pools(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("pools"), dict):
            return value
        own = {key: given for key, given in value.items() if key in PoolConfig.model_fields}
        return value | {"pools": {name: own | pool if isinstance(pool, dict) else pool for name, pool in value["pools"].items()}}

    @field_validator("pools")
    @classmethod
    def _names(cls, value: dict[str, PoolConfig]) -> dict[str, PoolConfig]:
        for name in value:
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"the name {name!r} becomes part of a metric's: letters, digits and any of _ -")
        return value

    def all_pools(self) -> dict[str, PoolConfig]:
        """Every pool with all of its settings, by name."""
        return self.pools or {"engines": PoolConfig.model_validate({key: getattr(self, key) for key in PoolConfig.model_fields})}


class ReplayConfig(Section):
    """Completions of the same prompt that the policy wrote earlier, in place of new ones (paper, Figure 4: historical to current from 0:8
    to 4:4). They are in the log with their log-probs, and so are data like any other."""

    share: float = Field(default=0.0, ge=0, lt=1)
    """Of each group's completions, as far as the log has that many."""
    policy: Literal["newest", "uniform", "residual"] = "newest"
    """`newest`, `uniform` (at random), or `residual`: the largest |residual| when last trained on."""
    window: int | None = Field(default=None, ge=1)
    """Only completions of the last so many steps; default: of the whole run."""


class SourceConfig(PromptsConfig):
    """Completions from elsewhere: Parquet or JSONL of (prompt, completion, and reward or answer), from people, other models or logs."""

    completion_column: str = "completion"
    reward_column: str | None = None
    """A number per row; without it the completions are verified, for which answer_column must be there."""
    share: float = Field(default=0.0, ge=0, lt=1)
    """Of each group's completions, where the file has some for that prompt."""
    group_share: float = Field(default=0.0, ge=0, le=1)
    """Of all groups: so many consist of one prompt of the file with its completions alone."""

    @model_validator(mode="after")
    def _one_way(self) -> SourceConfig:
        if (self.share > 0) == (self.group_share > 0):
            raise ValueError("say either share (of each group's completions) or group_share (of all groups)")
        return self


class RewardConfig(Section):
    """One part of the reward. At most one of `function`, `url` and `model`; without any, the reward's name says which function it is."""

    weight: float = 1.0
    function: str | None = None
    """`math`, `exact_match`, `numeric`, `format`, `length`, `module:function` or `path.py:function`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the function, such as {relative_tolerance: 0.01}; fields of every request where there is a url."""
    trusted: bool = False
    """Run a user's function in the verifier itself, whole groups at once: with network and files, and without any limit."""
    url: str | None = None
    """A reward served over HTTP: POST {prompts, completions, columns} -> {rewards}."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Of one HTTP request."""
    num_retries: int = Field(default=3, ge=0)
    """Of an HTTP request, each after twice as long."""
    batch_size: int = Field(default=32, ge=1)
    """Completions in one HTTP request or one forward pass of the reward model."""
    model: str | None = None
    """A reward model: a Hugging Face sequence classifier with one output, a folder or hub name, in actors of its own."""
    num: int = Field(default=1, ge=1)
    """Actors of the reward model."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs that one of them asks Ray for."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of one of them; 0: on CPU."""

    @model_validator(mode="after")
    def _one_kind(self) -> RewardConfig:
        kinds = [key for key in ("function", "url", "model") if getattr(self, key)]
        if len(kinds) > 1:
            raise ValueError(f"{kinds[0]} and {kinds[1]} exclude each other")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https:// (got {self.url!r})")
        return self


class VerifiersConfig(Section):
    num: int = Field(default=2, ge=1)
    """Verifier actors, spread over the nodes; each checks one group at a time. The fewest, where max_num says more."""
    max_num: int | None = Field(default=None, ge=1)
    """Grow to so many while every verifier has groups waiting, and shrink again; default: num."""
    num_cpus: float = Field(default=0.1, ge=0)
    resources: Resources = {}
    """Custom Ray resources of one verifier."""
    rewards: dict[str, RewardConfig] = {"math": RewardConfig()}
    """Reward functions: `name: weight`, or a section. The name is `math`, `exact_match`, `numeric`, `format`, `length`, `module:function`,
    `path.py:function`, that of a callable passed from Python, or free where the section says what it is. The reward is the weighted
    sum; the first one named says whether a completion is correct (> 0)."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Wall-clock limit of one check; past it the child that runs it is killed and the completion has no reward (never 0)."""
    cpu_s: int = Field(default=5, ge=1)
    """CPU-time limit of one check, in whole seconds; the verdict does not depend on what else the machine does."""
    memory_gib: float = Field(default=2.0, gt=0)
    """What the child that runs the checks may allocate beside its loaded functions."""
    max_checks: int = Field(default=10_000, ge=1)
    """Checks after which a child is replaced: what sympy caches does not pile up."""

    @field_validator("rewards", mode="before")
    @classmethod
    def _weights(cls, value: Any) -> Any:
        """`name: 0.5` is short for `name: {weight: 0.5}`."""
        if not isinstance(value, dict) or not value:
            raise ValueError("name at least one reward function")
        for name, entry in value.items():
            if not isinstance(entry, (int, float, dict, RewardConfig)):
                raise ValueError(f"{name} must be a weight or a section (got {entry!r})")
        return {name: {"weight": entry} if isinstance(entry, (int, float)) else entry for name, entry in value.items()}

    @model_validator(mode="after")
    def _at_most(self) -> VerifiersConfig:
        if self.max_num is not None and self.max_num < self.num:
            raise ValueError(f"max_num ({self.max_num}) is less than num ({self.num})")
        return self


class LearnerConfig(Section):
    num_workers: int = Field(default=1, ge=1)
    """Ray Train workers; whole groups go to each."""
    max_workers: int | None = Field(default=None, ge=1)
    """Elastic: Ray Train goes on with as many workers as the cluster has room for, from num_workers to so many. Default: num_workers."""
    max_restarts: int = Field(default=20, ge=0)
    """Deaths of workers after which the run goes on from its last checkpoint. Three in a row without a step between them end it."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs per worker; 0: gloo on CPU."""
    num_cpus: float = Field(default=0.25, gt=0)
    """CPUs that one worker asks Ray for."""
    accelerator_type: str | None = None
    """Ray's name of the GPU that a worker needs, such as H100."""
    resources: Resources = {}
    """Custom Ray resources of one worker."""
    num_threads: int = Field(default=1, ge=1)
    """Torch threads of one worker (CPU only matters)."""
    backend: Literal["deepspeed", "ddp", "fsdp"] = "deepspeed"
    """`deepspeed`, or torch's own: `ddp` replicates everything, `fsdp` (FSDP2) shards everything."""
    zero_stage: int = Field(default=0, ge=0, le=3)
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards the optimizer, 2 gradients too, 3 parameters too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What ZeRO keeps in the CPU's memory: the optimizer (stages 1 to 3), or the parameters too (stage 3)."""
    learning_rate: float = Field(default=1e-6, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate after the warm-up, to zero at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up of the learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    max_grad_norm: float = Field(default=1.0, gt=0)
    num_mini_batches: int = Field(default=4, ge=1)
    """Optimizer updates per step. With 1, the log-ratio is always 0 in a synchronous run: GVPO is then REINFORCE with a mean baseline."""
    packing: bool = True
    """A group is one sequence, its prompt computed once (packing.py), where the model allows it; else completions are padded."""
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Tokens of one forward pass. A larger group takes several, and one more without gradients."""
    max_skipped_updates: int = Field(default=3, ge=0)
    """An update whose gradient is not a number is skipped and counted; one more than so many in a row stop the run."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""


class EvaluationSet(PromptsConfig):
    """A held-out prompt file; what it does not say is as in the evaluation section."""

    num_samples: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Longest completion (`max_tokens` is the longest prompt)."""


class EvaluationConfig(Section):
    every: int = Field(default=0, ge=0)
    """Evaluate before the first step, every so many steps and after the last; 0: only on request."""
    sets: dict[str, EvaluationSet] = {}
    """Held-out prompt files by name; metrics are eval/<name>/pass@1."""
    num_samples: int = Field(default=1, ge=1)
    """n: completions per prompt; pass@1 is their mean."""
    pass_k: list[Annotated[int, Field(ge=1)]] = [1, 2, 4, 8, 16, 32, 64]
    """Report the unbiased pass@k for those of them that are at most n."""
    temperature: float = Field(default=1.0, ge=0)
    """0: greedy, which is deterministic and so allows one sample only."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Default: as in sampling."""
    every_limit: int | None = Field(default=None, ge=1)
    """Prompts per set for the evaluations inside training; the first and the last always use the whole set."""

    @field_validator("sets")
    @classmethod
    def _names(cls, value: dict[str, EvaluationSet]) -> dict[str, EvaluationSet]:
        for name in value:
            if not re.fullmatch(r"[\w@+-][\w@+.-]*", name):
                raise ValueError(f"the name {name!r} becomes a folder's: letters, digits and any of . _ - + @ (not . at its start)")
        return value

    def of(self, name: str) -> tuple[int, float, int | None]:
        """(num_samples, temperature, max_tokens) of a set; max_tokens None: as in sampling."""
        own = self.sets[name]
        return (
            self.num_samples if own.num_samples is None else own.num_samples,
            self.temperature if own.temperature is None else own.temperature,
            self.max_tokens if own.max_completion_tokens is None else own.max_completion_tokens,
        )

    @model_validator(mode="after")
    def _greedy_once(self) -> EvaluationConfig:
        for name in self.sets:
            num_samples, temperature, _ = self.of(name)
            if temperature == 0 and num_samples > 1:
                raise ValueError(f"{name} has temperature 0 (greedy): all of its {num_samples} samples would be the same; use num_samples: 1")
        return self


class CheckpointConfig(Section):
    every: int = Field(default=10, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""


class RayConfig(Section):
    address: str | None = None
    """Of a running cluster; default: RAY_ADDRESS (set under `ray job submit`), else an embedded Ray of the run's own."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of the embedded Ray; default: the machine's."""
    object_store_gib: float = Field(default=1.0, gt=0)
    """Object store of the embedded Ray."""
    dashboard: bool = False
    """Dashboard of the embedded Ray."""


class MLflowConfig(Section):
    tracking_uri: str | None = None
    """Of a tracking server or a database; default: MLFLOW_TRACKING_URI, else run_dir/mlflow/runs.db."""
    experiment: str = "gvpo"
    run_name: str | None = None
    """Default: the name of run_dir."""
    tags: dict[str, str] = {}


class TrackingConfig(Section):
    """Who gets every line of metrics.jsonl beside it; a run that is resumed goes on in the same place. `{}`: with the defaults."""

    tensorboard: dict[str, Any] | None = None
    """Into run_dir/tensorboard: arguments of tensorboardX's SummaryWriter."""
    wandb: dict[str, Any] | None = None
    """Weights & Biases: arguments of wandb.init, such as {project: gvpo, mode: offline}; its files are in run_dir/wandb."""
    mlflow: MLflowConfig | None = None


class WarmStartConfig(Section):
    """Make a small model from scratch and teach it by supervised learning (jobs/train.py, jobs/warm_start.py); writes model.path."""

    data: PromptsConfig
    """Worked problems."""
    task: Literal["arithmetic", "chain", "sort"] | None = None
    """Make the data of one of gvpo_ray/tasks.py first, in the folder of data.path, if that is not there."""
    solution_column: str = "solution"
    """Column of the worked solution; `column.key` looks into a column of JSON text."""
    remove: str | None = None
    """Regular expression of what to leave out of the solutions, such as GSM8K's "<<48/2=24>>"."""
    completion: str = "{solution}"
    """What the model learns to write, such as "{solution}\\n\\\\boxed{{answer}}"."""
    vocab_size: int = Field(default=4096, ge=257)
    """Of the byte-level BPE tokenizer trained on the texts; digits are tokens of their own."""
    architecture: dict[str, Any] = {}
    """Arguments of transformers' Qwen2Config."""
    num_epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=64, ge=1)
    """Examples per update."""
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """After a warm-up over the first twentieth, it falls linearly to a twentieth."""
    num_threads: int | None = Field(default=None, ge=1)
    """Torch threads; default: the machine's CPUs."""


Prompts = TypeVar("Prompts", bound=PromptsConfig)


class GVPOConfig(Section):
    run_dir: str
    """Folder of the run: config.yaml, metrics.jsonl, groups/, checkpoints/. Running `train` on it again resumes it."""
    root: str | None = None
    """Folder that relative paths begin at; default: the current one. On a cluster: of a file system that every node sees."""
    seed: int = 0
    num_steps: int = Field(ge=1)
    """Training steps; one step trains one batch of groups."""
    groups_per_step: int = Field(default=64, ge=1)
    """n: groups in the batch of one step."""
    max_staleness: int | None = Field(default=0, ge=0)
    """The one dial of asynchrony: a group may start while started // groups_per_step <= version + max_staleness. 0: synchronous,
    1: one step ahead, n: asynchronous, null: unbounded."""
    model: ModelConfig
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    replay: ReplayConfig = ReplayConfig()
    sources: dict[str, SourceConfig] = {}
    """Offline sources by name; what one does not say about its prompts' template is as in prompts."""
    loss: LossConfig = LossConfig()
    engines: EnginesConfig = EnginesConfig()
    verifiers: VerifiersConfig = VerifiersConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    ray: RayConfig = RayConfig()
    tracking: TrackingConfig = TrackingConfig()
    watchdog_s: float = Field(default=300.0, gt=0)
    """When no group finishes or no step ends for so many seconds, say who waits for whom; and again after as many."""
    warm_start: WarmStartConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _offline_only(cls, value: Any) -> Any:
        """Without engines there is nobody to ask: no prompts are needed."""
        if isinstance(value, dict) and "prompts" not in value and isinstance(value.get("engines"), dict) and value["engines"].get("num") == 0:
            return value | {"prompts": {"path": NO_PROMPTS}}
        return value

    @model_validator(mode="after")
    def _across(self) -> GVPOConfig:
        """Every check that concerns two keys."""
        model, engines, learner, n = self.model, self.engines, self.learner, self.groups_per_step
        if learner.num_mini_batches > n:
            raise ValueError(f"learner.num_mini_batches ({learner.num_mini_batches}) must not exceed groups_per_step ({n})")
        sets = ((f"evaluation.sets.{name}.max_completion_tokens", self.evaluation.of(name)[2]) for name in self.evaluation.sets)
        lengths = (("sampling.max_tokens", self.sampling.max_tokens), ("evaluation.max_tokens", self.evaluation.max_tokens), *sets)
        for key, max_tokens in lengths:
            if model.max_length is not None and max_tokens is not None and max_tokens >= model.max_length:
                raise ValueError(f"{key} ({max_tokens}) leaves no room for a prompt in model.max_length ({model.max_length})")
        pools = engines.all_pools()
        if engines.weight_transfer == "nccl":
            if not (all(pool.num_gpus for pool in pools.values()) and learner.num_gpus):
                raise ValueError("engines.weight_transfer: nccl needs GPUs in engines.num_gpus and learner.num_gpus; use objects")
            if len(pools) > 1 or any(pool.max_num not in (None, pool.num) for pool in pools.values()):
                raise ValueError("engines.weight_transfer: nccl needs a fixed fleet of one pool; use objects")
        self._across_sources(pools)
        if learner.max_workers is not None and learner.max_workers < learner.num_workers:
            raise ValueError(f"learner.max_workers ({learner.max_workers}) is less than learner.num_workers ({learner.num_workers})")
        if learner.zero_stage and learner.backend != "deepspeed":
            raise ValueError(f"learner.zero_stage ({learner.zero_stage}) needs learner.backend: deepspeed, not {learner.backend}")
        least = {"none": 0, "optimizer": 1, "parameters": 3}[learner.offload]
        if learner.zero_stage < least:
            raise ValueError(f"learner.offload: {learner.offload} needs learner.zero_stage of at least {least}, not {learner.zero_stage}")
        if model.lora is not None and engines.weight_transfer == "nccl":
            raise ValueError("model.lora sends adapters, which engines.weight_transfer: nccl cannot; use objects")
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
            raise ValueError(f"engines.num is 0, and the group_share of sources is {shares:g}: without engines it must be 1")
        if not has_engines and self.evaluation.every:
            raise ValueError("evaluation.every needs engines, and engines.num is 0")
        shares_of_groups = {"replay.share": self.replay.share, **{f"sources.{name}.share": source.share for name, source in self.sources.items()}}
        for key, share in shares_of_groups.items():
            if share and round(share * self.sampling.num_completions) < 1:
                raise ValueError(f"{key} ({share:g}) is less than one of sampling.num_completions ({self.sampling.num_completions})")
        mixed = self.replay.share + sum(source.share for source in self.sources.values())
        if mixed >= 1:
            raise ValueError(f"replay.share and the share of sources are {mixed:g} in all: no completion of a group would be new")

    @classmethod
    def from_file(cls, path: str | Path, overrides: list[str] | dict[str, Any] | None = None, for_evaluation: bool = False) -> GVPOConfig:
        """Read a YAML file and apply overrides: `["learner.num_workers=1", …]` or `{"learner.num_workers": 1}`.

        for_evaluation: a file with evaluation.sets but neither `prompts` nor `num_steps`, which only training needs, will do.

        Raises:
            ConfigError: one line that names the key.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: expected keys and values, found {'nothing' if data is None else type(data).__name__}")
        own = data.get("evaluation")
        has_sets = (isinstance(own, dict) and bool(own.get("sets"))) or any(key.startswith("evaluation.sets") for key in overrides or ())
        if for_evaluation and has_sets and "prompts" not in data and "num_steps" not in data:  # with one of them it is a run that lacks the other
            data |= {"num_steps": 1, "prompts": {"path": NO_PROMPTS}}
        return cls.from_dict(data, overrides, where=str(path))

    @classmethod
    def from_dict(cls, data: dict[str, Any], overrides: list[str] | dict[str, Any] | None = None, where: str = "config") -> GVPOConfig:
        """As from_file, from a dictionary. It and the overrides stay as they are."""
        data, overrides = copy.deepcopy((data, overrides))
        items = overrides.items() if isinstance(overrides, dict) else [_parse_override(text) for text in overrides or []]
        for key, value in items:
            _set(data, key, value)
        try:
            config = cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{where}: {_one_line(error)}") from error
        return config.absolute() if config.root else config

    def absolute(self) -> GVPOConfig:
        """With local paths made absolute: actors do not run in this folder, and a run may be taken up from another one."""

        root = Path(self.root or "").expanduser()

        def path(text: str) -> str:
            return str((root / Path(text).expanduser()).absolute()) if is_local(text, root) else text

        def reward(name: str, section: RewardConfig) -> RewardConfig:
            file, colon, function = (section.function or name).rpartition(":")
            places = {"function": f"{path(file)}:{function}"} if colon and file.endswith(".py") else {}
            return section.model_copy(update=places | ({"model": path(section.model)} if section.model else {}))

        def prompts(section: Prompts) -> Prompts:
            return section.model_copy(update={"path": path(section.path)})

        sets = {name: prompts(section) for name, section in self.evaluation.sets.items()}
        rewards = {name: reward(name, section) for name, section in self.verifiers.rewards.items()}
        return self.model_copy(
            update={
                "run_dir": str((root / Path(self.run_dir).expanduser()).absolute()),
                "model": self.model.model_copy(update={"path": path(self.model.path)}),
                "prompts": prompts(self.prompts),
                "sources": {name: prompts(section) for name, section in self.sources.items()},
                "verifiers": self.verifiers.model_copy(update={"rewards": rewards}),
                "evaluation": self.evaluation.model_copy(update={"sets": sets}),
                "warm_start": self.warm_start and self.warm_start.model_copy(update={"data": prompts(self.warm_start.data)}),
            }
        )

    def dump(self) -> str:
        """The resolved config as YAML, in the order of the fields."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return text

    def build(self, **rewards: Any) -> Any:
        """Start (or resume) the run: returns a `GVPO`. See `gvpo_ray.run.algorithm.GVPO`."""
        from gvpo_ray.run.algorithm import GVPO  # the only place where config looks up the layers: a convenience for users

        return GVPO(self, **rewards)


def verifiers_config(overrides: list[str]) -> VerifiersConfig:
    """The verifiers section alone, its defaults with overrides such as "timeout_s=3".

    Raises:
        ConfigError: one line that names the key.
    """
    data: dict[str, Any] = {}
    for key, value in map(_parse_override, overrides):
        _set(data, key, value)
    needed = {"run_dir": "", "num_steps": 1, "model": {"path": ""}, "prompts": {"path": ""}}
    return GVPOConfig.from_dict({**needed, "verifiers": data}, where="overrides").absolute().verifiers


NO_PROMPTS = "(none)"
"""prompts.path of a file without `prompts`: for evaluations, and where offline sources are all there is."""


def is_local(path: str, root: Path = Path()) -> bool:
    """Whether a path is of this machine. Hub names are `name` or `owner/name`, without the suffix of a file, and nothing is there."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in (".parquet", ".jsonl", ".json", ".py")
    return looks_local or (root / path).exists()


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r} is not key=value")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {key}: {value!r} is not a YAML value") from error


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        child = data.setdefault(name, {})
        if child is None:
            child = data[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {key}: {name} is not a section")
        data = child
    data[last] = value


def _one_line(error: ValidationError) -> str:
    """The first problem, with its key; an unknown key with the nearest right one."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        near = [".".join([*location[:-1], name]) for name in difflib.get_close_matches(location[-1], known, n=1)]
        hints = near or [path for path in _all_keys() if path.rsplit(".", 1)[-1] == location[-1]]
        return f"unknown key {key}; " + (f"did you mean {hints[0]}?" if hints else f"known here: {', '.join(known)}")
    if first["type"] == "missing":
        return f"{key}: required, and not given"
    message = first["msg"].removeprefix("Value error, ")
    shown = f" (got {first['input']!r})" if isinstance(first["input"], (int, float, str, bool)) else ""
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    return (f"{key}: " if key else "") + message + shown + more


def _section(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _keys_at(location: list[str]) -> list[str]:
    model: type[Section] | None = GVPOConfig
    names = iter(location)
    for name in names:
        annotation = model.model_fields[name].annotation if model is not None else None
        model = _section(annotation)
        if str(annotation).startswith("dict"):
            next(names, None)  # the name of an entry in a dictionary of sections: evaluation.sets.<name>
    return list(model.model_fields) if model else []


def _all_keys(model: type[Section] = GVPOConfig, prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if (section := _section(field.annotation)) is not None and not str(field.annotation).startswith("dict"):
            keys += _all_keys(section, prefix + name + ".")
    return keys


def resource_plan(config: GVPOConfig) -> list[tuple[str, int, float, float]]:
    """What the run asks Ray for: (who, how many, CPUs each, GPUs each)."""
    pools = config.engines.all_pools()
    engines = {name: "engine" if len(pools) == 1 else f"engine of {name}" for name in pools}
    return [
        ("learner worker", config.learner.num_workers, config.learner.num_cpus, config.learner.num_gpus),
        *((engines[name], pool.num, pool.num_cpus, pool.num_gpus) for name, pool in pools.items()),
        ("verifier", config.verifiers.num, config.verifiers.num_cpus, 0.0),
        *((f"reward model {name}", r.num, r.num_cpus, r.num_gpus) for name, r in config.verifiers.rewards.items() if r.model),
    ]


def check_resources(config: GVPOConfig, num_cpus: float, num_gpus: float, engines: bool = True, learner: bool = True) -> None:
    """Refuse a plan that the machine can never place. `engines`, `learner`: whether this run has them.

    Raises:
        ConfigError: names the key to lower.
    """
    keys = {"learner worker": "learner.num_workers", "engine": "engines.num", "verifier": "verifiers.num"}
    absent = (*(() if engines else ("engine", "verifier", "reward model")), *(() if learner else ("learner worker",)))
    plan = [row for row in resource_plan(config) if not row[0].startswith(absent)]
    for column, unit, available in ((0, "CPUs", num_cpus), (1, "GPUs", num_gpus)):
        total = 0.0
        for who, count, *shares in plan:
            each = shares[column]
            total += count * each
            if count * each > available + 1e-9:
                raise ConfigError(f"{keys.get(who, who)}: {count} x {each:g} {unit} are more than the {available:g} {unit} of this machine")
        if total > available + 1e-9:
            raise ConfigError(
                f"the run asks for {total:g} {unit} in all (see `gvpo-ray check`), this machine has {available:g}: "
                f"lower engines.num, learner.num_workers or their num_{unit.lower()}"
            )


def cluster_address(config: RayConfig) -> str | None:
    """Address of the cluster to join; None for an embedded Ray."""
    return config.address or os.environ.get("RAY_ADDRESS") or None
