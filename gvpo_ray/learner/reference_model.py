"""A ReferenceModel is a copy of the trained parameters, with which the policy's module can compute.

The copy is of each rank's part of them, and is swapped with them for a pass. So the reference model is
sharded as the policy is, computes as the policy does (a log-ratio of 0 is exactly 0), and needs no second
module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gvpo_ray.learner.adapter import switch_adapter, trained_parameters
from gvpo_ray.learner.backends.base import Backend
from gvpo_ray.learner.logprobs import CompletionLogprobs


class ReferenceModel:
    """A ReferenceModel belongs to a policy, and at first there is none; its methods are for every rank.

    Args:
        module: the policy's.
        backend: the policy's.
        read: returns the whole model in a folder.
        device: this rank's.
        has_adapter: whether a LoRA adapter is trained.
    """

    def __init__(
        self,
        module: CompletionLogprobs,
        backend: Backend,
        read: Callable[[str | Path], Any],
        device: torch.device,
        has_adapter: bool,
    ) -> None:
        self._module, self._backend, self._read = module, backend, read
        self._device, self._has_adapter = device, has_adapter
        self._values: list[Tensor] | Literal["without adapter"] | None = None
        self.is_copy = False
        """Whether it is a copy of an earlier policy, which is stored in checkpoints."""
        self.version = 0
        """The step whose weights the reference has; 0: the initial ones."""

    @property
    def exists(self) -> bool:
        """Return whether there is a reference model."""
        return self._values is not None

    def load(self, path: str | Path) -> None:
        """Take the model in a folder as the reference model.

        Where a LoRA adapter is trained, the reference is the base model instead, and `path` is not read.
        """
        if self._has_adapter:
            self._values = "without adapter"
            return
        self.fill(dict(self._read(path).named_parameters()))

    def refresh(self, step: int) -> None:
        """Make the reference model a copy of the current policy, which has finished `step` steps."""
        self._values = [part.clone() for part in self._parts()]
        self.is_copy, self.version = True, step

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Take whole values of the trained parameters, by name, as the reference model."""
        self._values = [part.clone() for part in self._parts()]
        for name, parameter in trained_parameters(self._module.model):
            self._backend.fill(parameter, values[name].to(self._device))
        self._swap()

    @contextlib.contextmanager
    def computes(self) -> Iterator[None]:
        """Let the module compute as the reference model within this context.

        Raises:
            RuntimeError: there is no reference model.
        """
        if self._values is None:
            raise RuntimeError("the policy has no reference")
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def _switch(self, is_reference: bool) -> None:
        if self._values == "without adapter":
            switch_adapter(self._module, on=not is_reference)
        else:
            self._swap()

    def _parts(self) -> list[Tensor]:
        parameters = trained_parameters(self._module.model)
        return [part for _, parameter in parameters for part in self._backend.local(parameter)]

    @torch.no_grad()
    def _swap(self) -> None:
        assert isinstance(self._values, list)
        for part, other in zip(self._parts(), self._values, strict=True):
            before = part.clone()
            part.copy_(other)
            other.copy_(before)
