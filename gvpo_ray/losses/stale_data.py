"""Rules for old data, which are ours and not the paper's: importance weights, the likelihood floor, damping
of the step and adaptive beta.

GVPO's optimum is the same for every sampler, so we may choose one afterwards: weighting completion i of the
sampler mu by s_i > 0 is the same as having sampled from mu s. With means of weight s,

    loss = 1/|D| sum_x 1/(m_x - 1) sum_i s_i 1/2 [ beta (D_i - mean_s D) - (R_i - mean_s R) ]^2     importance

has the minimum of the paper's loss, and the gradient -beta s_i w_i / ((m - 1) |D|). With s = min(1, pi/mu) a
completion that the policy would not write any more counts less; s = 1 is the paper.

The loss sees differences within a group alone: that all of a group gets less likely, and what nobody sampled
more, costs nothing. But D = (R - beta log Z) / beta at the minimum, and log Z <= max R / beta: what is best
does not get less likely. So the likelihood floor k = min(1, max pi/mu of the completions better than their
group's mean) multiplies the gradients that push completions of the group down (w_i < 0): where what is right
has got less likely, more goes up than down, until it is back. Where residuals vanish nothing pushes, so the
minimum stays; where k = 1, as in groups of equal rewards, the gradient is the loss's. Bias: k sees the
rewards, so where residuals cannot vanish (a completion's reward is noisy, or no weights of the model give the
minimum) and k < 1, completions gain whose residuals vary most.
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
from gvpo_ray.losses.within_groups import deviations, partition


def objective(batch: LossBatch, options: GvpoLoss) -> Computed:
    """GVPO as the learner calls it: the paper's loss, or ours with `importance_cap`."""
    given = (batch.logprob_sums, batch.reference_sums, batch.rewards, batch.group_ids, batch.beta)
    if options.importance_cap is None or batch.sampler_sums is None:
        return Computed(*gvpo_loss(*given, batch.num_groups), residuals(*given))
    sampled = (batch.logprob_sums, batch.sampler_sums)
    weights = importance_weights(*sampled, batch.group_ids, options.importance_cap)
    floor = likelihood_floor(*sampled, batch.rewards, batch.group_ids)
    loss, sums = stale_gvpo_loss(*given, weights, floor, batch.num_groups)
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
    """GVPO's loss with weighted completions; with weights of 1 and no floor it is `gvpo_loss`.

    Args:
        logprobs, reference_logprobs, rewards, group_ids, beta, num_groups: as `gvpo_loss` has them.
        weights: [N] s_i > 0 with mean 1 in each group, as `importance_weights` gives them.
        likelihood_floor: [N] k of the group that completion i belongs to, as the function of that name gives
            it: multiplies the gradient where w_i < 0. Default: 1.

    Returns and raises: as `gvpo_loss`.
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
    """The residuals w_i = (R_i - mean_s R) - beta (D_i - mean_s D), with means of weight s.

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
    """The weights s_i = min(cap, pi(y_i|x) / mu(y_i|x)), scaled to mean 1 in each group.

    Args:
        logprobs, sampling_logprobs: [N] log pi(y_i|x), and log mu(y_i|x) of whoever sampled it.
        group_ids: [N].
        cap: upper bound of pi/mu. Completions that mu sampled too rarely are not extrapolated.

    Returns:
        [N] float64 without gradient; exactly 1 where pi is mu.
    """
    index, counts = partition(group_ids)
    ratios = (logprobs.detach().double() - sampling_logprobs.detach().double()).clamp(max=math.log(cap))
    highest = ratios.new_full((len(counts),), -math.inf).scatter_reduce(0, index, ratios, "amax")
    # a sequence's ratio may be e^-1000: only what is relative to the group's counts
    weights = (ratios - highest[index]).exp()
    return weights * (counts / weights.new_zeros(len(counts)).index_add(0, index, weights))[index]


def likelihood_floor(
    logprobs: Tensor, sampling_logprobs: Tensor, rewards: Tensor, group_ids: Tensor
) -> Tensor:
    """The floor k = min(1, max_i pi(y_i|x) / mu(y_i|x)) over the completions of a group with R_i > mean R.

    Returns:
        [N] float64 without gradient, the same for all of a group; exactly 1 where pi is mu, and where all
        rewards of the group are equal.
    """
    index, counts = partition(group_ids)
    rewards = rewards.detach().double()
    ratios = (logprobs.detach().double() - sampling_logprobs.detach().double()).clamp(max=0)

    def of_group(how: str, values: Tensor) -> Tensor:
        return values.new_zeros(len(counts)).scatter_reduce(0, index, values, how, include_self=False)[index]

    differ = of_group("amax", rewards) > of_group("amin", rewards)
    better = differ & (deviations(rewards, index, counts) > 0)
    return torch.where(differ, of_group("amax", ratios.where(better, -math.inf)).exp(), 1.0)


def damping(sums: Mapping[str, Tensor | float]) -> float:
    """The squared correlation of the residuals with the rewards of an update multiplies its step.

    The residual is R - beta D: where D comes of these rewards the two go together, and elsewhere D is where
    the policy has gone since for other reasons, as far as this update knows. Adam makes steps of one length
    out of both. This is the share of the residuals' variance that the rewards explain, which is how much of a
    noisy estimate to follow (Wiener). Exactly 1 where pi is pi_ref, 0 where the rewards do not differ or the
    residuals go against them.

    Args:
        sums: the (added up) sums of `gvpo_sums`.
    """
    rewards, residuals, covariance = (
        float(sums[name]) for name in ("reward_var", "residual_var", "covariance")
    )
    if rewards * residuals <= 0:
        return 0.0
    return min(1.0, max(0.0, (rewards - covariance) / math.sqrt(rewards * residuals))) ** 2


WANTED_SPREAD, ADAPT_BY, BETAS = 0.5, 0.1, (0.01, 1.0)


def adapted_beta(beta: float, reward_var: float, implicit_reward_var: float) -> float:
    """beta of the next step, from the variances of the rewards and of beta D that the last one saw.

    beta is raised when the spread of beta D is below half the spread of the rewards, and lowered when above:
    at the optimum beta D = R, and half of it keeps the rewards in charge. beta changes by a tenth a step, so
    that it is slower than the data is old.
    """
    if reward_var <= 0 or implicit_reward_var <= 0:
        return beta  # nothing that it could be compared with
    missing = 1 - math.sqrt(implicit_reward_var / reward_var) / WANTED_SPREAD
    return min(BETAS[1], max(BETAS[0], beta * math.exp(ADAPT_BY * max(-2.0, missing))))
