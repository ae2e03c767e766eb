"""The registry lists the objectives by their names in the config.

A new objective is a file of its own, a class of options in config/loss.py and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gvpo_ray.losses import cispo, dpo, dr_grpo, grpo, gspo, maxrl, oapl, reinforce, rloo, stale_data
from gvpo_ray.losses.batch import Computed, LossBatch

OBJECTIVES: dict[str, Callable[[LossBatch, Any], Computed]] = {
    "gvpo": stale_data.objective,
    "grpo": grpo.objective,
    "dr_grpo": dr_grpo.objective,
    "rloo": rloo.objective,
    "reinforce": reinforce.objective,
    "gspo": gspo.objective,
    "cispo": cispo.objective,
    "maxrl": maxrl.objective,
    "oapl": oapl.objective,
    "dpo": dpo.objective,
}
"""The objective of each `loss.objective`; its second argument is that objective's class in config/loss.py."""
