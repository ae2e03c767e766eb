"""An Objective computes the configured loss, and its statistics, on the groups of one forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gvpo_ray import groups
from gvpo_ray.config.loss import LossOptions
from gvpo_ray.groups import Part, Row
from gvpo_ray.learner.examples import Examples
from gvpo_ray.learner.logprobs import sequence_sums, trained_tokens
from gvpo_ray.learner.microbatches import NOTHING, Plan
from gvpo_ray.learner.mismatch import NO_MISMATCH, Mismatch
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.references import Origin, ReferenceLogprobs, origins_of
from gvpo_ray.losses.batch import LossBatch, Total
from gvpo_ray.losses.diagnostics import finish, finish_buckets, residual_sums_by_bucket
from gvpo_ray.losses.registry import OBJECTIVES
from gvpo_ray.observe.metrics import STALENESS_EDGES, age_bucket

AGES = (*map(str, STALENESS_EDGES), "inf", "external")
"""The names of the staleness buckets of gvpo/residual_var/<age>, in the order of metrics.age_bucket."""


class Objective:
    """An Objective is the configured loss in one step.

    Every objective reports GVPO's statistics too, on the same data.

    Args:
        options: the config section `loss`.
        beta: the beta of this step, in reward units per nat.
        version: the version of the policy at the start of the step, from which staleness is counted.
        mismatch: of engines and learner, in the steps before.
    """

    def __init__(
        self, options: LossOptions, beta: float, version: int, mismatch: Mismatch = NO_MISMATCH
    ) -> None:
        self._options, self.beta, self._version, self._mismatch = options, beta, version, mismatch
        self._loss = OBJECTIVES[options.objective]

    def __call__(
        self, logprobs: Tensor, measured: ReferenceLogprobs, rows: Sequence[Row], total: Total
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of these whole groups, as a share of the update's loss, and sums for `finish`.

        Args:
            logprobs: [T] log-probs of all completions' trained tokens, in the rows' order, with gradients.
            measured: the sampler's and the reference's log-probs of the same tokens.
            rows: the groups, without completions that are left out.
            total: what the update holds, on all ranks.
        """
        device = logprobs.device
        lengths = [len(trained) for row in rows for trained in trained_tokens(row)]
        sampler = None if measured.sampler is None else measured.sampler.beside(logprobs)
        reference = None if measured.reference is None else measured.reference.beside(logprobs)
        if reference is None:
            known = [value for row in rows for value in row["reference_logprobs"]]
            reference_sums = torch.tensor(known, dtype=torch.float64, device=device)
        else:
            reference_sums = sequence_sums(reference, lengths)
        logprob_sums = sequence_sums(logprobs, lengths)
        sampler_sums = None if sampler is None else sequence_sums(sampler, lengths)
        if sampler_sums is not None and self._mismatch.is_rounding:
            sampler_sums = self._without_rounding(logprob_sums.detach(), sampler_sums, lengths, rows)
        computed = self._loss(
            LossBatch(
                logprobs=logprobs,
                completion_ids=torch.repeat_interleave(
                    torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long)
                ).to(device),
                logprob_sums=logprob_sums,
                sampler_logprobs=sampler,
                sampler_sums=sampler_sums,
                reference_logprobs=reference,
                reference_sums=reference_sums,
                rewards=torch.tensor(
                    [reward for row in rows for reward in row["rewards"]], dtype=torch.float64, device=device
                ),
                group_ids=torch.tensor(
                    [j for j, row in enumerate(rows) for _ in row["rewards"]], dtype=torch.long, device=device
                ),
                beta=self.beta,
                is_weak=torch.tensor(
                    [source.startswith(groups.WEAK) for row in rows for source in row["sources"]],
                    dtype=torch.bool,
                    device=device,
                ),
                total=total,
            ),
            self._options,
        )
        ages = [age_bucket(oldest, self._version) for row in rows for oldest in row["version_min"]]
        by_age = residual_sums_by_bucket(computed.residuals, ages, len(AGES))
        return computed.loss, computed.sums | by_age | mismatch_sums(sampler, rows, self._version, device)

    def _without_rounding(
        self, logprob_sums: Tensor, sampler_sums: Tensor, lengths: Sequence[int], rows: Sequence[Row]
    ) -> Tensor:
        """Return the sampler's sums; those of engines moved to the learner's by what rounding explains."""
        origins = [origin for row in rows for origin in origins_of(row, self._version)]
        by_engine = torch.tensor([origin is Origin.ENGINE for origin in origins], dtype=torch.bool)
        sizes = torch.tensor(lengths, dtype=torch.float64, device=logprob_sums.device)
        beyond = self._mismatch.beyond(logprob_sums - sampler_sums, sizes)
        return torch.where(by_engine.to(logprob_sums.device), logprob_sums - beyond, sampler_sums)

    def of_nothing(self, device: torch.device) -> dict[str, Tensor]:
        """Return the sums of no groups: zeros with the keys, in the order, that all sums have."""
        return self(torch.zeros(0, device=device), ReferenceLogprobs.empty(device), [], Total(1, 1, 1))[1]

    def finish(self, sums: dict[str, float]) -> dict[str, float]:
        """Return the metrics of a step from its sums, added up over passes, ranks and updates."""
        return {**finish(sums), **finish_buckets(sums, AGES), **finish_mismatch(sums)}


def mismatch_sums(
    sampler: Tensor | None, rows: Sequence[Row], version: int, device: torch.device
) -> dict[str, Tensor]:
    """Return number, sum and squares' sum of the learner's log-probs less the engines', for finish_mismatch.

    Only tokens count that the policy at the start of the step sampled: there both computed with the same
    weights, so that the difference is one of precision and kernels.

    Args:
        sampler: [T] the learner's log-probs of the sampling policy; None: the objective needs none.
        rows: the groups of these tokens.
        version: of the policy at the start of the step.
        device: where the sums are made.
    """
    engine = [np.zeros(0)]
    for row in rows:
        for i, (origin, trained) in enumerate(
            zip(origins_of(row, version), trained_tokens(row), strict=True)
        ):
            known = row["sampling_logprobs"][i] if origin is Origin.CURRENT else None
            engine.append(
                np.full(len(trained), np.nan) if known is None else np.asarray(known, float)[list(trained)]
            )
    difference = torch.zeros(0, dtype=torch.float64, device=device)
    if sampler is not None:
        difference = sampler - torch.from_numpy(np.concatenate(engine)).to(device)
        difference = difference[~difference.isnan()]
    return {
        "mismatch_count": torch.tensor(float(len(difference)), dtype=torch.float64, device=device),
        "mismatch": difference.sum(),
        "mismatch_square": difference.square().sum(),
    }


def finish_mismatch(sums: Mapping[str, float]) -> dict[str, float]:
    """Return policy/mismatch_mean and _rms per token; nothing where the current policy sampled no token."""
    count = sums["mismatch_count"]
    if not count:
        return {}
    return {
        "policy/mismatch_mean": sums["mismatch"] / count,
        "policy/mismatch_rms": math.sqrt(sums["mismatch_square"] / count),
    }


def gradient_weights_of_parts(
    policy: Policy,
    plan: Plan,
    measured: Sequence[ReferenceLogprobs],
    objective: Objective,
    total: Total,
    examples: Examples | None = None,
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return d loss / d log-prob of the tokens of groups that are spread over several passes.

    The gradient depends on the whole group, but only through one number per token. So a group that does not
    fit into a pass has passes without gradients first, and later some with gradients, whose loss is linear in
    the log-probs. Every rank calls this.

    Args:
        policy: this rank's part of the policy.
        plan: this rank's passes.
        measured: the sampler's and the reference's log-probs of each pass.
        objective: the loss of the step.
        total: what the update holds, on all ranks.
        examples: is shown these groups.

    Returns:
        For each pass the weights of its parts' tokens, in their order, and the sums of each group.
    """
    seen: dict[tuple[int, int], Tensor] = {}  # log-probs by group and completion
    for parts in plan.before:
        tokens = policy.token_logprobs(plan.rows_of(parts) or [NOTHING])
        seen |= dict(zip(_completions(parts), tokens, strict=False))
    known: dict[tuple[int, int], ReferenceLogprobs] = {}
    for parts, of_pass in zip(plan.parts, measured, strict=True):
        end = 0
        for completion in _completions(part for part in parts if not plan.is_whole(part)):
            start, end = end, end + len(seen[completion])
            known[completion] = of_pass.between(start, end)
    weights: dict[tuple[int, int], Tensor] = {}
    sums = []
    for i in sorted({row for row, _ in seen}):
        mine = sorted(completion for completion in seen if completion[0] == i)
        logprobs = torch.cat([seen[completion] for completion in mine]).requires_grad_()
        compared = ReferenceLogprobs.cat([known[completion] for completion in mine])
        loss, group_sums = objective(logprobs, compared, [plan.rows[i]], total)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        if examples is not None:
            examples.add([plan.rows[i]], logprobs, compared, gradient)
        lengths = [len(seen[completion]) for completion in mine]
        weights |= dict(zip(mine, gradient.split(lengths), strict=True))  # type: ignore[no-untyped-call]
        sums.append(group_sums)
    nothing = torch.zeros(0, device=policy.device)
    return [
        torch.cat([nothing, *(weights[x] for x in _completions(parts) if x in weights)])
        for parts in plan.parts
    ], sums


def _completions(parts: Iterable[Part]) -> list[tuple[int, int]]:
    """Return group and completion of everything in some parts, in their order."""
    return [(part.row, i) for part in parts for i in part.completions]
