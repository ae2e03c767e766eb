"""A client calls a host of episodes, wherever that is: engines know the hosts through their clients alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gvpo_ray.data.calls import Call
from gvpo_ray.environments.agent_host import Played
from gvpo_ray.environments.host import Opened, SoFar
from gvpo_ray.environments.world import Answer, Outcome
from gvpo_ray.errors import GvpoError


class NoEnvironmentError(GvpoError, RuntimeError):
    """The environments' actors cannot be reached at all; the message is the cause."""


class LostError(GvpoError):
    """A host died, or hung and was killed."""


class Client(ABC):
    """A Client has a method for each method of a host: host.Host, or agent_host.AgentHost.

    A host of environments has `act` and `finish`, one of agents has `play`, and both have the others. A
    method raises LostError where the host's process or node is gone, or does not answer within `limit_s`
    seconds; None waits as long as the host is there.
    """

    async def open(
        self, group_id: int, row: Mapping[str, Any], num: int, limit_s: float | None = None
    ) -> list[Opened]:
        """Begin `num` episodes of a group; see Host.open."""
        opened: list[Opened] = await self._call(limit_s, "open", group_id, row, num)
        return opened

    async def claim(
        self, group_id: int, without: Iterable[str] = (), limit_s: float | None = None
    ) -> list[Opened]:
        """Take over the episodes of a group; see Host.claim."""
        claimed: list[Opened] = await self._call(limit_s, "claim", group_id, without)
        return claimed

    async def act(
        self,
        name: str,
        lease: int,
        turn: int,
        so_far: SoFar,
        calls: Sequence[Call],
        message: str,
        limit_s: float | None = None,
    ) -> Answer:
        """Let the environment answer a turn; see Host.act."""
        answer: Answer = await self._call(limit_s, "act", name, lease, turn, so_far, calls, message)
        return answer

    async def finish(self, name: str, lease: int, so_far: SoFar, limit_s: float | None = None) -> Outcome:
        """End an episode; see Host.finish."""
        outcome: Outcome = await self._call(limit_s, "finish", name, lease, so_far)
        return outcome

    async def play(self, name: str, lease: int, url: str, token: str) -> Played:
        """Let an agent play its episode to the end; see AgentHost.play."""
        played: Played = await self._call(None, "play", name, lease, url, token)
        return played

    async def release(self, group_id: int) -> None:
        """Forget the episodes of a group; see Host.release."""
        await self._call(None, "release", group_id)

    async def status(self, limit_s: float | None = None) -> dict[str, Any]:
        """Return the host's status; see Host.status."""
        status: dict[str, Any] = await self._call(limit_s, "status")
        return status

    @abstractmethod
    async def _call(self, limit_s: float | None, method: str, *args: Any) -> Any:
        """Return the answer of the host's method of this name."""
