"""The FSDP backend shards parameters, gradients and optimizer over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.learner.backends.base import adamw
from gvpo_ray.learner.backends.ddp import DDPBackend

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import DTensor


class FSDPBackend(DDPBackend):
    """This backend is torch's FSDP2 (fully_shard): float32 shards, of which one layer is gathered at a time.

    Args:
        config: the config section `learner`.
        dtype: the type that forward passes compute in.
        device: this rank's device.
    """

    def __init__(self, config: LearnerConfig, dtype: torch.dtype, device: torch.device) -> None:
        if not dist.is_initialized():  # one process without a group, as in a test or a notebook
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(
                "gloo" if device.type == "cpu" else "nccl", store=store, rank=0, world_size=1
            )
        super().__init__(config, dtype, device)

    def load(self, read: Callable[[], nn.Module]) -> nn.Module:
        """Read the whole model and leave it on the CPU."""
        return read()  # fully_shard moves one layer after the other to the device

    def wrap(self, module: nn.Module) -> None:
        """Shard each layer and then the rest of the module, and make the optimizer of the shards."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        options: dict[str, Any] = {
            "mesh": init_device_mesh(self._device.type, (self.data_size,)),
            "mp_policy": self._precision(),
        }
        model: Any = module.model
        layers = set(model._no_split_modules or ())
        parts = [part for part in module.modules() if type(part).__name__ in layers] + [module]
        self._sharded = [fully_shard(part, **options) for part in parts]
        self._optimizer = adamw(module, self._config)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._module = module

    def _precision(self) -> MixedPrecisionPolicy:
        """Return the types that a layer is gathered in, and its gradients are reduced in."""
        from torch.distributed.fsdp import MixedPrecisionPolicy

        if self._compute_dtype == torch.bfloat16:
            return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return MixedPrecisionPolicy()

    def forward(self, inputs: dict[str, Any], is_last: bool) -> Tensor:
        """Call the module, whose layers are gathered one after the other."""
        # Gradients are reduced after every pass: without that FSDP2 would keep them unsharded, in float32, on
        # every rank (4 bytes per parameter).
        output: Tensor = self._module(**inputs)
        if not torch.is_grad_enabled():
            self._reshard()  # FSDP2 does so only in a backward pass
        return output

    def _reshard(self) -> None:
        for part in self._sharded:
            part.reshard()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate gradients, which are reduced and sharded in each pass."""
        loss.backward()  # type: ignore[no-untyped-call]

    def _clip(self) -> float:
        self._reshard()
        norm = nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm)
        return float(_dtensor(norm).full_tensor())

    def full(self, parameter: nn.Parameter) -> Tensor:
        """Gather the whole parameter from its shards, on every rank."""
        return _dtensor(parameter.detach()).full_tensor()

    def _part(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Return this rank's shard of a whole tensor, sharded as the parameter is."""
        from torch.distributed.tensor import distribute_tensor

        like = _dtensor(parameter)
        return distribute_tensor(
            value.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None
        ).to_local()

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Copy this rank's shard of a whole value into the parameter."""
        _dtensor(parameter.data).to_local().copy_(self._part(parameter, value))

    def local(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return this rank's shard of the parameter."""
        return [_dtensor(parameter.data).to_local()]


def _dtensor(tensor: Tensor) -> DTensor:
    """Return the tensor with the type that FSDP2 has given it."""
    return cast("DTensor", tensor)
