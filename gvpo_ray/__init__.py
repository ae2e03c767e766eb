"""gvpo_ray: post-train language models with GVPO (arXiv 2504.19599) on a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gvpo_ray.config.run import ConfigError, GVPOConfig

if TYPE_CHECKING:
    from gvpo_ray.engines.pools import EngineGroup
    from gvpo_ray.failures import RunError
    from gvpo_ray.learner.workers import LearnerGroup
    from gvpo_ray.losses.gvpo import gvpo_loss
    from gvpo_ray.run.algorithm import GVPO
    from gvpo_ray.verifiers.pool import VerifierGroup

__version__ = "0.1.0"
__all__ = ["GVPO", "ConfigError", "EngineGroup", "GVPOConfig", "LearnerGroup", "RunError", "VerifierGroup", "gvpo_loss"]


def __getattr__(name: str) -> Any:
    """Ray and torch are imported when they are first asked for: `gvpo-ray --help` and a bad config answer at once."""
    if name == "gvpo_loss":
        from gvpo_ray.losses.gvpo import gvpo_loss

        return gvpo_loss
    if name in __all__:
        from gvpo_ray.run import algorithm as controller

        return getattr(controller, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
