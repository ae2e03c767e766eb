"""How the learner's parameters, gradients and optimizer are spread over its ranks: the seam that every
backend stands behind.

learner/policy.py is its only user. A result never depends on which backend computes it, but for the order of
float32 sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gvpo_ray.config.learner import LearnerConfig


class Backend(Protocol):
    """Every rank makes the same number of forward and backward passes per update: with sharded parameters
    they are collectives.

    A backend loads the model, wraps it once, and then computes. All average gradients over the ranks that
    share the data, so a loss that is a share of a global sum is multiplied by data_size.
    """

    dtype: torch.dtype  # of the parameters that forward passes read
    data_rank: int  # which share of the groups this rank computes,
    data_size: int  # of how many

    # calls `read` once, for a whole model on the CPU, and returns it where this backend wants it
    def load(self, read: Callable[[], nn.Module]) -> nn.Module: ...
    # spreads the module over the ranks; what is below needs it
    def wrap(self, module: nn.Module) -> None: ...

    # is_last: of this update, where there are gradients
    def forward(self, inputs: dict[str, Tensor], is_last: bool) -> Tensor: ...
    def backward(self, loss: Tensor, is_last: bool) -> None: ...
    # returns the gradient's norm before clipping; where it is not finite, no update
    def step(self, learning_rate: float) -> float: ...
    def full(self, parameter: nn.Parameter) -> Tensor: ...  # the whole parameter, on every rank
    # with a whole value, the same on every rank
    def fill(self, parameter: nn.Parameter, value: Tensor) -> None: ...
    # this rank's part of it, which forward passes read
    def local(self, parameter: nn.Parameter) -> list[Tensor]: ...
    # exp_avg, exp_avg_sq, master: whole, float32
    def get_state(self, parameter: nn.Parameter) -> dict[str, Tensor]: ...
    def init_state(self, num_updates: int) -> None: ...  # make the state that set_state then fills
    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None: ...


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def adamw(module: nn.Module, config: LearnerConfig) -> torch.optim.AdamW:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.adam_betas, weight_decay=config.weight_decay
    )


def fill_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], num_updates: int) -> None:
    """AdamW makes its state at its first step; one that is restored must be there before."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(num_updates)),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def autocast_to(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
