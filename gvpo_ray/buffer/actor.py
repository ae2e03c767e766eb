"""The buffer as an actor, and its callers: the driver and the learner. One that dies is started again by Ray,
and rebuilds itself from its log.

Actors import this file: it imports neither torch nor vLLM.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import ActorUnavailableError, RayError

from gvpo_ray.actors import Note, actor_name, cause_of
from gvpo_ray.buffer.buffer import GroupBuffer
from gvpo_ray.buffer.states import Command
from gvpo_ray.groups import from_wire, to_wire


class _BufferActor(GroupBuffer):
    async def put_all(self, *scored: pa.Buffer) -> list[bool]:
        """`put` of each."""
        return [await self.put(from_wire(group)) for group in scored]

    async def batch_on_wire(self, step: int) -> pa.Buffer | None:
        batch = await self.batch(step)
        return None if batch is None else to_wire(batch)

    @ray.method(num_returns=2)
    async def replayed(self, prompt: pa.Buffer, num: int) -> tuple[pa.Buffer, None]:
        """Historical completions, and nothing: what the driver awaits, so that the table does not come to
        it.
        """
        return to_wire(await self.history(from_wire(prompt), num)), None


MAX_PUTS = 64
"""Groups that go to the buffer in one call."""


class BufferClient:
    """The buffer actor as the driver sees it: GroupBuffer's methods, awaited.

    When the actor dies Ray starts it again on its log, and the driver tells it what the log does not hold.

    Args:
        state: what to tell: (ids of the groups in flight, step up to which may be trained, whether the run is
            over, its first error).
        arguments: of GroupBuffer.
    """

    def __init__(
        self, state: Callable[[], tuple[list[int], int, bool, str | None]], note: Note, *arguments: Any
    ) -> None:
        on_the_head = {"node:__internal_head__": 0.001}  # other nodes may go
        self.actor = (
            ray.remote(_BufferActor)
            .options(
                name=actor_name("buffer"),
                num_cpus=0,
                resources=on_the_head,
                max_concurrency=100_000,
                max_restarts=-1,
            )
            .remote(*arguments)
        )
        self._state, self._note = state, note
        self._lives, self._lock = 0, asyncio.Lock()
        self._to_put: list[tuple[Any, asyncio.Future[bool]]] = []
        self._putting: asyncio.Future[None] | None = None

    async def put(self, scored: Any) -> bool:
        """GroupBuffer.put of a scored group, by ref. Those that come while a call is under way go together in
        the next.
        """
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._to_put.append((scored, future))
        if self._putting is None or self._putting.done():
            self._putting = asyncio.ensure_future(self._put_waiting())
        return await future

    async def _put_waiting(self) -> None:
        while self._to_put:
            batch, self._to_put = self._to_put[:MAX_PUTS], self._to_put[MAX_PUTS:]
            try:
                answers = await self._call("put_all", *(ref for ref, _ in batch))
            except Exception as error:  # each of those who wait has to hear of it
                for _, future in batch:
                    future.set_exception(error)
            else:
                for (_, future), answer in zip(batch, answers, strict=True):
                    future.set_result(answer)

    async def start(self, num: int) -> list[tuple[int, int]] | None:
        """See GroupBuffer.start."""
        started: list[tuple[int, int]] | None = await self._call("start", num)
        return started

    async def skip(self, group_id: int) -> None:
        """See GroupBuffer.skip."""
        await self._call("skip", group_id)

    async def replayed(self, prompt: pa.Table, num: int) -> Any:
        """Return a ref of GroupBuffer.history's completions, on the wire, once they are there."""
        return await self._call("replayed", to_wire(prompt), num)

    async def weights(self, newer_than: int) -> tuple[int, Any] | None:
        """See GroupBuffer.weights."""
        weights: tuple[int, Any] | None = await self._call("weights", newer_than)
        return weights

    async def permit(self, step: int) -> None:
        """See GroupBuffer.permit."""
        await self._call("permit", step)

    async def trained(self, step: int) -> dict[str, Any] | None:
        """See GroupBuffer.trained."""
        metrics: dict[str, Any] | None = await self._call("trained", step)
        return metrics

    async def save(self) -> int | None:
        """See GroupBuffer.save."""
        step: int | None = await self._call("save")
        return step

    async def waits(self) -> dict[str, float] | None:
        """See GroupBuffer.waits."""
        waits: dict[str, float] | None = await self._call("waits")
        return waits

    async def status(self) -> dict[str, Any]:
        """See GroupBuffer.status."""
        status: dict[str, Any] = await self._call("status")
        return status

    async def close(self, error: str | None = None) -> None:
        """See GroupBuffer.close."""
        await self._call("close", error)

    async def close_once(self) -> None:
        """Close the buffer if it is there; one that is dead is not waited for.

        Raises:
            RayActorError: it is dead.
        """
        await self.actor.close.remote()

    def kill(self) -> None:
        """End the actor for good."""
        ray.kill(self.actor, no_restart=True)

    async def _call(self, method: str, *arguments: Any) -> Any:
        """The method's answer; of one with two returns, the ref of the first once the second is there."""
        while True:
            async with self._lock:  # not before a new one knows what is in flight
                life = self._lives
            try:
                answer = getattr(self.actor, method).remote(*arguments)
                if isinstance(answer, list):
                    await answer[1]
                    return answer[0]
                return await answer
            except ActorUnavailableError as error:
                await self._again(life, error)

    async def _again(self, life: int, error: RayError) -> None:
        async with self._lock:  # hundreds of calls fail at once
            while life == self._lives:
                try:
                    await self.actor.reconnect.remote(*self._state())
                    self._lives += 1
                    self._note("buffer", "buffer", f"{cause_of(error)}; it is rebuilt from its log")
                except ActorUnavailableError:
                    await asyncio.sleep(0.2)


class LearnerBufferClient:
    """The buffer actor as the learner sees it: calls that wait. One that died is asked again once it is
    back.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._published: tuple[int, Any, dict[str, Any] | None] | None = None

    def _call(self, method: str, *arguments: Any) -> Any:
        while True:
            try:
                return ray.get(getattr(self._actor, method).remote(*arguments))
            except ActorUnavailableError:
                time.sleep(0.2)
                # where the newest weights are, only the learner knows
                if self._published is not None and method != "published":
                    self._call("published", *self._published)

    def learner_started(self, step: int) -> None:
        self._call("learner_started", step)

    def next_command(self, step: int, saved: bool) -> Command:
        command: Command = self._call("next_command", step, saved)
        return command

    def batch(self, step: int) -> pa.Table | None:
        batch = self._call("batch_on_wire", step)
        return None if batch is None else from_wire(batch)

    def report_references(self, version: int, references: dict[int, list[float | None]]) -> None:
        """See GroupBuffer.report_references."""
        if references:
            self._call("report_references", version, references)

    def published(self, version: int, weights: Any, metrics: dict[str, Any] | None) -> None:
        self._published = (version, weights, metrics)
        self._call("published", version, weights, metrics)

    def saved(self, step: int) -> None:
        self._call("saved", step)

    def close(self, error: str) -> None:
        self._call("close", error)
