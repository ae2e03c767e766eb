"""Every loss is made of sums and means within groups, which this module computes."""

from __future__ import annotations

import torch
from torch import Tensor


def partition(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the group of each completion, [N] in 0..G-1, and the size m of each group, [G].

    Args:
        group_ids: [N] integers, equal for the completions of one prompt.
    """
    _, index, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    return index, counts


def deviations(values: Tensor, index: Tensor, counts: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Return each value minus the mean of its group; [N] -> [N].

    Args:
        values: [N].
        index: [N] the group of each value, from `partition`.
        counts: [G] the size of each group, from `partition`.
        weights: [N] with mean 1 in each group: the mean is then the weighted one.
    """
    sums = values.new_zeros(len(counts)).index_add(0, index, weights * values)
    return values - (sums / counts)[index]
