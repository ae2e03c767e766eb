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


def group_max(values: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """Return the largest value of each group; [N] -> [G]."""
    start = values.new_full((num_groups,), -torch.inf)
    return start.scatter_reduce(0, index, values, "amax")


def rewards_differ(rewards: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """Return for each completion whether the rewards of its group differ; [N] -> [N] bool."""
    highest, lowest = group_max(rewards, index, num_groups), -group_max(-rewards, index, num_groups)
    return (highest > lowest)[index]


def group_log_sum_exp(values: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """Return log sum exp of the values of each group; [N] -> [G]; -inf where all values are -inf.

    It is differentiable, and no value overflows: the group's largest one is taken out first.
    """
    largest = group_max(values.detach(), index, num_groups)
    shift = torch.where(torch.isinf(largest), 0.0, largest)
    shifted = (values - shift[index]).exp()
    sums = values.new_zeros(num_groups).index_add(0, index, shifted)
    empty = sums == 0  # the gradient of log at 0 would be nan, also where nothing reads it
    return torch.where(empty, -torch.inf, torch.where(empty, 1.0, sums).log() + shift)


def group_log_mean_exp(values: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """Return log mean exp of the values of each group; [N] -> [G]."""
    return group_log_sum_exp(values, index, len(counts)) - counts.double().log()


def pairs(rewards: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return all pairs (i, j) of completions of one group with R_i > R_j, as two tensors of indices.

    Args:
        rewards: [N].
        index: [N] the group of each completion, from `partition`.
    """
    same = index[:, None] == index[None, :]
    better, worse = torch.nonzero(same & (rewards[:, None] > rewards[None, :]), as_tuple=True)
    return better, worse
