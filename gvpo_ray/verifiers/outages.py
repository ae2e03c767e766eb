"""The faults of a reward function are counted, and a service that does not answer is waited for.

Both are decided where all verifiers are seen, because a verifier that was added or started again just now
knows nothing of what has worked before.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gvpo_ray.config.shown import mask
from gvpo_ray.errors import GvpoError
from gvpo_ray.sandbox.functions import OutOfReach, Part

MAX_FAULTS = 16
"""Number of faults after which a reward function that has never worked stops the run."""

MAX_PAUSE_S = 30.0
"""Longest time between two tries of a service that does not answer, in seconds."""

SAY_AGAIN_S = 300.0
"""Seconds after which an outage that goes on is said again."""

NUM_TRIES, NUM_TRIES_UNREACHED, NUM_TRIES_ALONE = 3, 10, 8
"""Tries after which a failure is the group's own and not an outage: the service answered others before each,
and fails at this group or cannot be reached with it; or it fails at this group, and no other one waits."""


NUM_GROUPS = 32
"""Number of the last groups whose rewards say what is usual for a data set."""


class RewardError(GvpoError, RuntimeError):
    """A reward function fails on every row; the message names the function, the last row and the fault."""


@dataclass
class Given:
    """A Given is what a reward function has given to episodes of a data set."""

    low: float
    high: float
    groups: list[tuple[float, float]]
    """The lowest and the highest value of each of the last NUM_GROUPS groups, and of the last NUM_GROUPS
    whose values differ, which may be older."""

    def worst(self, values: Sequence[float], weight: float) -> float:
        """Return what an episode is worth whose environment the policy has brought down.

        It is less than the worst value of its group by as much as the best and the worst of a group differ
        (the median of the last NUM_GROUPS groups whose values differ), but not less than the worst that was
        ever given: by rewards of 0 and 1 it is 0. So it is never above another episode of its group, and it
        costs as much where the others have all succeeded, where the worst of the group would be no loss. The
        worst that was ever given would not do alone: where rewards have no bound, one episode would set it
        for all others, and a group would then have a mean far below all its answers.

        Args:
            values: of the group's other episodes; none: the median of the groups' worst stands for them.
            weight: of the reward function; below 0 its highest value is the worst.
        """
        sign = 1.0 if weight >= 0 else -1.0
        groups = [sorted((sign * low, sign * high)) for low, high in self.groups]
        spreads = [high - low for low, high in groups if high > low]
        usual = statistics.median_low(spreads) if spreads else 0.0
        lowest = min((sign * value for value in values), default=None)
        if lowest is None:
            lowest = statistics.median_low([low for low, _ in groups[-NUM_GROUPS:]])
        return sign * max(min(sign * self.low, sign * self.high), lowest - usual)


@dataclass
class Record:
    """A Record says which reward functions have worked, and counts the faults of all."""

    worked: set[str] = field(default_factory=set)
    """Names of the reward functions that have given a value."""
    faults: Counter[str] = field(default_factory=Counter)
    last: dict[str, str] = field(default_factory=dict)
    """Name -> the last fault, with its row."""
    given: dict[tuple[str, str], Given] = field(default_factory=dict)
    """Name and data set -> what it has given to the data set's episodes."""

    def add(self, name: str, parts: Iterable[Part], group_ids: list[int] | None) -> None:
        """Take down what a reward function gave for the completions of a group."""
        for i, part in enumerate(parts):
            if part.is_fault:
                self.faults[name] += 1
                where = f"completion {i} of group {group_ids[i]}" if group_ids else f"completion {i}"
                self.last[name] = f"{where}: {part.reason}"
            elif part.value is not None:
                self.worked.add(name)

    def add_group(self, name: str, dataset: str, values: Sequence[float]) -> None:
        """Take down what a reward function gave to the episodes of a group that no tool call has ended."""
        if values:
            low, high = min(values), max(values)
            self._extend((name, dataset), Given(low, high, [(low, high)]))

    def merge(self, other: Record) -> None:
        """Take down what another record holds."""
        self.faults += other.faults
        self.last |= other.last
        self.learn(other)

    def learn(self, other: Record) -> None:
        """Take over from another record what reward functions have given, and not their faults."""
        self.worked |= other.worked
        for key, given in other.given.items():
            self._extend(key, given)

    def _extend(self, key: tuple[str, str], new: Given) -> None:
        old = self.given.get(key, new)
        groups = new.groups if old is new else [*old.groups, *new.groups]
        numbers = range(len(groups))
        differ = [i for i in numbers if groups[i][0] < groups[i][1]]  # groups of equals push out none of them
        kept = sorted({*numbers[-NUM_GROUPS:], *differ[-NUM_GROUPS:]})
        self.given[key] = Given(min(old.low, new.low), max(old.high, new.high), [groups[i] for i in kept])

    def check(self) -> None:
        """Raise RewardError if a reward function has had MAX_FAULTS faults and never worked."""
        for name, number in self.faults.items():
            if number >= MAX_FAULTS and name not in self.worked:
                raise RewardError(
                    f"verifiers.rewards.{name} fails on every row ({number} so far), last on "
                    f"{self.last[name]}"
                )


def pause(num_tries: int) -> float:
    """Return the seconds to wait after a number of tries in vain."""
    return min(MAX_PAUSE_S, float(2 ** (min(num_tries, 10) - 1)))


@dataclass
class Failure:
    """A Failure holds the tries of one group in vain, of one reward function."""

    last: float = field(default_factory=time.monotonic)
    num_tries: int = 0
    num_while_others: int = 0
    """How many of them failed although the service had answered another group since the one before."""
    is_answer: bool = False
    """Whether the service answered the last time."""


@dataclass
class _Outage:
    """An _Outage says since when a service has not answered, and why."""

    since: float
    cause: str = ""
    num_tries: int = 0
    said: float | None = None
    """When it was said the last time."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Whose turn it is to try next: one group at a time finds out whether the service answers again."""


class Outages:
    """The Outages of a run are the reward functions whose service does not answer, with the groups that wait.

    Args:
        say: called with a line when an outage begins, every SAY_AGAIN_S while it lasts, and when it ends.
        what: what waits, in the singular.
    """

    def __init__(self, say: Callable[[str], None], what: str = "group") -> None:
        self._say, self._what = say, what
        self._outages: dict[str, _Outage] = {}
        self._answered: dict[str, float] = {}
        self._failing: dict[str, list[Failure]] = {}

    def lines(self) -> list[str]:
        """Describe each outage in a line."""
        return [self._line(name, outage) for name, outage in self._outages.items()]

    def _line(self, name: str, outage: _Outage) -> str:
        number = len(self._failing[name])
        waits = "waits for it and is tried again" if number == 1 else "wait for it and are tried again"
        return (
            f"verifiers.rewards.{name}: out of reach for {time.monotonic() - outage.since:.0f} s "
            f"({outage.cause}); {number} {self._what}{'s' * (number != 1)} {waits}"
        )

    def answered(self, names: Iterable[str]) -> None:
        """Note the reward functions that have given a value just now."""
        for name in names:
            self._answered[name] = time.monotonic()
            if (outage := self._outages.pop(name, None)) is not None:
                outage.over.set()
                if outage.said is not None:
                    seconds = time.monotonic() - outage.since
                    self._say(f"verifiers.rewards.{name}: answers again, after {seconds:.0f} s")

    async def wait(self, error: OutOfReach, failures: dict[str, Failure]) -> None:
        """Note that a group has failed, and wait until it may be tried again."""
        self.failed(error, failures)
        outage = self._outages[error.reward]
        async with outage.turn:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(outage.over.wait(), pause(outage.num_tries))

    def failed(self, error: OutOfReach, failures: dict[str, Failure]) -> float:
        """Note that a group has failed; return the seconds after which it should be tried again.

        Args:
            error: the failure.
            failures: the group's earlier failures, by the name of the reward; this one is added.
        """
        name, now = error.reward, time.monotonic()
        outage = self._outages.setdefault(name, _Outage(now))
        if name not in failures:
            failures[name] = Failure()
            self._failing.setdefault(name, []).append(failures[name])
        failure = failures[name]
        failure.num_while_others += self._answered.get(name, 0.0) > failure.last
        failure.last = now
        failure.num_tries, failure.is_answer = failure.num_tries + 1, error.is_answer
        outage.cause, outage.num_tries = " ".join(mask(str(error)).split()), outage.num_tries + 1
        if outage.num_tries > 1 and (outage.said is None or now - outage.said >= SAY_AGAIN_S):
            outage.said = now
            self._say(self._line(name, outage))
        return pause(outage.num_tries)

    def leave(self, failures: Mapping[str, Failure]) -> None:
        """Note that a group is done, or given up."""
        for name, failure in failures.items():
            self._failing[name] = [each for each in self._failing.get(name, []) if each is not failure]

    def without(self, failures: Mapping[str, Failure]) -> list[str]:
        """Return the names of the rewards that a group should do without: their failures are its own."""
        return [name for name, failure in failures.items() if self._is_its_own(name, failure)]

    def _is_its_own(self, name: str, failure: Failure) -> bool:
        if failure.num_while_others >= (NUM_TRIES if failure.is_answer else NUM_TRIES_UNREACHED):
            return True
        is_alone = len(self._failing[name]) == 1
        return failure.is_answer and is_alone and failure.num_tries >= NUM_TRIES_ALONE
