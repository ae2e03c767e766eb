"""The buffer runs as a Ray actor; the driver and the learner call it through the clients of this file.

Ray restarts a buffer that dies, and it rebuilds itself from its log. Other actors import this file, so it
imports neither torch nor vLLM.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import ActorUnavailableError, RayError

from gvpo_ray.actors import EventCallback, actor_name, cause_of, is_lost
from gvpo_ray.buffer.buffer import GroupBuffer
from gvpo_ray.buffer.log import EndedBy
from gvpo_ray.buffer.states import Command, Owner
from gvpo_ray.groups import from_wire, to_wire


class _BufferActor(GroupBuffer):
    """The actor's class is a GroupBuffer whose tables are sent as Arrow IPC streams."""

    async def put_all(self, *scored: pa.Buffer) -> list[list[EndedBy]]:
        """Put several tables of groups; return the answer of GroupBuffer.put for each."""
        return [await self.put(from_wire(table)) for table in scored]

    async def batch_on_wire(self, step: int) -> pa.Buffer | None:
        """Return GroupBuffer.batch's table as an Arrow IPC stream; None: the run was closed."""
        batch = await self.batch(step)
        return None if batch is None else to_wire(batch)

    @ray.method(num_returns=2)
    async def replayed(self, prompt: pa.Buffer, num: int) -> tuple[pa.Buffer, None]:
        """Return replayed completions, and None as a second object.

        The driver awaits only the second, so that the table does not come to its process.
        """
        return to_wire(await self.history(from_wire(prompt), num)), None


MAX_PUTS = 64
"""Most tables of groups that go to the buffer in one call."""


class BufferClient:
    """The driver calls the buffer actor through this client, which awaits GroupBuffer's methods.

    When the actor dies, Ray restarts it on its log and the client tells it what the log does not hold.

    Args:
        state: returns what a restarted buffer is told: (ids of the groups in flight, last step that may be
            trained, whether the run is over, its first error).
        note: called on every recovery.
        arguments: the arguments of GroupBuffer.
    """

    def __init__(
        self,
        state: Callable[[], tuple[list[int], int, bool, str | None]],
        note: EventCallback,
        *arguments: Any,
    ) -> None:
        on_the_head = {"node:__internal_head__": 0.001}  # other nodes may be removed
        self.actor: Any = (  # Ray gives its methods `remote` when it runs
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
        self._to_put: list[tuple[Any, asyncio.Future[list[EndedBy]]]] = []
        self._putting: asyncio.Future[None] | None = None

    async def put(self, scored: Any) -> list[EndedBy]:
        """Put a table of scored groups, given as an object ref, as GroupBuffer.put does.

        Tables that arrive while a call is in flight go together in the next call.
        """
        future: asyncio.Future[list[EndedBy]] = asyncio.get_running_loop().create_future()
        self._to_put.append((scored, future))
        if self._putting is None or self._putting.done():
            self._putting = asyncio.ensure_future(self._put_waiting())
        return await future

    async def _put_waiting(self) -> None:
        while self._to_put:
            batch, self._to_put = self._to_put[:MAX_PUTS], self._to_put[MAX_PUTS:]
            await self._put_together(batch)

    async def _put_together(self, batch: list[tuple[Any, asyncio.Future[list[EndedBy]]]]) -> None:
        try:
            answers = await self._call("put_all", *(ref for ref, _ in batch))
        except Exception as error:  # every caller that waits must get the error
            if len(batch) > 1 and is_lost(error):  # the other tables need not be made again
                for each in batch:
                    await self._put_together([each])
                return
            for _, future in batch:
                future.set_exception(error)
        else:
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)

    async def start(self, num: int) -> list[tuple[int, int]] | None:
        """Start groups; see GroupBuffer.start."""
        started: list[tuple[int, int]] | None = await self._call("start", num)
        return started

    async def skip(self, group_id: int) -> None:
        """Give up a started group; see GroupBuffer.skip."""
        await self._call("skip", group_id)

    async def replayed(self, prompt: pa.Table, num: int) -> Any:
        """Return a ref to GroupBuffer.history's completions, as an Arrow IPC stream, once they exist."""
        return await self._call("replayed", to_wire(prompt), num)

    async def weights(self, newer_than: int) -> tuple[int, Any] | None:
        """Return newer weights; see GroupBuffer.weights."""
        weights: tuple[int, Any] | None = await self._call("weights", newer_than)
        return weights

    async def next_turn(self, turn: int) -> tuple[int, Owner] | None:
        """Return the next turn on shared GPUs; see GroupBuffer.next_turn."""
        following: tuple[int, Owner] | None = await self._call("next_turn", turn)
        return following

    async def engines_sleep(self, turn: int) -> None:
        """Tell that all engines sleep; see GroupBuffer.engines_sleep."""
        await self._call("engines_sleep", turn)

    async def reached(self, version: int) -> int | None:
        """Wait for the weights of a version; see GroupBuffer.reached."""
        reached: int | None = await self._call("reached", version)
        return reached

    async def permit(self, step: int) -> None:
        """Let the learner train up to and including a step; see GroupBuffer.permit."""
        await self._call("permit", step)

    async def trained(self, step: int) -> dict[str, Any] | None:
        """Return a step's metrics once it is trained; see GroupBuffer.trained."""
        metrics: dict[str, Any] | None = await self._call("trained", step)
        return metrics

    async def save(self) -> int | None:
        """Wait for a checkpoint and return its step; see GroupBuffer.save."""
        step: int | None = await self._call("save")
        return step

    async def waits(self) -> dict[str, float] | None:
        """Return the seconds of waiting so far; see GroupBuffer.waits."""
        waits: dict[str, float] | None = await self._call("waits")
        return waits

    async def status(self) -> dict[str, Any]:
        """Return the buffer's status; see GroupBuffer.status."""
        status: dict[str, Any] = await self._call("status")
        return status

    async def close(self, error: str | None = None) -> None:
        """End the run; see GroupBuffer.close."""
        await self._call("close", error)

    async def close_once(self) -> None:
        """Close the buffer with one attempt, without waiting for a restart.

        Raises:
            RayActorError: the actor is dead.
        """
        await self.actor.close.remote()

    def kill(self) -> None:
        """Kill the actor without a restart."""
        ray.kill(self.actor, no_restart=True)

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Return a method's answer; of a method with two returns, the ref of the first.

        It returns once the second is there. A call that finds the actor dead is repeated after its restart.
        """
        while True:
            async with self._lock:  # a restarted actor must first be told what is in flight
                life = self._lives
            try:
                answer = getattr(self.actor, method).remote(*arguments)
                if isinstance(answer, list):
                    await answer[1]
                    return answer[0]
                return await answer
            except ActorUnavailableError as error:
                await self._reconnect(life, error)

    async def _reconnect(self, life: int, error: RayError) -> None:
        """Tell a restarted actor the driver's state, once per restart."""
        async with self._lock:  # hundreds of calls fail at once: only the first one reconnects
            while life == self._lives:
                try:
                    await self.actor.reconnect.remote(*self._state())
                    self._lives += 1
                    self._note("buffer", "buffer", f"{cause_of(error)}; it is rebuilt from its log")
                except ActorUnavailableError:
                    await asyncio.sleep(0.2)


class LearnerBufferClient:
    """The learner calls the buffer actor through this client, with calls that block.

    A call that finds the actor dead is repeated once Ray has restarted it. One thread may ask while others
    publish weights and report a checkpoint.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        # only the learner knows where the newest weights are, and a restarted buffer needs them
        self._published: tuple[int, Any, dict[str, Any] | None] | None = None
        # and the driver may not have heard of the newest metrics, which can precede their weights
        self._measured: tuple[int, None, dict[str, Any]] | None = None
        # and a driver may wait for a checkpoint that was written while the buffer was away
        self._saved: int | None = None
        self._publishing = threading.Lock()  # no older weights are told after newer ones

    def _call(self, method: str, *arguments: Any) -> Any:
        while True:
            try:
                return ray.get(getattr(self._actor, method).remote(*arguments))
            except ActorUnavailableError:
                time.sleep(0.2)
                if method not in ("published", "saved"):
                    self._remind()

    def _remind(self) -> None:
        """Tell a restarted buffer what it was told before and does not find on its disk."""
        with self._publishing:
            for report in (self._published, self._measured):
                if report is not None:
                    self._call("published", *report)
        if self._saved is not None:
            self._call("saved", self._saved)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Return the answer to a question that may be long in coming.

        A buffer that was restarted between two calls knows of no weights, and the engines would wait for
        them while the learner waits for the engines' groups.
        """
        if self._published is not None and not self._call("has_weights"):
            self._remind()
        return self._call(method, *arguments)

    def learner_waits(self, why: str) -> None:
        """Report that the learner waits for another one; see GroupBuffer.learner_waits."""
        self._call("learner_waits", why)

    def learner_started(self, step: int) -> None:
        """Report that the learner is up with the weights of `step`."""
        self._call("learner_started", step)

    def next_command(self, step: int, saved: bool) -> Command:
        """Return what the learner does next; see GroupBuffer.next_command."""
        command: Command = self._ask("next_command", step, saved)
        return command

    def batch(self, step: int) -> pa.Table | None:
        """Return the groups of a step, or None if the run was closed; see GroupBuffer.batch."""
        batch = self._ask("batch_on_wire", step)
        return None if batch is None else from_wire(batch)

    def report_references(self, version: int, references: dict[int, list[float | None]]) -> None:
        """Report reference log-probs, if any; see GroupBuffer.report_references."""
        if references:
            self._call("report_references", version, references)

    def published(self, version: int, weights: Any, metrics: dict[str, Any] | None) -> None:
        """Report new weights and a step's metrics; see GroupBuffer.published."""
        if weights is None:
            self._measured = None if metrics is None else (version, None, metrics)
            self._call("published", version, None, metrics)
            return
        with self._publishing:
            self._published = (version, weights, metrics)
            self._call("published", *self._published)

    def saved(self, step: int) -> None:
        """Report that the checkpoint of `step` is written; see GroupBuffer.saved."""
        self._saved = step
        self._call("saved", step)

    def close(self, error: str) -> None:
        """End the run with an error; see GroupBuffer.close."""
        self._call("close", error)
