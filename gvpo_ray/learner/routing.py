"""A mixture of experts is trained with the experts that the engine chose: router replay (arXiv 2510.11370).

Engine and learner round differently, so that their routers choose other experts for some tokens, and the
log-probs of those tokens differ by more than rounding. With replay a router still computes its logits, and so
its gates and their gradients; only which experts are the largest is read from the column `routed_experts`.
Where that says nothing (a group from before or from elsewhere, or a token without an entry), the router
chooses itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gvpo_ray.config.model import num_experts
from gvpo_ray.groups import GroupError, Row, experts_of
from gvpo_ray.groups.experts import merged_experts

NOT_KNOWN = -1
"""Stands for an expert that the router has to choose itself."""


class RouterReplay:
    """A RouterReplay lets the routers of a model take the experts that an argument of its layers says.

    That argument, `experts`, goes the way of the layout of packed groups: through the model to each of its
    layers, so that a layer that is computed again in the backward pass gets it again.

    Args:
        model: a PreTrainedModel, whose layers and routers are changed in place.

    Raises:
        ValueError: the model has no routers that are known here.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        layers = model.get_decoder().layers
        self._num_experts = num_experts(config)
        self._shape = (len(layers), config.num_experts_per_tok)
        if sum(_attach(layer, i) for i, layer in enumerate(layers)) == 0:
            raise ValueError(f"{config.model_type} has no routers that are known here")

    def experts(self, rows: Sequence[Row], inputs: dict[str, Any], packed: bool) -> Tensor | None:
        """Return the experts of all tokens of a pass, [layers, tokens, experts per token].

        All completions of a group have the experts that are known of its prompt, per token those of the first
        completion that knows them: a packed prompt is computed once, and neither packing nor the cut into
        passes may change a result.

        Args:
            rows: the groups of the pass.
            inputs: what `packing.pack` or `padded_inputs` has made of them.
            packed: which of the two.

        Returns:
            NOT_KNOWN where a router has to choose; None: nothing is known.

        Raises:
            GroupError: an entry does not fit the model.
        """
        if not any(any((row.get("prompt_experts"), *(row.get("routed_experts") or ()))) for row in rows):
            return None
        input_ids: Tensor = inputs["input_ids"]
        width = input_ids.shape[1]
        found = np.full((input_ids.numel(), *self._shape), NOT_KNOWN, np.int16)
        at = number = 0
        for row in rows:
            num_prompt = len(row["prompt_ids"])
            entries = row.get("routed_experts") or [None] * len(row["completion_ids"])
            prompt = self._of_this_model(
                row,
                merged_experts(
                    row.get("prompt_experts") or entries, num_prompt, self._shape, self._num_experts
                ),
            )
            if packed:
                found[at : at + len(prompt)] = prompt
                at += num_prompt
            for ids, entry in zip(row["completion_ids"], entries, strict=True):
                own = self._of_this_model(row, experts_of(entry, self._shape, self._num_experts))
                if len(own) > num_prompt + len(ids):
                    raise GroupError(
                        f"group {row['group_id']}: routed_experts has {len(own)} tokens of a completion that "
                        f"has {num_prompt + len(ids)} with its prompt"
                    )
                own = own[num_prompt : num_prompt + max(0, len(ids) - 1)]
                if not packed:
                    at = number * width
                    found[at : at + len(prompt)] = prompt
                    at += num_prompt
                found[at : at + len(own)] = own
                at += max(0, len(ids) - 1)
                number += 1
        return torch.from_numpy(found).to(input_ids.device).transpose(0, 1).contiguous()

    def _of_this_model(self, row: Row, known: np.ndarray | None) -> np.ndarray:
        if known is None:
            raise GroupError(
                f"group {row['group_id']}: routed_experts is not of a model with {self._shape[0]} layers and "
                f"{self._shape[1]} of {self._num_experts} experts per token"
            )
        return known


def _attach(layer: nn.Module, index: int) -> int:
    """Let a layer take the argument `experts`; return the number of its routers."""
    routers = [module for module in layer.modules() if type(module).__name__.endswith("TopKRouter")]
    chosen: list[Tensor | None] = [None]

    def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        experts = kwargs.pop("experts", None)
        chosen[0] = None if experts is None else experts[index]
        return args, kwargs

    layer.register_forward_pre_hook(take, with_kwargs=True)
    for router in routers:
        _replay(router, chosen)
    return len(routers)


def _replay(router: Any, chosen: list[Tensor | None]) -> None:
    usual = router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if chosen[0] is None:
            return usual(*args, **kwargs)
        with _Choice(chosen[0]):
            return usual(*args, **kwargs)

    router.forward = forward


class _Choice(TorchFunctionMode):
    """A _Choice answers torch.topk, within its context, with places that are given.

    So a router's own code computes the gates, and normalises them as its family does.

    Args:
        experts: [tokens, k] the places; NOT_KNOWN: the largest.
    """

    def __init__(self, experts: Tensor) -> None:
        super().__init__()
        self._experts = experts

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return result
        places = torch.where(self._experts < 0, result.indices, self._experts.long())
        return torch.return_types.topk((args[0].gather(-1, places), places))
