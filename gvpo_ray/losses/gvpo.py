"""GVPO is Group Variance Policy Optimization (arXiv 2504.19599): the objective on one page.

A prompt x has m completions y_i with rewards R_i. With D_i = log pi(y_i|x) - log pi_ref(y_i|x), summed over
the tokens of y_i:

    loss = 1/|D| sum_x 1/(m_x - 1) sum_i 1/2 [ beta (D_i - mean D) - (R_i - mean R) ]^2           squared form

Let w_i = (R_i - mean R) - beta (D_i - mean D), so that the bracket is -w_i. The chain rule gives -beta/|D|
sum_x 1/(m_x - 1) sum_i w_i (grad log pi(y_i|x) - mean_j grad log pi(y_j|x)), and the mean drops out because
sum_i w_i = 0:

    grad loss = -beta/|D| sum_x 1/(m_x - 1) sum_i w_i grad log pi(y_i|x)                         weighted form

With one reference pi_ref for all completions of a prompt, the unique minimum among all policies is
pi(y|x) = pi_ref(y|x) exp(R(x,y)/beta) / Z(x) for every sampler that covers the support of pi_ref (Theorem
3.1, Corollary 3.2) and for every m >= 2, which may vary by prompt (Corollary 3.5); 1/(m - 1) keeps the
estimator unbiased (Theorem 3.4). |D| is the number of groups in the whole update, so the shares of
micro-batches and ranks only add up.

The theorems do not cover a group whose completions have references of their own, as with `behaviour` where
it mixes completions of several policies pi_a. Then training rests at

    log pi(y|x) = R(x,y)/beta + sum_a w_a(y) log pi_a(y|x) + const,   w_a(y) proportional to p_a q_a(y)

where p_a is the share of policy a's completions and q_a the distribution that they come from, so that w_a(y)
is the posterior of who wrote y. The residuals do not all vanish there. tests/test_theory.py trains to both
rest points. Corrections for stale data, which are not the paper's, are in losses/stale_data.py.

Below, N is the number of completions. Groups have any size, and their completions lie in any order. Sums are
in float64, because sequence log-probs are hundreds of nats and only their differences matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gvpo_ray.losses.diagnostics import gvpo_sums
from gvpo_ray.losses.within_groups import deviations, partition


def gvpo_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    num_groups: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return GVPO's loss: its value is the squared form's, its gradient is computed by the weighted form.

    Both forms have the same gradient.

    Args:
        logprobs: [N] log pi(y_i|x), float32 or float64; the gradient comes back in this dtype.
        reference_logprobs: [N] log pi_ref(y_i|x); takes no gradient.
        rewards: [N].
        group_ids: [N] integers, equal for the completions of one prompt; only their equality matters.
        beta: reward units per nat.
        num_groups: |D|, the groups with m >= 2 in the whole update; default: those in this call. A group of
            one adds nothing to the loss.

    Returns:
        The loss, a float64 scalar, and the sums of `diagnostics.gvpo_sums`.

    Raises:
        ValueError: the shapes differ, or beta or num_groups is not positive.
    """
    w = residuals(logprobs, reference_logprobs, rewards, group_ids, beta)
    index, counts = partition(group_ids)
    m = counts[index]
    scale = (m >= 2).double() / (m - 1).clamp(min=1)  # 1/(m - 1), and 0 for a group of one
    value = (scale * (w.square() / 2)).sum()
    loss = with_gradient(value, -beta, scale * w, logprobs, number_of_groups(counts, num_groups))
    return loss, gvpo_sums(logprobs, reference_logprobs, rewards, group_ids, beta, w, value)


def residuals(
    logprobs: Tensor, reference_logprobs: Tensor, rewards: Tensor, group_ids: Tensor, beta: float
) -> Tensor:
    """Return the residuals w_i = (R_i - mean R) - beta (D_i - mean D).

    All are 0 at GVPO's optimum for one reference.

    The arguments are those of `gvpo_loss`.

    Returns:
        [N] float64 without gradient, in reward units; they sum to 0 in each group.
    """
    check_arguments(logprobs, reference_logprobs, rewards, group_ids, beta)
    index, counts = partition(group_ids)
    log_ratios = logprobs.detach().double() - reference_logprobs.detach().double()
    centred_rewards = deviations(rewards.detach().double(), index, counts)
    return centred_rewards - beta * deviations(log_ratios, index, counts)


def with_gradient(
    value: Tensor, factor: float, gradient_weights: Tensor, logprobs: Tensor, denominator: Tensor | float
) -> Tensor:
    """Return value / denominator as a scalar with a gradient that is given, not that of its computation.

    Args:
        value: a scalar without gradient.
        factor: multiplies all of `gradient_weights`.
        gradient_weights: [N]; d result / d logprobs is `factor * gradient_weights / denominator`.
        logprobs: [N] the tensor that the gradient is of.
        denominator: |D|.
    """
    surrogate = factor * (gradient_weights * logprobs.double()).sum() / denominator
    # The bracket's value is exactly 0; only its gradient counts.
    return value / denominator + (surrogate - surrogate.detach())


def gvpo_loss_squared(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    num_groups: float | None = None,
) -> Tensor:
    """Return GVPO's loss by its definition, one group after the other, differentiated by autograd.

    It is slow and checks nothing; tests compare `gvpo_loss` with it. The arguments are those of `gvpo_loss`.
    """
    terms = []
    for group in sorted(set(group_ids.tolist())):
        member = group_ids == group
        m = int(member.sum())
        if m < 2:
            continue
        log_ratio = logprobs[member].double() - reference_logprobs[member].double()
        reward = rewards[member].double()
        bracket = beta * (log_ratio - log_ratio.mean()) - (reward - reward.mean())
        terms.append((bracket.square() / 2).sum() / (m - 1))
    if not terms:
        return logprobs.double().sum() * 0
    return torch.stack(terms).sum() / (len(terms) if num_groups is None else num_groups)


def number_of_groups(counts: Tensor, num_groups: float | None) -> Tensor | float:
    """Return |D|: num_groups where it is given, else the number of groups with m >= 2, at least 1.

    Args:
        counts: [G] the groups' sizes m.
        num_groups: |D| of the whole update.

    Raises:
        ValueError: num_groups is not positive.
    """
    if num_groups is None:
        return (counts >= 2).sum().double().clamp(min=1)
    if not num_groups > 0:
        raise ValueError(f"num_groups must be positive, not {num_groups}")
    return num_groups


def check_arguments(
    logprobs: Tensor, reference_logprobs: Tensor, rewards: Tensor, group_ids: Tensor, beta: float
) -> None:
    """Check the arguments of `gvpo_loss`.

    Raises:
        ValueError: the shapes differ, which would broadcast, or beta is not positive.
    """
    tensors = (logprobs, reference_logprobs, rewards, group_ids)
    if logprobs.ndim != 1 or any(tensor.shape != logprobs.shape for tensor in tensors):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(
            f"logprobs, reference_logprobs, rewards and group_ids must be [N] alike, not {shapes}"
        )
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
