"""The mixture decides which groups are whole groups of an offline source: exact shares, from the id alone."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from fractions import Fraction
from itertools import accumulate, pairwise


class SourceSchedule:
    """A schedule assigns each group id to an offline source or to the policy's prompts, by a pure function.

    It is Tijdeman's schedule (The chairman assignment problem, Discrete Mathematics 32, 1980), with the
    ordinary prompts as one more source. A source's i-th group (from 0) may come no earlier than its share
    allows, at floor(i / share), and must come before ceil((i + 1) / share). Each id goes to the source with
    the earliest deadline among those that may come. So after any n ids every source has had n * share,
    rounded down or up. The schedule repeats with the common denominator of the shares as its period. One
    period is planned lazily, up to the largest id asked for, and looked up.

    Args:
        shares: share of all groups by name of source, each in (0, 1]; their sum is at most 1.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        # Sums are taken as written (0.1 is 1/10), to a millionth: three times 0.3333333333333333 is 1.
        ends = [
            end.limit_denominator(10**6)
            for end in accumulate(Fraction(str(share)) for share in shares.values())
        ]
        self._names: list[str | None] = [*shares, None]
        self._period = math.lcm(*(end.denominator for end in ends))
        self._sizes = [
            int((end - begin) * self._period) for begin, end in pairwise((Fraction(0), *ends, Fraction(1)))
        ]
        self._counts = [0] * len(self._sizes)
        self._owners, self._numbers, self._num_ordinary = array("i"), array("q"), array("q")

    def source_of(self, group_id: int) -> tuple[str, int] | None:
        """Return the source of a whole group and the group's number there; None for an ordinary prompt.

        A source's numbers are 0, 1, …. A look-up takes O(1) once the schedule is planned up to this id.
        """
        round_, place = self._place(group_id)
        owner = self._owners[place]
        name = self._names[owner]
        return None if name is None else (name, round_ * self._sizes[owner] + self._numbers[place])

    @property
    def owners(self) -> list[str | None]:
        """The sources that have whole groups, by name, and None if there are groups of ordinary prompts."""
        return [name for name, size in zip(self._names, self._sizes, strict=True) if size]

    def ordinary(self, group_id: int) -> int:
        """Return how many ordinary prompts come before this id.

        This is the number to ask PromptSet.group for, so that the prompts are used without gaps.
        """
        round_, place = self._place(group_id)
        return round_ * self._sizes[-1] + self._num_ordinary[place]

    def _place(self, group_id: int) -> tuple[int, int]:
        round_, place = divmod(group_id, self._period)
        while len(self._owners) <= place:
            self._plan_next()
        return round_, place

    def _plan_next(self) -> None:
        id_, period, counts = len(self._owners), self._period, self._counts
        may_come = [i for i, size in enumerate(self._sizes) if size and counts[i] * period < (id_ + 1) * size]
        owner = min(may_come, key=lambda i: -(-(counts[i] + 1) * period // self._sizes[i]))
        self._owners.append(owner)
        self._numbers.append(counts[owner])
        self._num_ordinary.append(counts[-1])
        counts[owner] += 1
