"""The statistics of the GVPO loss: from sums over completions to the metrics that are reported."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

RESIDUAL_EDGES = (-2.0, -1.0, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1.0, 2.0)
"""Between the bins of gvpo/residual_histogram, in reward units; the first and the last bin are open."""


def finish(sums: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Metric values from the (added up) sums of `gvpo_loss`.

    loss                     mean over groups; half of gvpo/residual_var, where the residual is not clipped
    gvpo/residual_var        Var(beta D - R) within the group, of weight s here and below: what the implicit
                             reward does not explain yet
    gvpo/reward_var          Var(R): where residual_var starts when D = 0
    gvpo/implicit_reward_var Var(beta D)
    gvpo/reward_correlation  of beta D with R, from the pooled variances; 0.0 where one of them is 0
    gvpo/term_reward         1/(m-1) sum_i (R_i - mean R) log pi(y_i|x), mean over groups: the group-relative
                             reward term, nats times reward.
    gvpo/term_reference      beta Cov(log pi, log pi_ref): pulls the policy's order of the completions towards
                             the reference's
    gvpo/term_variance       -beta/2 Var(log pi): holds the completions' log-probs together. -beta times the
                             three's sum has the loss's gradient.
    gvpo/residual_histogram/EDGE    share of the residuals from the edge before to this one (RESIDUAL_EDGES,
                                    then inf)
    gvpo/effective_share     of the completions that count: (sum s)^2 / (m sum s^2), mean over groups; 1 where
                             all count alike
    gvpo/kept                k, mean over groups: below 1, what is right has got less likely than it was when
                             it was sampled
    gvpo/binding             share of the residuals where |beta (D - mean D)| exceeds a tenth of |R - mean R|:
                             near 0 beta binds nothing
    policy/kl_ref            mean of -D, in nats per completion: the k1 estimator of KL(pi_ref || pi) on
                             completions that pi_ref sampled, as those of the default `behaviour` reference
                             are. Single batches may be below 0. On completions that pi itself sampled (an
                             older reference) it estimates -KL(pi || pi_ref).
    policy/log_ratio_rms     root mean square of D; 0.0 exactly when every D is 0
    gvpo/num_groups, gvpo/num_singletons    trained on, and of size one (no signal)
    """
    s = {name: float(value) for name, value in sums.items()}
    groups, completions = max(s["num_groups"], 1.0), max(s["num_completions"], 1.0)
    spread = (s["reward_var"] * s["implicit_reward_var"]) ** 0.5
    return {
        "loss": s["loss"] / groups,
        "gvpo/residual_var": s["residual_var"] / groups,
        "gvpo/reward_var": s["reward_var"] / groups,
        "gvpo/implicit_reward_var": s["implicit_reward_var"] / groups,
        "gvpo/reward_correlation": s["covariance"] / spread if spread > 0 else 0.0,
        **{f"gvpo/{name}": s[name] / groups for name in ("term_reward", "term_reference", "term_variance")},
        "gvpo/effective_share": s["effective"] / groups,
        "gvpo/kept": s["kept"] / groups,
        "gvpo/binding": s["binding"] / completions,
        **{
            f"gvpo/residual_histogram/{edge}": s[f"bin_{i}"] / completions
            for i, edge in enumerate((*RESIDUAL_EDGES, float("inf")))
        },
        "policy/kl_ref": -s["log_ratio"] / completions + 0.0,  # + 0.0: never -0.0
        "policy/log_ratio_rms": (s["log_ratio_square"] / completions) ** 0.5,
        "gvpo/num_groups": s["num_groups"],
        "gvpo/num_singletons": s["num_singletons"],
    }
