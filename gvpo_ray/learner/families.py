"""A model's family decides whether it can be trained, which is asked of its config before anything starts."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.model import ModelConfig, aux_loss_coefficient, num_experts

MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""The families with experts that engines and learner are compared of (docs/reference/families.md)."""


def check_trainable(model: ModelConfig) -> None:
    """Refuse a model that cannot be trained here, by the name of its family.

    What a model does to its logits is compared with its own forward pass when it is loaded (`check_head`).

    Raises:
        ConfigError: one line with the family and the reason.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    path = model.path
    config: Any = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    if num_experts(config) and config.model_type not in MIXTURES:
        raise ConfigError(
            f"model.path: {path} is a mixture of experts of a family that is not known here "
            f"({config.model_type}, {num_experts(config)} experts): {', '.join(MIXTURES)} are"
        )
    if model.router_aux_loss and not (num_experts(config) and aux_loss_coefficient(config)):
        raise ConfigError(
            f"model.router_aux_loss: {path} ({config.model_type}) has no auxiliary loss: its config has no "
            "experts, or no router_aux_loss_coef"
        )
    if config.is_encoder_decoder:
        raise ConfigError(
            f"model.path: {path} is an encoder and a decoder ({config.model_type}): only models of a decoder "
            "alone can be trained"
        )
    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_code:
        raise ConfigError(
            f"model.path: {path} ({config.model_type}) is no causal language model that transformers knows"
        )
    _check_generation_config(model)
    if model.lora is not None:
        import torch

        from gvpo_ray.learner.adapter import add_adapter

        with torch.device("meta"):  # its layers alone, without memory for weights
            layers: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=model.trust_remote_code
            )
            add_adapter(layers, model.lora)


def _check_generation_config(model: ModelConfig) -> None:
    """Refuse a generation_config.json that transformers reads, and would not write beside a checkpoint.

    Raises:
        ConfigError: one line with the file, its keys and the reason.
    """
    from transformers import GenerationConfig

    file = Path(model.path) / "generation_config.json"
    if not file.is_file():
        return
    try:
        GenerationConfig.from_pretrained(model.path).validate(strict=True)
    except (OSError, ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        keys = ", ".join(dict.fromkeys(re.findall(r"- `(\w+)`:", text))) or "unreadable"
        raise ConfigError(
            f"model.path: {file}: {keys}: no checkpoint could be written with it ({text[:300]})"
        ) from error


SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
"""Keys of a config that decide which weights fit a model."""


def digest_of(model: ModelConfig) -> dict[str, str]:
    """Return a digest of the shape and the vocabulary of model.path, by that key.

    A run's log and checkpoints hold token ids and weights, which mean nothing to a model with another one.
    """
    from transformers import AutoConfig, AutoTokenizer

    trust = model.trust_remote_code
    text = AutoConfig.from_pretrained(model.path, trust_remote_code=trust).get_text_config()
    vocabulary = AutoTokenizer.from_pretrained(model.path, trust_remote_code=trust).get_vocab()
    content = [[getattr(text, key, None) for key in SHAPE], sorted(vocabulary.items())]
    return {"model.path": hashlib.sha256(json.dumps(content).encode()).hexdigest()}


def without_dropout(config: Any) -> Any:
    """Return a model's config with every dropout of its attention at 0, where the config has one.

    Layers that recompute in the backward pass are in training mode, in which dropout would be on.
    """
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for key in ("attention_dropout", "attn_pdrop"):
            if hasattr(part, key):
                setattr(part, key, 0.0)
    return config
