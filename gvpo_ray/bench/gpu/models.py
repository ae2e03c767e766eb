"""Models with random weights in the sizes of real ones, and groups of random tokens, are made here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gvpo_ray.learner.policy import Policy

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Shape holds the sizes of a transformer."""

    kind: str
    """Architecture, a `model_type` of transformers."""
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    intermediate: int
    hidden: int = 0
    """Hidden size; 0: heads times head_dim."""
    tied: bool = True
    vocab: int = 151_936
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of the transformers config."""

    @property
    def hidden_size(self) -> int:
        """Size of the residual stream."""
        return self.hidden or self.heads * self.head_dim

    def config(self) -> Any:
        """Return the transformers config of this shape."""
        return AutoConfig.for_model(
            self.kind,
            vocab_size=self.vocab,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=32_768,
            tie_word_embeddings=self.tied,
            **self.extra,
        )

    def flops(self, prompt: int, completion: int, k: int) -> float:
        """Return the useful FLOPs of the forward and backward pass of one group.

        Each token counts once: 6 FLOPs per weight, the head on completion tokens alone, causal attention.

        Args:
            prompt: tokens of the prompt.
            completion: tokens of each completion.
            k: completions of the group.
        """
        attention = (
            2 * self.hidden_size * self.heads * self.head_dim
            + 2 * self.hidden_size * self.kv_heads * self.head_dim
        )
        weights = self.layers * (attention + 3 * self.hidden_size * self.intermediate)
        seen = prompt * prompt / 2 + k * (completion * prompt + completion * completion / 2)
        tokens = prompt + k * completion
        head = self.vocab * self.hidden_size * k * completion
        return 6.0 * (weights * tokens + head) + 12.0 * self.layers * self.heads * self.head_dim * seen


QWEN_05B = Shape("qwen2", 14, 2, 64, 24, 4864)
QWEN_15B = Shape("qwen2", 12, 2, 128, 28, 8960)
QWEN_7B = Shape("qwen2", 28, 4, 128, 28, 18944, tied=False, vocab=152_064)
TOY = Shape("qwen2", 4, 2, 32, 2, 128, vocab=512)
"""The sizes of a model whose runs on a CPU take seconds."""


Model = TypeVar("Model", bound=nn.Module)


def build(config: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """Build a Hugging Face model with random weights on the device.

    The head is scaled so that logits have a standard deviation near 4, as those of trained models.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        make: Any = AutoModelForCausalLM.from_config  # without types
        model = make(config, dtype=torch.float32)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head.mul_(4 / (float(head.std()) * head.shape[1] ** 0.5))
    return cast(model, dtype).eval()


def cast(model: Model, dtype: torch.dtype) -> Model:
    """Convert the parameters of a model to a dtype in place, drop their gradients, and return the model.

    Buffers keep their dtype, because rotary frequencies in bfloat16 would be those of another model.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.grad = None
    return model


def make_folder(folder: Path, config: Any) -> Path:
    """Write a model folder without weights: the config, and a tokenizer that is not used."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


class BuiltPolicy(Policy):
    """A BuiltPolicy makes its weights on the device, and does not read them from its folder."""

    def _load(self, path: str | Path) -> Any:
        return build(AutoConfig.from_pretrained(path), self.device, self._dtype)


def make_rows(
    groups: Sequence[tuple[int, Sequence[int]]], vocab: int, seed: int = 0, version: int | None = 0
) -> list[Row]:
    """Make groups of random tokens, rewarded 0 and 1 in turn.

    Args:
        groups: number of prompt tokens of each group, and of each of its completions.
        vocab: size of the vocabulary.
        seed: of the tokens.
        version: of the weights that are said to have sampled them; None: no policy of the run did.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(size: int) -> list[int]:
        return torch.randint(2, vocab, (size,), generator=generator).tolist()

    return [
        {
            "group_id": i,
            "prompt_ids": tokens(prompt),
            "completion_ids": [tokens(length) for length in lengths],
            "rewards": [float(j % 2) for j in range(len(lengths))],
            "finish_reasons": ["stop"] * len(lengths),
            "sources": ["offline:bench" if version is None else "policy"] * len(lengths),
            "version_min": [version] * len(lengths),
            "version_max": [version] * len(lengths),
            "sampling_logprobs": [None if version is None else [0.0] * length for length in lengths],
            "reward_reasons": [None] * len(lengths),
        }
        for i, (prompt, lengths) in enumerate(groups)
    ]
