"""A model's config says whether its layers can be split over workers, before anything starts."""

from __future__ import annotations

from typing import Any

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.model import ModelConfig, num_experts

SPLIT = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
"""Keys of a config with numbers that tensor parallel workers share out equally."""


SPLIT_MIXTURES = ("mixtral", "qwen3_moe")
"""Families with experts whose steps on tensor parallel workers are compared with one worker's."""


def check_sizes(model: ModelConfig, learner: LearnerConfig) -> None:
    """Refuse a model whose heads, columns or vocabulary the workers cannot share out.

    Raises:
        ConfigError: one line with the key and the number.
    """
    from transformers import AutoConfig

    tensor, context = learner.tensor_parallel_size, learner.context_parallel_size
    if tensor * context == 1:
        return
    config: Any = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    text = config.get_text_config()
    if experts := num_experts(config) if tensor > 1 else 0:
        if config.model_type not in SPLIT_MIXTURES:
            raise ConfigError(
                f"learner.tensor_parallel_size: a {config.model_type} is a mixture of experts that is not "
                f"known to be split rightly: {', '.join(SPLIT_MIXTURES)} are; use fsdp or ZeRO"
            )
        if experts % tensor:
            raise ConfigError(
                f"learner.tensor_parallel_size: {tensor} workers cannot share out the {experts} experts of "
                f"{model.path}"
            )
    if tensor > 1 and not text.base_model_tp_plan:
        raise ConfigError(
            f"learner.tensor_parallel_size: transformers has no plan to split a {config.model_type} up"
        )
    for key in SPLIT if tensor > 1 else ():
        number = getattr(text, key, None)
        if number is not None and number % tensor:
            raise ConfigError(
                f"learner.tensor_parallel_size: {tensor} workers cannot share out the {key} ({number}) of "
                f"{model.path}"
            )
    kinds = {*(getattr(text, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    heads = getattr(text, "num_attention_heads", None)
    if context > 1 and (kinds or heads is None or getattr(text, "attn_logit_softcapping", None)):
        raise ConfigError(
            f"learner.context_parallel_size: the groups of a {config.model_type} cannot be packed, and only "
            "packed ones are split"
        )
    if heads is not None and heads // tensor % context:
        raise ConfigError(
            f"learner.context_parallel_size: {context} workers cannot share out the num_attention_heads "
            f"({heads}{f' / {tensor}' if tensor > 1 else ''}) of {model.path}"
        )
