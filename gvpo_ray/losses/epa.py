"""EPA is Energy Preference Alignment (arXiv 2412.13862): the objective on one page.

A prompt x has one positive completion y_+ and negatives: the strong ones are worse completions of x, the weak
ones completions of other prompts, scored under x. With r_i = beta [ log pi(y_i|x) - log pi_ref(y_i|x) ],
summed over the tokens of y_i,

    loss = 1/|D| sum_x -log( exp r_+ / [ exp r_+ + sum_(negatives) exp r_j ] )
    d loss / d log pi(y_i|x) = -beta/|D| ( 1[i = +] - p_i ),    p = softmax(r) over the candidates

The gradient sums to zero over the candidates of x, so Z(x) cancels as in GVPO. Where a completion's reward
says only which is better, this is the likelihood of the choice under p(y|x) proportional to exp r. One
positive and one strong negative are DPO. If several completions share the highest reward, the loss is the
mean over them, and none is another's negative.

The paper's text could not be read here: the equation is derived from its abstract and from the energy
discrepancy that it names (equal up to the constant log M of that estimator). Whether its weak negatives have
a weight of their own is not known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gvpo_ray.losses.gvpo import check_arguments, number_of_groups
from gvpo_ray.losses.within_groups import group_log_sum_exp, group_max, partition


def epa_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    num_groups: float | None = None,
    weak: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of this module's docstring; autograd differentiates it as it stands.

    Args:
        logprobs: [N] log pi(y_i|x), float32 or float64; the gradient comes back in this dtype.
        reference_logprobs: [N] log pi_ref(y_i|x); takes no gradient.
        rewards: [N]; the highest reward of a group's completions that are not weak makes the positive.
        group_ids: [N] integers, equal for the candidates of one prompt.
        beta: reward units per nat.
        num_groups: |D|, the groups with m >= 2 in the whole update; default: those in this call.
        weak: [N] bool, the weak negatives, whose rewards are not read; default: none.

    Returns:
        The loss, a float64 scalar, and these sums, float64 scalars without gradient: `objective`, the loss
        times |D|; `positive_share`, the sum over groups of p_+.

    Raises:
        ValueError: the shapes differ, a group has weak negatives only, or beta or num_groups is not positive.
    """
    check_arguments(logprobs, reference_logprobs, rewards, group_ids, beta)
    weak = torch.zeros_like(rewards, dtype=torch.bool) if weak is None else weak
    if weak.shape != rewards.shape:
        raise ValueError(f"weak must be [N] like rewards, not {tuple(weak.shape)}")
    index, counts = partition(group_ids)
    score = torch.where(weak, -torch.inf, rewards.detach().double())
    highest = group_max(score, index, len(counts))
    if torch.isinf(highest).any():
        raise ValueError("a group has weak negatives only")
    positive = ~weak & (score == highest[index])
    r = beta * (logprobs.double() - reference_logprobs.detach().double())
    negatives = group_log_sum_exp(torch.where(positive, -torch.inf, r), index, len(counts))
    # log(1 + sum exp(r_j - r_+)); without any negative this is log 1 = 0.
    terms = torch.logaddexp(r, negatives[index]) - r
    num_positive = torch.bincount(index[positive], minlength=len(counts)).double()[index]
    weights = torch.where(positive & (counts[index] >= 2), 1 / num_positive.clamp(min=1), 0.0)
    total = (weights * terms).sum()
    sums = {"objective": total.detach(), "positive_share": (weights * (-terms.detach()).exp()).sum()}
    return total / number_of_groups(counts, num_groups), sums
