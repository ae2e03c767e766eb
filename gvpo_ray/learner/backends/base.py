"""A backend spreads the learner's parameters, gradients and optimizer over its ranks.

Only the policy (learner/policy.py) and its parts use this interface. A result does not depend on which
backend computes it, except through the order of float32 sums.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gvpo_ray.config.learner import LearnerConfig


class Backend(Protocol):
    """A backend loads the model, wraps it once, and then computes; its methods are called on every rank.

    Every rank makes the same number of forward and backward passes per update, because with sharded
    parameters they are collectives. All backends average gradients over the ranks that share the data, so a
    loss that is a share of a global sum is multiplied by data_size.
    """

    dtype: torch.dtype
    """The type of the parameters that forward passes read."""
    data_rank: int
    """The share of the groups that this rank computes, 0..data_size-1."""
    data_size: int
    """The number of shares that the groups are split into.

    Ranks with the same share follow each other, and compute the same pass together."""

    def reading(self, config: Any) -> dict[str, Any]:
        """Return arguments of from_pretrained that read this rank's shards of a model; {}: it is read whole.

        Args:
            config: the model's.
        """
        ...

    def load(self, read: Callable[[], nn.Module]) -> nn.Module:
        """Call `read` once, which returns a whole model on the CPU; return the model where it is needed."""
        ...

    def wrap(self, module: nn.Module) -> None:
        """Spread the module over the ranks and make its optimizer; the methods below need this."""
        ...

    def forward(self, inputs: dict[str, Any], is_last: bool) -> Tensor:
        """Call the module with these keyword arguments.

        Args:
            inputs: the module's arguments.
            is_last: with gradients, whether this is the update's last pass.
        """
        ...

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate the gradient of a scalar loss; is_last: in the update's last pass."""
        ...

    def step(self, learning_rate: float) -> float:
        """Make one optimizer update and clear the gradients; return their norm before clipping.

        Where that norm is not finite, the parameters and the optimizer stay as they are.
        """
        ...

    def full(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole parameter, on every rank."""
        ...

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a parameter to a whole value, which is the same on every rank."""
        ...

    def local(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return this rank's part of the parameter, as the tensors that forward passes read."""
        ...

    def get_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the training state of a parameter, for a checkpoint.

        It is `master`, the weight that is updated, and after the first update also `exp_avg` and
        `exp_avg_sq`. They are DTensors where the backend has sharded them so, else whole on every rank.
        Before the first update {} stands for the parameter itself.
        """
        ...

    def init_state(self, num_updates: int) -> None:
        """Make the optimizer's state as after `num_updates` updates, for `set_state` to fill."""
        ...

    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Restore what `get_state` returned for a parameter, after its tensors were overwritten."""
        ...


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def adamw(module: nn.Module, config: LearnerConfig) -> torch.optim.AdamW:
    """Make torch's AdamW for the trainable parameters of a module.

    It is the fused one, on every device: no temporary tensors, and on a CPU vectors and threads.
    """
    groups: dict[Any, list[nn.Parameter]] = {}  # a fused update takes tensors of one mesh, or of none
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters} for parameters in groups.values()],
        lr=config.learning_rate,
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def fill_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], num_updates: int) -> None:
    """Give an AdamW the state, all zeros, that it would otherwise make at its first step.

    Args:
        optimizer: an AdamW without state.
        parameters: the optimizer's parameters.
        num_updates: how many updates the state counts.
    """
    for parameter in parameters:
        optimizer.state[parameter] = {
            # where the fused AdamW would put it
            "step": torch.tensor(float(num_updates), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """Let torch compute on this rank's share of all CPUs of the machine within this context."""
    usual = torch.get_num_threads()
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(usual, share))
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def autocast_to(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return torch's autocast to `dtype`, which is switched off unless that is bfloat16."""
    return torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)


def _grouped_mm(kind: str) -> Callable[..., Tensor]:
    """Return torch's product of a mixture's experts as autocast takes it on devices of a kind."""

    def product(
        left: Tensor, right: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None
    ) -> Tensor:
        # float64 is left alone, as by autocast elsewhere; and torch's kernel wants rows of 16 bytes.
        fits = all(size % 8 == 0 for size in (*left.shape[-1:], *right.shape[-2:]))
        is_cast = fits and torch.float64 not in (left.dtype, right.dtype)
        dtype = torch.get_autocast_dtype(kind) if is_cast else right.dtype
        with torch.autocast(kind, enabled=False):
            result: Tensor = torch.ops.aten._grouped_mm(
                left.to(dtype), right.to(dtype), offs, bias, out_dtype
            )
        return result

    return product


# Torch's autocast leaves this product out, and transformers then takes it in the type of the weights: experts
# would be computed in float32 beside layers in bfloat16.
_AUTOCAST: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
for _kind in ("CPU", "CUDA"):
    _AUTOCAST.impl("_grouped_mm", _grouped_mm(_kind.lower()), f"Autocast{_kind}")
