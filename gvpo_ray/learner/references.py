"""What a forward pass is measured against: the log-probs of whoever sampled, and of the reference policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gvpo_ray import groups
from gvpo_ray.config.loss import LossConfig
from gvpo_ray.groups import Row
from gvpo_ray.learner.logprobs import sequence_sums, trained_tokens
from gvpo_ray.learner.passes import NOTHING, Plan, plan_passes, shares_of
from gvpo_ray.learner.policy import Policy


@dataclass
class Fixed:
    """What a pass measures its token log-probs against, [T] each; nan: against themselves, as they are before
    the update.
    """

    old: torch.Tensor
    """Of the policy that sampled."""
    reference: torch.Tensor

    @classmethod
    def of_nothing(cls, policy: Policy) -> Fixed:
        return cls(torch.zeros(0, device=policy.device), torch.zeros(0, device=policy.device))


START, FOREIGN = "start", "foreign"


def _sampled(row: Row, version: int) -> list[list[float] | str]:
    """Of each completion the log-probs of its tokens by the policy that sampled it; START: that was the
    policy at the start of the step; FOREIGN: it was no policy of this run.

    A completion wholly sampled by that very policy takes the learner's own pass (log-ratio exactly 0); an
    older or mixed one its engine's log-probs, exact also when weights changed in mid-completion.
    """
    columns = (row[name] for name in ("version_min", "version_max", "sampling_logprobs"))
    return [
        FOREIGN if oldest is None or logprobs is None else START if oldest == newest == version else logprobs
        for oldest, newest, logprobs in zip(*columns, strict=True)
    ]


def reference_passes(
    policy: Policy,
    mini_batches: Sequence[Sequence[Row]],
    plans: Sequence[Plan],
    loss: LossConfig,
    model_path: str,
) -> list[list[Fixed]]:
    """What each pass of a step measures against, once per completion and reference version, before the first
    update.

    nan: the policy at the start of the step, and no pass is needed for it, because that is the policy of the
    completion's own forward pass, whose log-probs become the reference (so the log-ratio there is exactly 0).
    That holds in the first mini-batch; the others need a pass of their own, unless every completion, on every
    rank, brings its log-probs along.

    For gvpo and `behaviour` a foreign completion is one that the policy at model_path wrote, which is the one
    that the run began with: D is then how far the learner has moved on it. Against the policy that meets it D
    would be 0, and what is wrong in it pushed down for ever.
    """
    version, result = policy.step, []
    by_token = loss.has_reference_model and not loss.asks_reference_model_for_sums
    takes_for_first = loss.reference == "behaviour" and loss.objective == "gvpo"
    asks_sampler = (
        loss.reference == "behaviour" or loss.objective != "gvpo" or loss.importance_cap is not None
    )
    for i, (mini_batch, plan) in enumerate(zip(mini_batches, plans, strict=True)):
        unknown = {known for row in mini_batch for known in _sampled(row, version) if isinstance(known, str)}
        asks_first = takes_for_first and FOREIGN in unknown
        if asks_first:
            unknown.remove(FOREIGN)
            if not policy.has_reference:
                policy.load_reference(model_path)
        asks_start = i > 0 and (
            "previous" in (loss.reference, loss.old_policy) or (asks_sampler and bool(unknown))
        )
        fixed = []
        for micro in plan.passes:  # a rank with nothing to ask takes part
            brought, foreign = [], []
            for row in micro:
                for trained, known in zip(trained_tokens(row), _sampled(row, version), strict=True):
                    is_unknown = isinstance(known, str)
                    brought += [float("nan") if is_unknown else known[t] for t in trained]
                    foreign += [known == FOREIGN] * len(trained)
            sampled = torch.tensor(brought, dtype=torch.float64, device=policy.device)
            if asks_first:
                first = _pass(policy, micro, reference=True)
                sampled = torch.where(
                    torch.tensor(foreign, dtype=torch.bool, device=policy.device), first, sampled
                )
            start = torch.full_like(sampled, float("nan"))
            if asks_start:
                start = _pass(policy, micro)
                sampled = torch.where(sampled.isnan(), start, sampled)
            reference = (
                _pass(policy, micro, reference=True)
                if by_token
                else start
                if loss.reference == "previous"
                else sampled
            )
            fixed.append(Fixed(start if loss.old_policy == "previous" else sampled, reference))
        result.append(fixed)
    return result


def pass_reference_model(policy: Policy, mini_batch: Sequence[dict[str, Any]], max_tokens: int) -> None:
    """Write the reference model's log-probs into the rows that this rank trains; a completion that brings
    them along costs nothing.
    """
    version = policy.reference_version
    shares = shares_of(policy, mini_batch)
    asked = [[(row, which) for row in share if (which := _unknown(row, version))] for share in shares]
    sums: list[float] = []
    for micro in plan_passes(
        policy, [[groups.only(row, which) for row, which in share] for share in asked], max_tokens
    ).passes:
        tokens = policy.token_logprobs(micro or [NOTHING], reference=True)
        sums += sequence_sums(torch.cat(tokens), [len(t) for t in tokens]).tolist() if micro else []
    for row, which in asked[policy.data_rank]:
        new, sums = dict(zip(which, sums, strict=False)), sums[len(which) :]
        known = row.get("reference_logprobs") or [None] * len(row["rewards"])
        row["reference_logprobs"] = [new.get(i, value) for i, value in enumerate(known)]
        row["reference_versions"] = [version] * len(known)


def _unknown(row: Row, version: int) -> list[int]:
    """Completions of which the reference of this version has said nothing yet."""
    versions = row.get("reference_versions") or [None] * len(row["rewards"])
    return [i for i, known in enumerate(versions) if known != version]


def _pass(policy: Policy, rows: Sequence[Row], reference: bool = False) -> torch.Tensor:
    """Token log-probs of a pass, float64 [T]."""
    tokens = torch.cat(policy.token_logprobs(rows or [NOTHING], reference)).double()
    return tokens if rows else tokens[:0]
