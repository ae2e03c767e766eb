"""Micro-batches: which groups each forward pass of this rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gvpo_ray import groups
from gvpo_ray.groups import Row
from gvpo_ray.learner.policy import Policy

NOTHING: Row = {"prompt_ids": [0], "completion_ids": [[0]]}
"""What a rank passes through the model where only another rank has something to do."""


@dataclass
class Plan:
    """This rank's passes through a mini-batch. With sharded parameters a pass is a collective: every rank
    makes as many.
    """

    passes: list[list[Row]]
    """Each some whole groups, or a part of one; [] where only another rank has something to do."""
    parts: list[list[int]]
    """Passes of each group that is larger than the token budget."""
    num_part_passes: int
    """The most that any rank has."""


def plan_passes(policy: Policy, rows_of_ranks: Sequence[Sequence[Row]], max_tokens: int) -> Plan:
    """This rank's passes. Every rank knows the groups of all, so they agree on the number without a word."""
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
    """The groups of each rank, dealt by their tokens."""
    return [[rows[i] for i in indices] for indices in groups.split_by_tokens(rows, policy.data_size)]
