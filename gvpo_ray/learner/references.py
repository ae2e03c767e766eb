"""A forward pass is compared with log-probs of the sampler and of the reference policy, which are found here.

The log-probs of `behaviour`, the policy that sampled a completion, depend on who that was:

    completion sampled by               token log-probs are taken from
    the policy at the start of the step the forward pass itself (so the log-ratio is exactly 0), or in later
                                        mini-batches a pass before the first update
    older or several versions           the engine: column `sampling_logprobs`
    no policy of this run (external)    a pass of the policy that the run began with, or of this step's, as
                                        the objective's options say

The other policies are the same for all completions:

    policy        token log-probs are taken from
    `previous`    the forward pass itself, or in later mini-batches a pass before the first update
    `model`       a pass of the reference model; where only sums are needed, the column
                  `reference_logprobs`, which is stored with a completion
    `other`       the same column, which another model has filled before the group was logged

An objective's options say what it needs (config/loss.py): no objective is known here by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from gvpo_ray import groups
from gvpo_ray.config.loss import LossOptions, Need
from gvpo_ray.groups import Row
from gvpo_ray.learner.logprobs import sequence_sums, trained_tokens
from gvpo_ray.learner.microbatches import NOTHING, Plan, plan_passes
from gvpo_ray.learner.policy import Policy


@dataclass(frozen=True)
class TokenLogprobs:
    """TokenLogprobs are the log-probs of a pass's T tokens by the sampler or by the reference policy."""

    values: Tensor
    """[T] The log-probs, float64; not used where `is_own`."""
    is_own: Tensor
    """[T] bool, whether that policy is the current one, so that the pass's own log-probs are used."""

    def beside(self, logprobs: Tensor) -> Tensor:
        """Return the log-probs, [T] float64 without gradient, to compare the pass's own `logprobs` with."""
        return torch.where(self.is_own, logprobs.detach().double(), self.values)

    def filled(self, values: Tensor, where: Tensor) -> TokenLogprobs:
        """Return a copy with `values`, [T], at the tokens of `where`, [T] bool."""
        return TokenLogprobs(torch.where(where, values, self.values), self.is_own & ~where)

    @classmethod
    def own(cls, like: Tensor) -> TokenLogprobs:
        """Make log-probs that are the pass's own at all tokens; `like` is any [T] float64."""
        return cls(torch.zeros_like(like), torch.ones_like(like, dtype=torch.bool))

    def between(self, start: int, end: int) -> TokenLogprobs:
        """Return the log-probs of the tokens start..end-1."""
        return TokenLogprobs(self.values[start:end], self.is_own[start:end])

    @classmethod
    def cat(cls, parts: Sequence[TokenLogprobs]) -> TokenLogprobs:
        """Concatenate the log-probs of several passes."""
        return cls(torch.cat([part.values for part in parts]), torch.cat([part.is_own for part in parts]))


@dataclass(frozen=True)
class ReferenceLogprobs:
    """ReferenceLogprobs are the token log-probs that one forward pass is compared with.

    None: the objective needs none, or only sums.
    """

    sampler: TokenLogprobs | None
    reference: TokenLogprobs | None

    @classmethod
    def empty(cls, device: torch.device) -> ReferenceLogprobs:
        """Make the log-probs of a pass without tokens."""
        nothing = TokenLogprobs.own(torch.zeros(0, dtype=torch.float64, device=device))
        return cls(nothing, nothing)

    def between(self, start: int, end: int) -> ReferenceLogprobs:
        """Return the log-probs of the tokens start..end-1."""
        return ReferenceLogprobs(
            *(known and known.between(start, end) for known in (self.sampler, self.reference))
        )

    @classmethod
    def cat(cls, parts: Sequence[ReferenceLogprobs]) -> ReferenceLogprobs:
        """Concatenate the log-probs of several passes."""
        samplers = [part.sampler for part in parts if part.sampler is not None]
        references = [part.reference for part in parts if part.reference is not None]
        return cls(
            TokenLogprobs.cat(samplers) if samplers else None,
            TokenLogprobs.cat(references) if references else None,
        )


class Origin(Enum):
    """An Origin says who sampled a completion."""

    CURRENT = "wholly the policy at the start of the step"
    ENGINE = "older policies, or several: the engine's log-probs say what they were"
    EXTERNAL = "no policy of this run"


def origins_of(row: Row, version: int) -> list[Origin]:
    """Return the origin of each completion of a group, in the step that starts from `version`."""
    columns = (row[name] for name in ("version_min", "version_max", "sampling_logprobs"))
    return [
        Origin.EXTERNAL
        if oldest is None or logprobs is None
        else Origin.CURRENT
        if oldest == newest == version
        else Origin.ENGINE
        for oldest, newest, logprobs in zip(*columns, strict=True)
    ]


def check_sampling_logprobs(rows: Sequence[Row]) -> None:
    """Check that the engines' log-probs are finite numbers.

    Raises:
        GroupError: one is not; the message names the group and the token.
    """
    for row in rows:
        for i, logprobs in enumerate(row["sampling_logprobs"]):
            if logprobs is not None and not math.isfinite(sum(logprobs)):
                token = next(t for t, value in enumerate(logprobs) if not math.isfinite(value))
                raise groups.GroupError(
                    f"group {row['group_id']}: sampling_logprobs[{i}] has {logprobs[token]} for token {token}"
                )


def check_given_references(rows: Sequence[Row]) -> None:
    """Check that another model has scored every completion of these groups.

    Raises:
        GroupError: it has not; the message names the group and the completion.
    """
    for row in rows:
        known = row.get("reference_logprobs") or [None] * len(row["rewards"])
        if None in known:
            raise groups.GroupError(
                f"group {row['group_id']}: completion {known.index(None)} has no log-prob of the other model "
                "that is the reference"
            )


def measure_passes(
    policy: Policy,
    mini_batch: Sequence[Row],
    plan: Plan,
    loss: LossOptions,
    model_path: str,
    is_first: bool,
) -> list[ReferenceLogprobs]:
    """Return the log-probs that each pass of a mini-batch is compared with.

    This is called before the first update of the step. In the first mini-batch the policy at the start of the
    step is that of the forward pass itself and needs no other pass. Every rank calls this with the whole
    mini-batch, and so makes as many passes as the others.

    Args:
        policy: this rank's part of the policy.
        mini_batch: the groups of all ranks.
        plan: this rank's passes.
        loss: says which log-probs are needed.
        model_path: the model that the run began with.
        is_first: whether this is the first mini-batch, which no update precedes.
    """
    asked = {need.policy for need in (loss.sampler_need, loss.reference_need) if need.detail != "nothing"}
    origins = {origin for row in mini_batch for origin in origins_of(row, policy.step)} - {Origin.ENGINE}
    asks_initial = loss.external_is_initial and Origin.EXTERNAL in origins
    if asks_initial:
        origins.remove(Origin.EXTERNAL)
        if not policy.reference.exists:
            policy.reference.load(model_path)
    asks_start = not is_first and ("previous" in asked or ("behaviour" in asked and bool(origins)))
    measured = []
    for micro in plan.passes:  # also empty passes, because they are collectives
        sampled, is_external = _sampled(policy, micro)
        if asks_initial:
            sampled = sampled.filled(_token_logprobs(policy, micro, reference=True), is_external)
        start = TokenLogprobs.own(sampled.values)
        if asks_start:
            tokens = _token_logprobs(policy, micro)
            start, sampled = start.filled(tokens, start.is_own), sampled.filled(tokens, sampled.is_own)
        by_policy = {"behaviour": sampled, "previous": start}
        if loss.reference_need == Need("tokens", "model"):
            by_policy["model"] = start.filled(
                _token_logprobs(policy, micro, reference=True), torch.ones_like(start.is_own)
            )
        measured.append(
            ReferenceLogprobs(
                *(
                    by_policy.get(need.policy) if need.detail != "nothing" else None
                    for need in (loss.sampler_need, loss.reference_need)
                )
            )
        )
    return measured


def _sampled(policy: Policy, rows: Sequence[Row]) -> tuple[TokenLogprobs, Tensor]:
    """Return the sampler's log-probs as far as the rows have them, and [T] bool: is the token external."""
    values: list[float] = []
    is_own: list[bool] = []
    is_external: list[bool] = []
    for row in rows:
        for i, (origin, trained) in enumerate(
            zip(origins_of(row, policy.step), trained_tokens(row), strict=True)
        ):
            num = len(trained)
            known = row["sampling_logprobs"][i] if origin is Origin.ENGINE else None
            values += [0.0] * num if known is None else [known[t] for t in trained]
            is_own += [origin is not Origin.ENGINE] * num
            is_external += [origin is Origin.EXTERNAL] * num
    own, external = (torch.tensor(x, dtype=torch.bool, device=policy.device) for x in (is_own, is_external))
    return TokenLogprobs(torch.tensor(values, dtype=torch.float64, device=policy.device), own), external


def score_with_reference(
    policy: Policy, rows_of_ranks: Sequence[Sequence[dict[str, Any]]], max_tokens: int
) -> None:
    """Write the reference model's sequence log-probs into the rows that this rank trains. Every rank.

    A completion that already has those of this version of the reference is not scored again.

    Args:
        policy: this rank's part of the policy.
        rows_of_ranks: the groups of each rank; the columns `reference_logprobs` and `reference_versions` of
            this rank's are changed in place.
        max_tokens: the token budget of a pass.
    """
    version = policy.reference.version
    unknown = [[(row, _unknown(row, version)) for row in rows] for rows in rows_of_ranks]
    asked = [[(row, which) for row, which in rows if which] for rows in unknown]
    plan = plan_passes(
        policy, [[groups.only(row, which) for row, which in rows] for rows in asked], max_tokens
    )
    mine = asked[policy.data_rank]
    for row, _ in mine:
        number = len(row["rewards"])
        row["reference_logprobs"] = [*(row.get("reference_logprobs") or [None] * number)]
        row["reference_versions"] = [version] * number
    for parts in plan.parts:
        tokens = policy.token_logprobs(plan.rows_of(parts) or [NOTHING], reference=True)
        sums = sequence_sums(torch.cat(tokens), [len(t) for t in tokens]).tolist()
        scored = ((mine[part.row], i) for part in parts for i in part.completions)
        for ((row, which), i), value in zip(scored, sums, strict=False):
            row["reference_logprobs"][which[i]] = value


def _unknown(row: Row, version: int) -> list[int]:
    """Return the completions that this version of the reference has not scored yet."""
    versions = row.get("reference_versions") or [None] * len(row["rewards"])
    return [i for i, known in enumerate(versions) if known != version]


def attach_references(
    policy: Policy, batch: Sequence[dict[str, Any]], mini_batches: Sequence[Sequence[Sequence[Row]]]
) -> None:
    """Copy the reference model's log-probs from the mini-batches into the batch's rows.

    A completion that is not trained gets None. Rows of other ranks lose the columns, so that each rank
    reports its own groups.

    Args:
        policy: this rank's part of the policy.
        batch: the step's rows, changed in place.
        mini_batches: their trainable parts of each rank, with the log-probs of `score_with_reference`.
    """
    own = {row["group_id"]: row for ranks in mini_batches for row in ranks[policy.data_rank]}
    for row in batch:
        trained = own.get(row["group_id"])
        for name in groups.REFERENCE_COLUMNS:
            row.pop(name, None)
            if trained is not None:
                # weak negatives stand behind the group's own completions, and are not reported
                known = dict(zip(groups.trainable_completions(row), trained[name], strict=False))
                row[name] = [known.get(i) for i in range(len(row["rewards"]))]


def _token_logprobs(policy: Policy, rows: Sequence[Row], reference: bool = False) -> Tensor:
    """Return the token log-probs of a pass without gradients, float64 [T]."""
    tokens = torch.cat(policy.token_logprobs(rows or [NOTHING], reference)).double()
    return tokens if rows else tokens[:0]
