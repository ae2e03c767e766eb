"""The DeepSpeed backend runs ZeRO stages 0 to 3, with offload."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.learner.backends.base import adamw, all_threads, fill_state
from gvpo_ray.learner.backends.ddp import DDPBackend


class DeepSpeedBackend(DDPBackend):
    """This backend is DeepSpeed ZeRO 0 to 3 over the existing process group, with torch's fused AdamW.

    DeepSpeed's own AdamW would have to be compiled, also for a CPU. Parameters that are not sharded, and an
    optimizer that is not, are read and written as in the DDP backend.

    Args:
        config: the config section `learner`.
        dtype: the type that forward passes compute in.
        device: this rank's device.
    """

    def __init__(self, config: LearnerConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, dtype, device)
        self._settings = deepspeed_config(config, dtype)
        self._is_zero = config.zero_stage > 0
        # With ZeRO the parameters are in bfloat16, and float32 master weights are kept beside them. Without
        # ZeRO the parameters are the master weights, and autocast computes in bfloat16.
        if self._is_zero:
            self.dtype, self._compute_dtype = dtype, torch.float32

    def load(self, read: Callable[[], nn.Module]) -> nn.Module:
        """Read the model to this rank's device; ZeRO-3 shards it while it is read."""
        import deepspeed  # type: ignore[import-untyped]

        if self._device.type == "cpu":
            # This op would be built with g++ for a minute at the first start, and only DeepSpeed's inference
            # uses it. On a GPU it is not built, and the look-up alone would try every op's compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if self._config.zero_stage < 3:
            return super().load(read)
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        # from_pretrained shards while this object lives
        shards = HfDeepSpeedConfig(self._settings)  # type: ignore[no-untyped-call]
        model = read().to(self._device)
        del shards
        rebuild_rotary(model)
        return model

    def wrap(self, module: nn.Module) -> None:
        """Make DeepSpeed's engine and its sharded optimizer."""
        import deepspeed

        self._module = module
        self._optimizer = adamw(module, self._config)
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=module, optimizer=self._optimizer, config=self._settings, dist_init_required=False
        )

    def forward(self, inputs: dict[str, Any], is_last: bool) -> Tensor:
        """Call DeepSpeed's engine, or without gradients the module itself."""
        if not torch.is_grad_enabled():  # passes without gradients bypass DeepSpeed's engine
            return super().forward(inputs, is_last)
        self._engine.set_gradient_accumulation_boundary(is_last)
        output: Tensor = self._engine(**inputs)
        return output

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate gradients, which are reduced as the ZeRO stage says."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip the gradient and make one AdamW update, unless the gradient's norm is not finite."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if self._is_zero:  # the engine itself skips an update whose gradient is not finite
            with all_threads() if self._config.offload != "none" else contextlib.nullcontext():
                self._engine.step()
            return float("inf") if self._zero.overflow else float(self._engine.get_global_grad_norm())
        # DeepSpeed clips plain gradients too, but does not say what their norm was.
        norm = float(
            nn.utils.get_total_norm([p.grad for p in self._engine.module.parameters() if p.grad is not None])
        )
        # Not even an update with a learning rate of 0 may be made: it would put nan into AdamW's moments.
        if not norm < float("inf"):
            for parameter in self._engine.module.parameters():
                parameter.grad = None
            self._engine.micro_steps += 1
            return norm
        self._engine.step()
        return norm

    def full(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole parameter, which ZeRO-3 gathers on every rank."""
        if not hasattr(parameter, "ds_id"):
            return super().full(parameter)
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Copy a whole value into the parameter, which ZeRO-3 shards again."""
        if not hasattr(parameter, "ds_id"):
            return super().fill(parameter, value)
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    def local(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return this rank's part of the parameter: its shard under ZeRO-3, else the whole."""
        if not hasattr(parameter, "ds_id"):
            return super().local(parameter)
        sharded: Any = parameter
        # ZeRO-3 keeps small parameters gathered: partition them, so that they are gathered anew from the
        # shards, which the caller may write to.
        if sharded.ds_status.name == "AVAILABLE":
            sharded.partition()
        return [sharded.ds_tensor.data]

    def get_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Gather AdamW's moments of a parameter and its master weight; with ZeRO {} before any update.

        ZeRO's parts of them are ranges of flat buffers, which begin and end within rows: no DTensor is such.
        """
        if not self._is_zero:
            return super().get_state(parameter)
        if not self._optimizer.state:
            return {}
        from deepspeed.utils import (  # type: ignore[import-untyped]
            safe_get_full_fp32_param,
            safe_get_full_optimizer_state,
        )

        state = {name: safe_get_full_optimizer_state(parameter, name) for name in ("exp_avg", "exp_avg_sq")}
        return {**state, "master": safe_get_full_fp32_param(parameter)}

    def init_state(self, num_updates: int) -> None:
        """Make AdamW's state as after `num_updates` updates, for `set_state` to fill."""
        # ZeRO-3 gives AdamW its flat shards only during a step, so they are taken from ZeRO's optimizer.
        stage = self._settings["zero_optimization"]["stage"]
        flat = (
            self._zero.fp32_partitioned_groups_flat
            if stage == 3
            else [p for group in self._optimizer.param_groups for p in group["params"]]
        )
        fill_state(self._optimizer, flat, num_updates)
        if stage in (1, 2):
            self._zero._lazy_init_hp_params_optimizer_state()

    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Restore saved moments and the master weight of a parameter."""
        if not self._is_zero:
            return super().set_state(parameter, state)
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, value in state.items():
            if name == "master":
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, name)


def rebuild_rotary(model: nn.Module) -> None:
    """Compute the frequencies of rotary embeddings again, in float32, where they are in bfloat16.

    Under zero.Init torch.arange and similar functions return the parameters' dtype, and bfloat16 frequencies
    rotate the 1,000th token by some radians too much or too little.

    Raises:
        ValueError: a module with such frequencies cannot be made again from its config.
    """
    for module in model.modules():
        wrong = [
            name
            for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq") and buffer.itemsize < 4
        ]
        if not wrong:
            continue
        if "config" not in inspect.signature(type(module)).parameters or not hasattr(module, "config"):
            raise ValueError(
                f"{type(module).__name__}: ZeRO-3 has rounded its {wrong[0]}, and it cannot be made "
                "again; use learner.zero_stage: 2 or learner.backend: fsdp"
            )
        make: Any = type(module)
        fresh = dict(make(config=module.config).named_buffers(recurse=False))
        for name in wrong:
            old = getattr(module, name)
            setattr(module, name, fresh[name].to(old.device))


def deepspeed_config(config: LearnerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run.

    Its accumulation steps are 1, because the number of micro-batches varies and `forward` sets the boundary.
    bfloat16 without ZeRO is autocast over float32 parameters, as in the DDP backend: DeepSpeed's own bfloat16
    optimizer would hide AdamW and the master weights. With ZeRO, gradients are accumulated and reduced in
    float32: GVPO's weights sum to zero in a group, so its gradients are differences. DeepSpeed's stage 1
    would do so with another optimizer class (BF16_Optimizer), which keeps unsharded float32 gradients, so
    stage 2 runs in its place.

    Args:
        config: the config section `learner`.
        dtype: the type that forward passes compute in.
    """
    is_half = dtype == torch.bfloat16
    is_half_zero = is_half and config.zero_stage > 0
    zero: dict[str, Any] = {"stage": 2 if is_half and config.zero_stage == 1 else config.zero_stage}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        # torch's AdamW is used on the CPU too, because DeepSpeed's own would have to be compiled
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": is_half_zero},
        **(
            {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
            if is_half_zero
            else {}
        ),
        "torch_autocast": {"enabled": is_half and config.zero_stage == 0, "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
