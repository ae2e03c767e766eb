"""A LoRA adapter (Hu et al. 2021, arXiv 2106.09685) in the weight that it changes."""

from __future__ import annotations

from torch import Tensor


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight + scale * b @ a, in float32: [out, in], [rank, in], [out, rank] -> [out, in].

    Learner and engines both round this sum once, so that a checkpoint holds what the engines serve.
    """
    return weight.float() + scale * b.float() @ a.float()
