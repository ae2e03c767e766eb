"""Torch's FSDP2: parameters, gradients and optimizer are sharded over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.learner.backends.base import adamw
from gvpo_ray.learner.backends.ddp import DDPBackend


class FSDPBackend(DDPBackend):
    """torch's FSDP2 (fully_shard): parameters, gradients and optimizer in shards, one layer gathered at a
    time; float32 shards.
    """

    def __init__(self, config: LearnerConfig, dtype: torch.dtype, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        if not dist.is_initialized():  # one process without a group, as in a test or a notebook
            dist.init_process_group(
                "gloo" if device.type == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1
            )
        super().__init__(config, dtype, device)
        self._mesh = init_device_mesh(device.type, (self.data_size,))

    def load(self, read: Callable[[], nn.Module]) -> nn.Module:
        return read()  # moved one layer after the other, as it is sharded

    def wrap(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options: dict[str, Any] = {
            "mesh": self._mesh,
            "mp_policy": half if self._compute_dtype == torch.bfloat16 else MixedPrecisionPolicy(),
        }
        layers = set(module.model._no_split_modules or ())
        self._sharded = [part for part in module.modules() if type(part).__name__ in layers] + [module]
        for part in self._sharded:
            fully_shard(part, **options)
        self._optimizer = adamw(module, self._config)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._module = module

    def forward(self, inputs: dict[str, Tensor], is_last: bool) -> Tensor:
        # Gradients are reduced after every pass: FSDP2 would keep those that wait whole, in float32, on every
        # rank (4 bytes per parameter).
        output: Tensor = self._module(**inputs)
        if not torch.is_grad_enabled():
            self._reshard()  # it would wait for a backward pass to do so
        return output

    def _reshard(self) -> None:
        for part in self._sharded:
            part.reshard()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()

    def _clip(self) -> float:
        self._reshard()
        return float(nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm).full_tensor())

    def full(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().full_tensor()

    def _part(self, like: Tensor, value: Tensor) -> Tensor:
        """This rank's shard of a whole tensor, cut as `like` is."""
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(
            value.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None
        ).to_local()

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.data.to_local().copy_(self._part(parameter, value))

    def local(self, parameter: nn.Parameter) -> list[Tensor]:
        return [parameter.data.to_local()]

    def get_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {name: value.full_tensor() for name, value in super().get_state(parameter).items()}

    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            whole = parameter.data if name == "master" else self._optimizer.state[parameter][name]
            whole.to_local().copy_(self._part(parameter, value))
