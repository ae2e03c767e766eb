"""An engine as a Ray actor: its methods, its handle, and how one is made."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from gvpo_ray.actors import actor_name
from gvpo_ray.config.engines import EnginesConfig, PoolConfig, SamplingConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.engines.openai_engine import ServerEngine
from gvpo_ray.engines.vllm_engine import Engine
from gvpo_ray.groups import from_wire, num_completion_tokens, to_wire


class Remote:
    """What turns an engine into an actor. Tables travel as groups.to_wire makes them."""

    async def start_here(self) -> dict[str, Any]:
        return {**await self.start(), "node": ray.get_runtime_context().get_node_id()}  # type: ignore[attr-defined]

    @ray.method(num_returns=2)
    async def sample(
        self,
        prompt: pa.Buffer,
        sampling: SamplingConfig,
        min_version: int,
        seed: int | None,
        *kept: pa.Buffer,
    ) -> tuple[pa.Buffer, tuple[int, int]]:
        """The sampled group; and how many of its completions are missing, and how many tokens were written:
        what the driver awaits.
        """
        group = from_wire(prompt)
        tables = [from_wire(part) for part in kept]
        own = [
            part
            for table in tables
            if len(part := table.filter(pc.equal(table["group_id"], group["group_id"][0])))
        ]
        sampled, missing = await self.generate(group, sampling, min_version, seed, *own)  # type: ignore[attr-defined]
        return to_wire(sampled), (
            missing,
            num_completion_tokens(sampled) - sum(map(num_completion_tokens, own)),
        )

    @ray.method(num_returns=2)
    async def hand_over(self) -> tuple[pa.Buffer, list[int]]:
        group_ids, table = await self.finished()  # type: ignore[attr-defined]
        return to_wire(table), group_ids


class _EngineActor(Remote, Engine):
    pass


class _ServerActor(Remote, ServerEngine):
    pass


def engine_maker(
    model: ModelConfig, config: EnginesConfig, seed: int, load_weights: bool, system_prompt: str | None
) -> MakeEngine:
    """How the engines of a run are made: vLLM, or the client of a pool's server."""

    def make(name: str, pool: PoolConfig, number: int) -> Any:
        resources = {
            "num_cpus": pool.num_cpus,
            "num_gpus": pool.num_gpus,
            "resources": pool.resources,
            "accelerator_type": pool.accelerator_type,
        }
        options = {
            "name": actor_name(f"{name}-{number}"),
            "max_concurrency": 10_000,
            "max_restarts": 0,
            **resources,
        }
        if pool.url is not None:
            key = os.environ.get(pool.url_key_variable) if pool.url_key_variable else None
            return (
                ray.remote(_ServerActor)
                .options(**options)
                .remote(name, model, pool, system_prompt, key, config.drain_s)
            )
        return (
            ray.remote(_EngineActor)
            .options(**options)
            .remote(model, pool, config.weight_transfer, seed + number, load_weights, config.drain_s)
        )

    return make


MakeEngine = Callable[[str, PoolConfig, int], Any]
"""(pool's name, pool, number) -> handle of a new actor with Engine's methods, `sample` and `hand_over`."""
