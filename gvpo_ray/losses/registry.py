"""The objectives by their names in the config. A new one is a file, a class in config/loss.py and a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gvpo_ray.losses import dr_grpo, grpo, reinforce, rloo, stale_data
from gvpo_ray.losses.batch import Computed, LossBatch

OBJECTIVES: dict[str, Callable[[LossBatch, Any], Computed]] = {
    "gvpo": stale_data.objective,
    "grpo": grpo.objective,
    "dr_grpo": dr_grpo.objective,
    "rloo": rloo.objective,
    "reinforce": reinforce.objective,
}
"""By `loss.objective`; the second argument is the options of the class of that name (config/loss.py)."""
