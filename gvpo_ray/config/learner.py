"""The config sections `learner` and `checkpoint` are in this file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from gvpo_ray.config.base import Resources, Section


class LearnerConfig(Section):
    """This section sets the learner's workers, their backend, the optimizer and the size of a pass."""

    num_workers: int = Field(default=1, ge=1)
    """Number of Ray Train workers. Each trains on whole groups."""
    max_workers: int | None = Field(default=None, ge=1)
    """Largest number of workers (experimental): Ray Train runs as many as the cluster has room for, from
    num_workers to max_workers. Default: num_workers."""
    max_restarts: int = Field(default=20, ge=0)
    """Number of workers' deaths that a run survives, each time from its last checkpoint. Three in a row
    without a finished step between them end it."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of one worker, at most 1; 0: train on CPU, with gloo."""
    num_cpus: float = Field(default=0.25, gt=0)
    """CPUs that one worker asks Ray for."""
    accelerator_type: str | None = None
    """Ray's name for the type of GPU that one worker needs, such as H100."""
    resources: Resources = {}
    """Custom Ray resources of one worker."""
    num_threads: int = Field(default=1, ge=1)
    """Torch threads of one worker on a CPU. An optimizer that is offloaded uses all of the machine's."""
    backend: Literal["deepspeed", "ddp", "fsdp", "native"] = "deepspeed"
    """Library that trains in parallel: `deepspeed` (see zero_stage), or torch's `ddp`, which replicates the
    model, or `fsdp` (FSDP2), which shards it, or `native`, transformers' own: FSDP2, and with
    tensor_parallel_size also tensor parallel."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Number of workers that compute each layer together, every one with some of its heads and columns;
    above 1 for `backend: native` alone. It divides num_workers, and the model's heads."""
    context_parallel_size: int = Field(default=1, ge=1)
    """Number of workers that split each packed sequence, and exchange heads for tokens around attention
    (learner/context.py), with any backend. It divides num_workers, and the model's heads."""
    zero_stage: int = Field(default=0, ge=0, le=3)
    """ZeRO stage of DeepSpeed: 0 replicates everything, 1 shards the optimizer's state, 2 also gradients, 3
    also parameters. In bfloat16, stage 1 runs as 2, so that gradients accumulate in float32."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Part of the training state that ZeRO keeps in the CPU's memory: the optimizer's (stages 1 to 3), or
    also the parameters (stage 3)."""
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
    """Largest global norm of the gradient; larger ones are scaled down to it."""
    num_mini_batches: int = Field(default=4, ge=1)
    """Mini-batches of a step, each with one optimizer update. With 1, the log-ratio is always 0 in a
    synchronous run, and GVPO is REINFORCE with a mean baseline."""
    packing: bool = True
    """Pack each group into one sequence, so that its prompt is computed once (learner/packing.py). Models
    that do not allow this, and `false`, pad the completions."""
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Largest number of tokens in one forward pass. A group with more takes several passes, and an extra one
    without gradients."""
    max_skipped_updates: int = Field(default=3, ge=0)
    """Largest number of updates in a row that are skipped because their gradient is not a number; one more
    stops the run."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass, to save memory; default: on GPUs."""

    @field_validator("num_gpus")
    @classmethod
    def _one_gpu(cls, value: float) -> float:
        if value > 1:
            raise ValueError(
                f"a learner worker computes on one GPU, not {value:g}: ask for more with learner.num_workers"
            )
        return value


class CheckpointConfig(Section):
    """This section says when checkpoints are written, and how many are kept."""

    every: int = Field(default=10, ge=1)
    """Steps between checkpoints; the last step always writes one."""
    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep."""


def check_split(learner: LearnerConfig, has_adapter: bool) -> None:
    """Refuse a split of layers or sequences over workers that these workers cannot make.

    Args:
        learner: the config section.
        has_adapter: whether a LoRA adapter is trained.

    Raises:
        ValueError: one line that names the key.
    """
    tensor, context = learner.tensor_parallel_size, learner.context_parallel_size
    if learner.backend == "native" and has_adapter:
        raise ValueError("model.lora cannot be trained with learner.backend: native: use fsdp or deepspeed")
    if tensor > 1 and learner.backend != "native":
        raise ValueError(
            f"learner.tensor_parallel_size ({tensor}) needs learner.backend: native, not {learner.backend}"
        )
    if context > 1 and not learner.packing:
        raise ValueError(
            f"learner.context_parallel_size ({context}) splits packed groups, and learner.packing is false"
        )
    if tensor * context == 1:
        return
    keys = [
        f"learner.{name} ({size})"
        for name, size in (("tensor_parallel_size", tensor), ("context_parallel_size", context))
        if size > 1
    ]
    if learner.num_workers % (tensor * context):
        raise ValueError(f"{' x '.join(keys)} must divide learner.num_workers ({learner.num_workers})")
    if learner.max_workers is not None:
        raise ValueError(f"learner.max_workers does not go with {keys[0]}: any number of workers may come")
