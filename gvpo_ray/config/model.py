"""The sections `model` and `warm_start`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from gvpo_ray.config.base import DECIDES_SCORES, LocalPath, Section
from gvpo_ray.config.data import PromptsConfig


class LoraConfig(Section):
    """Train a low-rank adapter (peft) and leave the model as it is: the reference is the model without it,
    and engines receive it alone.
    """

    rank: int = Field(default=16, ge=1)
    """Rank of the two matrices of the adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's product is scaled by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Names of the linear layers that get an adapter; `all-linear`: all but the head."""


class ModelConfig(Section):
    path: Annotated[str, LocalPath()]
    """A Hugging Face model folder or hub name; its tokenizer is beside it."""
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", json_schema_extra=DECIDES_SCORES)
    """Precision of the engines and of the learner's forward pass. Master weights and the optimizer stay in
    float32."""
    max_length: int | None = Field(default=None, ge=8, json_schema_extra=DECIDES_SCORES)
    """Longest prompt + completion in tokens; default: what the model's config.json says."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model folder."""
    lora: LoraConfig | None = None
    """Train an adapter in place of all weights. `{}`: with the defaults."""


class WarmStartConfig(Section):
    """Make a small model from scratch and teach it by supervised learning (jobs/train.py,
    jobs/warm_start.py); writes model.path.
    """

    data: PromptsConfig
    """Worked problems."""
    task: Literal["arithmetic", "chain", "sort"] | None = None
    """Make the data of one of gvpo_ray/data/tasks.py first, in the folder of data.path, if that is not
    there."""
    solution_column: str = "solution"
    """Column of the worked solution; `column.key` looks into a column of JSON text."""
    remove: str | None = None
    """Regular expression; what it matches is left out of the solutions, such as GSM8K's "<<48/2=24>>"."""
    completion: str = "{solution}"
    """What the model learns to write, such as "{solution}\\n\\\\boxed{{answer}}"."""
    vocab_size: int = Field(default=4096, ge=257)
    """Vocabulary size of the byte-level BPE tokenizer that is trained on the texts. Each digit is a token."""
    architecture: dict[str, Any] = {}
    """Arguments of transformers' Qwen2Config."""
    num_epochs: float = Field(default=1.0, gt=0)
    """Passes over the worked problems."""
    batch_size: int = Field(default=64, ge=1)
    """Examples per update."""
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Peak learning rate. It rises over the first twentieth of the updates, then falls to a 20th."""
    num_threads: int | None = Field(default=None, ge=1)
    """Torch threads; default: the machine's CPUs."""
