"""Rules for old data, which are ours and not the paper's: importance weights, the likelihood that is kept,
damping, and the adaptive beta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gvpo_ray.losses.gvpo import deviations, partition


def importance_weights(
    logprobs: Tensor, sampling_logprobs: Tensor, group_ids: Tensor, cap: float = 1.0
) -> Tensor:
    """s_i = min(cap, pi(y_i|x) / mu(y_i|x)), scaled to mean 1 in each group.

    Args:
        logprobs, sampling_logprobs: [N] log pi(y_i|x), and log mu(y_i|x) of whoever sampled it.
        cap: above which a ratio counts no more; what is scarce now is not made scarcer, and what mu wrote too
            seldom not guessed at.

    Returns:
        [N] float64 without gradient; exactly 1 where pi is mu.
    """
    index, counts = partition(group_ids)
    ratios = (logprobs.detach().double() - sampling_logprobs.detach().double()).clamp(max=math.log(cap))
    highest = ratios.new_full((len(counts),), -math.inf).scatter_reduce(0, index, ratios, "amax")
    # a sequence's ratio may be e^-1000: only what is relative to the group's counts
    shares = (ratios - highest[index]).exp()
    return shares * (counts / shares.new_zeros(len(counts)).index_add(0, index, shares))[index]


def kept_likelihood(
    logprobs: Tensor, sampling_logprobs: Tensor, rewards: Tensor, group_ids: Tensor
) -> Tensor:
    """k = min(1, max_i pi(y_i|x) / mu(y_i|x)) over the completions of a group with R_i > mean R; 1 where all
    rewards are equal.

    Returns:
        [N] float64 without gradient, the same for all of a group; exactly 1 where pi is mu.
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
    """Squared correlation of the residuals with the rewards of an update, from its (added up) sums of
    `gvpo_loss`: what to multiply its step by.

    The residual is R - beta D: where D comes of these rewards the two go together, and elsewhere D is where
    the policy has gone since for other reasons, as far as this update knows. Adam makes steps of one length
    out of both. This is the share of the residuals' variance that the rewards explain, which is how much of a
    noisy estimate to follow (Wiener). Exactly 1 where pi is pi_ref, 0 where the rewards do not differ or the
    residuals go against them.
    """
    rewards, residuals, covariance = (
        float(sums[name]) for name in ("reward_var", "residual_var", "covariance")
    )
    if rewards * residuals <= 0:
        return 0.0
    return min(1.0, max(0.0, (rewards - covariance) / math.sqrt(rewards * residuals))) ** 2


WANTED_SPREAD, STEER_BY, BETAS = 0.5, 0.1, (0.01, 1.0)


def steered(beta: float, reward_var: float, implicit_reward_var: float) -> float:
    """loss.beta: auto. beta of the next step, from what the last one saw.

    At the optimum of a generation of data beta D is R. While beta D varies half as much, the rewards still
    lead, and a policy that has gone elsewhere is called back. Where it varies more, most of what is learned
    is to go back, and beta falls; where less, as on fresh data, nothing holds the policy, and beta grows. By
    a tenth a step, so that it is slower than the data is old.
    """
    if reward_var <= 0 or implicit_reward_var <= 0:
        return beta  # nothing that it could be compared with
    missing = 1 - math.sqrt(implicit_reward_var / reward_var) / WANTED_SPREAD
    return min(BETAS[1], max(BETAS[0], beta * math.exp(STEER_BY * max(-2.0, missing))))
