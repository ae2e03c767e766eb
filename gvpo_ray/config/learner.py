"""The sections `learner` and `checkpoint`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from gvpo_ray.config.base import Resources, Section


class LearnerConfig(Section):
    num_workers: int = Field(default=1, ge=1)
    """Ray Train workers. Each trains on whole groups."""
    max_workers: int | None = Field(default=None, ge=1)
    """Elastic: Ray Train goes on with as many workers as the cluster has room for, from num_workers to so
    many. Default: num_workers."""
    max_restarts: int = Field(default=20, ge=0)
    """Deaths of workers after which the run goes on from its last checkpoint. Three in a row without a step
    between them end it."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs per worker; 0: gloo on CPU."""
    num_cpus: float = Field(default=0.25, gt=0)
    """CPUs that one worker asks Ray for."""
    accelerator_type: str | None = None
    """Ray's name of the GPU that a worker needs, such as H100."""
    resources: Resources = {}
    """Custom Ray resources of one worker."""
    num_threads: int = Field(default=1, ge=1)
    """Torch threads of one worker; matters on CPU only."""
    backend: Literal["deepspeed", "ddp", "fsdp"] = "deepspeed"
    """`deepspeed`, or torch's own: `ddp` replicates everything, `fsdp` (FSDP2) shards everything."""
    zero_stage: int = Field(default=0, ge=0, le=3)
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards the optimizer, 2 gradients too, 3 parameters too. In
    bfloat16 stage 1 runs as 2, so that gradients are added up in float32."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What ZeRO keeps in the CPU's memory: the optimizer (stages 1 to 3), or the parameters too (stage 3)."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Learning rate of AdamW after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate after the warm-up; linear and cosine decay to zero at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up of the learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moments."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    num_mini_batches: int = Field(default=4, ge=1)
    """Optimizer updates per step. With 1, the log-ratio is always 0 in a synchronous run: GVPO is then
    REINFORCE with a mean baseline."""
    packing: bool = True
    """A group is one sequence, its prompt computed once (learner/packing.py), where the model allows it; else
    completions are padded."""
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Tokens of one forward pass. A larger group takes several, and one more without gradients."""
    max_skipped_updates: int = Field(default=3, ge=0)
    """An update whose gradient is not a number is skipped and counted; one more than so many in a row stop
    the run."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""

    @field_validator("num_gpus")
    @classmethod
    def _one_gpu(cls, value: float) -> float:
        if value > 1:
            raise ValueError(
                f"a learner worker computes on one GPU, not {value:g}: ask for more with learner.num_workers"
            )
        return value


class CheckpointConfig(Section):
    every: int = Field(default=10, ge=1)
    """Steps between checkpoints; the last step always writes one."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
