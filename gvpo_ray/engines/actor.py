"""Engines become Ray actors here."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gvpo_ray.actors import actor_name
from gvpo_ray.config.engines import EnginesConfig, PoolConfig, SamplingConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.engines.openai_engine import ServerEngine
from gvpo_ray.engines.rollout import Episodes, Rollout, one_call
from gvpo_ray.engines.serving import Serve
from gvpo_ray.engines.vllm_engine import Engine
from gvpo_ray.files import writing
from gvpo_ray.groups import from_wire, num_sampled_tokens, to_wire


class _Engine(Protocol):
    """_Engine is the part of an engine that ActorMethods uses."""

    refusals: dict[int, str]

    async def start(self) -> dict[str, Any]: ...

    async def generate(
        self,
        group: pa.Table,
        sampling: SamplingConfig,
        min_version: int = 0,
        seed: int | None = None,
        *kept: pa.Table,
    ) -> tuple[pa.Table, int]: ...

    async def finished(self) -> tuple[list[int], pa.Table]: ...


class ActorMethods:
    """ActorMethods are the methods that an engine has as a Ray actor, beside those of base.py.

    It is a mix-in for an engine. Group tables travel as Arrow IPC buffers, made by groups.to_wire.
    """

    async def start_here(self: _Engine) -> dict[str, Any]:
        """Start the engine; return the report of its `start` and `node`, the id of its Ray node."""
        return {**await self.start(), "node": ray.get_runtime_context().get_node_id()}

    @ray.method(num_returns=2)
    async def sample(
        self: _Engine,
        prompt: pa.Buffer,
        sampling: SamplingConfig,
        min_version: int,
        seed: int | None,
        *kept: pa.Buffer,
    ) -> tuple[pa.Buffer, tuple[int, int, str]]:
        """Sample the completions of one group, as the engine's `generate` does.

        Two return values, so that the driver can await the numbers while the table stays in the object store.

        Args:
            prompt: the group's one row.
            sampling: how to sample, and how many completions the group has.
            min_version: oldest weights to start with.
            seed: seed of this group alone, or None.
            kept: tables with finished or begun completions; rows of other groups are ignored.

        Returns:
            The sampled group, and (number of completions that another engine has to sample, number of new
            tokens, why a server refused to sample the rest of them, or "").
        """
        group = from_wire(prompt)
        tables = [from_wire(part) for part in kept]
        own = [
            part
            for table in tables
            if len(part := table.filter(pc.equal(table["group_id"], group["group_id"][0])))
        ]
        sampled, missing = await self.generate(group, sampling, min_version, seed, *own)
        num_tokens = num_sampled_tokens(sampled) - sum(map(num_sampled_tokens, own))
        refusal = self.refusals.pop(group["group_id"][0].as_py(), "")
        return to_wire(sampled), (missing, num_tokens, refusal)

    async def take_finished(self: _Engine) -> tuple[list[int], pa.Buffer]:
        """Wait for finished completions of unfinished groups; return the rows' group ids, and the rows.

        No group ids: the engine is closed.
        """
        group_ids, table = await self.finished()
        return group_ids, to_wire(table)


class _EngineActor(ActorMethods, Engine):
    async def update(
        self, version: int, weights: dict[str, Any], probe: dict[str, Any] | None = None
    ) -> dict[str, float]:
        """Take newer weights, as Engine.update does; a full disk is named (DiskFull)."""
        with writing(Path(tempfile.gettempdir())):  # where they go if shared memory has no room
            return await super().update(version, weights, probe)


class _ServerActor(ActorMethods, ServerEngine):
    pass


def engine_maker(
    model: ModelConfig,
    config: EnginesConfig,
    seed: int,
    load_weights: bool,
    system_prompt: str | None,
    template: str | None = None,
    rollout: Rollout | Episodes = one_call,
    num_completions: int = SamplingConfig().num_completions,
    serve: Serve | None = None,
) -> MakeEngine:
    """Return the function that makes an engine actor: a client if its pool has a `url`, else vLLM.

    Args:
        model: the policy.
        config: all pools, and what they have in common.
        seed: the run's seed; engine `number` of a vLLM pool gets seed + number, in 32 bits.
        load_weights: whether vLLM starts with the weights of model.path, or waits for the learner's.
        system_prompt: first message of every request to a server.
        template: of the user's message to a server.
        rollout: makes one completion at an engine of our own, or the episodes of groups.
        num_completions: completions per group, by which vLLM's scheduler is sized.
        serve: how engines of our own serve; None: they do not.
    """

    def make(name: str, pool: PoolConfig, number: int, placement: PlacementGroup | None = None) -> Any:
        options = actor_options(name, pool, number, placement)
        if pool.url is not None:
            key = os.environ.get(pool.url_key_variable) if pool.url_key_variable else None
            return (
                ray.remote(_ServerActor)
                .options(**options)
                .remote(name, model, pool, system_prompt, template, key, config.drain_s)
            )
        return (
            ray.remote(_EngineActor)
            .options(**options)
            .remote(
                model,
                pool,
                config.weight_transfer,
                (seed + number) % 2**32,
                load_weights,
                config.drain_s,
                rollout,
                num_completions,
                config.colocated == "sleep",
                serve,
            )
        )

    return make


def actor_options(
    name: str, pool: PoolConfig, number: int, placement: PlacementGroup | None = None
) -> dict[str, Any]:
    """Return Ray's options of an engine's actor.

    Args:
        name: of its pool.
        pool: its pool.
        number: in its pool.
        placement: the placement group of an engine whose GPUs may be of several nodes, of bundles as
            actors.bundles_of has them. The actor is in the first of them, and a process of vLLM's in each.
    """
    options: dict[str, Any] = {
        "name": actor_name(f"{name}-{number}"),
        "max_concurrency": 10_000,
        "max_restarts": 0,
        "num_cpus": pool.num_cpus,
    }
    if placement is None:
        own = {"num_gpus": pool.num_gpus, "accelerator_type": pool.accelerator_type}
        return options | own | {"resources": pool.resources}
    # vLLM looks for GPUs before it has started its processes, and Ray hides all from an actor that has none
    visible = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    return options | {
        "resources": pool.resources,
        "runtime_env": {"env_vars": visible},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
        ),
    }


MakeEngine = Callable[..., Any]
"""(pool's name, pool, number) -> handle of a new actor with an engine's methods and ActorMethods.

For an engine whose GPUs may be of several nodes its placement group comes as a fourth argument."""
