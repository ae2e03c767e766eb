"""Sums and means within groups, which every loss is made of."""

from __future__ import annotations

from torch import Tensor


def partition(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which group each completion is in, [N] in 0..G-1, and the size m of each group, [G]."""
    _, index, counts = group_ids.unique(return_inverse=True, return_counts=True)
    return index, counts


def deviations(values: Tensor, index: Tensor, counts: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Each value minus the mean of its group; [N] -> [N].

    Args:
        values: [N].
        index, counts: what `partition` returned.
        weights: [N] with mean 1 in each group: the mean is then the weighted one.
    """
    sums = values.new_zeros(len(counts)).index_add(0, index, weights * values)
    return values - (sums / counts)[index]
