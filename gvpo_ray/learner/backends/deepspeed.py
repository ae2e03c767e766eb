"""DeepSpeed ZeRO, stages 0 to 3, with offload."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.learner.backends.base import adamw, autocast_to, fill_state


class DeepSpeedBackend:
    """DeepSpeed ZeRO 0 to 3 over the process group that is there, with torch's AdamW (no op is built)."""

    def __init__(
        self, module: nn.Module, config: LearnerConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        import deepspeed

        self._config, self._device, self._module = config, device, module
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=module,
            optimizer=adamw(module, config),
            config=deepspeed_config(config, dtype),
            dist_init_required=False,
        )
        self._is_zero = config.zero_stage > 0
        # ZeRO's parameters are in bfloat16 themselves
        self._autocast_dtype = torch.float32 if self._is_zero else dtype

    def forward(self, inputs: dict[str, Tensor], is_last: bool) -> Tensor:
        if not torch.is_grad_enabled():  # DeepSpeed's engine has no part in these
            with autocast_to(self._device, self._autocast_dtype):
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
        norm = float(
            nn.utils.get_total_norm([p.grad for p in self._engine.module.parameters() if p.grad is not None])
        )
        # an update by nothing, at a learning rate of nothing, leaves AdamW's moments damaged: none at all
        if not norm < float("inf"):
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
        # ZeRO-3 keeps small ones gathered: let it gather them anew from what is in the shards
        if parameter.ds_status.name == "AVAILABLE":
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
        flat = (
            self._optimizer.fp32_partitioned_groups_flat
            if stage == 3
            else [p for g in self._base.param_groups for p in g["params"]]
        )
        fill_state(self._base, flat, num_updates)
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
    """The DeepSpeed configuration of a run. Accumulation boundaries are set by hand: micro-batches vary in
    number.

    bfloat16 without ZeRO is autocast over float32 parameters, as for DDP: DeepSpeed's own wrapper there hides
    optimizer and master weights.
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
        # torch's AdamW also on the CPU: DeepSpeed's own would have to be compiled
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": is_half and config.zero_stage > 0},
        "torch_autocast": {"enabled": is_half and config.zero_stage == 0, "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
