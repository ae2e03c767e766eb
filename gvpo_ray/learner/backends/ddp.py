"""The DDP backend replicates parameters, gradients and optimizer on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.learner.backends.base import adamw, autocast_to, fill_state, ranks


class DDPBackend:
    """This backend is torch's DistributedDataParallel, with float32 parameters; bfloat16 is by autocast.

    Args:
        config: the config section `learner`.
        dtype: the type that forward passes compute in.
        device: this rank's device.
    """

    def __init__(self, config: LearnerConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._compute_dtype, self._device = config, dtype, device
        self.dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        self.data_rank, self.data_size = ranks()

    def reading(self, config: Any) -> dict[str, Any]:
        """Return {}: the model is read whole."""
        return {}

    def load(self, read: Callable[[], nn.Module]) -> nn.Module:
        """Read the whole model and move it to this rank's device."""
        return read().to(self._device)

    def wrap(self, module: nn.Module) -> None:
        """Make the optimizer, and with several ranks wrap the module in DistributedDataParallel."""
        self._optimizer = adamw(module, self._config)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._module: nn.Module = module
        if self.data_size > 1:
            self._module = nn.parallel.DistributedDataParallel(module)

    def _no_sync(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._module, nn.parallel.DistributedDataParallel) and not is_last:
            return self._module.no_sync()
        return contextlib.nullcontext()

    def forward(self, inputs: dict[str, Any], is_last: bool) -> Tensor:
        """Call the module; gradients are reduced over the ranks in the update's last pass only."""
        with self._no_sync(is_last), autocast_to(self._device, self._compute_dtype):
            output: Tensor = self._module(**inputs)
        return output

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate gradients; they are reduced over the ranks in the update's last pass only."""
        with self._no_sync(is_last):
            loss.backward()  # type: ignore[no-untyped-call]

    def _clip(self) -> float:
        return float(nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm))

    def step(self, learning_rate: float) -> float:
        """Clip the gradient and make one AdamW update, unless the gradient's norm is not finite."""
        norm = self._clip()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if norm < float("inf"):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def full(self, parameter: nn.Parameter) -> Tensor:
        """Return the parameter itself, which every rank has whole."""
        return parameter.detach()

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Copy the value into the parameter."""
        parameter.data.copy_(value)

    def local(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return the parameter itself: this rank's part is the whole."""
        return [parameter.data]

    def get_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the parameter itself and AdamW's moments of it."""
        state = self._optimizer.state[parameter]
        moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq")} if state else {}
        return {"master": parameter.detach(), **moments}

    def init_state(self, num_updates: int) -> None:
        """Make AdamW's state as after `num_updates` updates, for `set_state` to fill."""
        fill_state(self._optimizer, self._parameters, num_updates)

    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Do nothing: the tensors of `get_state` are those that the optimizer uses."""
