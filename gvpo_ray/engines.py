"""Engines sample completions: Engine (vLLM's AsyncLLM) and FakeEngine behind the same few methods.

    generate(group, sampling, min_version)   group table -> group table with its completions
    update(version, weights, probe)          swap in newer weights while completions are in flight
    status() / close()

Plain classes; controller.py makes them actors, one event loop each, many groups in flight.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
import uuid
from collections.abc import Awaitable, Coroutine
from typing import Any

import numpy as np
import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.config import EnginesConfig, ModelConfig, SamplingConfig
from gvpo_ray.weights import SharedMemory, WeightMismatch


class Engine:
    """vLLM in one actor.

    With `load_weights=False` it starts with dummy weights and is of no use until its first update: the learner is the only
    source of weights in training. A model with tied embeddings is then run untied, because vLLM's layerwise reload leaves a tied
    head at its old values without an error; the learner sends the head under its own name.

    With model.lora the learner sends an adapter, and updates leave embeddings and head as they are: the model starts with its own
    weights, its embeddings tied as they are, but is of no use before its first update either.
    """

    def __init__(self, model: ModelConfig, config: EnginesConfig, seed: int, load_weights: bool = False) -> None:
        self._model, self._config, self._seed, self._load_weights = model, config, seed, load_weights
        self._llm: Any = None
        self.version = 0 if load_weights else -1
        self._new_version = asyncio.Condition()
        self._updating = asyncio.Lock()
        self._num_tokens = 0
        self._in_flight: dict[int, float] = {}  # group id -> since when

    async def start(self) -> dict[str, Any]:
        """Start vLLM (20 s and more)."""
        config, on_gpu = self._config, self._config.num_gpus > 0
        os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"))
        if not on_gpu:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(config.kv_cache_gib)))
            # vLLM would compile one small kernel for log-probs, for 4 to 9 s of the first generation.
            os.environ["TORCH_COMPILE_DISABLE"] = "1"
            # Pinning cores would set engine and learner on the same ones: let the kernel spread the threads.
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            os.environ["OMP_NUM_THREADS"] = str(config.num_threads or len(os.sched_getaffinity(0)))
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments: dict[str, Any] = {
            "model": self._model.path,
            "dtype": self._model.dtype,
            "max_model_len": self._model.max_length,
            "trust_remote_code": self._model.trust_remote_code,
            "seed": self._seed,
            "enforce_eager": config.enforce_eager,
            "tensor_parallel_size": config.tensor_parallel_size,
            "distributed_executor_backend": "uni" if config.tensor_parallel_size == 1 else "mp",
            "logprobs_mode": "raw_logprobs",  # of the policy itself, at temperature 1: what the learner computes too
            "disable_log_stats": True,
            "worker_extension_cls": "gvpo_ray.weights_vllm.WorkerExtension",
            "weight_transfer_config": {"backend": config.weight_transfer},
            # vLLM must not take sampling defaults from the model folder: they often cut the support (top_p, top_k).
            "generation_config": "vllm",
        }
        if on_gpu:
            arguments["gpu_memory_utilization"] = config.memory_fraction
        if not self._load_weights and self._model.lora is None:
            arguments |= {"load_format": "dummy", "hf_overrides": {"tie_word_embeddings": False}}
        started = time.perf_counter()
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**(arguments | config.vllm)))
        self._death = asyncio.get_running_loop().create_future()
        self._watcher = asyncio.create_task(self._watch())
        await self._llm.update_weight_version(str(self.version))
        if config.weight_transfer == "objects":
            from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
        return {"seconds": time.perf_counter() - started}

    async def generate(self, group: pa.Table, sampling: SamplingConfig, min_version: int = 0, seed: int | None = None) -> pa.Table:
        """Sample the completions of one group (one row), starting with weights of at least `min_version`.

        seed: of this group alone, so that its samples do not depend on what else is sampled; costs speed.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        async with self._new_version:
            await self._new_version.wait_for(lambda: self.version >= min_version)
        (row,) = groups.rows(group)
        room = self._llm.model_config.max_model_len - len(row["prompt_ids"])
        params = SamplingParams(
            n=sampling.num_completions,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=max(0, sampling.top_k),
            min_p=sampling.min_p,
            max_tokens=min(sampling.max_tokens, room),
            logprobs=0,  # the sampled token's own
            seed=seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._in_flight[row["group_id"]] = time.time()
        try:
            output = await self._final(row["prompt_ids"], params)
        finally:
            self._in_flight.pop(row["group_id"], None)
        completions = sorted(output.outputs, key=lambda completion: completion.index)
        ids = [list(completion.token_ids) for completion in completions]
        self._num_tokens += sum(map(len, ids))
        versions = [[int(span.version) for span in completion.weight_versions or []] or [self.version] for completion in completions]
        return groups.with_columns(
            group,
            completions=[[completion.text for completion in completions]],
            completion_ids=[ids],
            finish_reasons=[[completion.finish_reason for completion in completions]],
            sources=[["policy"] * len(completions)],
            version_min=[[min(v) for v in versions]],
            version_max=[[max(v) for v in versions]],
            sampling_logprobs=[
                [[logprob[token].logprob for token, logprob in zip(c.token_ids, c.logprobs, strict=True)] for c in completions]
            ],
        )

    async def _final(self, prompt_ids: list[int], params: Any) -> Any:
        async def last() -> Any:
            final = None
            async for output in self._llm.generate({"prompt_token_ids": prompt_ids}, params, request_id=uuid.uuid4().hex):
                final = output
            return final

        return await self._unless_dead(last())

    async def _watch(self) -> None:
        """vLLM does not wake those who wait for a core that was killed (SIGKILL, out of memory): look once a second."""
        while not self._llm.errored:
            await asyncio.sleep(1.0)
        self._death.set_exception(self._llm.dead_error)

    async def _unless_dead(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of `work`; raises vLLM's EngineDeadError as soon as its core is dead."""
        task = asyncio.ensure_future(work)
        await asyncio.wait([task, self._death], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            self._death.result()
        return task.result()

    # --- weights -------------------------------------------------------------------------------------------------------

    async def update(self, version: int, weights: dict[str, Any], probe: dict[str, Any] | None = None) -> dict[str, float]:
        """Fetch and swap in newer weights. Completions in flight are frozen meanwhile and go on with the new ones.

        Args:
            weights: what the learner published: `shards` (object refs or arrays of safetensors bytes), `bytes`, and `adapter`
                (peft's adapter_config.json) where they are an adapter's.
            probe: sequences with the learner's log-probs of them, to compare with this engine's.

        Returns:
            Seconds of the copy (generation went on) and of the pause (it did not).

        Raises:
            WeightMismatch: names the worst token of the probe.
        """
        async with self._updating:
            if self._config.weight_transfer == "nccl":  # the learner's broadcast has been here already
                return {"copy_s": 0.0, "pause_s": 0.0, **(await self._check(probe) if probe else {})}
            started = time.perf_counter()
            adapter = weights.get("adapter")
            update_info = {} if adapter is None else {"adapter_scale": adapter["lora_alpha"] / adapter["r"]}
            arrays = [await shard if isinstance(shard, Awaitable) else shard for shard in weights["shards"]]
            with await asyncio.to_thread(SharedMemory, arrays) as memory:
                copied = time.perf_counter()
                await self._unless_dead(self._swap(version, {"paths": memory.paths, **update_info}))
            done = time.perf_counter()
            parity = await self._check(probe) if probe else {}
            return {"copy_s": copied - started, "pause_s": done - copied, **parity}

    async def init_transfer(self, init_info: dict[str, Any]) -> None:
        """NCCL only: join the learner's broadcast group."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def _swap(self, version: int, update_info: dict[str, Any]) -> None:
        await self.begin_update()
        await self.receive(update_info)
        await self.finish_update(version)

    async def begin_update(self) -> None:
        # clear_cache: keys and values of the old weights are recomputed, so that a prompt's cached prefix is never stale and what
        # follows the swap is exactly the new policy given the tokens so far.
        await self._llm.pause_generation(mode="keep", clear_cache=True)
        await self._llm.start_weight_update()

    async def receive(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def finish_update(self, version: int) -> None:
        await self._llm.finish_weight_update(str(version))
        await self._llm.resume_generation()
        async with self._new_version:
            self.version = version
            self._new_version.notify_all()

    async def _check(self, probe: dict[str, Any]) -> dict[str, float]:
        """Compare log-probs token by token with the learner's."""
        from vllm import SamplingParams

        worst, worst_text, total, count = 0.0, "", 0.0, 0
        for sequence, (ids, expected) in enumerate(zip(probe["ids"], probe["logprobs"], strict=True)):
            output = await self._final(ids, SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=1.0))
            for position in range(1, len(ids)):
                got = output.prompt_logprobs[position][ids[position]].logprob
                difference = abs(got - expected[position - 1])
                total, count = total + difference, count + 1
                if not difference <= worst:  # also true for nan
                    worst = difference
                    worst_text = (
                        f"token {ids[position]} at position {position} of probe {sequence}: engine {got:.4f}, learner {expected[position - 1]:.4f}"
                    )
        mean = total / max(1, count)
        tolerance = self._config.parity_tolerance or (1e-3 if self._model.dtype == "float32" else 0.1)
        if not mean <= tolerance:
            raise WeightMismatch(
                f"version {self.version}: engine and learner differ by {mean:.4f} nats per token on average "
                f"(allowed {tolerance:g}); worst is {worst_text}"
            )
        return {"parity_mean": mean, "parity_max": worst}

    # --- the rest ------------------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        oldest = min(self._in_flight.items(), key=lambda item: item[1], default=None)
        return {"version": self.version, "groups": len(self._in_flight), "tokens": self._num_tokens, "oldest": oldest}

    async def close(self) -> None:
        """End vLLM's core process."""
        if self._llm is not None:
            self._watcher.cancel()
            self._llm.shutdown()
            self._llm = None


class FakeEngine:
    """An engine without a model, for unit and scale tests: random tokens, `\\boxed{digit}` texts, a latency from `latency()`.

    Its weights are its version; everything else about a group table is as from Engine.
    """

    def __init__(self, seed: int = 0, vocab_size: int = 16, latency_s: float = 0.0) -> None:
        self._random = random.Random(seed)
        self._vocab_size, self._latency_s = vocab_size, latency_s
        self.version = -1
        self._new_version = asyncio.Condition()
        self._num_tokens = 0

    async def start(self) -> dict[str, Any]:
        return {"seconds": 0.0}

    async def generate(self, group: pa.Table, sampling: SamplingConfig, min_version: int = 0) -> pa.Table:
        async with self._new_version:
            await self._new_version.wait_for(lambda: self.version >= min_version)
        began = self.version
        if self._latency_s:
            await asyncio.sleep(self._random.expovariate(1 / self._latency_s))
        k = sampling.num_completions
        ids = [[self._random.randrange(self._vocab_size) for _ in range(self._random.randint(1, sampling.max_tokens))] for _ in range(k)]
        self._num_tokens += sum(map(len, ids))
        uniform = float(-np.log(self._vocab_size))
        return groups.with_columns(
            group,
            completions=[[f"\\boxed{{{tokens[-1] % 10}}}" for tokens in ids]],
            completion_ids=[ids],
            finish_reasons=[["length" if len(tokens) == sampling.max_tokens else "stop" for tokens in ids]],
            sources=[["policy"] * k],
            version_min=[[began] * k],
            version_max=[[self.version] * k],
            sampling_logprobs=[[[uniform] * len(tokens) for tokens in ids]],
        )

    async def update(self, version: int, weights: dict[str, Any], probe: dict[str, Any] | None = None) -> dict[str, float]:
        async with self._new_version:
            self.version = version
            self._new_version.notify_all()
        return {"copy_s": 0.0, "pause_s": 0.0}

    async def status(self) -> dict[str, Any]:
        return {"version": self.version, "groups": 0, "tokens": self._num_tokens, "oldest": None}

    async def close(self) -> None:
        pass
