"""The registry lists the backends by their names in the config."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.learner.backends.base import Backend
from gvpo_ray.learner.backends.ddp import DDPBackend
from gvpo_ray.learner.backends.deepspeed import DeepSpeedBackend
from gvpo_ray.learner.backends.fsdp import FSDPBackend


def make_backend(config: LearnerConfig, dtype: torch.dtype, device: torch.device) -> Backend:
    """Make the backend that `learner.backend` names; it has no model yet.

    Args:
        config: the config section `learner`.
        dtype: the type that forward passes compute in.
        device: this rank's device.
    """
    backends: dict[str, Callable[..., Backend]] = {
        "ddp": DDPBackend,
        "fsdp": FSDPBackend,
        "deepspeed": DeepSpeedBackend,
    }
    return backends[config.backend](config, dtype, device)
