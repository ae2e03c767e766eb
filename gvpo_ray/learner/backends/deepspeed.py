"""How the learner's parameters, gradients and optimizer are spread over its ranks: DDP, FSDP2, DeepSpeed ZeRO 0 to 3, behind one seam.

policy.py is its only user. A result never depends on which of them computes it, but for the order of float32 sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gvpo_ray.config.run import LearnerConfig


class Backend(Protocol):
    """Every rank makes the same number of forward and backward passes per update: with sharded parameters they are collectives.

    All average gradients over the ranks, so a loss that is a share of a global sum is multiplied by the number of ranks.
    """

    def forward(self, inputs: dict[str, Tensor], is_last: bool) -> Tensor: ...  # is_last: of this update, where there are gradients
    def backward(self, loss: Tensor, is_last: bool) -> None: ...
    def step(self, learning_rate: float) -> float: ...  # returns the gradient's norm before clipping; where it is not finite, no update
    def full(self, parameter: nn.Parameter) -> Tensor: ...  # the whole parameter, on every rank
    def fill(self, parameter: nn.Parameter, value: Tensor) -> None: ...  # with a whole value, the same on every rank
    def local(self, parameter: nn.Parameter) -> list[Tensor]: ...  # this rank's part of it, which forward passes read
    def get_state(self, parameter: nn.Parameter) -> dict[str, Tensor]: ...  # exp_avg, exp_avg_sq, master: whole, float32
    def init_state(self, num_updates: int) -> None: ...  # make the state that set_state then fills
    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None: ...


def make_backend(module: nn.Module, config: LearnerConfig, dtype: torch.dtype, device: torch.device) -> Backend:
    backends: dict[str, Callable[..., Backend]] = {"ddp": DDPBackend, "fsdp": FSDPBackend, "deepspeed": DeepSpeedBackend}
    return backends[config.backend](module, config, dtype, device)


def _adamw(module: nn.Module, config: LearnerConfig) -> torch.optim.AdamW:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=config.learning_rate, betas=config.adam_betas, weight_decay=config.weight_decay)


def _fill_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], num_updates: int) -> None:
    """AdamW makes its state at its first step; one that is restored must be there before."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(num_updates)),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)


class DDPBackend:
    """torch's DistributedDataParallel: replicated float32 parameters and optimizer; bfloat16 by autocast."""

    def __init__(self, module: nn.Module, config: LearnerConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self._optimizer = _adamw(module, config)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._module: nn.Module = module
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._module = nn.parallel.DistributedDataParallel(module)

    def _no_sync(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        ddp = isinstance(self._module, nn.parallel.DistributedDataParallel)
        return self._module.no_sync() if ddp and not is_last else contextlib.nullcontext()

    def forward(self, inputs: dict[str, Tensor], is_last: bool) -> Tensor:
        with self._no_sync(is_last), _autocast(self._device, self._dtype):
            return self._module(**inputs)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        with self._no_sync(is_last):
            loss.backward()

    def _clip(self) -> float:
        return float(nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm))

    def step(self, learning_rate: float) -> float:
        norm = self._clip()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if norm < float("inf"):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def full(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.data.copy_(value)

    def local(self, parameter: nn.Parameter) -> list[Tensor]:
        return [parameter.data]

    def get_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self._optimizer.state[parameter]
        return {name: state[name] for name in ("exp_avg", "exp_avg_sq")} if state else {}

    def init_state(self, num_updates: int) -> None:
        _fill_state(self._optimizer, self._parameters, num_updates)

    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            (parameter.data if name == "master" else self._optimizer.state[parameter][name]).copy_(value)


class FSDPBackend(DDPBackend):
    """torch's FSDP2 (fully_shard): parameters, gradients and optimizer in shards, one layer gathered at a time; float32 shards."""

    def __init__(self, module: nn.Module, config: LearnerConfig, dtype: torch.dtype, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if not dist.is_initialized():  # one process without a group, as in a test or a notebook
            dist.init_process_group("gloo" if device.type == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": half if dtype == torch.bfloat16 else MixedPrecisionPolicy()}
        layers = set(module.model._no_split_modules or ())
        self._sharded = [part for part in module.modules() if type(part).__name__ in layers] + [module]
        for part in self._sharded:
            fully_shard(part, **options)
        self._config, self._dtype, self._device = config, torch.float32, device  # mixed precision is FSDP's own
        self._optimizer = _adamw(module, config)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._module = module

    def forward(self, inputs: dict[str, Tensor], is_last: bool) -> Tensor:
        self._module.set_requires_gradient_sync(is_last)
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

        return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None).to_local()

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


class DeepSpeedBackend:
    """DeepSpeed ZeRO 0 to 3 over the process group that is there, with torch's AdamW (no op is built)."""

    def __init__(self, module: nn.Module, config: LearnerConfig, dtype: torch.dtype, device: torch.device) -> None:
        import deepspeed

        self._config, self._device, self._module = config, device, module
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=module, optimizer=_adamw(module, config), config=deepspeed_config(config, dtype), dist_init_required=False
        )
        self._is_zero = config.zero_stage > 0
        self._autocast_dtype = torch.float32 if self._is_zero else dtype  # ZeRO's parameters are in bfloat16 themselves

    def forward(self, inputs: dict[str, Tensor], is_last: bool) -> Tensor:
        if not torch.is_grad_enabled():  # DeepSpeed's engine has no part in these
            with _autocast(self._device, self._autocast_dtype):
                return self._module(**inputs)
        self._engine.set_gradient_accumulation_boundary(is_last)
        return self._engine(**inputs)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if self._is_zero:  # which skips an update by itself
            self._engine.step()
            return float("inf") if self._optimizer.overflow else float(self._engine.get_global_grad_norm())
        # DeepSpeed clips plain gradients too, but does not say what their norm was.
        norm = float(nn.utils.get_total_norm([p.grad for p in self._engine.module.parameters() if p.grad is not None]))
        if not norm < float("inf"):  # an update by nothing, at a learning rate of nothing, leaves AdamW's moments damaged: none at all
            for parameter in self._engine.module.parameters():
                parameter.grad = None
            self._engine.micro_steps += 1
            return norm
        self._engine.step()
        return norm

    def full(self, parameter: nn.Parameter) -> Tensor:
        if not hasattr(parameter, "ds_id"):
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        if not hasattr(parameter, "ds_id"):
            parameter.data.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    def local(self, parameter: nn.Parameter) -> list[Tensor]:
        if not hasattr(parameter, "ds_id"):
            return [parameter.data]
        if parameter.ds_status.name == "AVAILABLE":  # ZeRO-3 keeps small ones gathered: let it gather them anew from what is in the shards
            parameter.partition()
        return [parameter.ds_tensor.data]

    def get_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not self._base.state:
            return {}
        if not self._is_zero:
            return {name: self._base.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")}
        state = {name: safe_get_full_optimizer_state(parameter, name) for name in ("exp_avg", "exp_avg_sq")}
        return {**state, "master": safe_get_full_fp32_param(parameter)}

    def init_state(self, num_updates: int) -> None:
        # ZeRO-3 shows AdamW its flat shards only while it steps.
        stage = self._config.zero_stage
        flat = self._optimizer.fp32_partitioned_groups_flat if stage == 3 else [p for g in self._base.param_groups for p in g["params"]]
        _fill_state(self._base, flat, num_updates)
        if stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, value in state.items():
            if not self._is_zero:
                (parameter.data if name == "master" else self._base.state[parameter][name]).copy_(value)
            elif name == "master":
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, name)

    @property
    def _base(self) -> torch.optim.Optimizer:
        """torch's AdamW below DeepSpeed's sharding."""
        return self._optimizer.optimizer if self._is_zero else self._optimizer


def deepspeed_config(config: LearnerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed configuration of a run. Accumulation boundaries are set by hand: micro-batches vary in number.

    bfloat16 without ZeRO is autocast over float32 parameters, as for DDP: DeepSpeed's own wrapper there hides optimizer and master weights.
    """
    is_half = dtype == torch.bfloat16
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also on the CPU: DeepSpeed's own would have to be compiled
        "bf16": {"enabled": is_half and config.zero_stage > 0},
        "torch_autocast": {"enabled": is_half and config.zero_stage == 0, "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
