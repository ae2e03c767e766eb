"""The config sections `model` and `warm_start`, and that of a model that only scores, are in this file."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gvpo_ray.config.base import DECIDES_SCORES, LocalPath, Section
from gvpo_ray.config.data import PromptsConfig


class LoraConfig(Section):
    """A low-rank adapter (peft) is trained in place of the model's weights.

    The initial policy is the model without its adapter, and engines receive the adapter alone.
    """

    rank: int = Field(default=16, ge=1)
    """Rank of the adapter's two matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale of the adapter: the product of its matrices is multiplied by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Names of the linear layers that get an adapter; `all-linear`: all except the head."""


class ModelConfig(Section):
    """This section names the model that is trained, its precision and its context."""

    path: Annotated[str, LocalPath()]
    """Folder or hub name of a Hugging Face model, with its tokenizer."""
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", json_schema_extra=DECIDES_SCORES)
    """Precision of the engines and of the learner's passes. Master weights and the optimizer's state stay in
    float32."""
    max_length: int | None = Field(default=None, ge=8, json_schema_extra=DECIDES_SCORES)
    """Context, in tokens: longest prompt and completion together; default: that of config.json."""
    trust_remote_code: bool = False
    """Allow transformers and vLLM to run Python code of the model's folder."""
    lora: LoraConfig | None = None
    """Train an adapter in place of all weights; `{}`: with the defaults of an adapter."""
    router_replay: bool = True
    """Compute each token in the learner with the experts that the engine chose for it. Only mixtures of
    experts have routers."""
    router_aux_loss: bool = False
    """Add the auxiliary loss that evens out the load of the experts, with the coefficient of the model's
    config.json (router_aux_loss_coef). It moves the optimum away from GVPO's (learner/balance.py)."""


EXPERTS = re.compile(r"^(num|n|moe_num)_(local_|routed_)?experts$")
"""Keys of a model's config.json with the number of a layer's experts."""


def num_experts(config: Any) -> int:
    """Return the number of a layer's experts, of which a router chooses some, by transformers' config.

    0: the model is dense.
    """
    found = (value for key, value in config.get_text_config().to_dict().items() if EXPERTS.match(key))
    return max((value for value in found if isinstance(value, int) and value > 1), default=0)


def aux_loss_coefficient(config: Any) -> float:
    """Return the coefficient of the auxiliary loss in transformers' config of a model; 0: it has none."""
    return float(getattr(config.get_text_config(), "router_aux_loss_coef", None) or 0)


class ScoringModelConfig(Section):
    """A scoring model scores texts, with a tokenizer of its own and in actors of its own.

    Ray restarts an actor that dies, and what it had in hand is scored again.
    """

    model: Annotated[str, LocalPath()]
    """Folder or hub name of a Hugging Face causal language model, with its tokenizer."""
    num: int = Field(default=1, ge=1)
    """Number of actors, each with the whole model. With max_num, the smallest number."""
    max_num: int | None = Field(default=None, ge=1)
    """Largest number of actors: there are more while every actor has work waiting, and fewer again
    afterwards. Default: num."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs that one actor asks Ray for."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of one actor, on which it computes in bfloat16; 0: in float32 on CPU."""
    batch_size: int = Field(default=8, ge=1)
    """Texts in one forward pass."""

    @model_validator(mode="after")
    def _at_most(self) -> ScoringModelConfig:
        if self.max_num is not None and self.max_num < self.num:
            raise ValueError(f"max_num ({self.max_num}) is less than num ({self.num})")
        return self


class WarmStartConfig(Section):
    """With a warm start a small model is made, taught by supervised learning and written to model.path.

    Only `gvpo-ray train` and `gvpo-ray warm-start` read this section.
    """

    data: PromptsConfig
    """Data set of worked problems to imitate."""
    task: Literal["arithmetic", "chain", "sort"] | None = None
    """Task of gvpo_ray/data/tasks.py whose data is made first, in the folder of data.path, if that does not
    exist."""
    solution_column: str = "solution"
    """Column that holds the worked solution; `column.key` is a key in a column of JSON text."""
    remove: str | None = None
    """Regular expression of parts to remove from the solutions, such as GSM8K's "<<48/2=24>>"."""
    completion: str = "{solution}"
    """Template of the text that the model learns to write, such as "{solution}\\n\\\\boxed{{answer}}"."""
    vocab_size: int = Field(default=4096, ge=257)
    """Vocabulary size of the byte-level BPE tokenizer that is trained on the texts. Each digit is a token."""
    architecture: dict[str, Any] = {}
    """Arguments for transformers' Qwen2Config."""
    num_epochs: float = Field(default=1.0, gt=0)
    """Passes over the worked problems."""
    batch_size: int = Field(default=64, ge=1)
    """Examples per update."""
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Peak learning rate. It rises over the first 5 % of the updates, then falls linearly to zero."""
    num_threads: int = Field(default=1, ge=1)
    """Torch threads. A model of less than about a million parameters gains nothing by a second one, and where
    other work has the other cores, threads that wait for each other have taken ten times as long."""
