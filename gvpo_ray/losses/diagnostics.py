"""The statistics of a loss are sums over completions, from which the metrics of a step are computed.

The sums have the same keys in the same order in every call and do not depend on the number of groups in the
update, so they are added up over micro-batches, ranks and updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gvpo_ray.losses.within_groups import deviations, partition

RESIDUAL_EDGES = (-2.0, -1.0, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1.0, 2.0)
"""The edges between the bins of gvpo/residual_histogram, in reward units; the outer two bins are open."""


def gvpo_sums(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    residuals: Tensor,
    value: Tensor,
    weights: Tensor | None = None,
    likelihood_floor: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the statistics of some whole groups as sums over their completions, for `finish`.

    Args:
        logprobs: [N] log pi(y_i|x).
        reference_logprobs: [N] log pi_ref(y_i|x).
        rewards: [N].
        group_ids: [N] integers, equal for the completions of one prompt.
        beta: reward units per nat.
        residuals: [N] (R_i - mean R) - beta (D_i - mean D).
        value: the loss times the number of groups.
        weights: [N] s_i with mean 1 in each group, from `stale_data.importance_weights`; default: 1.
        likelihood_floor: [N] k of each completion's group, from `stale_data.likelihood_floor`; default: 1.

    Returns:
        Float64 scalars without gradient.
    """
    index, counts = partition(group_ids)
    sizes = counts[index]
    trained = sizes >= 2
    weights = torch.ones_like(residuals) if weights is None else weights
    likelihood_floor = torch.ones_like(residuals) if likelihood_floor is None else likelihood_floor
    scale = trained * weights / (sizes - 1).clamp(min=1)
    # Half the residual's variance is Var(R)/2 - Cov(beta D, R) + Var(beta D)/2; and with D = log pi - log
    # pi_ref its gradient is that of -beta [ Cov(R, log pi) + beta Cov(log pi_ref, log pi) - beta/2 Var(log
    # pi) ], the paper's three terms: reward, reference, spread.
    reward = deviations(rewards.detach().double(), index, counts, weights)
    implicit_reward = reward - residuals  # beta (D_i - mean D)
    own = deviations(logprobs.detach().double(), index, counts, weights)
    reference = deviations(reference_logprobs.detach().double(), index, counts, weights)
    log_ratio = trained * (logprobs.detach().double() - reference_logprobs.detach().double())
    edges = torch.tensor(RESIDUAL_EDGES, dtype=torch.float64, device=residuals.device)
    bins = torch.bucketize(residuals[trained], edges)
    histogram = torch.bincount(bins, minlength=len(RESIDUAL_EDGES) + 1).double()
    squares = weights.new_zeros(len(counts)).index_add(0, index, weights.square())
    return {
        "num_groups": (counts >= 2).sum().double(),
        "num_singletons": (counts == 1).sum().double(),
        "num_completions": trained.sum().double(),
        "loss": value.detach(),
        "residual_var": (scale * residuals.square()).sum(),
        "reward_var": (scale * reward.square()).sum(),
        "implicit_reward_var": (scale * implicit_reward.square()).sum(),
        "covariance": (scale * implicit_reward * reward).sum(),
        "term_reward": (scale * reward * own).sum(),
        "term_reference": beta * (scale * reference * own).sum(),
        "term_variance": -beta / 2 * (scale * own.square()).sum(),
        "log_ratio": log_ratio.sum(),
        "log_ratio_square": log_ratio.square().sum(),
        "effective": ((counts >= 2) * counts / squares).sum(),
        "likelihood_floor": (trained * likelihood_floor / sizes).sum(),
        "kl_active": (trained & (implicit_reward.abs() > 0.1 * reward.abs())).sum().double(),
        **{f"bin_{i}": count for i, count in enumerate(histogram)},
    }


def residual_sums_by_bucket(residuals: Tensor, buckets: Sequence[int], num_buckets: int) -> dict[str, Tensor]:
    """Return the sum of squared residuals and the number of completions in each bucket.

    Args:
        residuals: [N] float64.
        buckets: the index, 0..num_buckets-1, of each completion's bucket.
        num_buckets: how many buckets there are; an empty one gets sums of 0.
    """
    index = torch.tensor(buckets, dtype=torch.long, device=residuals.device)
    squares = residuals.new_zeros(num_buckets).index_add(0, index, residuals.square())
    counts = torch.bincount(index, minlength=num_buckets).double()
    return {
        **{f"bucket_square_{i}": x for i, x in enumerate(squares)},
        **{f"bucket_count_{i}": x for i, x in enumerate(counts)},
    }


def finish_buckets(sums: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Return gvpo/residual_var/<name>, the mean squared residual of each bucket's completions, unweighted.

    A bucket without completions has no entry.

    Args:
        sums: the sums of `residual_sums_by_bucket`, added up over passes and ranks.
        names: the name of each bucket.
    """
    found = {name: (sums[f"bucket_square_{i}"], sums[f"bucket_count_{i}"]) for i, name in enumerate(names)}
    return {f"gvpo/residual_var/{name}": square / count for name, (square, count) in found.items() if count}


def finish(sums: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Return the metrics of a step from its sums, added up over passes, ranks and updates.

    D is log pi - log pi_ref, and Var, Cov and the term_ rows are within a group, then the mean over groups.

    loss                     mean over groups, or over what else the objective counts (`num_counted`: sft and
                             dapo tokens, poft completions); for gvpo half of gvpo/residual_var
    gvpo/residual_var        Var(beta D - R), here and below with completions weighted by s: the part of the
                             rewards that the implicit reward beta D does not explain yet
    gvpo/reward_var          Var(R): where residual_var starts when D = 0
    gvpo/implicit_reward_var Var(beta D)
    gvpo/reward_correlation  correlation of beta D with R, from the pooled variances; 0.0 where one of them
                             is 0
    gvpo/term_reward         1/(m-1) sum_i (R_i - mean R) log pi(y_i|x): the group-relative reward term, in
                             nats times reward
    gvpo/term_reference      beta Cov(log pi, log pi_ref): pulls the policy's order of the completions towards
                             the reference's
    gvpo/term_variance       -beta/2 Var(log pi): holds the completions' log-probs together. The sum of the
                             three terms, times -beta, has the loss's gradient.
    gvpo/residual_histogram/EDGE    share of the residuals between the previous edge and this one
                                    (RESIDUAL_EDGES, then inf)
    gvpo/effective_share     effective sample size as a share of m: (sum s)^2 / (m sum s^2), mean over groups;
                             1 where all weights are equal
    gvpo/likelihood_floor    the likelihood floor k, mean over groups: below 1, the better completions have
                             become less likely than when they were sampled
    gvpo/kl_active_share     share of the residuals where |beta (D - mean D)| exceeds a tenth of |R - mean R|:
                             near 0 the KL term is hardly active
    policy/kl_ref            mean of -D, in nats per completion: the k1 estimator of KL(pi_ref || pi) on
                             completions that pi_ref sampled, as those of the default `behaviour` reference
                             are. Single batches may be below 0. On completions that pi itself sampled (an
                             older reference) it estimates -KL(pi || pi_ref).
    policy/log_ratio_rms     root mean square of D; 0.0 exactly when every D is 0
    pairs/ordered            share of the pairs of a group that the implicit reward orders as the rewards do,
                             a tie being half; mean over groups that have pairs; only for dpo
    pairs/margin             mean difference of the implicit rewards of a pair; only for dpo
    epa/positive_share       probability of the positive among its candidates, mean over groups
    poft/weight              weight with which a completion is imitated, mean over completions
    policy/clipped           share of the tokens whose gradient is zero because of clipping; only for the
                             objectives over tokens
    gvpo/num_groups          groups that were trained on
    gvpo/num_singletons      groups with one completion, which give no signal
    """
    s = {name: float(value) for name, value in sums.items()}
    groups, completions = max(s["num_groups"], 1.0), max(s["num_completions"], 1.0)
    spread = (s["reward_var"] * s["implicit_reward_var"]) ** 0.5
    clipped = {"policy/clipped": s["clipped_tokens"] / max(1.0, s["num_tokens"])} if "num_tokens" in s else {}
    own = {}
    if "pairs" in s:
        own = {
            f"pairs/{name}": s[key] / max(1.0, s["pairs"])
            for name, key in (("ordered", "pairs_ordered"), ("margin", "margin"))
        }
    if "positive_share" in s:
        own["epa/positive_share"] = s["positive_share"] / groups
    if "weight" in s:
        own["poft/weight"] = s["weight"] / max(1.0, s["num_counted"])
    return {
        "loss": s["loss"] / max(s.get("num_counted", groups), 1.0),
        "gvpo/residual_var": s["residual_var"] / groups,
        "gvpo/reward_var": s["reward_var"] / groups,
        "gvpo/implicit_reward_var": s["implicit_reward_var"] / groups,
        "gvpo/reward_correlation": s["covariance"] / spread if spread > 0 else 0.0,
        **{f"gvpo/{name}": s[name] / groups for name in ("term_reward", "term_reference", "term_variance")},
        "gvpo/effective_share": s["effective"] / groups,
        "gvpo/likelihood_floor": s["likelihood_floor"] / groups,
        "gvpo/kl_active_share": s["kl_active"] / completions,
        **{
            f"gvpo/residual_histogram/{edge}": s[f"bin_{i}"] / completions
            for i, edge in enumerate((*RESIDUAL_EDGES, float("inf")))
        },
        "policy/kl_ref": -s["log_ratio"] / completions + 0.0,  # + 0.0: never -0.0
        "policy/log_ratio_rms": (s["log_ratio_square"] / completions) ** 0.5,
        "gvpo/num_groups": s["num_groups"],
        "gvpo/num_singletons": s["num_singletons"],
        **clipped,
        **own,
    }
