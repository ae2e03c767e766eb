"""A LoRA adapter is put into the model here, named as in peft's files, and switched off for a pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.model import LoraConfig


def add_adapter(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """Put a LoRA adapter (Hu et al. 2021, arXiv 2106.09685) into the model, which still computes the same.

    Returns:
        The contents of peft's adapter_config.json.

    Raises:
        ConfigError: no layer has such a name, or one that has is not linear or is the head.
    """
    import peft

    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it by r and needs no whole number
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same adapter on every rank and in every start of a run
        try:
            peft.inject_adapter_in_model(lora, model)
        except (ValueError, re.error) as error:
            raise ConfigError(f"model.lora.target_modules: {' '.join(str(error).split())}") from error
    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    adapted: dict[str, Any] = {
        name: module for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    for name, module in adapted.items():
        base = module.get_base_layer()  # one of peft's, as its lora_A shows
        if not isinstance(base, nn.Linear) or module is head:
            # engines and checkpoints merge it into weights that are [out, in], and into those of layers alone
            family = getattr(getattr(model, "config", None), "model_type", "model")
            what = "the head" if module is head else f"no torch.nn.Linear but a layer {type(base).__name__}"
            raise ConfigError(
                f"model.lora.target_modules: {name} of this {family} is {what}, and cannot have an adapter"
            )
    layers = {name.rpartition(".")[2] for name in adapted}
    known: dict[str, Any] = lora.to_dict()  # type: ignore[no-untyped-call]
    return {**known, "peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": sorted(layers)}


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Return the parameters that the optimizer updates: all of the model's, or the adapter's."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def adapter_name(name: str) -> str:
    """Return the name that peft's files give a parameter of an adapter."""
    return "base_model.model." + name.replace(".default.", ".")


def switch_adapter(module: nn.Module, on: bool) -> None:
    """Let the module compute with its adapter, or without it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._disable_adapters = not on  # enable_adapters() would also change what is trained
