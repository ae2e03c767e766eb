"""The plan of a run is what it asks of a cluster; one that a machine can never place is refused."""

from __future__ import annotations

import os

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.run import GVPOConfig, RayConfig


def resource_plan(config: GVPOConfig) -> list[tuple[str, int, float, float]]:
    """Return the actors that the run asks Ray for, as (kind, number, CPUs of each, GPUs of each)."""
    pools = config.engines.all_pools()
    engines = {name: "engine" if len(pools) == 1 else f"engine of {name}" for name in pools}
    return [
        ("learner worker", config.learner.num_workers, config.learner.num_cpus, config.learner.num_gpus),
        *((engines[name], pool.num, pool.num_cpus, pool.num_gpus) for name, pool in pools.items()),
        ("verifier", config.verifiers.num, config.verifiers.num_cpus, 0.0),
        *([("environment", e.num, e.num_cpus, 0.0)] if (e := config.environment) else []),
        *(
            (f"reward model {name}", r.num, r.num_cpus, r.num_gpus)
            for name, r in config.verifiers.rewards.items()
            if r.model
        ),
        *([("reference", t.num, t.num_cpus, t.num_gpus)] if (t := config.loss.reference_model) else []),
    ]


def engine_layouts(config: GVPOConfig) -> list[str]:
    """Return a line for each pool of engines of several GPUs: how vLLM splits one, and where it may be."""
    lines = []
    for name, pool in config.engines.all_pools().items():
        if pool.url is not None or pool.num_gpus <= 1:
            continue
        sizes = " x ".join(f"{size} {kind.split('_')[0]}" for kind, size in pool.sizes.items() if size > 1)
        experts = ", experts shared out" if pool.vllm.get("enable_expert_parallel") else ""
        where = (
            f"a placement group of {pool.num_gpus:g} x 1 GPU and its actor, on as few nodes as have room"
            if pool.is_spread
            else "all on one node"
        )
        lines.append(f"engine of {name}: {sizes} parallel{experts}; {where}")
    return lines


def check_resources(
    config: GVPOConfig,
    num_cpus: float,
    num_gpus: float,
    engines: bool = True,
    learner: bool = True,
    references: bool = True,
) -> None:
    """Refuse a plan that the machine can never place.

    Args:
        config: of the run.
        num_cpus: logical CPUs of the machine.
        num_gpus: GPUs of the machine.
        engines: whether this run starts engines, verifiers and reward models.
        learner: whether this run starts a learner.
        references: whether engines' groups are scored by another model that is the reference.

    Raises:
        ConfigError: one line that names what asks for too much.
    """
    keys = {"learner worker": "learner.num_workers", "engine": "engines.num", "verifier": "verifiers.num"}
    keys |= {"environment": "environment.num", "reference": "loss.reference.num"}
    absent = (
        *(() if engines else ("engine", "verifier", "environment", "reward model")),
        *(() if engines and references else ("reference",)),
        *(() if learner else ("learner worker",)),
    )
    plan = [row for row in resource_plan(config) if not row[0].startswith(absent)]
    for column, unit, available in ((0, "CPUs", num_cpus), (1, "GPUs", num_gpus)):
        total = 0.0
        for who, count, *shares in plan:
            each = shares[column]
            total += count * each
            if count * each > available + 1e-9:
                raise ConfigError(
                    f"{keys.get(who, who)}: {count} x {each:g} {unit} are more than the {available:g} "
                    f"{unit} of this machine"
                )
        if total > available + 1e-9:
            raise ConfigError(
                f"the run asks for {total:g} {unit} in all (see `gvpo-ray check`), this machine has "
                f"{available:g}: lower engines.num, learner.num_workers or their num_{unit.lower()}"
            )


def cluster_address(config: RayConfig) -> str | None:
    """Return the address of the cluster to join; None for an embedded Ray."""
    address = config.address or os.environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address
