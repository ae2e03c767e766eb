"""A mixture of experts is trained with the experts that the engine chose: router replay (arXiv 2510.11370).

Engine and learner round differently, so that their routers choose other experts for some tokens, and the
log-probs of those tokens differ by more than rounding. With replay a router still computes its logits, and so
its gates and their gradients; only which experts are the largest is read from the column `routed_experts`.
Where that says nothing (a group from before or from elsewhere, or a token without an entry), the router
chooses itself. What the routers say of the tokens of a pass is added up for the auxiliary loss (balance.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gvpo_ray.config.model import num_experts
from gvpo_ray.groups import GroupError, Row, experts_of
from gvpo_ray.groups.experts import merged_experts
from gvpo_ray.learner.context import Context

NOT_KNOWN = -1
"""Stands for an expert that the router has to choose itself."""


class Load:
    """A Load adds up, over the tokens of one pass, the probabilities that the routers give to each expert.

    Args:
        weights: [tokens] how often each token counts.
        num_experts: of a layer.
        counts: whether to count also how often each expert is chosen.
    """

    def __init__(self, weights: Tensor, num_experts: int, counts: bool) -> None:
        self._weights, self._num_experts, self._counts = weights, num_experts, counts
        self._probabilities: dict[int, Tensor] = {}
        self._chosen: dict[int, Tensor] = {}

    def add(self, layer: int, logits: Tensor, experts: Tensor) -> None:
        """Take what a router returned.

        Args:
            layer: its layer.
            logits: [tokens, num_experts].
            experts: [tokens, k] the experts that are chosen.
        """
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        weights = self._weights.to(dtype)
        summed = (logits.softmax(-1, dtype=dtype) * weights[:, None]).sum(0)
        # a layer that is computed again in the backward pass comes here again, with the same
        self._probabilities.setdefault(layer, summed)
        if self._counts:
            each = self._weights.double().repeat_interleave(experts.shape[1])
            self._chosen[layer] = torch.bincount(experts.flatten(), each, self._num_experts)

    @property
    def probabilities(self) -> Tensor:
        """Return each expert's probabilities, added up over tokens and layers, [num_experts], in float64."""
        return torch.stack(list(self._probabilities.values())).double().sum(0)

    @property
    def chosen(self) -> Tensor:
        """Return how often each expert was chosen in all layers, [num_experts], in float64."""
        return torch.stack(list(self._chosen.values())).sum(0)


class Routers:
    """The Routers of a model take the experts that an argument of its layers says, and fill a Load.

    Those arguments, `experts` and `load`, go the way of the layout of packed groups: through the model to
    each of its layers, so that a layer that is computed again in the backward pass gets them again.

    Args:
        model: a PreTrainedModel, whose layers and routers are changed in place.
        replays: whether experts that engines chose are replayed.
        context: the ranks that split packed sequences; None: each has them whole.

    Raises:
        ValueError: the model has no routers that are known here.
    """

    def __init__(self, model: Any, replays: bool = True, context: Context | None = None) -> None:
        config = model.config.get_text_config()
        layers = model.get_decoder().layers
        self.replays, self._context = replays, context
        self.num_experts = num_experts(config)
        self._shape = (len(layers), config.num_experts_per_tok)
        self._sparse = [i for i, layer in enumerate(layers) if _attach(layer, i)]
        if not self._sparse:
            raise ValueError(f"{config.model_type} has no routers that are known here")

    @property
    def num_layers(self) -> int:
        """Return the number of layers that have a router."""
        return len(self._sparse)

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
            NOT_KNOWN where a router has to choose; None: nothing is known, or nothing is replayed.

        Raises:
            GroupError: an entry does not fit the model.
        """
        if not self.replays or not any(
            any((row.get("prompt_experts"), *(row.get("routed_experts") or ()))) for row in rows
        ):
            return None
        known = [self._known(row) for row in rows]
        return self._laid_out(known, inputs["input_ids"], packed, NOT_KNOWN).transpose(0, 1).contiguous()

    def load(self, rows: Sequence[Row], inputs: dict[str, Any], packed: bool, counts: bool = False) -> Load:
        """Return the Load that the routers fill in a pass.

        A completion counts with its prompt, without its last token, which no packed pass computes: a packed
        prompt counts once for each completion. So neither packing nor the cut into passes changes a sum.

        Args:
            rows: the groups of the pass.
            inputs: what `packing.pack` or `padded_inputs` has made of them.
            packed: which of the two.
            counts: whether to count also how often each expert is chosen.
        """
        weights = []
        for row in rows:
            times = len(row["completion_ids"]) if packed else 1
            own = [np.ones(max(0, len(ids) - 1), np.float32) for ids in row["completion_ids"]]
            weights.append((np.full(len(row["prompt_ids"]), times, np.float32), own))
        return Load(self._laid_out(weights, inputs["input_ids"], packed, 0), self.num_experts, counts)

    def chosen(self, rows: Sequence[Row]) -> np.ndarray | None:
        """Return how often each expert is chosen for some groups, [num_experts], as `load` counts it.

        None: nothing is replayed, or the engine has not said it of every token.

        Args:
            rows: the groups.
        """
        counts = np.zeros(self.num_experts)
        for row in rows if self.replays else ():
            prompt, own = self._known(row)
            for times, part in ((len(own), prompt), *((1, one) for one in own)):
                experts = part[:, self._sparse].ravel()
                if (experts < 0).any():
                    return None
                counts += times * np.bincount(experts, minlength=self.num_experts)
        return counts if self.replays else None

    def _known(self, row: Row) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the experts of a prompt's tokens, and of each completion's tokens but the last."""
        num_prompt = len(row["prompt_ids"])
        entries = row.get("routed_experts") or [None] * len(row["completion_ids"])
        given = row.get("prompt_experts") or entries
        prompt = self._of_this_model(row, merged_experts(given, num_prompt, self._shape, self.num_experts))
        completions = []
        for ids, entry in zip(row["completion_ids"], entries, strict=True):
            own = self._of_this_model(row, experts_of(entry, self._shape, self.num_experts))
            if len(own) > num_prompt + len(ids):
                raise GroupError(
                    f"group {row['group_id']}: routed_experts has {len(own)} tokens of a completion that "
                    f"has {num_prompt + len(ids)} with its prompt"
                )
            known = np.full((max(0, len(ids) - 1), *self._shape), NOT_KNOWN, np.int16)
            own = own[num_prompt : num_prompt + len(known)]
            known[: len(own)] = own
            completions.append(known)
        return prompt, completions

    def _of_this_model(self, row: Row, known: np.ndarray | None) -> np.ndarray:
        if known is None:
            raise GroupError(
                f"group {row['group_id']}: routed_experts is not of a model with {self._shape[0]} layers and "
                f"{self._shape[1]} of {self.num_experts} experts per token"
            )
        return known

    def _laid_out(
        self,
        rows: Sequence[tuple[np.ndarray, list[np.ndarray]]],
        input_ids: Tensor,
        packed: bool,
        fill: int,
    ) -> Tensor:
        """Return something of each of this rank's tokens, in the order of a pass's tokens, [tokens, …].

        Args:
            rows: for each group that of its prompt's tokens, and of each completion's tokens but the last.
            input_ids: the pass's tokens, of which this rank may have a part.
            packed: whether groups are packed, else completions are padded.
            fill: stands for all other tokens.
        """
        some, num = rows[0][0], input_ids.numel()
        parts = 1 if self._context is None else self._context.size
        found = np.full((num * parts, *some.shape[1:]), fill, some.dtype)
        at = number = 0
        for prompt, completions in rows:
            if packed:
                found[at : at + len(prompt)] = prompt
                at += len(prompt)
            for own in completions:
                if not packed:
                    at = number * input_ids.shape[1]
                    found[at : at + len(prompt)] = prompt
                    at += len(prompt)
                found[at : at + len(own)] = own
                at += len(own)
                number += 1
        first = 0 if self._context is None else self._context.rank * num
        return torch.from_numpy(found[first : first + num]).to(input_ids.device)


def _attach(layer: nn.Module, index: int) -> bool:
    """Let a layer take the arguments `experts` and `load`; return whether it has a router."""
    routers = [module for module in layer.modules() if type(module).__name__.endswith("TopKRouter")]
    given = SimpleNamespace(experts=None, load=None)

    def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        experts = kwargs.pop("experts", None)
        given.experts = None if experts is None else experts[index]
        given.load = kwargs.pop("load", None)
        return args, kwargs

    layer.register_forward_pre_hook(take, with_kwargs=True)
    for router in routers:
        _follow(router, given, index)
    return bool(routers)


def _follow(router: Any, given: SimpleNamespace, index: int) -> None:
    """Let a router choose the experts that its layer is given, and tell the layer's Load what it chose."""
    usual = router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if given.experts is None and given.load is None:
            return usual(*args, **kwargs)
        with _Choice(given.experts) as choice:
            result = usual(*args, **kwargs)
        if given.load is not None:
            # expert parallel routers return numbers of their own for the experts
            given.load.add(index, result[0], choice.places)
        return result

    router.forward = forward


class _Choice(TorchFunctionMode):
    """A _Choice answers torch.topk, within its context, with places that are given.

    So a router's own code computes the gates, and normalises them as its family does.

    Args:
        experts: [tokens, k] the places; NOT_KNOWN: the largest. None: all are the largest.
    """

    def __init__(self, experts: Tensor | None) -> None:
        super().__init__()
        self._experts = experts
        self.places: Tensor
        """[tokens, k] The places of the answer."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return result
        self.places = result.indices
        if self._experts is None:
            return result
        self.places = torch.where(self._experts < 0, result.indices, self._experts.long())
        return torch.return_types.topk((args[0].gather(-1, self.places), self.places))
