"""The registry lists the backends by their names in the config.

A new backend is a file beside this one, its name in config/learner.py and a line here.
"""

from __future__ import annotations

from collections.abc import Callable

from gvpo_ray.learner.backends.base import Backend
from gvpo_ray.learner.backends.ddp import DDPBackend
from gvpo_ray.learner.backends.deepspeed import DeepSpeedBackend
from gvpo_ray.learner.backends.fsdp import FSDPBackend
from gvpo_ray.learner.backends.native import NativeBackend

BACKENDS: dict[str, Callable[..., Backend]] = {
    "ddp": DDPBackend,
    "fsdp": FSDPBackend,
    "deepspeed": DeepSpeedBackend,
    "native": NativeBackend,
}
"""The class of each `learner.backend`.

It is called with the config section `learner`, the type that forward passes compute in, and this rank's
device; the backend has no model yet.
"""
