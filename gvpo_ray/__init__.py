"""The package gvpo_ray post-trains language models with GVPO (arXiv 2504.19599) on a Ray cluster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gvpo_ray.actors import RunError
    from gvpo_ray.config.base import ConfigError
    from gvpo_ray.config.run import GVPOConfig
    from gvpo_ray.engines.pools import EngineGroup
    from gvpo_ray.learner.workers import LearnerGroup
    from gvpo_ray.losses.gvpo import gvpo_loss
    from gvpo_ray.run.algorithm import GVPO
    from gvpo_ray.sandbox.functions import OutOfReach
    from gvpo_ray.verifiers.pool import VerifierGroup

__version__ = "0.1.0"
__all__ = [
    "GVPO",
    "ConfigError",
    "EngineGroup",
    "GVPOConfig",
    "LearnerGroup",
    "OutOfReach",
    "RunError",
    "VerifierGroup",
    "gvpo_loss",
]

_HOMES = {
    "GVPO": "run.algorithm",
    "ConfigError": "config.base",
    "EngineGroup": "engines.pools",
    "GVPOConfig": "config.run",
    "LearnerGroup": "learner.workers",
    "OutOfReach": "sandbox.functions",
    "RunError": "actors",
    "VerifierGroup": "verifiers.pool",
    "gvpo_loss": "losses.gvpo",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `gvpo-ray --help` loads neither torch nor Ray."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"gvpo_ray.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
