"""The config sections `sampling` and `engines` are in this file."""

from __future__ import annotations

import math
import re
import warnings
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gvpo_ray.config.base import DECIDES_SCORES, Resources, Section


class SamplingConfig(Section):
    """This section says how engines sample completions.

    GVPO's optimum needs a sampler that covers the reference's support, so values that cut it are refused.
    """

    num_completions: int = Field(default=8, ge=2)
    """Completions per prompt, which form one group (the paper's k). One alone carries no signal."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest completion, in tokens; one that reaches it has finish_reason "length"."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1, json_schema_extra=DECIDES_SCORES)
    """Sample from the likeliest tokens that hold this much probability together; 1: from all."""
    top_k: int = Field(default=0, ge=-1, json_schema_extra=DECIDES_SCORES)
    """Sample from the k likeliest tokens only; 0 or -1: from all."""
    min_p: float = Field(default=0.0, ge=0, le=1, json_schema_extra=DECIDES_SCORES)
    """Drop tokens less likely than this share of the likeliest one; 0: none."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[], json_schema_extra=DECIDES_SCORES)
    """Texts that end a completion, such as "\\nQuestion:" for a base model; they are trained, and left out of
    the text that is graded."""
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(default=[], json_schema_extra=DECIDES_SCORES)
    """Token ids that end a completion, beside the tokenizer's end of sequence, those that the model's config
    files name, and the one that ends a turn of its chat template."""
    allow_truncated_support: bool = False
    """Warn of top_p < 1, top_k and min_p instead of refusing them. The optimum is then no longer GVPO's."""

    @model_validator(mode="after")
    def _full_support(self) -> SamplingConfig:
        cuts = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_p": self.min_p > 0}
        if any(cuts.values()):
            named = ", ".join(f"{key}={getattr(self, key)}" for key, cut in cuts.items() if cut)
            why = (
                f"{named} cuts the sampler's support, and GVPO's optimum holds only for samplers that "
                "cover the reference (Corollary 3.2)"
            )
            if not self.allow_truncated_support:
                raise ValueError(
                    f"{why}; use temperature alone, or set allow_truncated_support: true to accept the bias"
                )
            warnings.warn(f"sampling: {why}", stacklevel=2)
        return self


SPLITS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
    "data_parallel_size",
)
"""vLLM's names of the ways to split an engine over processes; all but the first are keys of `vllm`."""

NUM_PROBES, PROBE_TOKENS = 4, 256
"""A parity check compares engines' log-probs with the learner's on so many sequences of so many tokens."""


class PoolConfig(Section):
    """A pool is a number of equal engines.

    Pools may differ in everything here: with one reference per prompt GVPO's optimum is the same for every
    sampler that covers it, and with the `behaviour` reference each completion's own sampler is its reference.
    """

    num: int = Field(default=1, ge=0)
    """Number of engine actors, started at once and replaced when they die. An elastic pool shrinks to this
    number. 0 in all pools: train on offline sources alone."""
    max_num: int | None = Field(default=None, ge=1)
    """Largest number of engines of an elastic pool; default: num. The pool scales up while the learner waits
    for groups, and down to num while the buffer stays full, without stopping the run."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of one engine, as many as vLLM has processes: tensor_parallel_size, times the sizes in `vllm` of
    other ways to split it (pipeline_parallel_size, data_parallel_size, prefill_context_parallel_size); or a
    part of one GPU. They are of one node, or with `vllm: {distributed_executor_backend: ray}` of one or
    several, placed as one placement group. 0: vLLM's CPU build."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs that one engine asks Ray for."""
    accelerator_type: str | None = None
    """Ray's name for the type of GPU that one engine needs, such as H100 or L4."""
    resources: Resources = {}
    """Custom Ray resources of one engine, such as {spot: 0.001}."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs over which one engine shards each layer of the model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the engines of this pool; default: model.dtype."""
    quantization: str | None = None
    """Method by which vLLM quantises the weights when it loads them, such as fp8 (GPU only)."""
    max_groups: int = Field(default=64, ge=1)
    """Largest number of groups in flight on one engine. vLLM decodes all of their completions at once, up to
    1,024; `vllm: {max_num_seqs: …}` sets another limit."""
    memory_fraction: float = Field(default=0.85, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes (GPU only)."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Size of the key-value cache in GiB; default: 1 on a CPU, and on a GPU what memory_fraction leaves.
    vLLM finds that out by measuring, which goes wrong if a learner on the same GPU takes or frees memory
    meanwhile."""
    enforce_eager: bool | None = None
    """Run without CUDA graphs and compilation: the engine starts sooner and decodes slower on GPU. Default:
    without them on a CPU, with them on a GPU."""
    keep_kv: bool = False
    """Keep the keys and values of completions in flight when new weights come, in place of reading all their
    tokens again. What is sampled next is then of neither version: the new weights look at what the old ones
    saw. The recorded log-probs are of exactly that sampler, so they stay right as `behaviour` reference and
    in importance weights. But the learner's own log-probs of these tokens differ from them even before it has
    learned anything. Prompts of new groups are always read with the new weights."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads of one engine; default: all that the node has."""
    parity_tolerance: float | None = Field(default=None, gt=0)
    """Largest mean difference from the learner's log-probs, in nats per token: with a larger one the run
    stops. Default: 1e-3 in float32, and 1 in other precisions, where a run says so above 0.1 (quantised: 0.3)
    and goes on."""
    vllm: dict[str, Any] = Field(default={}, json_schema_extra=DECIDES_SCORES)
    """Further engine arguments for vLLM (`AsyncEngineArgs`), passed unchanged."""
    url: str | None = None
    """Address of an external server with an OpenAI-compatible API, up to and with /v1. The server gets no
    weights, and its completions are external data (source offline:<pool>). max_groups bounds the requests in
    flight."""
    url_model: str | None = None
    """Name of the server's model; default: the first one that the server lists."""
    url_key_variable: str | None = None
    """Environment variable of the driver that holds the server's API key."""
    max_restarts_per_hour: int = Field(default=20, ge=0)
    """How often an engine of this pool is replaced within an hour after it died. Beyond that its place stays
    empty until the hour is over; if all places of all pools are empty for this reason, the run stops."""

    @property
    def sizes(self) -> dict[str, int]:
        """The ways in which vLLM splits one engine over processes, by its names, and the number of parts.

        Expert parallel (`vllm: {enable_expert_parallel: true}`) needs no processes more.
        """
        return {name: self.vllm.get(name, getattr(self, name, 1)) for name in SPLITS}

    @property
    def num_processes(self) -> int:
        """The number of vLLM's processes that compute, with a GPU each."""
        return math.prod(self.sizes.values())

    @property
    def is_spread(self) -> bool:
        """Return whether the GPUs of one engine may be of several nodes."""
        return self.vllm.get("distributed_executor_backend") == "ray"

    def parity_noise(self, dtype: str) -> float:
        """Return the mean difference of log-probs, in nats per token, that precision may explain.

        Args:
            dtype: the learner's, model.dtype.
        """
        if self.quantization or self.vllm.get("quantization"):
            return 0.3
        return 1e-3 if {self.vllm.get("dtype") or self.dtype or dtype, dtype} == {"float32"} else 0.1

    def parity_limit(self, dtype: str) -> float:
        """Return the mean difference of log-probs beyond which an engine does not run the learner's weights.

        In float32 that is what precision explains. Elsewhere a rounding that is larger than expected is no
        reason to stop before it is three times as large.

        Args:
            dtype: the learner's, model.dtype.
        """
        noise = self.parity_noise(dtype)
        return self.parity_tolerance or (noise if noise < 0.1 else 3 * noise)

    @model_validator(mode="after")
    def _of_one_engine(self) -> PoolConfig:
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError("url must start with http:// or https://")  # not shown: it may hold a password
        if self.url is None and (self.url_model or self.url_key_variable):
            raise ValueError("url_model and url_key_variable need a url")
        if self.max_num is not None and self.max_num < self.num:
            raise ValueError(f"max_num ({self.max_num}) is less than num ({self.num})")
        if self.url is None:
            self._check_split()
        if self.quantization and not self.num_gpus and not self.url:
            raise ValueError(f"quantization: {self.quantization} needs GPUs (num_gpus)")
        return self

    def _check_split(self) -> None:
        """Refuse a split of one engine for which there are no GPUs, or that vLLM would place by itself."""
        for name, size in self.sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"vllm.{name}: {size!r} is not a number of parts")
        # an engine on a part of a GPU has one process
        if self.num_gpus and max(self.num_gpus, 1) != self.num_processes:
            sizes = {name: n for name, n in self.sizes.items() if n > 1 or name == SPLITS[0]}
            product = " x ".join(f"{name} ({size})" for name, size in sizes.items())
            raise ValueError(f"num_gpus ({self.num_gpus:g}) must equal {product}")
        for name, usual in (("nnodes", 1), ("data_parallel_backend", "mp")):
            if self.vllm.get(name, usual) != usual:
                raise ValueError(
                    f"vllm.{name}: {self.vllm[name]}: engines get their places from the run; for one on "
                    "several nodes set vllm.distributed_executor_backend: ray"
                )
        executor = self.vllm.get("distributed_executor_backend", "mp")
        if executor not in ("mp", "uni", "ray"):  # another one, by its class, might ask Ray for GPUs again
            raise ValueError(f"vllm.distributed_executor_backend: {executor!r} is none of mp, uni and ray")
        if not self.is_spread:
            return
        if self.num_gpus < 1:
            raise ValueError("vllm.distributed_executor_backend: ray needs whole GPUs (num_gpus)")
        if self.resources:
            raise ValueError(
                "resources are asked for on one node, and with vllm.distributed_executor_backend: ray an "
                "engine may have GPUs on others: use accelerator_type"
            )
        if (parts := self.sizes["data_parallel_size"]) > 1:
            raise ValueError(
                f"vllm.data_parallel_size ({parts}) cannot go with distributed_executor_backend: ray, with "
                "which each part would take the same GPUs: raise num, or keep the engine on one node"
            )


class EnginesConfig(PoolConfig):
    """This section has the settings of the fleet's one pool, or the defaults of those in `pools`."""

    pools: dict[str, PoolConfig] = {}
    """Pools by name, the cheapest first: it grows first and shrinks last. A key that a pool leaves out has
    the value of this section. Default: one pool named `engines`, with the settings of this section."""
    scale_window_s: float = Field(default=60.0, gt=0)
    """Seconds over which an elastic pool measures its load before it scales up or down by one engine."""
    weight_transfer: Literal["objects", "nccl", "ipc", "sharded_rdt"] = "objects"
    """How weights reach the engines. `objects`: through Ray's object store and shared memory, once per node;
    engines may join later. The others are vLLM's, from GPU to GPU into a fixed fleet, and experimental: the
    death of an engine ends the run, and the same command resumes it. `nccl`: broadcast from learner rank 0.
    `ipc`: within GPUs that one engine and the learner share (colocated: share). `sharded_rdt`: each engine
    pulls its part from the learner ranks by RDMA; needs the package nixl, and
    `vllm: {distributed_executor_backend: ray}`."""
    colocated: Literal["sleep", "share"] | None = None
    """How engines and learner live on the same GPUs. `sleep`: they take turns. While the learner trains, all
    engines of ours free their memory and stand still. Groups in flight go on afterwards with the new weights,
    so each turn costs reading their tokens again. `share`: both run all the time, the learner in what
    memory_fraction leaves; needs kv_cache_gib. Default: they have GPUs of their own. On a CPU `sleep` only
    pauses the engines."""
    parity_every: int = Field(default=20, ge=0)
    """Weight transfers between two comparisons of engine and learner log-probs; the first is always compared.
    0: only the first."""
    serve: bool = False
    """Whether each engine of ours also answers over HTTP, as `vllm serve` does, on a free port of its node's
    address (of the loopback address, where Ray is of this machine alone). `gvpo-ray status` shows the
    addresses; the bearer token is in run_dir/serve_token, which its owner alone can read. The model is called
    `policy`. Requests wait while new weights are swapped in."""
    serve_arguments: dict[str, Any] = Field(default={}, json_schema_extra=DECIDES_SCORES)
    """Further arguments of that server, as `vllm serve` has them: {enable_auto_tool_choice: true,
    tool_call_parser: hermes}."""
    start_s: float = Field(default=1800.0, gt=0)
    """Seconds that an engine may take to load its model, once it has its place; then it is replaced. That
    includes the download from a hub: where that takes longer, raise this or download the model first."""
    hang_s: float = Field(default=300.0, gt=0)
    """Seconds after which a running engine is replaced that writes no token although it has groups in flight,
    that has not taken new weights, or that does not answer; and seconds that a drain may last beyond
    drain_s."""
    drain_s: float = Field(default=30.0, ge=0)
    """Seconds that an engine still works on its groups in flight after a preemption notice of its node
    (SIGTERM, or Ray's drain notice without a deadline). Unfinished completions then migrate to other
    engines."""

    @model_validator(mode="after")
    def _of_server(self) -> EnginesConfig:
        if self.serve_arguments and not self.serve:
            raise ValueError("serve_arguments need serve: true")
        ours = {"api_key", "host", "port", "uds", "model", "served_model_name", "middleware"}
        if wrong := sorted(ours & {*self.serve_arguments}):
            raise ValueError(f"serve_arguments: {wrong[0]} is set by the run")
        return self

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_pools(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("pools"), dict):
            return value
        own = {key: given for key, given in value.items() if key in PoolConfig.model_fields}
        return value | {
            "pools": {
                name: own | pool if isinstance(pool, dict) else pool for name, pool in value["pools"].items()
            }
        }

    @field_validator("pools")
    @classmethod
    def _names(cls, value: dict[str, PoolConfig]) -> dict[str, PoolConfig]:
        for name in value:
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(
                    f"the name {name!r} becomes part of a metric's: letters, digits and any of _ -"
                )
        return value

    @property
    def has_engines(self) -> bool:
        """Return whether anybody samples: an engine of ours or a server."""
        return any(pool.num or pool.max_num for pool in self.all_pools().values())

    @property
    def has_own_engines(self) -> bool:
        """Return whether there are engines with the policy's weights, which alone can be evaluated."""
        return any((pool.num or pool.max_num) and pool.url is None for pool in self.all_pools().values())

    @property
    def memory_of_learner(self) -> float:
        """Largest share of a GPU's memory for a learner on the engines' GPUs.

        CUDA itself takes some for each process, and an engine that sleeps keeps its CUDA graphs.
        """
        if self.colocated is None:
            return 1.0
        fractions = [pool.memory_fraction for pool in self.all_pools().values() if pool.num_gpus]
        return 0.92 if self.colocated == "sleep" else 0.96 - max(fractions, default=0.0)

    def all_pools(self) -> dict[str, PoolConfig]:
        """Return every pool by name, with all of its settings."""
        return self.pools or {
            "engines": PoolConfig.model_validate({key: getattr(self, key) for key in PoolConfig.model_fields})
        }
