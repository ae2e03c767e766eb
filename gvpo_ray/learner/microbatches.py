"""A Plan divides a mini-batch into this rank's forward passes (micro-batches)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from gvpo_ray import groups
from gvpo_ray.groups import Part, Row
from gvpo_ray.learner.policy import Policy

Item = TypeVar("Item")
Result = TypeVar("Result")

NOTHING: Row = {"prompt_ids": [0], "completion_ids": [[0]]}
"""The group that a rank passes through the model where only other ranks have groups left."""


@dataclass
class Plan:
    """A Plan holds this rank's passes through a mini-batch.

    With sharded parameters a pass is a collective, so every rank makes equally many.
    """

    rows: Sequence[Row]
    """This rank's groups."""
    parts: list[list[Part]]
    """The parts of groups in each pass, those of groups that are larger than a pass first.

    It is [] where only other ranks have groups left."""
    before: list[list[Part]]
    """The passes without gradients that come first, with the groups that are larger than a pass."""

    def rows_of(self, parts: Sequence[Part]) -> list[Row]:
        """Return the rows of some parts; a part of a group is a row with only its completions."""
        return [
            self.rows[part.row] if self.is_whole(part) else groups.only(self.rows[part.row], part.completions)
            for part in parts
        ]

    def is_whole(self, part: Part) -> bool:
        """Return whether a part is a whole group."""
        return len(part.completions) == len(self.rows[part.row]["completion_ids"])

    @property
    def passes(self) -> list[list[Row]]:
        """The rows of each pass."""
        return [self.rows_of(parts) for parts in self.parts]


def plan_passes(policy: Policy, rows_of_ranks: Sequence[Sequence[Row]], max_tokens: int) -> Plan:
    """Return this rank's passes; all ranks agree on their number, because each knows the groups of all.

    Args:
        policy: this rank's part of the policy.
        rows_of_ranks: the groups of each rank.
        max_tokens: the token budget of a pass.
    """
    plans = [
        Plan(rows, parts, [])
        for rows, parts in zip(
            rows_of_ranks, groups.cut_into_passes(rows_of_ranks, max_tokens, policy.packs), strict=True
        )
    ]
    large = [
        sorted({part.row for parts in plan.parts for part in parts if not plan.is_whole(part)})
        for plan in plans
    ]
    first = groups.cut_into_passes(
        [[rows[i] for i in own] for rows, own in zip(rows_of_ranks, large, strict=True)],
        max_tokens,
        policy.packs,
    )
    mine, own = plans[policy.data_rank], large[policy.data_rank]
    mine.before = [[Part(own[row], which) for row, which in parts] for parts in first[policy.data_rank]]
    return mine


def rows_of_ranks(policy: Policy, rows: Sequence[Any], max_tokens: int) -> list[list[Any]]:
    """Return the groups of each rank, dealt so that the ranks' passes end together."""
    ranks = groups.split_over_ranks(rows, policy.data_size, max_tokens, policy.packs)
    return [[rows[i] for i in indices] for indices in ranks]


def one_ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Yield each item with work(item), which a thread does for the next item meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="one_ahead") as pool:
        waiting: list[tuple[Item, Future[Result]]] = []
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > 1:
                before, result = waiting.pop(0)
                yield before, result.result()
        for item, result in waiting:
            yield item, result.result()
