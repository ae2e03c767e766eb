"""Engine samples with vLLM's AsyncLLM. This module imports neither torch nor vLLM."""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from gvpo_ray import groups
from gvpo_ray.config.engines import PoolConfig, SamplingConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.data.turns import Turns
from gvpo_ray.engines.base import ABORTED
from gvpo_ray.engines.process_log import ProcessLog, how_it_ended, last_error, why_it_died
from gvpo_ray.engines.rollout import Completions, Episodes, ModelCall, Rollout, Span, one_call
from gvpo_ray.engines.rollout_engine import Agents, RolloutEngine
from gvpo_ray.engines.serving import Serve, Serving
from gvpo_ray.engines.vllm_arguments import of_the_model, returns_experts, vllm_arguments
from gvpo_ray.home import ensure_home
from gvpo_ray.imports import large_imports

ZOMBIE_S = 10.0
"""Seconds after which an engine whose vLLM core is dead ends its own process, if nobody else did: retries
must not reach a dead engine (ray#60088)."""


class Engine(RolloutEngine):
    """An Engine runs vLLM in a process of its own.

    With `load_weights=False` vLLM starts with dummy weights and cannot be used before the first update,
    because the learner is the only source of weights in training. A model with tied embeddings is then run
    untied, because vLLM's layerwise reload leaves a tied head at its old values without an error; the learner
    sends the head under its own name.

    With model.lora the learner sends an adapter, and updates leave embeddings and head as they are. So the
    model starts with its own weights and keeps tied embeddings tied, but it too cannot be used before the
    first update.

    Args:
        model: the policy.
        pool: the pool's section.
        transfer: how weights come (engines.weight_transfer).
        seed: vLLM's seed, for groups without a seed of their own.
        load_weights: whether vLLM loads the weights of model.path, as version 0.
        drain_s: as for BaseEngine.
        rollout: makes one completion, or the episodes of groups.
        num_completions: completions per group of the training. vLLM's scheduler takes pool.max_groups times
            as many at once; its own default would be 128.
        sleeps: whether the engine must be able to free its GPU's memory while the learner trains.
        serve: how vLLM's HTTP server answers, once the engine is started; None: there is none.
    """

    def __init__(
        self,
        model: ModelConfig,
        pool: PoolConfig,
        transfer: str,
        seed: int,
        load_weights: bool = False,
        drain_s: float | None = None,
        rollout: Rollout | Episodes = one_call,
        num_completions: int = SamplingConfig().num_completions,
        sleeps: bool = False,
        serve: Serve | None = None,
    ) -> None:
        super().__init__(drain_s, rollout)
        self._serve = serve
        self.serving: Serving | None = None
        self._model, self._pool, self._transfer = model, pool, transfer
        self.arguments = vllm_arguments(
            model, pool, transfer, seed, load_weights, drain_s, pool.max_groups * num_completions, sleeps
        )
        self._llm: Any = None
        self._returns_experts = False
        self.version = 0 if load_weights else -1
        self._updating, self._has_started = asyncio.Lock(), asyncio.Event()
        self._node_copy: Any = None
        self._num_finished_tokens = 0
        self._known_turns: dict[tuple[int, ...], Turns] = {}

    async def start(self) -> dict[str, Any]:
        """Start vLLM, which takes 20 s and more; return the seconds and the pid.

        Raises:
            RuntimeError: vLLM's processes do not start; the message holds the first cause.
        """
        pool, on_gpu = self._pool, self._pool.num_gpus > 0
        ensure_home()  # a node of a cluster may lack what the driver's machine has
        os.environ.update(
            VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
        )
        if not on_gpu:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(pool.kv_cache_gib or 1)))
            # vLLM would compile a small kernel for log-probs, which delays the first generation by 4 to 9 s.
            os.environ["TORCH_COMPILE_DISABLE"] = "1"
            # Pinning would put engine and learner on the same cores: let the kernel spread the threads.
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            os.environ["OMP_NUM_THREADS"] = str(pool.num_threads or len(os.sched_getaffinity(0)))
        if self._transfer == "ipc":  # the learner's handles are pickled; they come from it alone, through Ray
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        if self._transfer == "sharded_rdt":
            import ray

            # vLLM's own processes look up the learner's actors
            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        with large_imports():
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

        started = time.perf_counter()
        self._log = ProcessLog()
        self._returns_experts = returns_experts(self._model)
        arguments = of_the_model(self._model, self.arguments, self._returns_experts and on_gpu)
        try:
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except RuntimeError as error:
            raise RuntimeError(_why_not_started(error, self._log)) from error
        self._death = asyncio.get_running_loop().create_future()
        self._watcher = asyncio.create_task(self._watch())
        await self._unless_dead(self._llm.update_weight_version(str(self.version)))
        if self._returns_experts and not on_gpu:
            await self._unless_dead(self._llm.collective_rpc("keep_experts"))
        self._has_started.set()
        if self._transfer == "objects":
            await self.init_transfer({})
        if self._serve is not None:
            await self._begin_to_serve(self._serve)
        self._leave_on_sigterm()
        return {"seconds": time.perf_counter() - started, "pid": os.getpid()}

    async def _begin_to_serve(self, serve: Serve) -> None:
        from gvpo_ray.engines.vllm_server import vllm_app

        app = await vllm_app(self._llm, self._model.path, serve, lambda: self._may_begin(0))
        self.serving = Serving(app, serve.token, serve.host())
        await self.serving.start()
        if isinstance(self._rollout, Agents):
            self._rollout.serving = self.serving

    async def _span(self, call: ModelCall) -> Span:
        """Call the model, as a request of its own.

        vLLM returns a request with several completions only when all of them are finished.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        turns = self._turns(call.sampling)
        params = SamplingParams(
            temperature=call.sampling.temperature,
            top_p=call.sampling.top_p,
            top_k=max(0, call.sampling.top_k),
            min_p=call.sampling.min_p,
            max_tokens=call.max_tokens,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            # these tokens and no others, whatever vLLM reads in the model's folder
            ignore_eos=True,
            stop_token_ids=turns.ends,
            stop=call.sampling.stop or None,
            # decoding token by token costs this process twice as much as all the rest of a completion
            detokenize=bool(call.sampling.stop),
            seed=call.seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # nobody else holds these parameters
        )
        began = self.version
        name = f"{call.running.name}-{call.number}"
        output = await self._final(call.ids, params, name)
        self.num_prompt_tokens += len(call.ids)
        self.num_cached_tokens += output.num_cached_tokens or 0
        (new,) = output.outputs
        self._num_finished_tokens += len(new.token_ids)
        runs = [(int(one.version), one.start, one.end) for one in new.weight_versions or []]
        versions = [version for version, _, _ in runs] or [self.version]
        if self._pool.keep_kv:  # the first token may look at what these weights saw of the prompt
            versions.append(began)
        ids, logprobs = list(new.token_ids), list(new.logprobs.logprobs) if new.token_ids else []
        # after a drain the core may hang, and the next engine reads all tokens again
        is_known = self._returns_experts and new.finish_reason != ABORTED
        experts = await self._experts(name, new) if is_known else None
        return Span(ids, logprobs, new.finish_reason, versions, new.stop_reason, experts, runs)

    async def _experts(self, name: str, output: Any) -> bytes | None:
        """Return the experts that vLLM has chosen for the tokens of a finished request."""
        if self._pool.num_gpus > 0:
            number = self._llm.model_config.get_num_experts()
            chosen = output.routed_experts
            return None if chosen is None else groups.experts_entry(chosen.astype("int32"), number)
        found = await self._unless_dead(self._llm.collective_rpc("take_experts", args=(name,)))
        return next(filter(None, found), None)

    def _longest(self, running: Completions) -> int:
        return int(self._llm.model_config.max_model_len) - len(running.prompt_ids)

    def _text(
        self, before: Sequence[int], ids: Sequence[int], stop_reason: Any, sampling: SamplingConfig
    ) -> str:
        return self._turns(sampling).text(before, ids, stop_reason)

    def _turns(self, sampling: SamplingConfig) -> Turns:
        """Return where completions end with these settings; a run and its evaluations have their own."""
        key = (*sampling.stop_token_ids,)
        if key not in self._known_turns:
            self._known_turns[key] = Turns(self._model, self._llm.get_tokenizer(), sampling)
        return self._known_turns[key]

    async def _cut_off(self) -> None:
        await super()._cut_off()
        # vLLM returns an aborted request's tokens so far without asking its core, which may hang.
        names = [
            f"{running.name}-{i}"
            for running in self._in_flight
            if isinstance(running, Completions)
            for i in range(running.size)
        ]
        if not self._llm.errored:
            await self._llm.abort(names)

    async def _final(self, prompt_ids: list[int], params: Any, request_id: str) -> Any:
        from vllm.inputs import tokens_input

        final = None
        # with keep_kv the cache still holds prefixes that older weights have read
        prompt = tokens_input(prompt_ids, cache_salt=str(self.version) if self._pool.keep_kv else None)
        async for output in self._llm.generate(prompt, params, request_id=request_id):
            final = output
        return final

    async def _watch(self) -> None:
        """Check once a second whether vLLM's core is dead, and then end this process after ZOMBIE_S.

        Callers of vLLM that wait for a core that was killed (SIGKILL, out of memory) are never woken.
        """
        while not self._llm.errored:
            await asyncio.sleep(1.0)
        self._death.set_exception(self._llm.dead_error)
        self._death.exception()  # marks it as seen: asyncio complains of an exception that nobody awaited
        await asyncio.sleep(ZOMBIE_S)
        os._exit(1)

    async def _unless_dead(self, work: Awaitable[Any]) -> Any:
        """Return the result of `work`; raise vLLM's EngineDeadError as soon as vLLM's core is dead.

        Every call of vLLM that asks its core goes through here. The error has the first cause as a note.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        task = asyncio.ensure_future(work)
        await asyncio.wait([task, self._death], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            # marks a later error as seen, since nobody awaits this task
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
            task.cancel()
        try:
            return task.result() if task.done() else self._death.result()
        except EngineDeadError as error:
            if not hasattr(error, "__notes__"):
                manager = self._llm and self._llm.engine_core.resources.engine_manager
                # a manager of Ray actors knows no processes
                statuses: dict[str, int] = getattr(manager, "finished_procs", dict)()
                error.add_note(why_it_died(self._log.lines(), statuses))
            raise

    # --- weights --------------------------------------------------------------------------------------------

    async def update(
        self, version: int, weights: dict[str, Any], probe: dict[str, Any] | None = None
    ) -> dict[str, float]:
        """Fetch newer weights and swap them in.

        Completions in flight pause during the swap and go on with the new weights.

        Args:
            version: the new version.
            weights: what the learner published (ObjectPublisher.publish), with object refs or what they refer
                to, and `adapter` (peft's adapter_config.json) if they are an adapter's.
            probe: token ids of some sequences and the learner's log-probs of them, to check this engine's
                log-probs against.

        Returns:
            `copy_s` and `pause_s`, the seconds of the copy (generation goes on) and of the pause (it stops),
            and with a probe `parity_mean`, `parity_rms` and `parity_max`, differences of log-probs in nats
            per token.

        Raises:
            WeightMismatch: the log-probs differ by more than pool.parity_limit; the message names the worst
                token.
        """
        from gvpo_ray.weights.node_copy import NodeCopy

        async with self._updating:
            if self._transfer != "objects":  # the learner has sent the weights already
                return {"copy_s": 0.0, "pause_s": 0.0, **(await self._check(probe) if probe else {})}
            started = time.perf_counter()
            adapter = weights.get("adapter")
            update_info = {} if adapter is None else {"adapter_scale": adapter["lora_alpha"] / adapter["r"]}
            self._node_copy = self._node_copy or await asyncio.to_thread(NodeCopy)
            paths, reading = await asyncio.to_thread(self._node_copy.take, weights, _fetcher())
            with reading:
                copied = time.perf_counter()
                await self.begin_update()
                await self.receive({"paths": paths, **update_info})
                await self.finish_update(version)
            done = time.perf_counter()
            parity = await self._check(probe) if probe else {}
            return {"copy_s": copied - started, "pause_s": done - copied, **parity}

    async def init_transfer(self, init_info: dict[str, Any]) -> None:
        """Join what brings the weights; the learner may call this before vLLM has started."""
        await self._has_started.wait()
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        request = WeightTransferInitRequest(init_info=init_info)
        await self._unless_dead(self._llm.init_weight_transfer_engine(request))

    async def begin_update(self) -> None:
        """Pause generation, and make vLLM ready for new weights."""
        self._is_updating, self._last_token_at = True, time.time()
        # clear_cache: keys and values of the old weights are recomputed, so that a prompt's cached prefix is
        # never stale and what follows the swap is exactly the new policy given the tokens so far.
        clear = not self._pool.keep_kv
        await self._unless_dead(self._llm.pause_generation(mode="keep", clear_cache=clear))
        await self._unless_dead(self._llm.start_weight_update())

    async def receive(self, update_info: dict[str, Any]) -> None:
        """Load new weights in vLLM's workers; `update_info` says where they are, or how they come."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        request = WeightTransferUpdateRequest(update_info=update_info)
        await self._unless_dead(self._llm.update_weights(request))

    async def finish_update(self, version: int) -> None:
        """Take `version` as the engine's version, and resume generation."""
        await self._unless_dead(self._llm.finish_weight_update(str(version)))
        await self._unless_dead(self._llm.resume_generation())
        self._is_updating = False
        await self._has_version(version)

    async def sleep(self) -> None:
        """Move the weights to the host's memory and drop the keys and values; generation stands still.

        The groups in flight keep their tokens; vLLM reads them again after `wake`. On a CPU vLLM only pauses.
        """
        async with self._updating:
            if not self._is_asleep:
                self._is_updating, self._last_token_at = (
                    True,
                    time.time(),
                )  # a sleep that does not come is a hang
                await self._unless_dead(self._llm.sleep(level=1, mode="keep"))
                self._is_updating = False
                await super().sleep()

    async def wake(self) -> None:
        """Take the GPU's memory again, and go on."""
        async with self._updating:
            if self._is_asleep:
                self._is_updating, self._last_token_at = True, time.time()
                await self._unless_dead(self._llm.wake_up())
                self._is_updating = False
                await super().wake()

    async def _check(self, probe: dict[str, Any]) -> dict[str, float]:
        """Compare this engine's log-probs of the probe with the learner's, token by token."""
        from vllm import SamplingParams

        from gvpo_ray.weights.transfer import WeightMismatch

        worst, worst_text, total, squares, count = 0.0, "", 0.0, 0.0, 0
        for sequence, (ids, expected) in enumerate(zip(probe["ids"], probe["logprobs"], strict=True)):
            output = await self._unless_dead(
                self._final(
                    ids, SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=1.0), uuid.uuid4().hex
                )
            )
            for position in range(1, len(ids)):
                got = output.prompt_logprobs[position][ids[position]].logprob
                difference = abs(got - expected[position - 1])
                total, squares, count = total + difference, squares + difference**2, count + 1
                if not difference <= worst:  # also true for nan
                    worst = difference
                    worst_text = (
                        f"token {ids[position]} at position {position} of probe {sequence}: "
                        f"engine {got:.4f}, learner {expected[position - 1]:.4f}"
                    )
        mean = total / max(1, count)
        limit = self._pool.parity_limit(self._model.dtype)
        if not mean <= limit:
            raise WeightMismatch(
                f"version {self.version}: engine and learner differ by {mean:.4f} nats per token on average "
                f"(allowed {limit:g}); worst is {worst_text}"
            )
        rms = math.sqrt(squares / max(1, count))
        return {"parity_mean": mean, "parity_rms": rms, "parity_max": worst}

    async def status(self) -> dict[str, Any]:
        """Return the status of BaseEngine, with the tokens that vLLM has written so far."""
        if self._llm is not None:
            # vLLM's own count (its stat loggers) costs this process a quarter more per token. Tokens on their
            # way from a request to its completion are in neither sum for a moment, so the count may fall.
            states = self._llm.output_processor.request_states.values()
            num_tokens = self._num_finished_tokens + sum(
                state.detokenizer.num_output_tokens() for state in states
            )
            if num_tokens > self._num_tokens:
                self._num_tokens, self._last_token_at = num_tokens, time.time()
        return {**await super().status(), "address": self.serving and self.serving.address}

    async def close(self) -> None:
        """End vLLM's core process."""
        await super().close()
        if self._node_copy is not None:  # first: vLLM may take longer to end than this process has
            self._node_copy.close()
        if self.serving is not None:
            await self.serving.close()
        if self._llm is not None:
            self._watcher.cancel()
            self._llm.shutdown()
            self._llm = None


def _fetcher() -> Callable[[Sequence[Any]], list[Any]]:
    """Return a function that another thread may call to await some object refs on this event loop."""
    loop = asyncio.get_running_loop()

    async def one(part: Any) -> Any:
        return await part if isinstance(part, Awaitable) else part

    async def fetched(parts: Sequence[Any]) -> list[Any]:
        return await asyncio.gather(*map(one, parts))

    return lambda parts: asyncio.run_coroutine_threadsafe(fetched(parts), loop).result()


def _why_not_started(error: RuntimeError, log: ProcessLog) -> str:
    """Return one line with the first cause of an error of vLLM's start."""
    text = " ".join(str(error).split())
    if "root cause" not in text:
        return text
    if cause := last_error(log.lines()):
        return f"vLLM did not start: {cause}"
    if ended := re.search(r": (-?\d+)\b", text):  # "Failed core proc(s): {'EngineCore': -9}"
        return f"vLLM did not start: its core process {how_it_ended(int(ended[1]))} and wrote no cause"
    return " ".join([text, *(f"(log: {path})" for path in log.paths)])
