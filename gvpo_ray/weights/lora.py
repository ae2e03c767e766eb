"""A LoRA adapter (Hu et al. 2021, arXiv 2106.09685) is merged into the weight that it changes here."""

from __future__ import annotations

from torch import Tensor


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return weight + scale * b @ a, [out, in] in float32.

    Learner and engines both call this and round its result once, so that a checkpoint holds exactly what the
    engines serve.

    Args:
        weight: [out, in] of the base model.
        a: [rank, in].
        b: [out, rank].
        scale: alpha / rank.
    """
    return weight.float() + scale * b.float() @ a.float()
