"""Our rules for old data (losses/stale_data.py) a second time, in plain Python: what the learner is tested
against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def weighted_squared_loss(
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    beta: float,
    weights: torch.Tensor,
) -> torch.Tensor:
    """GVPO's squared form with weighted completions, differentiated through everything."""
    terms = []
    for group in sorted(set(group_ids.tolist())):
        member = group_ids == group
        m = int(member.sum())
        if m < 2:
            continue
        log_ratio, reward = (logprobs - reference_logprobs)[member].double(), rewards[member].double()
        weight = weights[member].double()
        mean_log_ratio, mean_reward = ((weight * x).sum() / weight.sum() for x in (log_ratio, reward))
        bracket = beta * (log_ratio - mean_log_ratio) - (reward - mean_reward)
        terms.append((weight * bracket.square() / 2).sum() / (m - 1))
    return torch.stack(terms).mean()


def weights_floor_and_damping(
    groups: Sequence[tuple[Sequence[float], Sequence[float]]], beta: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The importance weights and likelihood floor of each completion, and the damping of the learning rate.

    Args:
        groups: of each, (rewards, log pi - log mu of the completions), where mu is the reference, too.
    """
    counts, floors, around_rewards, around_residuals, together = [], [], 0.0, 0.0, 0.0
    for rewards, log_ratios in groups:
        ratios = [min(1.0, math.exp(log_ratio)) for log_ratio in log_ratios]
        weights = [ratio * len(ratios) / sum(ratios) for ratio in ratios]
        mean_reward, mean_log_ratio = (
            sum(s * x for s, x in zip(weights, xs, strict=True)) / len(weights)
            for xs in (rewards, log_ratios)
        )
        for weight, reward, log_ratio in zip(weights, rewards, log_ratios, strict=True):
            advantage = reward - mean_reward
            residual = advantage - beta * (log_ratio - mean_log_ratio)
            around_rewards += weight * advantage**2 / (len(weights) - 1)
            around_residuals += weight * residual**2 / (len(weights) - 1)
            together += weight * advantage * residual / (len(weights) - 1)
        counts += weights
        better = [
            ratio
            for ratio, reward in zip(ratios, rewards, strict=True)
            if reward > sum(rewards) / len(rewards)
        ]
        floors += [max(better, default=1.0)] * len(ratios)
    numbers = (torch.tensor(values, dtype=torch.float64) for values in (counts, floors))
    return *numbers, max(0.0, together) ** 2 / (around_rewards * around_residuals)


def with_likelihood_floor(loss: torch.Tensor, logprobs: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """A sum with the loss's gradient, but `floor` times it where it pushes a completion down."""
    (gradient,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    return (torch.where(gradient > 0, floor * gradient, gradient) * logprobs).sum()
