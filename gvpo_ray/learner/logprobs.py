"""This module computes log-probs of completions: padded inputs, the forward pass, and sums over sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gvpo_ray.groups import Row
from gvpo_ray.learner.head import linear_logprobs


class CompletionLogprobs(nn.Module):
    """This module returns log pi(y_t | x, y_<t) for every token of every completion of a micro-batch.

    The head is not applied to prompt tokens. It is called once per pass, whatever a rank's pass holds: under
    ZeRO-3 and FSDP every call of a module is a collective. So the head's `forward` gets a second form,
    head(hidden, targets), which is the fused function of head.py.

    Raises:
        TypeError: the model's output head is not a plain linear layer.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model  # a PreTrainedModel, whose methods have no types
        head = model.get_output_embeddings()
        # FSDP gives a module that it has sharded a class of its own, above the usual one
        kind = next(kind for kind in type(head).__mro__ if not issubclass(kind, FSDPModule))
        if kind is not nn.Linear:
            raise TypeError(f"the model's output head is a {kind.__name__}: only a plain linear one is known")
        usual = head.forward
        scale, softcap = logit_transform(model)
        # transformers shards a tied weight twice; the embedding's is gathered by the time the head is called
        embedding = model.get_input_embeddings()
        is_shared = isinstance(head.weight, DTensor) and head.weight is embedding.weight
        owner = embedding if is_shared else head

        def forward(hidden: Tensor, targets: Tensor | None = None) -> Tensor:
            if targets is None:
                logits: Tensor = usual(hidden)
                return logits
            weight, bias = owner.weight, head.bias
            group: dist.ProcessGroup | None = None
            if isinstance(weight, DTensor):  # tensor parallel: each rank has a part of the vocabulary
                group = weight.device_mesh.get_group("tp")
                weight, bias = weight.to_local(), None if bias is None else bias.to_local()
            return linear_logprobs(hidden, weight, targets, bias, scale, softcap, group)

        head.forward = forward

    def forward(
        self, rows: Tensor, positions: Tensor, targets: Tensor, by_model: bool = False, **inputs: Any
    ) -> Tensor:
        """Return the log-probs of N tokens, [N], in float32, or in float64 for a float64 model.

        Args:
            rows: [N] the sequence in which each token is predicted.
            positions: [N] the position in that sequence at which each token is predicted.
            targets: [N] the tokens' ids.
            by_model: compute all of the model's own logits, which the fused head is checked against.
            inputs: the model's arguments (`padded_inputs`, `packing.pack`).
        """
        if by_model:
            logits = self.model(**inputs, use_cache=False).logits[rows, positions]
            dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
            by_logits: Tensor = logits.to(dtype).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
            return by_logits
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state[rows, positions]
        by_head: Tensor = self.model.get_output_embeddings()(hidden, targets)
        layout = inputs.get("layout")
        return by_head if layout is None else layout.whole(by_head)

    def checkpoint_activations(self, on: bool = True) -> None:
        """Switch gradient checkpointing, which computes activations again in the backward pass, on or off."""
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        # Layers recompute only in training mode; in other modules that mode would switch dropout on.
        for module in self.modules():
            module.training = getattr(module, "gradient_checkpointing", False)


def logit_transform(model: Any) -> tuple[float, float | None]:
    """Return what the model does to its head's logits: their factor, and their soft cap or None.

    It knows the transforms of some families of models; `check_head` finds others.
    """
    config = model.config.get_text_config()
    scale = getattr(model, "logit_scale", None) or 1.0  # Cohere
    if config.model_type.startswith("granite"):
        scale = 1 / config.logits_scaling
    return float(scale), getattr(config, "final_logit_softcapping", None)  # Gemma, NanoChat


def check_head(by_model: Tensor, ours: Tensor, config: Any, is_half: bool) -> None:
    """Compare the fused head's log-probs with those of the model's own logits.

    Args:
        by_model: [N] log-probs of the model's own logits.
        ours: [N] the fused head's.
        config: the model's.
        is_half: whether both are computed in bfloat16.

    Raises:
        ValueError: they differ by more than rounding; the message names the model's type and the keys of its
            config that change its logits.
    """
    difference = float((by_model - ours).double().square().mean().sqrt())
    if difference < (0.1 if is_half else 1e-3):
        return
    hints = [
        name
        for name, value in config.get_text_config().to_dict().items()
        if value is not None and ("logit" in name or "lm_head" in name or name == "dim_model_base")
    ]
    raise ValueError(
        f"{config.model_type}: its log-probs are not those of its linear head: they differ by "
        f"{difference:.2g} nats. What it does to its logits ({', '.join(hints) or 'not said in its config'}) "
        "is not known here"
    )


def trained_tokens(row: Row) -> list[Sequence[int]]:
    """Return for each completion the indices of the tokens that are trained.

    The optional column `trained_tokens` has a bool for each token; null means that all are trained. The other
    tokens are context: the model reads them, but they are no targets.
    """
    masks = row.get("trained_tokens") or [None] * len(row["completion_ids"])
    result: list[Sequence[int]] = []
    for ids, mask in zip(row["completion_ids"], masks, strict=True):
        pairs = () if mask is None else zip(ids, mask, strict=True)
        trained = [place for place, (_, is_trained) in enumerate(pairs) if is_trained]
        result.append(range(len(ids)) if mask is None else trained)
    return result


def padded_inputs(rows: Sequence[Row], device: torch.device | str) -> tuple[dict[str, Tensor], list[int]]:
    """Lay out every completion with its prompt as a row of its own, right-padded.

    Returns:
        The arguments of CompletionLogprobs, and the number of trained tokens of each completion.
    """
    sequences = [
        (row["prompt_ids"], ids, trained)
        for row in rows
        for ids, trained in zip(row["completion_ids"], trained_tokens(row), strict=True)
    ]
    width = max(len(prompt) + len(ids) for prompt, ids, _ in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    index: list[tuple[int, int, int]] = []
    for i, (prompt, ids, trained) in enumerate(sequences):
        end = len(prompt) + len(ids)
        input_ids[i, :end] = torch.tensor([*prompt, *ids])
        mask[i, :end] = 1
        index += [(i, len(prompt) + t - 1, ids[t]) for t in trained]
    where = torch.tensor(index, dtype=torch.long).view(-1, 3)
    tensors = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "rows": where[:, 0],
        "positions": where[:, 1],
        "targets": where[:, 2],
    }
    lengths = [len(trained) for _, _, trained in sequences]
    return {name: tensor.to(device) for name, tensor in tensors.items()}, lengths


def sequence_sums(token_logprobs: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the sum of token log-probs over each completion, [number of completions], in float64.

    The same tokens give the same bits, which atomic additions on a GPU would not: a log-ratio of 0 is
    exactly 0.

    Args:
        token_logprobs: [sum of lengths], completion by completion.
        lengths: the number of tokens of each completion; it may be 0.
    """
    sizes = torch.tensor(lengths, dtype=torch.long, device=token_logprobs.device)
    # unsafe: lengths are not checked, which also allows that there are none
    return torch.segment_reduce(token_logprobs.double(), "sum", lengths=sizes, unsafe=True)
