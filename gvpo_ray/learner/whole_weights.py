"""The whole weights of a model that is spread over ranks are gathered one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from gvpo_ray.learner.adapter import adapter_name, trained_parameters
from gvpo_ray.learner.backends.base import Backend
from gvpo_ray.learner.logprobs import CompletionLogprobs
from gvpo_ray.weights.lora import merged


class _Tensors:
    """This iterable gathers named tensors one at a time, each time that it is iterated over."""

    def __init__(self, gather: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        self._gather = gather

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._gather()


class WholeWeights:
    """WholeWeights are a policy's weights under the names that engines and files give them.

    Every rank has to iterate over what a method returns, to its end.

    Args:
        module: the policy's.
        backend: the policy's.
        adapter: contents of adapter_config.json, where a LoRA adapter is trained; else None.
    """

    def __init__(self, module: CompletionLogprobs, backend: Backend, adapter: dict[str, Any] | None) -> None:
        self._module, self._backend, self._adapter = module, backend, adapter

    def for_engines(self) -> Iterable[tuple[str, Tensor]]:
        """Return what engines need: the whole model, or where a LoRA adapter is trained its weights alone.

        The result can be iterated over more than once: vLLM's NCCL broadcast asks for the shapes first.
        """
        return _Tensors(self.of_model if self._adapter is None else self.of_adapter)

    def of_adapter(self) -> Iterator[tuple[str, Tensor]]:
        """Gather the adapter, under peft's names."""
        for name, parameter in trained_parameters(self._module.model):
            yield adapter_name(name), self._backend.full(parameter)

    def of_model(self) -> Iterator[tuple[str, Tensor]]:
        """Gather the whole model, with the adapter merged into it, under Hugging Face names.

        Tied weights come under each of their names.
        """
        config = self._adapter or {}
        adapters = dict(trained_parameters(self._module.model)) if self._adapter is not None else {}
        for name, parameter in self._module.model.named_parameters(remove_duplicate=False):
            if name in adapters:
                continue
            value = self._backend.full(parameter)
            layer, is_adapted, _ = name.partition(".base_layer.")
            if is_adapted and name.endswith(".weight"):
                a, b = (self._backend.full(adapters[f"{layer}.lora_{x}.default.weight"]) for x in "AB")
                value = merged(value, a, b, config["lora_alpha"] / config["r"]).to(value.dtype)
            yield name.replace(".base_layer.", "."), value
