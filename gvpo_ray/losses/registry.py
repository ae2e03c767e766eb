"""The objectives by their names in the config; each is one page, as its paper writes it, in pure torch."""

from collections.abc import Callable
from typing import Any

from gvpo_ray.losses.dr_grpo import dr_grpo_loss
from gvpo_ray.losses.grpo import grpo_loss
from gvpo_ray.losses.reinforce import reinforce_loss
from gvpo_ray.losses.rloo import rloo_loss

OBJECTIVES: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "grpo": (grpo_loss, ("clip_low", "clip_high", "kl_coefficient")),
    "dr_grpo": (dr_grpo_loss, ("clip_low", "clip_high", "kl_coefficient")),
    "rloo": (rloo_loss, ("kl_coefficient",)),
    "reinforce": (reinforce_loss, ("kl_coefficient", "baseline")),
}
"""What gvpo is compared with, on the same inputs, and the options of each (LossConfig)."""
