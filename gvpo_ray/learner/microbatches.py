"""A Plan divides a mini-batch into this rank's forward passes (micro-batches)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gvpo_ray import groups
from gvpo_ray.groups import Row
from gvpo_ray.learner.policy import Policy

NOTHING: Row = {"prompt_ids": [0], "completion_ids": [[0]]}
"""The group that a rank passes through the model where only other ranks have groups left."""


@dataclass
class Plan:
    """A Plan holds this rank's passes through a mini-batch.

    With sharded parameters a pass is a collective, so every rank makes equally many.
    """

    passes: list[list[Row]]
    """The groups of each pass: whole groups, or a part of one; [] where only other ranks have groups left."""
    parts: list[list[int]]
    """For each group that is larger than the token budget, the indices of its passes."""
    num_part_passes: int
    """The number of passes with a part of a group, on the rank that has most of them."""


def plan_passes(policy: Policy, rows_of_ranks: Sequence[Sequence[Row]], max_tokens: int) -> Plan:
    """Return this rank's passes; all ranks agree on their number, because each knows the groups of all.

    Args:
        policy: this rank's part of the policy.
        rows_of_ranks: the groups of each rank.
        max_tokens: the token budget of a pass.
    """
    plans = []
    for rows in rows_of_ranks:
        passes: list[list[Row]] = []
        parts: list[list[int]] = []
        for micro in groups.micro_batches(rows, max_tokens, policy.packs):
            pieces = groups.split_group(rows[micro[0]], max_tokens, policy.packs) if len(micro) == 1 else []
            if len(pieces) > 1:
                parts.append(list(range(len(passes), len(passes) + len(pieces))))
                passes += [[piece] for piece in pieces]
            else:
                passes.append([rows[i] for i in micro])
        plans.append(Plan(passes, parts, sum(map(len, parts))))
    mine = plans[policy.data_rank]
    mine.passes += [[] for _ in range(max(len(plan.passes) for plan in plans) - len(mine.passes))]
    mine.num_part_passes = max(plan.num_part_passes for plan in plans)
    return mine


def rows_of_ranks(policy: Policy, rows: Sequence[Any]) -> list[list[Any]]:
    """Return the groups of each rank, split so that the ranks have similar numbers of tokens."""
    return [[rows[i] for i in indices] for indices in groups.split_by_tokens(rows, policy.data_size)]
