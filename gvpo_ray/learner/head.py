"""The fused output head computes log softmax(W h)[target] without holding the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
"""The number of logits held at a time, by type of device, forward and backward.

In float32 that is 16 MB on a CPU, which stays in its cache, and 1 GB on a GPU.
"""


class LinearLogprobs(torch.autograd.Function):
    """This function fuses the output head with log-softmax and never keeps logits for the backward pass.

    The forward pass keeps hidden states, targets and the log of the sum of exponentials. The backward pass
    computes the logits of each chunk again and adds to one float32 gradient of the weight, so that no chunk
    has a weight-sized gradient of its own. Products of bfloat16 are summed and returned in float32.

    Where a group of ranks has the weight split by its rows, the vocabulary, each computes the logits of its
    own rows. They exchange two numbers per token: the log of the sum of exponentials of their rows, which is
    their maximum and the sum beyond it in one, and the target's logit, or 0 where another rank has it. Every
    rank adds them up in the same order, to the same bits. The hidden states' gradients are added up as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        scale: float,
        softcap: float | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """Return the targets' log-probs, [N], in float32, or in float64 for float64 inputs.

        Args:
            ctx: autograd's context.
            hidden: [N, hidden size].
            weight: [vocabulary, hidden size].
            bias: [vocabulary] or None.
            targets: [N] token ids.
            chunk: tokens whose logits are held at a time.
            scale: multiplies the logits.
            softcap: caps the logits, as in `linear_logprobs`; None: no cap.
            group: the ranks that share the vocabulary, as in `linear_logprobs`; None: the weight is whole.
        """
        owned = None if group is None else _owned(targets, len(weight), dist.get_rank(group))
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        half, matrix = hidden.to(dtype), weight.to(dtype)
        result = hidden.new_empty(
            len(hidden), dtype=torch.float64 if dtype == torch.float64 else torch.float32
        )
        sums = torch.empty_like(result)
        with torch.autocast(kind, enabled=False):  # autocast would round float32 products to bfloat16
            for part in _chunks(len(hidden), chunk):
                logits = _capped(_logits(half[part], matrix, bias, scale), softcap)
                sums[part] = torch.logsumexp(logits, dim=-1)
                if owned is None:
                    result[part] = logits.gather(1, targets[part, None]).squeeze(1) - sums[part]
                else:
                    place, is_own = owned[0][part], owned[1][part]
                    result[part] = logits.gather(1, place[:, None]).squeeze(1) * is_own
        if group is not None:
            pairs = result.new_empty((2 * dist.get_world_size(group), len(hidden)))
            dist.all_gather_into_tensor(pairs, torch.stack([sums, result]), group=group)
            sums = torch.logsumexp(pairs[::2], dim=0)
            result = pairs[1::2].sum(0) - sums
        ctx.save_for_backward(hidden, weight, bias, targets, sums)
        ctx.chunk, ctx.dtype, ctx.scale, ctx.softcap, ctx.group = chunk, dtype, scale, softcap, group
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden states, weight and bias; d log p / d logits = one-hot - softmax."""
        hidden, weight, bias, targets, sums = ctx.saved_tensors
        half, matrix = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        owned = None if ctx.group is None else _owned(targets, len(weight), dist.get_rank(ctx.group))
        # parts of it from several ranks are added up in float32
        kind = hidden.dtype if ctx.group is None else sums.dtype
        of_hidden = torch.empty_like(hidden, dtype=kind) if wants_hidden else None
        of_weight = (
            torch.zeros(weight.shape, dtype=sums.dtype, device=weight.device) if wants_weight else None
        )
        of_bias = torch.zeros(len(weight), dtype=sums.dtype, device=weight.device) if wants_bias else None
        for part in _chunks(len(hidden), ctx.chunk):
            logits = _capped(_logits(half[part], matrix, bias, ctx.scale), ctx.softcap)
            # d cap tanh(x / cap) / dx = 1 - tanh(x / cap)^2
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square_()
            own = logits.sub_(sums[part, None]).exp_().mul_(-gradient[part, None])
            place, towards = targets[part], gradient[part].to(own.dtype)
            if owned is not None:
                place, towards = owned[0][part], towards * owned[1][part]
            own.scatter_add_(1, place[:, None], towards[:, None])
            if slope is not None:
                own.mul_(slope)
            if ctx.scale != 1:
                own.mul_(ctx.scale)
            if of_bias is not None:
                of_bias += own.sum(0)
            own = own.to(ctx.dtype)
            if of_hidden is not None:
                of_hidden[part] = own @ matrix
            if of_weight is not None:
                _add_product(of_weight, own.t(), half[part])
        of_weight = None if of_weight is None else of_weight.to(weight.dtype)
        if of_hidden is not None and ctx.group is not None:
            dist.all_reduce(of_hidden, group=ctx.group)
        return (
            None if of_hidden is None else of_hidden.to(hidden.dtype),
            of_weight,
            None if of_bias is None or bias is None else of_bias.to(bias.dtype),
            *[None] * 5,
        )


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return log softmax(cap(scale * (weight @ hidden_i + bias)))[targets_i] for all i.

    Args:
        hidden: [N, hidden size].
        weight: [vocabulary, hidden size].
        targets: [N] token ids.
        bias: [vocabulary] or None.
        scale: multiplies the logits (Cohere, Granite).
        softcap: where given, cap(x) = softcap * tanh(x / softcap) (Gemma 2); else cap(x) = x.
        group: where given, the ranks that have `weight` and `bias` in equal parts, [vocabulary / ranks, …],
            in the order of the vocabulary. Hidden states and targets, and the loss, are the same on each.

    Returns:
        [N], float32, or float64 for float64 inputs; under autocast products are taken in autocast's dtype.
    """
    chunk = max(1, ELEMENTS[hidden.device.type] // len(weight))
    result: Tensor = LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, chunk, scale, softcap, group
    )
    return result


def _owned(targets: Tensor, rows: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the row of each target in this rank's part of the vocabulary, and whether it is there."""
    place = targets - rank * rows
    is_own = (place >= 0) & (place < rows)
    return place.clamp(0, rows - 1), is_own


def _chunks(size: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = _product(hidden, weight.t())
    if bias is not None:
        logits.add_(bias)
    return logits if scale == 1 else logits.mul_(scale)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32 for inputs of any type, as vLLM's float32 head does; float64 stays float64.

    On a GPU the inputs are not copied.
    """
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, which is float32 or float64."""
    if a.dtype in (torch.float32, torch.float64):
        total.addmm_(a, b)
    elif a.is_cuda:
        total.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        total.addmm_(a.float(), b.float())
