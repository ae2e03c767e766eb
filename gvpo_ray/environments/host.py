"""A host holds the environments of many episodes. It is an actor; engines call it.

It also keeps each episode's tokens up to its last turn. So when an engine dies, another one claims the
episodes of its groups and goes on with their tokens, and the environments have lost nothing. Every turn has a
number, and a turn that has been made is answered again and not made again.

Each environment is in a process of its own (forks.py), so that no number of calls that hang touches the host
or another episode. A tool call that does not return is an error that the policy reads. The policy's calls are
the cause where the process goes down, during one or after one, whatever it does then, and of whatever fails
after a call that has hung: the episode is worth no more than its group (verifiers/outages.py: Given.worst).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gvpo_ray.config.verifiers import ReasonKind
from gvpo_ray.data.calls import Call, well_formed
from gvpo_ray.environments.forks import BrokenError, NoServerError
from gvpo_ray.environments.world import Answer, Outcome

GONE = "environment: its actor died, and the episode's state with it"
"""Reason of an episode whose environment is no more."""

BY_POLICY = "environment: brought down by a tool call: "
"""Begins the reason of an episode whose environment the policy has brought down: no prompt is to blame."""

MAX_NAMES = 200
"""Characters of the names of tools, which the policy has written, in a reason."""

SoFar = dict[str, Any]
"""Completion columns of an episode, up to the end of a turn."""


class AnyWorld(Protocol):
    """The AnyWorld protocol is what a host needs of a world: forks.WorldProcess has it, and world.World."""

    async def open(self, row: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """Make and reset the environment; return what it says, or why it could not begin."""

    async def act(self, calls: Sequence[Call], message: str) -> Answer:
        """Make a turn's tool calls, or let the environment respond to its message."""

    async def score(self) -> Outcome:
        """Return the reward."""

    async def close(self) -> None:
        """Let the environment go."""


@dataclass
class Opened:
    """An Opened episode is what an engine gets to know of one."""

    name: str
    lease: int
    """Number of the engine, by order, that has it; calls of earlier ones are refused."""
    said: str | None
    """What reset has returned."""
    so_far: SoFar | None = None
    reason: str | None = None
    """Why it could not begin."""


@dataclass(eq=False)
class _Episode:
    name: str
    group_id: int
    number: int
    """Of all that this host has begun, in the order of `open`: engines draw the seeds by the place in it."""
    world: AnyWorld
    said: str | None = None
    lease: int = 0
    so_far: SoFar | None = None
    turns: list[asyncio.Task[Answer]] = field(default_factory=list)
    outcome: asyncio.Task[Outcome] | None = None
    is_to_blame: bool = False
    """Whether a tool call of the policy's has hung or brought the world down, and so is the cause of what
    fails from then on."""
    has_called: bool = False
    """Whether there were tool calls of the policy's at all."""

    def blame(self, is_to_blame: bool) -> None:
        """Note whether a tool call is the cause of a failure, if there was one."""
        self.is_to_blame = self.is_to_blame or (is_to_blame and self.has_called)


class Host:
    """A Host makes worlds and gives them the turns of their episodes.

    Args:
        make: starts a world.
    """

    def __init__(self, make: Callable[[], Awaitable[AnyWorld]]) -> None:
        self._make = make
        self._episodes: dict[str, _Episode] = {}
        self._numbers = itertools.count()

    async def open(self, group_id: int, row: Mapping[str, Any], num: int) -> list[Opened]:
        """Begin `num` episodes of a group; `row` goes to reset, as far as it has such arguments."""
        numbers = [next(self._numbers) for _ in range(num)]
        begun = await asyncio.gather(
            *(self._open(group_id, number, row) for number in numbers), return_exceptions=True
        )
        opened = [one for one in begun if isinstance(one, Opened)]
        for error in begun:
            if isinstance(error, BaseException):  # nobody gets to know of the others
                for one in opened:
                    if (episode := self._episodes.pop(one.name, None)) is not None:
                        await episode.world.close()
                raise error
        return opened

    async def claim(self, group_id: int, without: Iterable[str] = ()) -> list[Opened]:
        """Take over the episodes of a group that there are, but for those of the names `without`.

        They are in the order in which they were begun, whichever was reset first.
        """
        left_out = set(without)
        found = [e for e in self._episodes.values() if e.group_id == group_id and e.name not in left_out]
        found.sort(key=lambda episode: episode.number)
        for episode in found:
            episode.lease += 1
        return [Opened(e.name, e.lease, e.said, e.so_far) for e in found]

    async def act(
        self, name: str, lease: int, turn: int, so_far: SoFar, calls: Sequence[Call], message: str
    ) -> Answer:
        """Make a turn's tool calls, or let the environment respond to its message.

        Args:
            name: of the episode.
            lease: from Opened.
            turn: its number, from 0.
            so_far: the episode's columns up to the end of this turn.
            calls: the turn's tool calls; synchronous ones are made in their order, asynchronous ones at once.
            message: the turn's text.
        """
        episode = self._episodes.get(name)
        if episode is None or episode.lease != lease:
            return Answer(reason=GONE)
        if turn == len(episode.turns):
            episode.so_far = so_far
            episode.turns.append(asyncio.ensure_future(self._act(episode, calls, message)))
        return await asyncio.shield(episode.turns[turn])

    async def finish(self, name: str, lease: int, so_far: SoFar) -> Outcome:
        """End an episode; return its reward, or None and the reason."""
        episode = self._episodes.get(name)
        if episode is None or episode.lease != lease:
            return Outcome(None, GONE)
        if episode.outcome is None:
            episode.so_far = so_far
            episode.outcome = asyncio.ensure_future(self._score(episode))
        return await asyncio.shield(episode.outcome)

    async def release(self, group_id: int) -> None:
        """Forget the episodes of a group, which nobody will claim."""
        for name in [e.name for e in self._episodes.values() if e.group_id == group_id]:
            await self._episodes.pop(name).world.close()

    async def status(self) -> dict[str, Any]:
        """Return the number of episodes, and the pid."""
        return {"num_episodes": len(self._episodes), "pid": os.getpid()}

    async def _open(self, group_id: int, number: int, row: Mapping[str, Any]) -> Opened:
        name = uuid.uuid4().hex
        try:
            world = await self._make()
        except BrokenError as error:  # which says nothing of the prompt
            return Opened(name, 0, None, reason=f"environment: {error}")
        try:
            said, reason = await world.open(row)
        except NoServerError:
            return Opened(name, 0, None, reason=GONE)
        except BrokenError as error:
            return Opened(name, 0, None, reason=f"{ReasonKind.CRASH}: environment: reset: {error}")
        if reason is not None:
            await world.close()
            return Opened(name, 0, None, reason=reason)
        self._episodes[name] = _Episode(name, group_id, number, world, said)
        return Opened(name, 0, said)

    async def _act(self, episode: _Episode, calls: Sequence[Call], message: str) -> Answer:
        episode.has_called = episode.has_called or bool(calls)
        try:
            answer = await episode.world.act(calls, message)
        except NoServerError:
            return Answer(reason=GONE)
        except BrokenError as error:
            episode.blame(True)
            what = ", ".join(dict.fromkeys(well_formed(call.name) for call in calls))[:MAX_NAMES] or "respond"
            answer = Answer(reason=f"{ReasonKind.CRASH}: environment: {what}: {error}")
        episode.blame(answer.num_hung > 0)
        if answer.reason is not None and episode.is_to_blame:
            answer.is_broken, answer.reason = True, BY_POLICY + answer.reason
        return answer

    async def _score(self, episode: _Episode) -> Outcome:
        try:
            outcome = await episode.world.score()
        except NoServerError:
            return Outcome(None, GONE)
        except BrokenError as error:
            episode.blame(True)
            outcome = Outcome(None, f"{ReasonKind.CRASH}: environment: get_reward: {error}")
        await episode.world.close()  # nobody asks it for anything else
        if outcome.reason is not None and episode.is_to_blame:
            return Outcome(None, BY_POLICY + outcome.reason, is_broken=True)
        return outcome
