"""DPO is Direct Preference Optimization (arXiv 2305.18290), and IPO its squared form (arXiv 2310.12036).

A prompt x has m completions with rewards, of which only the order counts. P is the set of its pairs (i, j)
with R_i > R_j. With r_i = beta [ log pi(y_i|x) - log pi_ref(y_i|x) ], summed over the tokens of y_i,

    loss = 1/|D| sum_x 1/|P| sum_(i, j) -(1 - s) log sigma(r_i - r_j) - s log sigma(r_j - r_i)        DPO
    loss = 1/|D| sum_x 1/|P| sum_(i, j) [ (r_i - r_j)/beta - 1/(2 beta) ]^2                           IPO

s is `label_smoothing`, the share of pairs that are taken to be labelled the wrong way round. For m = 2, one
better and one worse completion, this is DPO as published and as TRL and OpenRLHF compute it; a larger group
counts each of its pairs alike. A group without a pair (all rewards equal) adds nothing. At m = 2, rewards 1
and 0, GVPO's loss is beta^2/4 times IPO's with half of beta. Log-probs are sums, as in IPO's paper; TRL
divides each by its length first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gvpo_ray.losses.gvpo import check_arguments, number_of_groups
from gvpo_ray.losses.within_groups import pairs, partition


def dpo_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    num_groups: float | None = None,
    *,
    label_smoothing: float = 0.0,
    ipo: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of this module's docstring; autograd differentiates it as it stands.

    Args:
        logprobs: [N] log pi(y_i|x), float32 or float64; the gradient comes back in this dtype.
        reference_logprobs: [N] log pi_ref(y_i|x); takes no gradient.
        rewards: [N]; a preference is a group of two with the rewards 1 and 0.
        group_ids: [N] integers, equal for the completions of one prompt.
        beta: reward units per nat.
        num_groups: |D|, the groups with m >= 2 in the whole update; default: those in this call.
        label_smoothing: s, at least 0 and below 0.5.
        ipo: compute IPO's loss, for which label_smoothing must be 0.

    Returns:
        The loss, a float64 scalar, and these sums, float64 scalars without gradient: `objective`, the loss
        times |D|; `pairs`, the groups that have a pair; `pairs_ordered`, the sum over groups of the share of
        pairs with r_i > r_j, a tie being half; `margin`, the sum over groups of the mean of r_i - r_j.

    Raises:
        ValueError: the shapes differ, or an option is out of its range.
    """
    check_arguments(logprobs, reference_logprobs, rewards, group_ids, beta)
    if not 0 <= label_smoothing < 0.5 or (ipo and label_smoothing):
        raise ValueError(f"label_smoothing must be in [0, 0.5), and 0 for IPO, not {label_smoothing}")
    index, counts = partition(group_ids)
    reward = beta * (logprobs.double() - reference_logprobs.detach().double())
    better, worse = pairs(rewards.detach().double(), index)
    num_pairs = torch.bincount(index[better], minlength=len(counts)).double()
    weight = 1 / num_pairs[index[better]]
    margin = reward[better] - reward[worse]
    if ipo:
        terms = (margin / beta - 1 / (2 * beta)).square()
    else:
        terms = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    total = (weight * terms).sum()
    margin = margin.detach()
    sums = {
        "objective": total.detach(),
        "pairs": (num_pairs > 0).sum().double(),
        "pairs_ordered": (weight * _in_order(margin)).sum(),
        "margin": (weight * margin).sum(),
    }
    return total / number_of_groups(counts, num_groups), sums


TIE = 1e-6
"""Largest difference of the implicit rewards of a pair that counts as none.

Before the policy has moved all differences are 0, up to a rounding that depends on how passes are packed.
"""


def _in_order(margin: Tensor) -> Tensor:
    """Return 1 for a pair in order, 0 for one in the other order, and 1/2 for a tie."""
    return (margin > TIE).double() + 0.5 * (margin.abs() <= TIE)
