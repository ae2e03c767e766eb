"""OAPL is GVPO's square with a soft maximum as the centre (arXiv 2602.19362): the objective on one page.

A prompt x has m completions y_i with rewards R_i. With D_i = log pi(y_i|x) - log pi_lag(y_i|x), summed over
the tokens of y_i, where pi_lag is the policy that sampled them (`reference: behaviour`),

    loss = 1/|D| sum_x 1/m sum_i [ beta D_i - (R_i - V*) ]^2
    V*   = value_beta log( 1/m sum_i exp(R_i / value_beta) )        an estimate of value_beta log Z(x)

GVPO subtracts the group's means of R and D, so that log Z(x) cancels for every m. Here V* estimates it from
the rewards of the group: for value_beta = beta, completions of pi_lag and m to infinity, the minimum is
GVPO's, pi_lag exp(R/beta) / Z. For finite m the estimate is too low on average (Jensen), and the gradient
does not sum to zero in a group. The equation is known here from a summary of the paper, not from its text;
its values of beta are not known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gvpo_ray.losses.gvpo import check_arguments, number_of_groups
from gvpo_ray.losses.within_groups import group_log_mean_exp, partition


def oapl_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    num_groups: float | None = None,
    *,
    value_beta: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of this module's docstring; autograd differentiates it as it stands.

    Args:
        logprobs: [N] log pi(y_i|x), float32 or float64; the gradient comes back in this dtype.
        reference_logprobs: [N] log pi_lag(y_i|x); takes no gradient.
        rewards: [N].
        group_ids: [N] integers, equal for the completions of one prompt.
        beta: reward units per nat.
        num_groups: |D|, the groups with m >= 2 in the whole update; default: those in this call. A group of
            one adds nothing to the loss.
        value_beta: temperature of V* in reward units; default: beta.

    Returns:
        The loss, a float64 scalar, and one sum, a float64 scalar without gradient: `objective`, the loss
        times |D|.

    Raises:
        ValueError: the shapes differ, or beta, value_beta or num_groups is not positive.
    """
    check_arguments(logprobs, reference_logprobs, rewards, group_ids, beta)
    value_beta = beta if value_beta is None else value_beta
    if not value_beta > 0:
        raise ValueError(f"value_beta must be positive, not {value_beta}")
    index, counts = partition(group_ids)
    m = counts[index]
    reward = rewards.detach().double()
    value = value_beta * group_log_mean_exp(reward / value_beta, index, counts)[index]
    log_ratio = logprobs.double() - reference_logprobs.detach().double()
    squares = (beta * log_ratio - (reward - value)).square()
    total = (torch.where(m >= 2, squares, 0.0) / m).sum()
    return total / number_of_groups(counts, num_groups), {"objective": total.detach()}
