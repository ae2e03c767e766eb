"""An engine starts vLLM with the arguments that are made here."""

from __future__ import annotations

import math
from typing import Any

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.engines import EnginesConfig, PoolConfig
from gvpo_ray.config.model import ModelConfig, num_experts

MAX_SEQUENCES = 1024
"""The most completions that vLLM decodes at once on one engine, unless the pool's `vllm` says otherwise. Each
costs room for its logits; more of them decode no faster on today's GPUs."""

TOKENS_PER_SEQUENCE = 16
LEAST_BATCHED_TOKENS, MOST_BATCHED_TOKENS = 8192, 16384
"""On a GPU, a step of vLLM's scheduler computes up to so many tokens: 16 per completion in flight, within the
bounds that vLLM itself has for batch jobs. New weights make it read all completions in flight again."""


def vllm_arguments(
    model: ModelConfig,
    pool: PoolConfig,
    transfer: str,
    seed: int,
    load_weights: bool,
    drain_s: float | None,
    num_completions: int,
    sleeps: bool,
) -> dict[str, Any]:
    """Return the arguments of vLLM's AsyncEngineArgs: ours, and over them those of the pool's `vllm`.

    Args:
        model: the policy.
        pool: the engine's.
        transfer: how weights come (engines.weight_transfer).
        seed: of requests without a seed of their own.
        load_weights: whether vLLM reads the weights of model.path.
        drain_s: as for Engine.
        num_completions: completions in flight on the engine, at most. vLLM's own default would be 128.
        sleeps: whether the engine must be able to free its GPU's memory.
    """
    on_gpu, own, dtype = pool.num_gpus > 0, dict(pool.vllm), pool.dtype or model.dtype
    num_sequences = min(num_completions, MAX_SEQUENCES)
    size = pool.tensor_parallel_size
    arguments: dict[str, Any] = {
        "model": model.path,
        "dtype": dtype,
        "max_model_len": model.max_length,
        "trust_remote_code": model.trust_remote_code,
        "seed": seed,
        "enforce_eager": not on_gpu if pool.enforce_eager is None else pool.enforce_eager,
        # no more than a step computes tokens, which vLLM would refuse
        "max_num_seqs": min(num_sequences, own.get("max_num_batched_tokens", MAX_SEQUENCES)),
        "tensor_parallel_size": size,
        # each part of a data parallel engine has a core and an executor of its own
        "distributed_executor_backend": _executor(
            pool.num_processes // pool.sizes["data_parallel_size"], on_gpu
        ),
        # the policy's own log-probs at temperature 1, as the learner computes them
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        "worker_extension_cls": "gvpo_ray.weights.vllm_worker.WorkerExtension",
        "weight_transfer_config": {"backend": transfer},
        # no sampling defaults from the model folder: they often cut the support (top_p, top_k)
        "generation_config": "vllm",
    }
    if pool.quantization is not None:
        arguments["quantization"] = pool.quantization
    if on_gpu:
        arguments["gpu_memory_utilization"] = pool.memory_fraction
        arguments["enable_sleep_mode"] = sleeps
        if pool.kv_cache_gib is not None:
            arguments["kv_cache_memory_bytes"] = round(pool.kv_cache_gib * 2**30)
        tokens = TOKENS_PER_SEQUENCE * num_sequences
        arguments["max_num_batched_tokens"] = min(max(tokens, LEAST_BATCHED_TOKENS), MOST_BATCHED_TOKENS)
    else:
        # After a chunk of a prompt vLLM rewinds the generator of a request with a seed. Generators on a CPU
        # cannot be rewound, and vLLM's core would die.
        arguments["enable_chunked_prefill"] = False
    if drain_s is not None:  # a node that is about to go sends SIGTERM to vLLM's core too
        arguments["shutdown_timeout"] = math.ceil(drain_s)
    overrides: dict[str, Any] = {}
    if dtype != "float32":
        # Logits in float32, as the learner computes them: rounded to bfloat16 they cost half of the agreement
        # with it.
        overrides["head_dtype"] = "float32"
    if not load_weights and model.lora is None:
        arguments["load_format"] = "dummy"
        overrides["tie_word_embeddings"] = False
    return arguments | own | {"hf_overrides": overrides | own.get("hf_overrides", {})}


def _executor(num_workers: int, on_gpu: bool) -> str:
    """Return who runs vLLM's workers: a single one is in the process of vLLM's core.

    On a CPU vLLM makes `uni` into `mp`, a process more with all of vLLM in it, so that it can pin threads to
    cores. Engines pin none (VLLM_CPU_OMP_THREADS_BIND), and a class that is named is left as it is.
    """
    if num_workers > 1:
        return "mp"
    return "uni" if on_gpu else "vllm.v1.executor.uniproc_executor.UniProcExecutor"


def returns_experts(model: ModelConfig) -> bool:
    """Return whether an engine says which experts it has chosen, so that the learner can choose the same."""
    from transformers import AutoConfig

    if not model.router_replay:
        return False
    return num_experts(AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)) > 0


def check_experts(model: ModelConfig, engines: EnginesConfig) -> None:
    """Refuse engines with which vLLM does not start where it has to say which experts it has chosen.

    Raises:
        ConfigError: one line with the key.
    """
    without = {
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "enable_prefix_caching": True,
    }
    for name, pool in engines.all_pools().items():
        own = next((key for key, usual in without.items() if pool.vllm.get(key, usual) != usual), None)
        if own and pool.num_gpus and pool.url is None and returns_experts(model):
            where = f"engines.pools.{name}" if engines.pools else "engines"
            raise ConfigError(
                f"{where}.vllm.{own}: {pool.vllm[own]}: so vLLM cannot say which experts of {model.path} it "
                "chose; leave it out, or set model.router_replay: false"
            )


def of_the_model(model: ModelConfig, arguments: dict[str, Any], says_experts: bool) -> dict[str, Any]:
    """Return the arguments with those that only the model's own config decides.

    Args:
        model: the policy.
        arguments: what `vllm_arguments` has returned.
        says_experts: whether vLLM itself returns the experts that it has chosen, which it can on GPUs.
    """
    overrides = as_the_learner_computes(model) | arguments["hf_overrides"]
    experts = {"enable_return_routed_experts": True} if says_experts else {}
    return experts | arguments | {"hf_overrides": overrides}


def as_the_learner_computes(model: ModelConfig) -> dict[str, Any]:
    """Return overrides of a model's config without which vLLM's layers are not those of the learner.

    A layer of Cohere 2 with a window sees config.sliding_window tokens in transformers, and one more in vLLM.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    window: int | None = getattr(config, "sliding_window", None)
    if config.model_type != "cohere2" or window is None:
        return {}
    return {"sliding_window": window - 1}
