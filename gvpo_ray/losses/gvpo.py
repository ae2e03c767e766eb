"""GVPO: Group Variance Policy Optimization (arXiv 2504.19599). The objective on one page.

A prompt x has m completions y_i with rewards R_i. With D_i = log pi(y_i|x) - log pi_ref(y_i|x), summed over
the tokens of y_i:

    loss = 1/|D| sum_x 1/(m_x - 1) sum_i 1/2 [ beta (D_i - mean D) - (R_i - mean R) ]^2           squared form

Let w_i = (R_i - mean R) - beta (D_i - mean D), so that the bracket is -w_i. The chain rule gives -beta/|D|
sum_x 1/(m_x - 1) sum_i w_i (grad log pi(y_i|x) - mean_j grad log pi(y_j|x)), and the mean drops out because
sum_i w_i = 0:

    grad loss = -beta/|D| sum_x 1/(m_x - 1) sum_i w_i grad log pi(y_i|x)                         weighted form

The unique minimum is pi(y|x) = pi_ref(y|x) exp(R(x,y)/beta) / Z(x) for every sampler that covers the support
of pi_ref (Theorem 3.1, Corollary 3.2) and for every m >= 2, also mixed (Corollary 3.5); 1/(m - 1) keeps the
estimator unbiased (Theorem 3.4). |D| is the number of groups in the whole update, so micro-batches and ranks
only add up.

Which sampler is ours to choose, also afterwards: completions of mu that count s_i > 0 each are those of a
sampler mu s. With means of weight s,

    loss = 1/|D| sum_x 1/(m_x - 1) sum_i s_i 1/2 [ beta (D_i - mean_s D) - (R_i - mean_s R) ]^2     importance

has the same minimum, and the gradient -beta s_i w_i / ((m - 1) |D|). `importance_weights` takes s = min(1,
pi/mu): what both write, the policy that sampled and the one of today. Old completions that it would not write
any more no longer tell it where to go; s = 1 is the paper's.

The form sees differences within a group alone: that all of a group gets less likely, and what nobody sampled
more, costs nothing. But D = (R - beta log Z) / beta at the minimum, and log Z <= max R / beta: what is best
does not get less likely. So `kept_likelihood`, k = min(1, max pi/mu of the completions better than their
group's mean), multiplies what pushes completions of the group down (w_i < 0): where what is right has got
less likely, more goes up than down, until it is back. Where residuals vanish nothing pushes, so the minimum
stays; where k = 1, as in groups of equal rewards, the gradient is the loss's. Bias: k sees the rewards, so
where residuals cannot vanish (a completion's reward is noisy, or no weights of the model give the minimum)
and k < 1, completions gain whose residuals vary most.

Below, N is the number of completions; groups have any size and any order, and their completions may lie
anywhere in the tensors. Sums are in float64: sequence log-probabilities are hundreds of nats, and it is their
differences that count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gvpo_ray.losses.diagnostics import RESIDUAL_EDGES


def gvpo_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    num_groups: float | None = None,
    residual_clip: float | None = None,
    importance: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value of the squared form with the gradient of the weighted form.

    Args:
        logprobs: [N] log pi(y_i|x), float32 or float64; the gradient comes back in this dtype.
        reference_logprobs: [N] log pi_ref(y_i|x); takes no gradient.
        rewards: [N].
        group_ids: [N] integers, equal for the completions of one prompt; nothing else is read from them.
        beta: reward units per nat.
        num_groups: |D|, the groups with m >= 2 in the whole update; default: those in this call. A group of
            one counts for nothing.
        residual_clip: Huber's loss of the residual w_i in place of its half square: linear where |w_i|
            exceeds this, in reward units. Its gradient weighs with clip(w_i), centred in the group. Bias:
            single rewards count for less where it clips, so that with noisy rewards the optimum is no longer
            that of their mean; it is unchanged where every residual vanishes.
        importance: [N] s_i, with mean 1 in each group (`importance_weights`); takes no gradient. Default: 1.
        kept: [N] k of the group that completion i belongs to (`kept_likelihood`): the gradient is multiplied
            by it where w_i < 0. Default: 1.

    Returns:
        The loss, a float64 scalar, and float64 scalars for `finish`: sums that do not depend on `num_groups`,
        have the same keys in the same order in every call, and may be added over micro-batches, ranks and
        updates.

    Raises:
        ValueError: the shapes differ, or beta or num_groups is not positive.
    """
    weights, sizes = gvpo_weights(logprobs, reference_logprobs, rewards, group_ids, beta, importance)
    if num_groups is not None and not num_groups > 0:
        raise ValueError(f"num_groups must be positive, not {num_groups}")
    index, counts = partition(group_ids)
    shares = torch.ones_like(weights) if importance is None else importance.detach().double()
    num_trained = (counts >= 2).sum().double()
    denominator = num_trained.clamp(min=1) if num_groups is None else num_groups
    trained = sizes >= 2

    scale = trained * shares / (sizes - 1).clamp(min=1)  # s/(m - 1), and 0 for a group of one
    pulls, penalties = weights, weights.square() / 2
    if residual_clip is not None:
        clipped = weights.clamp(-residual_clip, residual_clip)
        pulls, penalties = deviations(clipped, index, counts, shares), clipped * (weights - clipped / 2)
    kept = torch.ones_like(weights) if kept is None else kept.detach().double()
    pulls = torch.where(pulls < 0, kept * pulls, pulls)
    value = (scale * penalties).sum()
    surrogate = -beta * (scale * pulls * logprobs.double()).sum() / denominator
    # the bracket is exactly 0 and carries the gradient
    loss = value / denominator + (surrogate - surrogate.detach())

    # Half the residual's variance is Var(R)/2 - Cov(beta D, R) + Var(beta D)/2; and with D = log pi - log
    # pi_ref its gradient is that of -beta [ Cov(R, log pi) + beta Cov(log pi_ref, log pi) - beta/2 Var(log
    # pi) ], the paper's three terms: reward, reference, spread.
    reward = deviations(rewards.detach().double(), index, counts, shares)
    implicit_reward = reward - weights  # beta (D_i - mean D)
    own = deviations(logprobs.detach().double(), index, counts, shares)
    reference = deviations(reference_logprobs.detach().double(), index, counts, shares)
    log_ratio = trained * (logprobs.detach().double() - reference_logprobs.detach().double())
    bins = torch.bucketize(
        weights[trained], torch.tensor(RESIDUAL_EDGES, dtype=torch.float64, device=weights.device)
    )
    histogram = torch.bincount(bins, minlength=len(RESIDUAL_EDGES) + 1).double()
    squares = shares.new_zeros(len(counts)).index_add(0, index, shares.square())
    stats = {
        "num_groups": num_trained,
        "num_singletons": (counts == 1).sum().double(),
        "num_completions": trained.sum().double(),
        "loss": value,
        "residual_var": (scale * weights.square()).sum(),
        "reward_var": (scale * reward.square()).sum(),
        "implicit_reward_var": (scale * implicit_reward.square()).sum(),
        "covariance": (scale * implicit_reward * reward).sum(),
        "term_reward": (scale * reward * own).sum(),
        "term_reference": beta * (scale * reference * own).sum(),
        "term_variance": -beta / 2 * (scale * own.square()).sum(),
        "log_ratio": log_ratio.sum(),
        "log_ratio_square": log_ratio.square().sum(),
        "effective": ((counts >= 2) * counts / squares).sum(),
        "kept": (trained * kept / sizes).sum(),
        "binding": (trained & (implicit_reward.abs() > 0.1 * reward.abs())).sum().double(),
        **{f"bin_{i}": count for i, count in enumerate(histogram)},
    }
    return loss, stats


def gvpo_weights(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """w_i = (R_i - mean R) - beta (D_i - mean D), and the size m of the group that completion i belongs to.

    d loss / d log pi(y_i|x) is -beta s_i w_i / ((m - 1) |D|): one number per completion is all that the rest
    of its group tells it, so a group may be passed through a model in parts.

    Returns:
        [N] float64 without gradient, with sum_i s_i w_i = 0 in each group (so 0 in a group of one); [N]
        int64.
    """
    if (
        logprobs.ndim != 1
        or not logprobs.shape == reference_logprobs.shape == rewards.shape == group_ids.shape
    ):
        shapes = [tuple(t.shape) for t in (logprobs, reference_logprobs, rewards, group_ids)]
        raise ValueError(
            f"logprobs, reference_logprobs, rewards and group_ids must be [N] alike, not {shapes}"
        )
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    log_ratio = logprobs.detach().double() - reference_logprobs.detach().double()
    index, counts = partition(group_ids)
    shares = torch.ones_like(log_ratio) if importance is None else importance.detach().double()
    reward = deviations(rewards.detach().double(), index, counts, shares)
    weights = reward - beta * deviations(log_ratio, index, counts, shares)
    return weights, counts[index]


def gvpo_loss_squared(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    num_groups: float | None = None,
    importance: Tensor | None = None,
) -> Tensor:
    """The definition, one group after the other, differentiated through everything. What `gvpo_loss` is
    tested against.
    """
    terms = []
    for group in sorted(set(group_ids.tolist())):
        member = group_ids == group
        m = int(member.sum())
        if m < 2:
            continue
        log_ratio = logprobs[member].double() - reference_logprobs[member].double()
        reward = rewards[member].double()
        share = torch.ones_like(reward) if importance is None else importance[member].double()
        mean_log_ratio, mean_reward = (
            (share * log_ratio).sum() / share.sum(),
            (share * reward).sum() / share.sum(),
        )
        residual = beta * (log_ratio - mean_log_ratio) - (reward - mean_reward)
        terms.append((share * residual.square() / 2).sum() / (m - 1))
    if not terms:
        return logprobs.double().sum() * 0
    return torch.stack(terms).sum() / (len(terms) if num_groups is None else num_groups)


def partition(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which group each completion is in, [N] in 0..G-1, and the size m of each group, [G]."""
    _, index, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    return index, counts


def deviations(values: Tensor, index: Tensor, counts: Tensor, shares: Tensor | float = 1.0) -> Tensor:
    """values - their mean in the group, of weight `shares`, which are 1 in the mean; [N] -> [N]."""
    sums = values.new_zeros(len(counts)).index_add(0, index, shares * values)
    return values - (sums / counts)[index]
