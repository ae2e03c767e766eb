"""GVPO on stale data gets four corrections that are not the paper's.

They are importance weights, the likelihood floor, damping of the step, and adaptive beta.

With one reference pi_ref for all completions of a prompt, GVPO's optimum is the same for every sampler that
covers pi_ref, so we may choose one afterwards: weights s_i > 0 on the completions of the sampler mu stand for
samples of mu s, in the limit of large groups. With means of weight s,

    loss = 1/|D| sum_x 1/(m_x - 1) sum_i s_i 1/2 [ beta (D_i - mean_s D) - (R_i - mean_s R) ]^2     importance

has the minimum of the paper's loss in groups of any size, since all residuals vanish there, and, with s taken
as given, the gradient -beta s_i w_i / ((m - 1) |D|). With s = min(1, pi/mu) a completion that the policy
would hardly sample any more counts less; s = 1 is the paper. 1/(m - 1) is unbiased for s = 1 alone; with
other weights only the scale of a group differs.

The loss depends only on differences within a group. So it costs nothing if all completions of a group become
less likely, and unsampled ones more likely. But D = (R - beta log Z) / beta at the minimum, and
log Z <= max R / beta: the best completions do not become less likely. Therefore the likelihood floor
k = min(1, max pi/mu of the completions better than their group's mean) multiplies the gradients that push
completions of the group down (w_i < 0): where the better completions have become less likely, the upward
gradients outweigh the downward ones until their likelihood is back. Where residuals vanish there is no
gradient, so the minimum stays; where k = 1, as in groups of equal rewards, the gradient is the loss's. Where
k < 1 the weights of a group no longer sum to 0, and the step is the gradient of no GVPO loss. Bias: k depends
on the rewards, so where residuals cannot vanish (a completion's reward is noisy, no weights of the model give
the minimum, or references are mixed) and k < 1, the completions whose residuals vary most gain.

With mixed references, the default `behaviour` on groups of several policies, no policy makes all residuals
vanish. Then s and k do move the rest point: s counts completions, so it is at log pi = R/beta + sum_a w_a(y)
log pi_a + const with w_a(y) proportional to p_a q_a(y) s_a(y). How far depends on how far the policies lie
apart, in second order: between neighbouring versions it is little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gvpo_ray.config.loss import GvpoLoss
from gvpo_ray.losses.batch import Computed, LossBatch
from gvpo_ray.losses.diagnostics import gvpo_sums
from gvpo_ray.losses.gvpo import check_arguments, gvpo_loss, number_of_groups, residuals, with_gradient
from gvpo_ray.losses.within_groups import deviations, group_max, partition, rewards_differ


def objective(batch: LossBatch, options: GvpoLoss) -> Computed:
    """Compute GVPO on one forward pass; this is the entry in losses/registry.py.

    It is the paper's loss, or with `importance_cap` the loss with importance weights and likelihood floor.
    """
    given = batch.sequences
    if options.importance_cap is None or batch.sampler_sums is None:
        return Computed(*gvpo_loss(*given, batch.total.groups), residuals(*given))
    sampled = (batch.logprob_sums, batch.sampler_sums)
    weights = importance_weights(*sampled, batch.group_ids, options.importance_cap)
    floor = likelihood_floor(*sampled, batch.rewards, batch.group_ids)
    loss, sums = stale_gvpo_loss(*given, weights, floor, batch.total.groups)
    return Computed(loss, sums, weighted_residuals(*given, weights))


def stale_gvpo_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    weights: Tensor,
    likelihood_floor: Tensor | None = None,
    num_groups: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return GVPO's loss with weighted completions; with weights of 1 and no floor it is `gvpo_loss`.

    Args:
        logprobs: [N] log pi(y_i|x), float32 or float64; the gradient comes back in this dtype.
        reference_logprobs: [N] log pi_ref(y_i|x); takes no gradient.
        rewards: [N].
        group_ids: [N] integers, equal for the completions of one prompt.
        beta: reward units per nat.
        weights: [N] s_i > 0 with mean 1 in each group, from `importance_weights`.
        likelihood_floor: [N] k of the group that completion i belongs to, from the function of that name; it
            multiplies the gradient where w_i < 0. Default: 1.
        num_groups: |D|, the groups with m >= 2 in the whole update; default: those in this call.

    Returns:
        The loss, a float64 scalar, and the sums of `diagnostics.gvpo_sums`.

    Raises:
        ValueError: the shapes differ, or beta or num_groups is not positive.
    """
    weights = weights.detach().double()
    w = weighted_residuals(logprobs, reference_logprobs, rewards, group_ids, beta, weights)
    index, counts = partition(group_ids)
    m = counts[index]
    scale = (m >= 2) * weights / (m - 1).clamp(min=1)
    value = (scale * (w.square() / 2)).sum()
    floor = torch.ones_like(w) if likelihood_floor is None else likelihood_floor.detach().double()
    gradient_weights = scale * torch.where(w < 0, floor * w, w)
    loss = with_gradient(value, -beta, gradient_weights, logprobs, number_of_groups(counts, num_groups))
    sums = gvpo_sums(logprobs, reference_logprobs, rewards, group_ids, beta, w, value, weights, floor)
    return loss, sums


def weighted_residuals(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    weights: Tensor,
) -> Tensor:
    """Return the residuals w_i = (R_i - mean_s R) - beta (D_i - mean_s D), where mean_s is weighted by s.

    The arguments are those of `stale_gvpo_loss`.

    Returns:
        [N] float64 without gradient; sum_i s_i w_i = 0 in each group.
    """
    check_arguments(logprobs, reference_logprobs, rewards, group_ids, beta)
    index, counts = partition(group_ids)
    log_ratios = logprobs.detach().double() - reference_logprobs.detach().double()
    centred_rewards = deviations(rewards.detach().double(), index, counts, weights)
    return centred_rewards - beta * deviations(log_ratios, index, counts, weights)


def importance_weights(
    logprobs: Tensor, sampling_logprobs: Tensor, group_ids: Tensor, cap: float = 1.0
) -> Tensor:
    """Return the importance weights s_i = min(cap, pi(y_i|x) / mu(y_i|x)), scaled to mean 1 in each group.

    Args:
        logprobs: [N] log pi(y_i|x).
        sampling_logprobs: [N] log mu(y_i|x), by the policy that sampled the completion.
        group_ids: [N] integers, equal for the completions of one prompt.
        cap: upper bound of pi/mu. Completions that mu sampled too rarely are not extrapolated.

    Returns:
        [N] float64 without gradient; exactly 1 where pi is mu.
    """
    index, counts = partition(group_ids)
    ratios = (logprobs.detach().double() - sampling_logprobs.detach().double()).clamp(max=math.log(cap))
    # A sequence's ratio may be e^-1000, so it is taken relative to the highest of its group.
    weights = (ratios - group_max(ratios, index, len(counts))[index]).exp()
    return weights * (counts / weights.new_zeros(len(counts)).index_add(0, index, weights))[index]


def likelihood_floor(
    logprobs: Tensor, sampling_logprobs: Tensor, rewards: Tensor, group_ids: Tensor
) -> Tensor:
    """Return k = min(1, max_i pi(y_i|x) / mu(y_i|x)) over the completions of a group with R_i > mean R.

    Args:
        logprobs: [N] log pi(y_i|x).
        sampling_logprobs: [N] log mu(y_i|x), by the policy that sampled the completion.
        rewards: [N].
        group_ids: [N] integers, equal for the completions of one prompt.

    Returns:
        [N] float64 without gradient, equal within a group; exactly 1 where pi is mu, and where all
        rewards of the group are equal.
    """
    index, counts = partition(group_ids)
    rewards = rewards.detach().double()
    ratios = (logprobs.detach().double() - sampling_logprobs.detach().double()).clamp(max=0)
    differ = rewards_differ(rewards, index, len(counts))
    better = differ & (deviations(rewards, index, counts) > 0)
    best = group_max(ratios.where(better, -math.inf), index, len(counts))
    return torch.where(differ, best[index].exp(), 1.0)


def damping(sums: Mapping[str, Tensor | float]) -> float:
    """Return the factor of an update's learning rate: the squared correlation of residuals and rewards.

    The residual is R - beta D. It follows the rewards where D is small or due to these rewards; elsewhere D
    is drift of the policy for other reasons, as far as this update can tell. Adam makes steps of the same
    length out of both. The factor is the share of the residuals' variance that the rewards explain, which is
    the gain of a Wiener filter.

    Args:
        sums: the sums of `gvpo_sums`, added up over the passes and ranks of the update.

    Returns:
        A number in 0..1: exactly 1 where pi is pi_ref, 0 where the rewards do not differ or the residuals are
        negatively correlated with them.
    """
    rewards, residuals, covariance = (
        float(sums[name]) for name in ("reward_var", "residual_var", "covariance")
    )
    if rewards * residuals <= 0:
        return 0.0
    return min(1.0, max(0.0, (rewards - covariance) / math.sqrt(rewards * residuals))) ** 2


WANTED_SPREAD, ADAPT_BY, BETAS = 0.5, 0.1, (0.01, 1.0)
"""Adaptive beta has a target of std(beta D) / std(R), a largest rise of its log in a step, and a range."""


def adapted_beta(beta: float, reward_var: float, implicit_reward_var: float) -> float:
    """Return the beta of the next step, from the variances of the rewards and of beta D in the last one.

    beta is raised when the spread of beta D is below half the spread of the rewards, and lowered when above:
    at the optimum beta D = R, and half of it keeps the rewards in charge. One step changes beta by a factor
    between exp(-0.2) and exp(0.1), so that beta changes more slowly than the data ages.

    Args:
        beta: the last step's, in reward units per nat.
        reward_var: gvpo/reward_var.
        implicit_reward_var: gvpo/implicit_reward_var.
    """
    if reward_var <= 0 or implicit_reward_var <= 0:
        return beta  # there is nothing to compare
    missing = 1 - math.sqrt(implicit_reward_var / reward_var) / WANTED_SPREAD
    return min(BETAS[1], max(BETAS[0], beta * math.exp(ADAPT_BY * max(-2.0, missing))))
