"""The native backend is transformers' own: tensor parallel layers, and FSDP2 over the ranks beside them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    TensorParallelLayer,
    _AllReduceBackward,
)

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.model import num_experts
from gvpo_ray.learner.backends.base import adamw, autocast_to, ranks
from gvpo_ray.learner.backends.fsdp import FSDPBackend


class SummedGradients(TensorParallelLayer):
    """These layers are whole on every tensor rank, and each sees its own heads: their gradients are added up.

    transformers' own style for Qwen3's norms of queries and keys adds up `parameter.grad` after each backward
    pass. An update of several passes then counts those of the first once more with each pass.
    """

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Let the module compute with parameters whose gradients come from all ranks, in every pass."""
        usual: dict[str, nn.Parameter | None] = {}

        def before(module: nn.Module, inputs: Any) -> None:
            usual.update(module._parameters)
            for name, parameter in usual.items():
                if parameter is not None:
                    summed: Any = _AllReduceBackward.apply(  # type: ignore[no-untyped-call]
                        parameter, mesh.get_group()
                    )
                    module._parameters[name] = summed

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            module._parameters.update(usual)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)
        return module


class NativeBackend(FSDPBackend):
    """This backend lets transformers lay the model out by its DistributedConfig: [data, tensor] ranks.

    Each rank reads its shards of the weights alone. Heads and columns of layers, and the vocabulary of the
    output head, are split over the tensor ranks, which follow each other; over the data ranks FSDP2 shards
    what is left of each. What the model's plan does not split (norms; an untied embedding) every tensor rank
    has, and updates to the same bits.

    Args:
        config: the config section `learner`.
        dtype: the type that forward passes compute in.
        device: this rank's device.
    """

    def __init__(self, config: LearnerConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, dtype, device)
        size = config.tensor_parallel_size
        self.data_rank, self.data_size = self.data_rank // size, self.data_size // size
        ALL_PARALLEL_STYLES["replicated_with_grad_allreduce"] = SummedGradients()
        # It warns that a weight which both shard is gathered in two messages, once per rank.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

    def reading(self, config: Any) -> dict[str, Any]:
        """Return the layout. Of a mixture, each tensor rank has some of the experts, whole.

        transformers' own plan would send tokens to the ranks that have their experts, from data ranks too,
        and its loading refuses that (`ep_size` other than `tp_size`). So every tensor rank routes all tokens,
        and leaves out those of the experts that it lacks; what the ranks make of a token is added up.
        """
        size, experts = self._config.tensor_parallel_size, {}
        if size > 1 and num_experts(config):
            for name, style in config.get_text_config().base_model_ep_plan.items():
                if style == "ep_dispatch_experts":
                    experts[f"model.{name}"] = "moe_tp_experts"
                    experts[f"model.{name.removesuffix('experts')}gate"] = "ep_router"
        layout = DistributedConfig(
            tp_size=size,
            fsdp_size=self.data_size,
            fsdp_mixed_precision=self._compute_dtype == torch.bfloat16,
            ep_size=size if experts else 1,
            ep_plan=experts or None,
        )
        return {"distributed_config": layout}

    def load(self, read: Callable[[], nn.Module]) -> nn.Module:
        """Read this rank's shards of the model to its device."""
        model: Any = read().to(self._device)
        config = model.config
        if self._config.tensor_parallel_size > 1 and num_experts(config):
            _check_product(config._experts_implementation, model.dtype)
        config.distributed_config = None  # or save_pretrained, on rank 0 alone, would wait for others
        loaded: nn.Module = model
        return loaded

    def wrap(self, module: nn.Module) -> None:
        """Make the module the root of layers that are sharded already, and the optimizer of the shards."""
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if self.data_size > 1:
            model: Any = module.model
            whole = {type(part).__name__ for part in module.modules()} & {*(model._no_split_modules or ())}
            if whole:  # a sharded layer's class has another name
                raise ConfigError(
                    f"learner.backend: native shards no {', '.join(sorted(whole))} by itself, and would "
                    "gather the model as a whole: use fsdp"
                )
            fully_shard(module, mesh=model._mesh_manager.get_mesh("fsdp"), mp_policy=self._precision())
        self._sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
        self._optimizer = adamw(module, self._config)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._module = module

    def forward(self, inputs: dict[str, Any], is_last: bool) -> Tensor:
        """Call the module; without FSDP, which converts what it gathers, bfloat16 is by autocast."""
        usual = torch.float32 if self._sharded else self._compute_dtype
        with autocast_to(self._device, usual):
            return super().forward(inputs, is_last)

    @torch.no_grad()
    def _clip(self) -> float:
        """Scale the gradient down to the largest norm, and return its norm.

        torch's function takes no shards of several meshes. The squares of all ranks' parts are added up, each
        divided by the number of ranks that have the same part.
        """
        self._reshard()
        held = [p.grad for p in self._parameters if p.grad is not None]
        parts = [_local(gradient) for gradient in held]
        copies = [_copies(gradient) for gradient in held]
        squares = torch.stack(torch._foreach_norm(parts)).double().square()
        total = (squares / torch.tensor(copies, device=squares.device)).sum()
        if dist.is_initialized():
            dist.all_reduce(total)
        norm = float(total.sqrt())
        if norm > self._config.max_grad_norm:
            torch._foreach_mul_(parts, self._config.max_grad_norm / (norm + 1e-6))
        return norm

    def full(self, parameter: nn.Parameter) -> Tensor:
        """Gather the whole parameter from its shards, or return what every rank has whole."""
        whole = parameter.detach()
        return super().full(parameter) if isinstance(whole, DTensor) else whole

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Copy a value into the parameter: whole, or read as this rank's shard."""
        if isinstance(parameter.data, DTensor) and not isinstance(value, DTensor):
            super().fill(parameter, value)
        else:
            _local(parameter.data).copy_(_local(value))

    def local(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return this rank's part of the parameter."""
        return [_local(parameter.data)]


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, or the tensor where it is whole on every rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copies(tensor: Tensor) -> int:
    """Return the number of ranks that have the same part of a tensor as this one."""
    copies = ranks()[1]
    if isinstance(tensor, DTensor):
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            copies //= 1 if placement.is_replicate() else size
    return copies


def _check_product(way: str, dtype: torch.dtype) -> None:
    """Refuse experts that are shared out and computed one by one.

    A rank none of whose experts is chosen in a layer would then have no part in the backward pass, and the
    others would wait for it. Float64 knows no other way; no run has it.
    """
    if way != "grouped_mm" and dtype != torch.float64:
        raise ConfigError(
            f"learner.tensor_parallel_size: transformers computes this model's experts by {way}, and they "
            "are shared out where it does so by grouped_mm"
        )
