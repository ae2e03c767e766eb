"""A model's family decides whether it can be trained, which is asked of its config before anything starts."""

from __future__ import annotations

import re
from typing import Any

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.model import ModelConfig

EXPERTS = re.compile(r"^(num|n|moe_num)_(local_|routed_)?experts$")
"""Keys of a config with the number of a layer's experts."""


def check_trainable(model: ModelConfig) -> None:
    """Refuse a model that cannot be trained here, by the name of its family.

    What a model does to its logits is compared with its own forward pass when it is loaded (`check_head`).

    Raises:
        ConfigError: one line with the family and the reason.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    path = model.path
    config: Any = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    text = config.get_text_config()
    found = {key: value for key, value in text.to_dict().items() if EXPERTS.match(key)}
    experts = next((key for key, value in found.items() if isinstance(value, int) and value > 1), None)
    if experts is not None:
        raise ConfigError(
            f"model.path: {path} is a mixture of experts ({config.model_type}, {experts} {found[experts]}), "
            "and only dense models can be trained yet: engines would not get the experts' weights"
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


def without_dropout(config: Any) -> Any:
    """Return a model's config with every dropout of its attention at 0, where the config has one.

    Layers that recompute in the backward pass are in training mode, in which dropout would be on.
    """
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for key in ("attention_dropout", "attn_pdrop"):
            if hasattr(part, key):
                setattr(part, key, 0.0)
    return config
