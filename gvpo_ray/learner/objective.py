"""loss.objective on the groups of one pass, and what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gvpo_ray import groups
from gvpo_ray.config.loss import LossConfig
from gvpo_ray.groups import Row
from gvpo_ray.learner.logprobs import sequence_sums, trained_tokens
from gvpo_ray.learner.passes import NOTHING, Plan
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.references import Fixed
from gvpo_ray.losses.diagnostics import finish
from gvpo_ray.losses.gvpo import gvpo_loss, gvpo_weights
from gvpo_ray.losses.registry import OBJECTIVES
from gvpo_ray.losses.stale_data import importance_weights, kept_likelihood
from gvpo_ray.observe.metrics import STALENESS_EDGES, age_bucket


class Objective:
    """loss.objective on the groups of one pass. What gvpo reports is reported of every objective, on the same
    data.
    """

    def __init__(self, config: LossConfig, beta: float, version: int) -> None:
        self._config, self.beta, self._version = config, beta, version
        self.residuals: dict[int, list[float]] = {}
        """(R - mean R) - beta (D - mean D) of the completions of each group so far, by group id."""

    def __call__(
        self, logprobs: torch.Tensor, fixed: Fixed, rows: Sequence[Row], num_groups: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of these groups as a share of an update of `num_groups`, and sums for `finish`."""
        config, device = self._config, logprobs.device
        lengths = [len(trained) for row in rows for trained in trained_tokens(row)]
        rewards = torch.tensor(
            [reward for row in rows for reward in row["rewards"]], dtype=torch.float64, device=device
        )
        ids = torch.tensor(
            [j for j, row in enumerate(rows) for _ in row["rewards"]], dtype=torch.long, device=device
        )
        old, reference = (
            torch.where(given.isnan(), logprobs.detach().double(), given)
            for given in (fixed.old, fixed.reference)
        )
        totals, reference_totals = sequence_sums(logprobs, lengths), sequence_sums(reference, lengths)
        importance = kept = None
        if config.objective == "gvpo" and config.importance_cap is not None:
            old_totals = sequence_sums(old, lengths)
            importance = importance_weights(totals, old_totals, ids, config.importance_cap)
            kept = kept_likelihood(totals, old_totals, rewards, ids)
        if config.asks_reference_model_for_sums:
            known = [value for row in rows for value in row["reference_logprobs"]]
            reference_totals = torch.tensor(known, dtype=torch.float64, device=device)
        if config.length_normalised:
            sizes = torch.tensor(lengths, device=device)
            totals, reference_totals = totals / sizes, reference_totals / sizes
        loss, stats = gvpo_loss(
            totals,
            reference_totals,
            rewards,
            ids,
            self.beta,
            num_groups,
            config.residual_clip,
            importance,
            kept,
        )
        residuals = gvpo_weights(totals, reference_totals, rewards, ids, self.beta, importance)[0]
        stats |= residuals_by_age(
            residuals, [oldest for row in rows for oldest in row["version_min"]], self._version
        )
        for row, own in zip(rows, residuals.split([len(row["rewards"]) for row in rows]), strict=True):
            self.residuals[row["group_id"]] = own.tolist()
        stats["num_tokens"] = stats["clipped_tokens"] = torch.zeros((), dtype=torch.float64, device=device)
        if config.objective != "gvpo":
            owners = torch.repeat_interleave(
                torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long)
            ).to(device)
            function, options = OBJECTIVES[config.objective]
            given = {name: getattr(config, name) for name in options}
            loss, own = function(logprobs, old, reference, owners, rewards, ids, num_groups, **given)
            stats |= {
                "loss": own["objective"],
                "num_tokens": own["num_tokens"],
                "clipped_tokens": own["clipped_tokens"],
            }
        return loss, stats

    def finish(self, sums: dict[str, float]) -> dict[str, Any]:
        clipped = sums["clipped_tokens"] / max(1.0, sums["num_tokens"])
        return {
            **finish(sums),
            **finish_by_age(sums),
            **({} if self._config.objective == "gvpo" else {"policy/clipped": clipped}),
        }


AGES = (*map(str, STALENESS_EDGES), "inf", "foreign")


def residuals_by_age(
    residuals: torch.Tensor, version_mins: Sequence[int | None], version: int
) -> dict[str, torch.Tensor]:
    """Sums for `finish_by_age`: squared residuals, and completions, by their staleness
    (metrics.age_bucket).
    """
    ages = torch.tensor(
        [age_bucket(oldest, version) for oldest in version_mins], dtype=torch.long, device=residuals.device
    )
    squares = torch.zeros(len(AGES), dtype=torch.float64, device=residuals.device).index_add(
        0, ages, residuals.square()
    )
    counts = torch.bincount(ages, minlength=len(AGES)).double()
    return {
        **{f"age_square_{i}": x for i, x in enumerate(squares)},
        **{f"age_count_{i}": x for i, x in enumerate(counts)},
    }


def finish_by_age(sums: dict[str, float]) -> dict[str, float]:
    """gvpo/residual_var/<edge>: mean squared residual of the completions of that staleness, each counted
    once; only where there are some.
    """
    counts = {age: (sums[f"age_square_{i}"], sums[f"age_count_{i}"]) for i, age in enumerate(AGES)}
    return {f"gvpo/residual_var/{age}": square / count for age, (square, count) in counts.items() if count}


def pulls_of(
    policy: Policy, plan: Plan, fixed: Sequence[Fixed], objective: Objective, num_groups: int
) -> tuple[dict[int, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """For passes that hold a part of a group: d loss / d log-probs of their tokens, and the sums of those
    groups.

    A weight depends on the whole group, but only through one number per completion: so a group that does not
    fit into a pass has one pass of each part without gradients first, and then one with them, whose loss is
    linear in the log-probs.
    """
    seen = []
    for i in range(plan.num_part_passes):
        parts = [part for group in plan.parts for part in group]
        seen.append(torch.cat(policy.token_logprobs(plan.passes[parts[i]] if i < len(parts) else [NOTHING])))
    pulls: dict[int, torch.Tensor] = {}
    sums = []
    for group in plan.parts:
        tokens = [seen.pop(0) for _ in group]
        rows = [plan.passes[i][0] for i in group]
        lists = {
            name: [x for row in rows for x in row[name]]
            for name in groups.PER_COMPLETION_COLUMNS
            if rows[0].get(name) is not None
        }
        whole = {**rows[0], **lists}
        logprobs = torch.cat(tokens).requires_grad_()
        known = Fixed(
            torch.cat([fixed[i].old for i in group]), torch.cat([fixed[i].reference for i in group])
        )
        loss, stats = objective(logprobs, known, [whole], num_groups)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        pulls |= dict(zip(group, gradient.split([len(t) for t in tokens]), strict=True))
        sums.append(stats)
    return pulls, sums
