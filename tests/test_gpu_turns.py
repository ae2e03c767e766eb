"""Engines and learner take turns on the GPUs that they share. Engines are fakes on a clock that leaps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from buffers import put
from test_supervision import SAMPLING, Actor, Fleet, prompt, row_of, run, running  # noqa: F401 - a fixture

from gvpo_ray.buffer.buffer import GroupBuffer
from gvpo_ray.buffer.states import Owner
from gvpo_ray.buffer.turns import Turns
from gvpo_ray.config.engines import EnginesConfig
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.engines import base
from gvpo_ray.observe.status import EngineState

Run = Callable[..., Any]


class Gpu:
    """A GPU whose memory the learner and the engines never use at the same time."""

    def __init__(self) -> None:
        self.users: set[Any] = set()
        self.most = 0
        self.log: list[str] = []

    def take(self, user: Any) -> None:
        self.users.add(user)
        assert "learner" not in self.users or self.users == {"learner"}, self.users
        self.most = max(self.most, len(self.users))

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        self.take("learner")
        try:
            yield
        finally:
            self.users.remove("learner")


class Sharing(Actor):
    """An engine that takes time to start, to sleep and to wake, and uses the GPU unless it sleeps."""

    def __init__(self, gpu: Gpu, number: int) -> None:
        super().__init__(number, seconds_per_token=1.0, median_tokens=40, sigma=0.0)
        self.gpu, self.number = gpu, number
        self.updates: list[int] = []
        self.never_sleeps = False
        self.fails: str | None = None

    async def start_here(self) -> dict[str, Any]:
        self.gpu.take(self)
        await asyncio.sleep(10)
        return await super().start_here()

    async def sleep(self) -> None:
        if self.never_sleeps:
            self._is_updating = True
            await asyncio.Event().wait()
        if self.fails == "sleep":
            raise RuntimeError("no room for the weights in the host's memory")
        if not self._is_asleep:
            await asyncio.sleep(1)
            self.gpu.users.remove(self)
        await super().sleep()

    async def wake(self) -> None:
        if self.fails == "wake":
            raise RuntimeError("CUDA out of memory")
        if self._is_asleep:
            self.gpu.take(self)
            await asyncio.sleep(1)
        await super().wake()

    async def update(self, version: int, weights: Any, probe: Any = None) -> dict[str, float]:
        assert not self._is_asleep
        await asyncio.sleep(2)
        self.updates.append(version)
        return await super().update(version, weights, probe)

    async def status(self) -> dict[str, Any]:
        return await base.BaseEngine.status(self)


class Shared(Fleet):
    """A fleet on the learner's GPU, and the buffer's part of taking turns."""

    def __init__(self, num: int = 2, **config: Any) -> None:
        self.gpu, self.turns = Gpu(), Turns()
        super().__init__({"num": num, **config}, lambda i: Sharing(self.gpu, i), turns=self)

    async def next_turn(self, turn: int) -> tuple[int, Owner] | None:
        while True:
            asked = self.turns
            answer = asyncio.ensure_future(asked.next(turn))
            while not answer.done() and self.turns is asked:
                await asyncio.sleep(0.1)
            if answer.done():
                return answer.result()
            answer.cancel()  # as the client does when Ray restarts the buffer: it asks again

    async def engines_sleep(self, turn: int) -> None:
        await self.turns.slept(turn)

    def kill(self, handle: Any) -> None:
        self.gpu.users.discard(handle.actor)
        handle.kill()

    async def publishes(self, version: int) -> None:
        self.publish(version)
        await self.turns.give()

    async def trains(self, version: int, seconds: float = 30) -> None:
        await asyncio.wait_for(self.turns.take(), 1000)
        with self.gpu.training():
            await asyncio.sleep(seconds)
        await self.publishes(version)


def test_engines_start_after_the_learner_sleep_while_it_trains_and_wake_with_new_weights(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        fleet = Shared()
        async with running(fleet):
            with fleet.gpu.training():  # the learner loads its model
                await asyncio.sleep(100)
            assert fleet.states() == [EngineState.STARTING] * 2 and not fleet.gpu.users
            await fleet.publishes(0)
            await asyncio.sleep(20)
            assert fleet.states() == [EngineState.RUNNING] * 2 and fleet.gpu.most == 2
            for version in (1, 2, 3):
                await fleet.trains(version)
                await asyncio.sleep(10)
            # a batch that is there already: the turn is taken as soon as it was given
            await fleet.trains(4)
            await fleet.trains(5)
            await asyncio.sleep(10)
            for handle in fleet.handles:
                assert handle.actor.updates[:4] == [0, 1, 2, 3] and handle.actor.updates[-1] == 5
                assert not handle.actor._is_asleep
            assert not fleet.notes and len(fleet.gpu.users) == 2

    run(main())


def test_groups_in_flight_outlive_a_long_turn_of_the_learner_which_is_no_hang(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        fleet = Shared(1, hang_s=50)
        async with running(fleet):
            await fleet.publishes(0)
            await asyncio.sleep(20)
            sampled = asyncio.ensure_future(fleet.group.sample(prompt(), SAMPLING, 0))
            await asyncio.sleep(1)
            await fleet.trains(1, seconds=500)
            row = await row_of(await sampled)
            assert len(row["completion_ids"]) == 2 and len(fleet.handles) == 1 and not fleet.notes
            # awake, its silence is a hang as ever
            fleet.handles[0].actor._seconds_per_token = 1e6
            again = asyncio.ensure_future(fleet.group.sample(prompt(1), SAMPLING, 0))
            await asyncio.sleep(100)
            assert len(fleet.handles) == 2 and "no token for" in fleet.notes[0][2]
            await row_of(await again)

    run(main())


def test_an_engine_that_dies_in_the_learners_turn_starts_again_after_it(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        fleet = Shared()
        async with running(fleet):
            await fleet.publishes(0)
            await asyncio.sleep(20)
            training = asyncio.ensure_future(fleet.trains(1, seconds=200))
            await asyncio.sleep(50)
            fleet.kill(fleet.handles[0])
            await asyncio.sleep(100)
            assert len(fleet.handles) == 3 and fleet.states()[0] is EngineState.STARTING
            await training
            await asyncio.sleep(20)
            assert fleet.states() == [EngineState.RUNNING] * 2
            assert [handle.actor.updates for handle in fleet.handles] == [[0], [0, 1], [1]]

    run(main())


@pytest.mark.parametrize("how", ["dies", "hangs", "is starting"])
def test_the_learner_gets_its_turn_also_if_an_engine_cannot_sleep(run: Run, how: str) -> None:  # noqa: F811
    async def main() -> None:
        fleet = Shared(hang_s=50)
        async with running(fleet):
            await fleet.publishes(0)
            await asyncio.sleep(20)
            odd = fleet.handles[0]
            if how == "is starting":
                fleet.kill(odd)
                await asyncio.sleep(5)
                assert fleet.states()[0] is EngineState.STARTING
            else:
                odd.actor.never_sleeps = True
                real_kill = odd.kill
                odd.kill = lambda: (fleet.gpu.users.discard(odd.actor), real_kill())
            training = asyncio.ensure_future(fleet.trains(1))
            await asyncio.sleep(2)
            if how == "dies":
                odd.kill()
            await asyncio.wait_for(training, 200)
            await asyncio.sleep(30)
            assert fleet.states() == [EngineState.RUNNING] * 2 and len(fleet.handles) == 3
            assert len(fleet.notes) == 1 and all(slot.status["version"] == 1 for slot in fleet.group.slots)

    run(main())


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("sleep", "it cannot sleep: RuntimeError: no room for the weights in the host's memory"),
        ("wake", "it cannot wake: RuntimeError: CUDA out of memory"),
    ],
)
def test_an_engine_that_lives_on_but_cannot_sleep_or_wake_is_replaced_at_once(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    why: str,
) -> None:
    """It would keep memory in the learner's turn, or stand still in its own."""

    async def main() -> None:
        fleet = Shared(hang_s=1000)
        monkeypatch.setattr("ray.kill", lambda handle, no_restart: fleet.kill(handle))
        async with running(fleet):
            await fleet.publishes(0)
            await asyncio.sleep(20)
            fleet.handles[0].actor.fails = what
            await fleet.trains(1)
            await asyncio.sleep(30)
            assert fleet.states() == [EngineState.RUNNING] * 2 and len(fleet.handles) == 3
            assert [(name, text) for _, name, text in fleet.notes] == [("engines-0", f"UpdateFailed: {why}")]
            await fleet.trains(2)
            await asyncio.sleep(10)
            assert fleet.handles[1].actor.updates == [0, 1, 2] and fleet.handles[2].actor.updates == [1, 2]

    run(main())


def test_a_learner_that_dies_in_its_turn_gives_it_back_when_its_successor_has_published(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        fleet = Shared()
        async with running(fleet):
            await fleet.publishes(5)
            await asyncio.sleep(20)
            await fleet.turns.take()
            with fleet.gpu.training():
                await asyncio.sleep(30)
            await asyncio.sleep(100)  # the successor starts
            assert not fleet.gpu.users
            await fleet.turns.give()  # of the checkpoint of step 3: the engines have newer weights
            await asyncio.sleep(10)
            assert len(fleet.gpu.users) == 2 and all(handle.actor.updates == [5] for handle in fleet.handles)

    run(main())


@pytest.mark.parametrize("when", ["engines", "learner", "between"])
def test_a_buffer_that_is_restarted_leaves_the_turn_as_it_is(run: Run, when: str) -> None:  # noqa: F811
    async def main() -> None:
        fleet = Shared()
        async with running(fleet):
            await fleet.publishes(0)
            await asyncio.sleep(20)
            if when == "engines":
                fleet.turns = Turns()
                await asyncio.sleep(10)
                assert len(fleet.gpu.users) == 2
            else:
                taking = asyncio.ensure_future(fleet.turns.take())
                await asyncio.sleep(0 if when == "between" else 10)
                fleet.turns = Turns()
                if when == "between":
                    taking.cancel()
                    await fleet.turns.take()  # the learner's client asks again
                with fleet.gpu.training():
                    await asyncio.sleep(50)
                await fleet.publishes(1)
            await fleet.trains(2)
            await asyncio.sleep(10)
            assert len(fleet.gpu.users) == 2 and all(
                handle.actor.updates[-1] == 2 for handle in fleet.handles
            )

    run(main())


def test_turns_are_numbered_and_an_answer_of_an_older_turn_is_none_of_a_newer(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        turns = Turns()
        ask = asyncio.ensure_future(turns.next(0))
        await asyncio.sleep(1)
        assert not ask.done()  # nobody's turn
        await turns.give()
        first, owner = await ask
        assert owner is Owner.ENGINES
        await turns.give()  # again: the same turn
        one, two = (asyncio.ensure_future(turns.take()) for _ in range(2))  # two ranks of the learner
        second, owner = await turns.next(first)
        assert (owner, second) == (Owner.LEARNER, first + 1)
        await turns.slept(first)
        await asyncio.sleep(1)
        assert not one.done() and not two.done()
        await turns.slept(second)
        await asyncio.gather(one, two)
        waiting = asyncio.ensure_future(turns.next(second))
        third = asyncio.ensure_future(Turns().take())
        await turns.close()
        assert await waiting is None and not third.done()
        third.cancel()

    run(main())


def test_the_buffer_gives_the_learner_its_batch_when_the_engines_sleep(tmp_path: Any) -> None:
    async def main() -> None:
        buffer = GroupBuffer(tmp_path, 1, 3, None, takes_turns=True)
        await buffer.published(0, {}, None)
        turn, owner = await buffer.next_turn(0) or (0, None)
        assert owner is Owner.ENGINES
        asked = asyncio.ensure_future(buffer.batch(1))
        await asyncio.sleep(0.01)
        await put(buffer, 0)
        turn, owner = await buffer.next_turn(turn) or (0, None)
        assert owner is Owner.LEARNER and not asked.done()
        await buffer.engines_sleep(turn)
        batch = await asked
        assert batch is not None and len(batch) == 1
        await buffer.published(1, {}, {})
        assert (await buffer.next_turn(turn) or (0, None))[1] is Owner.ENGINES
        waiting = asyncio.ensure_future(buffer.batch(2))
        await put(buffer, 1)
        await asyncio.sleep(0.01)
        await buffer.close()
        assert await waiting is not None and await buffer.next_turn(0) is None
        buffer.release()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("engines", "share"),
    [
        ({}, 1.0),
        ({"colocated": "sleep", "num_gpus": 0.5}, 0.92),
        ({"colocated": "share", "num_gpus": 0.5, "kv_cache_gib": 4, "memory_fraction": 0.4}, 0.56),
        ({"colocated": "share"}, 0.96),
    ],
)
def test_the_learner_has_the_memory_that_the_engines_leave(engines: dict[str, Any], share: float) -> None:
    assert EnginesConfig.model_validate(engines).memory_of_learner == pytest.approx(share)


@pytest.mark.parametrize(
    ("engines", "error"),
    [
        ({"colocated": "share", "num_gpus": 0.5}, "engines.colocated: share needs engines.kv_cache_gib"),
        (
            {"colocated": "share", "num_gpus": 0.5, "kv_cache_gib": 4, "memory_fraction": 0.96},
            r"engines.memory_fraction \(0.96\) leaves the learner no memory",
        ),
        (
            {"colocated": "sleep", "num_gpus": 1, "weight_transfer": "nccl"},
            "engines.colocated cannot go with weight_transfer: nccl",
        ),
        (
            {"colocated": "share", "num_gpus": 1, "weight_transfer": "sharded_rdt"},
            "engines.colocated cannot go with weight_transfer: sharded_rdt",
        ),
        *(
            (
                {**engines, "num_gpus": 0.5, "weight_transfer": "ipc"},
                "weight_transfer: ipc needs engines on the learner's GPUs: engines.colocated: share",
            )
            for engines in ({}, {"colocated": "sleep"})
        ),
        (
            {"colocated": "share", "kv_cache_gib": 4, "weight_transfer": "ipc"},
            "weight_transfer: ipc needs GPUs in engines.num_gpus",
        ),
        (
            {"colocated": "share", "kv_cache_gib": 4, "weight_transfer": "ipc", "num": 2, "num_gpus": 0.5},
            "weight_transfer: ipc needs one engine per GPU: engines.num_gpus above 0.5, or engines.num: 1",
        ),
    ],
)
def test_what_cannot_share_a_gpu_is_refused(engines: dict[str, Any], error: str) -> None:
    given = {"run_dir": "r", "num_steps": 1, "model": {"path": "m"}, "prompts": {"path": "p.jsonl"}}
    with pytest.raises(ValueError, match=error):
        GVPOConfig.from_dict({**given, "learner": {"num_gpus": 1}, "engines": engines})


@pytest.mark.parametrize(("num", "num_gpus"), [(1, 0.5), (2, 0.51), (8, 0.6)])
def test_one_engine_on_each_of_the_learners_gpus_takes_weights_by_ipc(num: int, num_gpus: float) -> None:
    given = {"run_dir": "r", "num_steps": 1, "model": {"path": "m"}, "prompts": {"path": "p.jsonl"}}
    engines = {"colocated": "share", "kv_cache_gib": 4, "memory_fraction": 0.4, "weight_transfer": "ipc"}
    engines |= {"num": num, "num_gpus": num_gpus}
    GVPOConfig.from_dict({**given, "learner": {"num_gpus": 0.4}, "engines": engines})
