"""How an actor is asked for: its name, and its resources."""

from __future__ import annotations

import uuid

from gvpo_ray.config.run import LearnerConfig, PoolConfig


def actor_name(text: str) -> str:
    """An actor's name on the dashboard. Ray wants each once: the one of a run that was stopped just now may still be there."""
    return f"{text}-{uuid.uuid4().hex[:6]}"


def resources_of(actor: PoolConfig | LearnerConfig) -> dict[str, float]:
    """Of one engine or learner worker, under Ray's names."""
    accelerator = {f"accelerator_type:{actor.accelerator_type}": 0.001} if actor.accelerator_type else {}
    own = {"CPU": actor.num_cpus, "GPU": actor.num_gpus, **actor.resources, **accelerator}
    return {name: number for name, number in own.items() if number}
