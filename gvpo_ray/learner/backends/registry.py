"""The backends by their names in the config."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.learner.backends.base import Backend
from gvpo_ray.learner.backends.ddp import DDPBackend
from gvpo_ray.learner.backends.deepspeed import DeepSpeedBackend
from gvpo_ray.learner.backends.fsdp import FSDPBackend


def make_backend(config: LearnerConfig, dtype: torch.dtype, device: torch.device) -> Backend:
    """The backend of learner.backend, with its mesh and no model yet. dtype: what is computed in."""
    backends: dict[str, Callable[..., Backend]] = {
        "ddp": DDPBackend,
        "fsdp": FSDPBackend,
        "deepspeed": DeepSpeedBackend,
    }
    return backends[config.backend](config, dtype, device)
