"""A Context splits one packed sequence over ranks: context parallel, as DeepSpeed's Ulysses does it.

    tokens    rank 0: x1 x2 x3 y1 | rank 1: y2 z1 z2 z3        everything token-wise: all heads of some tokens
    attention rank 0: head 0 of all tokens | rank 1: head 1    all tokens of some heads

(Jacobs et al. 2023, arXiv 2309.14509.) Between the two forms the ranks exchange parts, all to all, around the
attention function. That has the whole sequence, and so the whole mask of the groups. DeepSpeed's own
implementation is not used: it replaces every mask of FlexAttention by a causal one, in which completions of a
group would see each other.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another, as in the group of all of them, which Ray Train makes."""


class Context:
    """A Context is the group of ranks that compute the passes of one share of the groups together.

    Making one is a collective of all ranks.

    Args:
        size: the number of ranks that split a sequence.
        stride: the number of ranks that have the same tokens, because they split layers; they follow each
            other, and so do the ranks of a sequence in steps of `stride`.
    """

    def __init__(self, size: int, stride: int) -> None:
        self.size, rank = size, dist.get_rank()
        self.rank = rank // stride % size
        for first in range(0, dist.get_world_size(), size * stride):
            for start in range(first, first + stride):
                ranks = list(range(start, start + size * stride, stride))
                group = dist.new_group(ranks, timeout=TIMEOUT)
                if rank in ranks:
                    self.group = group

    def split(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return this rank's part of a packed pass, whose length is a multiple of `size`.

        Args:
            inputs: what `packing.pack` made of the whole pass.
        """
        ids, sources, layout = inputs["input_ids"], inputs["positions"], inputs["layout"]
        length = ids.shape[1] // self.size
        tokens = slice(self.rank * length, (self.rank + 1) * length)
        (own,) = (sources // length == self.rank).nonzero(as_tuple=True)
        layout.own, layout.num_targets = own, len(sources)
        return {
            **inputs,
            "input_ids": ids[:, tokens],
            "position_ids": inputs["position_ids"][:, tokens],
            **{name: inputs[name][own] for name in ("rows", "targets")},
            "positions": sources[own] - tokens.start,
        }

    def whole(self, logprobs: Tensor, own: Tensor, number: int) -> Tensor:
        """Return the log-probs of all ranks' targets, [number], of which this rank has those at `own`."""
        result: Tensor = _Whole.apply(  # type: ignore[no-untyped-call]
            logprobs, own, number, self.group
        )
        return result

    def by_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return all tokens of this rank's heads.

        Key and value heads are repeated where the ranks cannot share them out.

        Args:
            query: [1, H, T / size, D] all heads of this rank's tokens.
            key: [1, H_kv, T / size, D].
            value: [1, H_kv, T / size, D].

        Returns:
            The three with T tokens, of 1 / size of the heads each.

        Raises:
            ValueError: the ranks cannot share out the query's heads.
        """
        heads, shared = query.shape[1], key.shape[1]
        if heads % self.size:
            raise ValueError(f"its {heads} heads cannot be shared out to {self.size} ranks")
        times = next(
            n for n in range(1, heads + 1) if heads // shared % n == 0 and shared * n % self.size == 0
        )
        key, value = repeat_kv(key, times), repeat_kv(value, times)

        def exchanged(states: Tensor) -> Tensor:
            parts = self._exchange(states[0].unflatten(0, (self.size, -1)))  # type: ignore[no-untyped-call]
            return parts.transpose(0, 1).flatten(1, 2)[None]

        return exchanged(query), exchanged(key), exchanged(value)

    def by_tokens(self, out: Tensor) -> Tensor:
        """Return all heads of this rank's tokens, [1, T / size, H, D], from all tokens of its heads."""
        parts = self._exchange(out[0].unflatten(0, (self.size, -1)))  # type: ignore[no-untyped-call]
        return parts.transpose(0, 1).flatten(1, 2)[None]

    def _exchange(self, parts: Tensor) -> Tensor:
        """Return the parts, [size, …], that the ranks have for this one, of which part i is for rank i."""
        result: Tensor = _Exchange.apply(parts, self.group)  # type: ignore[no-untyped-call]
        return result


class _Exchange(torch.autograd.Function):
    """This function sends part i to rank i; its gradient goes back the same way."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        received = torch.empty_like(gradient)
        dist.all_to_all_single(received, gradient, group=ctx.group)
        return received, None


class _Whole(torch.autograd.Function):
    """This function gathers scalars of all ranks, each in its places; the loss is the same on each rank."""

    @staticmethod
    def forward(ctx: Any, own_values: Tensor, own: Tensor, number: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(own)
        whole = own_values.new_zeros(number)
        whole[own] = own_values
        dist.all_reduce(whole, group=group)  # a value and zeros: exact in any order
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (own,) = ctx.saved_tensors
        return gradient[own], None, None, None
