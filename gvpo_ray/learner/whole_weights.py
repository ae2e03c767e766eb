"""The whole weights of a model that is spread over ranks are gathered one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from gvpo_ray.config.model import num_experts
from gvpo_ray.learner.adapter import adapter_name, trained_parameters
from gvpo_ray.learner.backends.base import Backend
from gvpo_ray.learner.logprobs import CompletionLogprobs
from gvpo_ray.weights.lora import merged


class WholeWeights:
    """WholeWeights are a policy's weights under the names that engines and files give them.

    Itself it yields what engines need: the whole model, or where a LoRA adapter is trained its weights alone.
    Every rank has to iterate over it, or over what a method returns, to the end, and may do so more than
    once: vLLM's NCCL broadcast asks for the shapes first.

    Args:
        module: the policy's.
        backend: the policy's.
        adapter: contents of adapter_config.json, where a LoRA adapter is trained; else None.
    """

    def __init__(self, module: CompletionLogprobs, backend: Backend, adapter: dict[str, Any] | None) -> None:
        self.module, self.backend, self.adapter = module, backend, adapter

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._of_files() if self.adapter is None else self.of_adapter()

    def _of_files(self) -> Iterator[tuple[str, Tensor]]:
        """Gather the whole model under the names of its files, which are those that engines load.

        transformers holds all experts of a layer in two tensors, and files have three tensors of each expert.
        """
        model: Any = self.module.model
        is_mixture = num_experts(model.config) > 0
        for name, value in self.of_model():
            if is_mixture:
                yield from revert_weight_conversion(model, {name: value}).items()  # views: nothing is copied
            else:
                yield name, value

    def of_adapter(self) -> Iterator[tuple[str, Tensor]]:
        """Gather the adapter, under peft's names."""
        for name, parameter in trained_parameters(self.module.model):
            yield adapter_name(name), self.backend.full(parameter)

    def of_model(self) -> Iterator[tuple[str, Tensor]]:
        """Gather the whole model, with the adapter merged into it, under the names that transformers has.

        Tied weights come under each of their names.
        """
        config = self.adapter or {}
        adapters = dict(trained_parameters(self.module.model)) if self.adapter is not None else {}
        for name, parameter in self.module.model.named_parameters(remove_duplicate=False):
            if name in adapters:
                continue
            value = self.backend.full(parameter)
            layer, is_adapted, _ = name.partition(".base_layer.")
            if is_adapted and name.endswith(".weight"):
                a, b = (self.backend.full(adapters[f"{layer}.lora_{x}.default.weight"]) for x in "AB")
                value = merged(value, a, b, config["lora_alpha"] / config["r"]).to(value.dtype)
            yield name.replace(".base_layer.", "."), value
