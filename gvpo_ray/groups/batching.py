"""Groups are prepared for training here: dealt to ranks, and cut into forward passes by their tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gvpo_ray.config.environment import BROKEN
from gvpo_ray.groups.table import PER_COMPLETION_COLUMNS


def num_tokens(row: Mapping[str, Any]) -> int:
    """Return the tokens that a group costs the learner: its prompt once, and its completions."""
    return len(row["prompt_ids"]) + sum(len(ids) for ids in row["completion_ids"])


def untrained_completions(row: Mapping[str, Any]) -> list[int]:
    """Return the indices of a group's completions that have tokens, of which none is trained."""
    masks = row.get("trained_tokens") or ()
    return [i for i, mask in enumerate(masks) if mask and not any(mask)]


def broken_episodes(row: Mapping[str, Any]) -> list[bool]:
    """Return for each completion of a group whether it is an episode that a tool call has brought down."""
    of_each = row["completions"] if row.get("rewards") is None else row["rewards"]
    entries = row.get("episodes") or [None] * len(of_each)
    return [entry is not None and json.loads(entry).get("end") == BROKEN for entry in entries]


def trainable_completions(row: Mapping[str, Any]) -> list[int]:
    """Return the indices of a group's completions that have a reward and at least one trained token."""
    untrained = untrained_completions(row)
    has_tokens = [i for i, ids in enumerate(row["completion_ids"]) if ids and i not in untrained]
    return [i for i in has_tokens if row["rewards"][i] is not None]


def trainable(row: Mapping[str, Any], least: int = 2) -> dict[str, Any] | None:
    """Return the row without the completions that are not trained on; None if fewer than `least` are left.

    Left out are those that are unverifiable (reward null) and those without a trained token.

    Where completions are compared, a group of one carries no signal: its only weight, R - mean R, is zero.
    """
    keep = trainable_completions(row)
    if len(keep) < least:
        return None
    result = only(row, keep)
    if parts := row.get("reward_parts"):
        result["reward_parts"] = {name: [part[i] for i in keep] for name, part in dict(parts).items()}
    return result


def only(row: Mapping[str, Any], completions: Sequence[int]) -> dict[str, Any]:
    """Return the row with only these of its completions.

    `reward_parts` is left as it is, because forward passes do not read it. All entries that may know the
    prompt's experts stay with it under `prompt_experts`, so that all parts of the group merge the same ones
    (`experts.merged_experts`): the bytes alone do not say where a token ends.
    """
    names = [name for name in PER_COMPLETION_COLUMNS if row.get(name) is not None]
    result = {**row, **{name: [row[name][i] for i in completions] for name in names}}
    if "routed_experts" in names:
        result.setdefault("prompt_experts", tuple(filter(None, row["routed_experts"])))
    return result


class Part(NamedTuple):
    """A Part is the share of a group that one forward pass computes."""

    row: int
    """The index of the group among its rank's."""
    completions: list[int]
    """The indices of the completions; not all of them where the group is larger than a pass."""


class _Sizes:
    """The sizes of a group in forward passes are pairs of a number and a width: number * width tokens.

    Where passes are packed, the number counts tokens and the width is 1. Where they are padded, the number
    counts completions and the width is the length of the longest one with its prompt.
    """

    def __init__(self, row: Mapping[str, Any], packed: bool) -> None:
        self.lengths = [*map(len, row["completion_ids"])]
        prompt, count = len(row["prompt_ids"]), len(self.lengths)
        self.whole = (prompt + sum(self.lengths), 1) if packed else (count, prompt + max(self.lengths))
        self.size = self.whole[0] * self.whole[1]
        self.prompt = prompt if packed else 0
        """What a first completion of the group adds to a pass beside itself."""
        self.parts = [(length, 1) if packed else (1, prompt + length) for length in self.lengths]


class _Pass:
    """A _Pass is a pass that is being filled: its size, and the completions of each of its groups."""

    def __init__(self) -> None:
        self.num, self.width, self.size = 0, 0, 0
        self.parts: dict[int, list[int]] = {}

    def size_with(self, num: int, width: int) -> int:
        return (self.num + num) * max(self.width, width)

    def add(self, row: int, completions: Iterable[int], num: int, width: int) -> None:
        self.num, self.width = self.num + num, max(self.width, width)
        self.size = self.num * self.width
        self.parts.setdefault(row, []).extend(completions)


@dataclass
class _Filled:
    """A _Filled holds one rank's passes, the largest first."""

    passes: list[_Pass]
    excess: int
    """The tokens that did not fit into so many passes and were added nevertheless; 0: all fitted."""


def _fill(groups: Sequence[_Sizes], max_tokens: int, num_passes: int) -> _Filled:
    """Put one rank's groups into passes of nearly equal size.

    Whole groups come first, the largest first, each into the pass that is smallest with it. Then those that
    are larger than a pass fill the passes up to one level, completion by completion.
    """
    passes, excess = [_Pass() for _ in range(num_passes)], 0

    def put(row: int, completions: Sequence[int], num: int, width: int, prompt: int = 0) -> None:
        nonlocal excess
        firsts = [0 if row in one.parts else prompt for one in passes]
        sizes = [one.size_with(num + first, width) for one, first in zip(passes, firsts, strict=True)]
        at = sizes.index(min(sizes))
        if passes[at].parts:
            excess += max(0, sizes[at] - max_tokens)
        passes[at].add(row, completions, num + firsts[at], width)

    order = sorted(range(len(groups)), key=lambda i: (-groups[i].size, i))
    for i in (i for i in order if groups[i].size <= max_tokens):
        put(i, range(len(groups[i].lengths)), *groups[i].whole)
    for i in (i for i in order if groups[i].size > max_tokens):
        lengths = groups[i].lengths
        for j in sorted(range(len(lengths)), key=lambda j: (-lengths[j], j)):
            put(i, [j], *groups[i].parts[j], groups[i].prompt)
    return _Filled(sorted(passes, key=lambda one: -one.size), excess)


def _fewest(groups: Sequence[_Sizes], max_tokens: int) -> int:
    """Return a number of passes that one rank's groups need at least."""
    total = 0
    for group in groups:
        if group.size <= max_tokens:
            total += group.size
        else:  # a completion that is larger than a pass is one alone
            total += sum(min(num * width, max_tokens) for num, width in group.parts)
    return -(-total // max_tokens)


def _fill_all(ranks: Sequence[Sequence[_Sizes]], max_tokens: int) -> list[_Filled]:
    """Put the groups of every rank into the same number of passes, in which all fit; many are a few more."""
    num_passes = max((_fewest(own, max_tokens) for own in ranks), default=0)
    while True:
        filled = [_fill(own, max_tokens, num_passes) for own in ranks]
        if not any(own.excess for own in filled):
            return filled
        num_passes += 1 + num_passes // 16


NUM_SWAPS, NUM_PLACES, GOOD_ENOUGH, EXCESS = 200, 200_000, 1.02, 10
"""`split_over_ranks` tries so many swaps of groups, fewer where that would look at more places in passes.

It stops where the time is so near the ideal, and counts a token that does not fit as EXCESS tokens.
"""


class _Spread:
    """A _Spread is a division of groups among ranks, with their passes and the time that these take."""

    def __init__(self, ranks: list[list[int]], sizes: Sequence[_Sizes], max_tokens: int, num: int) -> None:
        self.ranks, self.sizes, self.max_tokens, self.num_passes = ranks, sizes, max_tokens, num
        self.filled = [self._filled(rank) for rank in ranks]

    def _filled(self, rank: Sequence[int]) -> _Filled:
        return _fill([self.sizes[i] for i in rank], self.max_tokens, self.num_passes)

    @property
    def fits(self) -> bool:
        """Return whether every pass has room for what it holds."""
        return not any(own.excess for own in self.filled)

    def time(self, filled: Sequence[_Filled]) -> float:
        """Return the time of all passes, as a number of tokens: a pass ends on all ranks together."""
        before = max(
            sum(_work(self.sizes[i], self.max_tokens) - self.sizes[i].size for i in rank)
            for rank in self.ranks
        )
        passes = zip(*(own.passes for own in filled), strict=True)
        longest: int = sum(max(one.size for one in together) for together in passes)
        return before + longest + EXCESS * sum(own.excess for own in filled)

    def _awaited(self, rank: int) -> int:
        """Return the tokens for which the other ranks wait for this one."""
        others = [own.passes for i, own in enumerate(self.filled) if i != rank]
        waits: int = sum(
            max(0, mine.size - max(other.size for other in together))
            for mine, *together in zip(self.filled[rank].passes, *others, strict=True)
        )
        return self.filled[rank].excess * EXCESS + waits

    def improve(self) -> None:
        """Swap groups of two ranks while that makes the time shorter, those of awaited ranks first."""
        best = self.time(self.filled)
        of_a_swap = 2 * self.num_passes * sum(map(self._num_units, self.sizes)) // len(self.ranks)
        tries = min(NUM_SWAPS, NUM_PLACES // max(1, of_a_swap))
        enough = GOOD_ENOUGH * sum(_work(one, self.max_tokens) for one in self.sizes) / len(self.ranks)
        while best > enough and tries > 0:
            order = sorted(range(len(self.ranks)), key=lambda rank: -self._awaited(rank))
            for a, b in itertools.permutations(order, 2):
                swaps = itertools.product(range(len(self.ranks[a])), range(len(self.ranks[b])))
                for i, j in itertools.islice(swaps, tries):
                    tries -= 1
                    if self._swap(a, i, b, j, best):
                        break
                else:
                    continue
                best = self.time(self.filled)
                break
            else:
                return

    def _num_units(self, group: _Sizes) -> int:
        return 1 if group.size <= self.max_tokens else len(group.lengths)

    def _swap(self, a: int, i: int, b: int, j: int, best: float) -> bool:
        """Swap two groups if that is better than `best`; return whether it is."""
        own, other = self.ranks[a], self.ranks[b]
        own[i], other[j] = other[j], own[i]
        filled = [*self.filled]
        filled[a], filled[b] = self._filled(own), self._filled(other)
        if self.time(filled) < best:
            self.filled = filled
            return True
        own[i], other[j] = other[j], own[i]
        return False


def _work(group: _Sizes, max_tokens: int) -> float:
    """Return the work of a group, in tokens of a forward and backward pass.

    A group that is larger than a pass needs its log-probs before any of its gradients: a forward pass more,
    which is a third.
    """
    return group.size * (1.0 if group.size <= max_tokens else 4 / 3)


def split_over_ranks(
    groups: Sequence[Mapping[str, Any]], num_ranks: int, max_tokens: int, packed: bool = True
) -> list[list[int]]:
    """Deal whole groups to ranks, so that their passes end together; return the indices per rank.

    The longest group goes first, to the rank with the fewest tokens. Then groups of two ranks are swapped
    where that makes the passes of all ranks fewer or shorter. The result is deterministic and every rank
    keeps arrival order. A rank may get no group.

    Args:
        groups: rows of the group table.
        num_ranks: into how many parts the groups are dealt.
        max_tokens: most tokens of a pass.
        packed: as in `cut_into_passes`.
    """
    sizes = [_Sizes(row, packed) for row in groups]
    works = [_work(group, max_tokens) for group in sizes]
    loads = [0.0] * num_ranks
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    for i in sorted(range(len(groups)), key=lambda i: (-works[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += works[i]
        dealt[rank].append(i)
    if num_ranks == 1 or len(groups) <= num_ranks:
        return [sorted(rank) for rank in dealt]
    num_passes = len(_fill_all([[sizes[i] for i in rank] for rank in dealt], max_tokens)[0].passes)
    fewer = max(num_passes - 1, -(-_fewest(sizes, max_tokens) // num_ranks))
    for num in dict.fromkeys((fewer, num_passes)):
        spread = _Spread([[*rank] for rank in dealt], sizes, max_tokens, num)
        spread.improve()
        if spread.fits:
            break
    return [sorted(rank) for rank in spread.ranks]


def cut_into_passes(
    ranks: Sequence[Sequence[Mapping[str, Any]]], max_tokens: int, packed: bool = True
) -> list[list[list[Part]]]:
    """Cut the groups of every rank into passes; return the parts of groups per pass and rank.

    All ranks have the same number of passes, as few as hold their groups, because with sharded parameters a
    pass is a collective. A rank's passes are of nearly equal size and the largest come first, because a pass
    ends on all ranks together. Groups that are larger than a pass are spread over several, and come first in
    each. A pass may be empty, and has more than `max_tokens` tokens only where it is one completion.

    Args:
        ranks: rows of the group table, of each rank.
        max_tokens: most tokens of a pass.
        packed: count a prompt once per group and no padding; otherwise every completion counts with its
            prompt, padded to the longest of the pass.
    """
    sizes = [[_Sizes(row, packed) for row in rows] for rows in ranks]
    return [
        [
            sorted(
                (Part(row, sorted(completions)) for row, completions in one.parts.items()),
                key=lambda part: (len(part.completions) == len(own[part.row].lengths), part.row),
            )
            for one in rank.passes
        ]
        for own, rank in zip(sizes, _fill_all(sizes, max_tokens), strict=True)
    ]
