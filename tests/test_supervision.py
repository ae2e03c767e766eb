"""The pools of engines on the driver: which group goes where, and what becomes of an engine that fails, hangs
or has to leave. Engines are fakes in this process, on a clock that leaps; there is no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from clocks import leaping
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from gvpo_ray import groups
from gvpo_ray.actors import RunError, cause_of
from gvpo_ray.config.engines import EnginesConfig, SamplingConfig
from gvpo_ray.engines import actor as actor_module
from gvpo_ray.engines import base, dispatcher, fake_engine, slots, supervisor
from gvpo_ray.engines.actor import ActorMethods
from gvpo_ray.engines.fake_engine import FakeEngine
from gvpo_ray.engines.pools import EngineGroup
from gvpo_ray.files import DiskFull
from gvpo_ray.observe.status import EngineState
from gvpo_ray.weights.transfer import WeightMismatch

K = 2
SAMPLING = SamplingConfig(num_completions=K, max_tokens=1000)


class Actor(ActorMethods, FakeEngine):
    """A FakeEngine with an actor's methods, on a node that is named after it."""

    node = "n"

    async def start_here(self) -> dict[str, Any]:
        return {**await self.start(), "node": self.node}


def as_ray_brings_it(error: BaseException) -> BaseException:
    return RayTaskError("method", "Traceback …", error).as_instanceof_cause()


class Handle:
    """A handle of an actor in this process. When it is killed, its calls fail and its objects are lost."""

    def __init__(self, actor: Actor) -> None:
        self.actor, self.dead = actor, asyncio.get_running_loop().create_future()

    def __getattr__(self, name: str) -> Any:
        return _Method(self, name)

    def kill(self) -> None:
        if not self.dead.done():
            self.dead.set_result(None)


class _Method:
    def __init__(self, handle: Handle, name: str) -> None:
        self.handle, self.name = handle, name

    def remote(self, *arguments: Any) -> Any:
        call = asyncio.ensure_future(self._call(arguments))
        if self.name != "sample":
            return call
        call.add_done_callback(lambda call: call.cancelled() or call.exception())
        return _Ref(self.handle, call, 0), _Ref(None, call, 1)

    async def _call(self, arguments: tuple[Any, ...]) -> Any:
        if self.name == "__ray_ready__":
            return None
        arguments = tuple([await each if isinstance(each, _Ref) else each for each in arguments])
        call = asyncio.ensure_future(getattr(self.handle.actor, self.name)(*arguments))
        await asyncio.wait([call, self.handle.dead], return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            call.cancel()
            raise RayActorError()
        try:
            return call.result()
        except Exception as error:
            raise as_ray_brings_it(error) from None


class _Ref:
    """A reference to a return value, lost with the actor's node unless it is small (`handle` None)."""

    def __init__(self, handle: Handle | None, call: asyncio.Future[Any], index: int) -> None:
        self.handle, self.call, self.index = handle, call, index

    def __await__(self) -> Any:
        result = yield from asyncio.shield(self.call).__await__()
        if self.handle is not None and self.handle.dead.done():
            raise ObjectLostError("ab" * 28, None, "")
        return result[self.index]


class Fleet:
    """An EngineGroup with fakes, their handles in the order in which they were made, and what was noted."""

    def __init__(
        self, config: dict[str, Any], make: Callable[[int], Actor] = lambda i: Actor(i), **more: Any
    ):
        self.handles: list[Handle] = []
        num_completions = more.pop("num_completions", K)
        self.notes: list[tuple[str, str, str]] = []
        self.newest = 0
        self.published = asyncio.Event()
        self.is_over = False

        self.given: list[tuple[Any, ...]] = []  # what an engine was made with beside its place in the pool

        def make_one(pool: str, config: Any, number: int, *given: Any) -> Handle:
            self.given.append(given)
            actor = make(len(self.handles))
            actor.node = f"node-{len(self.handles)}"
            self.handles.append(Handle(actor))
            return self.handles[-1]

        self.group = EngineGroup(
            EnginesConfig.model_validate(config),
            num_completions,
            make_one,  # type: ignore[arg-type]
            self.weights,
            more.pop("note", lambda *note: self.notes.append(note)),
            **more,
        )

    async def weights(self, newer_than: int) -> tuple[int, Any] | None:
        while self.newest <= newer_than and not self.is_over:
            await self.published.wait()
        return None if self.is_over else (self.newest, {"probe": None})

    def publish(self, version: int) -> None:
        self.newest = version
        self._wake()

    def end(self) -> None:
        self.is_over = True
        self._wake()

    def _wake(self) -> None:
        before, self.published = self.published, asyncio.Event()
        before.set()

    def states(self) -> list[EngineState]:
        return [slot.state for slot in self.group.slots]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    async def at_once(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(supervisor.asyncio, "to_thread", at_once)
    monkeypatch.setattr(supervisor, "draining_nodes", dict)
    monkeypatch.setattr("ray.kill", lambda handle, no_restart: handle.kill())
    yield leaping(monkeypatch, base, fake_engine, dispatcher, supervisor, slots)


@contextlib.asynccontextmanager
async def running(fleet: Fleet) -> Any:
    """Supervises the fleet; its error is raised at the end."""
    task = asyncio.ensure_future(fleet.group.run())
    try:
        await asyncio.sleep(1)
        yield task
    finally:
        if task.done():
            task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def prompt(group_id: int = 0) -> pa.Table:
    row = {"group_id": group_id, "prompt": "p", "answer": "1", "dataset": "d", "prompt_ids": [1]}
    return groups.table([row])


async def row_of(sampled: Any) -> dict[str, Any]:
    (row,) = groups.rows(groups.from_wire(await sampled))
    return row


# --- engines of several nodes -------------------------------------------------------------------------------

SPREAD = {"num_gpus": 4, "tensor_parallel_size": 4, "vllm": {"distributed_executor_backend": "ray"}}


@pytest.mark.parametrize("pool", [{}, SPREAD], ids=["one node", "several"])
def test_an_engine_of_several_nodes_has_a_placement_group_until_it_dies_leaves_or_is_closed(
    run: Any, monkeypatch: pytest.MonkeyPatch, pool: dict[str, Any]
) -> None:
    asked: list[tuple[Any, str]] = []
    given_back: list[int] = []

    def ask(bundles: Any, strategy: str, name: str) -> int:
        asked.append((bundles, strategy))
        return len(asked) - 1

    monkeypatch.setattr(slots, "placement_group", ask)
    monkeypatch.setattr(slots, "remove_placement_group", given_back.append)

    async def main() -> None:
        fleet = Fleet({"num": 2, "num_cpus": 3, "accelerator_type": "H100", **pool})
        async with running(fleet):
            fleet.publish(1)
            await asyncio.sleep(5)
            assert fleet.states() == [EngineState.RUNNING] * 2 and given_back == []
            fleet.handles[0].kill()
            await asyncio.sleep(60)
            assert fleet.states() == [EngineState.RUNNING] * 2
            assert given_back == ([0] if pool else [])
            fleet.group._supervisor.nodes_leave({"node-1": 0.0})
            await asyncio.sleep(60)
            assert len(fleet.handles) == 4 and given_back == ([0, 1] if pool else [])
            await fleet.group.close()
        assert given_back == ([0, 1, 2, 3] if pool else [])
        gpu = {"GPU": 1.0, "accelerator_type:H100": 0.001}
        bundles = [{"CPU": 3.0, **gpu}, gpu, gpu, gpu]
        assert asked == ([(bundles, "PACK")] * 4 if pool else [])
        assert fleet.given == ([(0,), (1,), (2,), (3,)] if pool else [()] * 4)

    run(main())


def test_a_fixed_fleet_of_such_engines_gives_all_groups_back_when_one_dies_or_cannot_be_placed_or_removed(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config allows them with direct transports alone: no engine is replaced, and the run ends."""
    asked: list[int] = []
    given_back: list[int] = []
    room, broken = 3, 1

    def ask(bundles: Any, strategy: str, name: str) -> int:
        if len(asked) == room:
            raise RuntimeError("no place")
        asked.append(len(asked))
        return asked[-1]

    def give_back(number: int) -> None:
        given_back.append(number)
        if number == broken:
            raise RuntimeError("the head node does not answer")

    monkeypatch.setattr(slots, "placement_group", ask)
    monkeypatch.setattr(slots, "remove_placement_group", give_back)
    config = {"weight_transfer": "nccl", **SPREAD}

    async def main() -> None:
        fleet = Fleet({"num": 3, **config})
        assert asked == [0, 1, 2]  # before any of them starts
        with pytest.raises(BaseExceptionGroup) as died:
            async with running(fleet):
                fleet.publish(1)
                await asyncio.sleep(5)
                assert fleet.states() == [EngineState.RUNNING] * 3
                fleet.handles[0].kill()
                await asyncio.sleep(60)
        assert died.group_contains(RayActorError) and given_back == [] and len(fleet.handles) == 3
        with pytest.raises(RuntimeError, match="head node"):
            await fleet.group.close()
        assert given_back == [0, 1, 2]

    async def without_room() -> None:
        with pytest.raises(RuntimeError, match="no place"):
            Fleet({"num": 3, **config})

    run(main())
    asked.clear(), given_back.clear()
    room, broken = 1, 9
    run(without_room())
    assert asked == given_back == [0]


# --- updates that fail --------------------------------------------------------------------------------------


class Failing(Actor):
    """Its update to `at` and later versions fails with `error`."""

    error: BaseException | None = None
    at = 1

    async def update(self, version: int, weights: Any, probe: Any = None) -> dict[str, float]:
        if self.error is not None and version >= self.at:
            raise self.error
        return await super().update(version, weights, probe)


class Differing(Actor):
    """Its log-probs differ from the learner's by as much as its list says, an update after the other."""

    differences: Sequence[float | None] = ()

    async def update(self, version: int, weights: Any, probe: Any = None) -> dict[str, float]:
        taken = await super().update(version, weights, probe)
        difference = self.differences[version - 1] if version else None
        return taken if difference is None else {**taken, "parity_mean": difference}


@pytest.mark.parametrize(
    "told", [((0.8, 0.01), (0.02, 0.03)), ((0.02, 0.03), (0.8, 0.01)), ((0.8, 0.03), (None, 0.02))]
)
def test_of_engines_that_take_a_version_the_one_furthest_from_the_learner_is_told_of(
    run: Callable[..., Any], told: Any
) -> None:
    async def main() -> None:
        fleet = Fleet({"num": 2, "max_groups": 4}, Differing)
        async with running(fleet):
            for handle, differences in zip(fleet.handles, told, strict=True):
                handle.actor.differences = differences  # type: ignore[attr-defined]
            for version, largest in ((1, 0.8), (2, 0.03)):
                fleet.publish(version)
                await asyncio.sleep(5)
                assert fleet.group.times["parity_mean"] == largest

    run(main())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "1048576 requested and 0 written"),
        RuntimeError("CUDA out of memory"),
        Exception("Call to update_weights method failed: [Errno 28] No space left on device"),  # vLLM's core
    ],
)
def test_an_engine_that_cannot_take_an_update_is_replaced_and_the_others_go_on(
    run: Callable[..., Any], error: Exception
) -> None:
    async def main() -> None:
        fleet = Fleet({"num": 2, "max_groups": 4}, Failing)
        async with running(fleet):
            assert fleet.states() == [EngineState.RUNNING] * 2
            fleet.handles[0].actor.error = error  # type: ignore[attr-defined]
            fleet.publish(1)
            await asyncio.sleep(5)
            assert fleet.states() == [EngineState.RUNNING] * 2 and len(fleet.handles) == 3
            assert [handle.actor.version for handle in fleet.handles] == [0, 1, 1]
        ((who, name, why),) = fleet.notes
        assert (who, name) == ("engine", "engines-0") and "version 1" in why
        assert str(error).splitlines()[0] in why

    run(main())


def test_weights_that_no_engine_can_take_stop_the_run_after_a_few_and_wrong_ones_at_once(
    run: Callable[..., Any],
) -> None:
    async def main(error: Exception, num_made: int) -> None:
        def make(number: int) -> Actor:
            actor = Failing(number)
            actor.error = error
            return actor

        fleet = Fleet({"num": 1}, make)
        with pytest.raises(ExceptionGroup) as raised:
            async with running(fleet):
                fleet.publish(1)
                await asyncio.sleep(600)
        assert cause_of(raised.value).endswith(f"{type(error).__name__}: {error}")
        assert len(fleet.handles) == num_made

    run(main(RuntimeError("no such layer"), supervisor.MAX_FAILURES))
    run(main(OSError(errno.EIO, "no answer"), supervisor.MAX_FAILURES))
    run(main(DiskFull(errno.ENOSPC, "no room for /tmp on the file system at / (0 of 9 MiB are free)"), 1))
    run(main(WeightMismatch("version 1: they differ"), 1))
    run(main(ValueError("a mistake of the code"), 1))


def test_a_full_disk_of_one_node_costs_its_engine_and_that_of_all_nodes_ends_the_run_with_its_name(
    run: Callable[..., Any],
) -> None:
    full = DiskFull(errno.ENOSPC, "no room for /tmp/w on the file system at /tmp (0 of 9 MiB are free)")

    async def main(num_full: int) -> None:
        def make(number: int) -> Actor:
            actor = Failing(number)
            actor.error = full if number < num_full else None
            return actor

        fleet = Fleet({"num": 2}, make)
        async with running(fleet):
            fleet.publish(1)
            await asyncio.sleep(10)
            assert fleet.states() == [EngineState.RUNNING] * 2

    run(main(1))
    with pytest.raises(ExceptionGroup) as raised:
        run(main(99))
    assert cause_of(raised.value) == f"UpdateFailed: version 1: DiskFull: {full}"


def test_an_engine_names_the_file_system_that_has_no_room_for_new_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def update(*_: Any) -> dict[str, float]:
        raise OSError("1048576 requested and 4096 written")  # as numpy says it

    monkeypatch.setattr(actor_module.Engine, "update", update)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = object.__new__(actor_module._EngineActor)
    with pytest.raises(DiskFull, match=f"no room for {tmp_path} on the file system at .*same command again"):
        asyncio.run(engine.update(1, {}))


@pytest.mark.parametrize("num", [2, 5])
def test_engines_that_cannot_take_a_version_end_the_run_only_if_all_others_cannot_either(
    run: Callable[..., Any], num: int
) -> None:
    """However large the fleet is, and whichever engine is first: the last one takes the weights late."""
    error = RuntimeError("no such layer")

    async def main(one_can: bool) -> None:
        class Late(Failing):
            async def update(self, version: int, weights: Any, probe: Any = None) -> dict[str, float]:
                if version:
                    await asyncio.sleep(100)
                return await super().update(version, weights, probe)

        def make(number: int) -> Actor:
            is_last = number == num - 1
            actor = (Late if is_last else Failing)(number)
            actor.error = None if is_last and one_can else error
            return actor

        fleet = Fleet({"num": num, "max_restarts_per_hour": 1000}, make)
        async with running(fleet):
            fleet.publish(1)
            await asyncio.sleep(90)
            # each of the others has failed more often than a single engine may
            assert len(fleet.notes) > (num - 1) * supervisor.MAX_FAILURES
            await asyncio.sleep(300)
            assert one_can and fleet.states()[-1] == EngineState.RUNNING

    run(main(one_can=True))
    with pytest.raises(ExceptionGroup) as raised:
        run(main(one_can=False))
    assert cause_of(raised.value) == "UpdateFailed: version 1: RuntimeError: no such layer"


# --- engines that die at their work, or do not start --------------------------------------------------------


class EngineDeadError(Exception):
    """Named as vLLM's."""


class Dying(Actor):
    """Its core dies at each prompt, until `lives` is set."""

    lives = False

    async def generate(self, group: pa.Table, *arguments: Any) -> tuple[pa.Table, int]:
        if self.lives:
            return await super().generate(group, *arguments)
        error = EngineDeadError("see above")
        error.add_note("ValueError: a token that is not in the vocabulary")
        raise error


@pytest.mark.parametrize("num", [1, 3])
def test_engines_that_all_die_at_every_prompt_end_the_run_with_the_cause(
    run: Callable[..., Any], num: int
) -> None:
    async def main() -> None:
        fleet = Fleet({"num": num}, Dying)
        with pytest.raises(ExceptionGroup) as raised:
            async with running(fleet) as task:
                asking = [asyncio.ensure_future(fleet.group.sample(prompt(i), SAMPLING, 0)) for i in range(8)]
                await asyncio.wait([task], timeout=3600)
        for each in asking:
            each.cancel()
        assert cause_of(raised.value) == (
            "vLLM's core process died: ValueError: a token that is not in the vocabulary"
        )
        assert len(fleet.notes) <= num * supervisor.MAX_FAILURES

    run(main())


def test_an_engine_that_dies_at_its_prompts_ends_nothing_while_another_returns_groups(
    run: Callable[..., Any],
) -> None:
    async def main() -> None:
        def make(number: int) -> Actor:
            actor = Dying(number)
            actor.lives = number == 1
            return actor

        fleet = Fleet({"num": 2, "max_groups": 1, "max_restarts_per_hour": 1000}, make)
        async with running(fleet):
            for i in range(40):
                row = await row_of(await fleet.group.sample(prompt(i), SAMPLING, 0))
                assert len(row["completions"]) == K
                await asyncio.sleep(10)
            assert len(fleet.notes) > 3 * supervisor.MAX_FAILURES

    run(main())


def test_processes_that_are_lost_end_nothing_before_the_restarts_of_an_hour_are_used_up(
    run: Callable[..., Any],
) -> None:
    async def main() -> None:
        fleet = Fleet({"num": 1, "max_restarts_per_hour": 5}, lambda i: Actor(i, seconds_per_token=1e6))
        with pytest.raises(ExceptionGroup) as raised:
            async with running(fleet) as task:
                group = asyncio.ensure_future(fleet.group.sample(prompt(), SAMPLING, 0))
                while not task.done():
                    fleet.handles[-1].kill()
                    await asyncio.sleep(100)
        group.cancel()
        assert "died 6 times within an hour" in cause_of(raised.value) and len(fleet.handles) == 6

    run(main())


class Slow(Actor):
    """Its start takes `seconds`, and fails then if there is an `error`."""

    seconds, error = 0.0, None

    async def start(self) -> dict[str, Any]:
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return await super().start()


def test_a_start_that_does_not_end_is_a_hang_that_names_its_key(run: Callable[..., Any]) -> None:
    async def main() -> None:
        def make(number: int) -> Actor:
            actor = Slow(number)
            actor.seconds = 1e9 if number == 0 else 100.0
            return actor

        fleet = Fleet({"num": 1, "start_s": 200}, make)
        async with running(fleet):
            await asyncio.sleep(198)
            assert not fleet.notes and fleet.states() == [EngineState.STARTING]
            await asyncio.sleep(120)
            assert fleet.notes == [
                ("engine", "engines-0", "Hang: not started within 200 s (engines.start_s)")
            ]
            assert fleet.states() == [EngineState.RUNNING]

    run(main())


async def ended_by(error: Exception) -> tuple[Fleet, str]:
    """A fleet of one engine that cannot start, and the cause that it ended with."""

    def make(number: int) -> Actor:
        actor = Slow(number)
        actor.error = error
        return actor

    fleet = Fleet({"num": 1}, make)
    with pytest.raises(ExceptionGroup) as raised:
        async with running(fleet) as task:
            await asyncio.wait([task], timeout=600)
    return fleet, cause_of(raised.value)


def test_a_timeout_inside_an_engine_is_said_as_its_own_and_not_as_silence(run: Callable[..., Any]) -> None:
    async def main() -> None:
        _, why = await ended_by(TimeoutError("the weights' folder does not answer"))
        assert why == "TimeoutError: the weights' folder does not answer"

    run(main())


def test_one_engine_that_cannot_start_ends_nothing_while_the_others_still_load(
    run: Callable[..., Any],
) -> None:
    async def main() -> None:
        def make(number: int) -> Actor:
            actor = Slow(number)
            if number == 1:
                actor.seconds = 120.0  # the others' attempts are over before
            else:
                actor.error = RuntimeError("no such device")
            return actor

        fleet = Fleet({"num": 2}, make)
        async with running(fleet):
            await asyncio.sleep(100)
            assert len(fleet.notes) > supervisor.MAX_FAILURES
            await asyncio.sleep(100)
            assert fleet.states()[1] == EngineState.RUNNING

    run(main())


@pytest.mark.parametrize(("error", "num_tries"), [(ValueError, 1), (RuntimeError, supervisor.MAX_FAILURES)])
def test_an_engine_that_cannot_start_ends_the_run_at_once_or_after_a_few_tries(
    run: Callable[..., Any], error: type[Exception], num_tries: int
) -> None:
    async def main() -> None:
        fleet, why = await ended_by(error("no such model: tiny"))
        assert why == f"{error.__name__}: no such model: tiny" and len(fleet.handles) == num_tries
        assert fleet.notes == [("engine", "engines-0", why)] * (num_tries if num_tries > 1 else 0)

    run(main())


# --- engines that have to leave -----------------------------------------------------------------------------


@pytest.mark.components
def test_a_thousand_engines_hear_of_their_nodes_notice_within_two_seconds(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, float] = {}

    class Told(Actor):
        async def drain(self, seconds: float) -> None:
            told[self.node] = asyncio.get_running_loop().time()
            await super().drain(seconds)

    async def main() -> None:
        fleet = Fleet({"num": 1000}, Told)
        async with running(fleet):
            await asyncio.sleep(4.3)  # in the midst of everything
            assert fleet.states() == [EngineState.RUNNING] * 1000
            at = asyncio.get_running_loop().time()
            going = {handle.actor.node: at + 20 for handle in fleet.handles[:1000]}
            monkeypatch.setattr(supervisor, "draining_nodes", lambda: going)
            await asyncio.sleep(2)
            assert set(told) == set(going) and max(told.values()) - at <= supervisor.NODE_CHECK_S

    run(main())


def test_an_engine_that_refuses_a_group_because_it_leaves_is_drained_at_once(
    run: Callable[..., Any],
) -> None:
    async def main() -> None:
        fleet = Fleet({"num": 2, "max_groups": 1, "scale_window_s": 1000})
        async with running(fleet):
            fleet.handles[0].actor._is_draining = True  # SIGTERM
            fleet.group.slots[1].load = 1
            row = await row_of(await fleet.group.sample(prompt(), SAMPLING, 0))
            assert len(row["completions"]) == K
            fleet.group.slots[1].load = 0
            await asyncio.sleep(3)
            assert fleet.notes == [("engine", "engines-0", "left: node node-0 is about to go")]
            assert fleet.states() == [EngineState.RUNNING] * 2 and len(fleet.handles) == 3

    run(main())


def test_a_drain_that_does_not_end_is_a_hang_and_its_groups_go_on_elsewhere(run: Callable[..., Any]) -> None:
    class Stuck(Actor):
        async def drain(self, seconds: float) -> None:
            await asyncio.Event().wait()

    async def main() -> None:
        def make(number: int) -> Actor:
            return (Stuck if number == 0 else Actor)(number, seconds_per_token=10.0 if number == 0 else 0.0)

        fleet = Fleet({"num": 1, "drain_s": 30, "hang_s": 100}, make)
        async with running(fleet):
            group = asyncio.ensure_future(fleet.group.sample(prompt(), SAMPLING, 0))
            await asyncio.sleep(1)
            fleet.group.slots[0].leaves.set()
            await asyncio.sleep(129)
            assert not fleet.notes and fleet.states() == [EngineState.LEAVING]
            await asyncio.sleep(3)
            assert fleet.notes == [("engine", "engines-0", "Hang: not drained within 130 s")]
            assert len((await row_of(await group))["completions"]) == K

    run(main())


def test_an_update_that_does_not_end_is_a_hang_also_of_an_idle_engine(
    run: Callable[..., Any],
) -> None:
    class Stuck(Failing):
        async def update(self, version: int, weights: Any, probe: Any = None) -> dict[str, float]:
            if self.error is not None:
                self._is_updating = True
                await asyncio.Event().wait()
            return await super().update(version, weights, probe)

        async def status(self) -> dict[str, Any]:
            return await base.BaseEngine.status(self)

    async def main() -> None:
        fleet = Fleet({"num": 1, "hang_s": 50}, Stuck)
        async with running(fleet):
            fleet.handles[0].actor.error = OSError()  # type: ignore[attr-defined]
            fleet.publish(1)
            await asyncio.sleep(60)
            ((_, _, why),) = fleet.notes
            assert why.startswith("Hang: new weights are not in place after 5")
            assert fleet.states() == [EngineState.RUNNING] and fleet.handles[1].actor.version == 1

    run(main())


# --- what survives ------------------------------------------------------------------------------------------


def test_finished_siblings_survive_the_node_that_wrote_them(run: Callable[..., Any]) -> None:
    async def main() -> None:
        fleet = Fleet({"num": 1}, lambda i: Actor(i, seconds_per_token=0.01, median_tokens=400, sigma=0.0))
        sampling = SamplingConfig(num_completions=K, max_tokens=400)
        begun = groups.with_columns(
            prompt(7),
            completions=[["x"]],
            completion_ids=[[[3] * 300]],
            finish_reasons=[["abort"]],
            sources=[["policy"]],
            version_min=[[0]],
            version_max=[[0]],
            sampling_logprobs=[[[-1.0] * 300]],
        )
        async with running(fleet):
            sample = functools.partial(fleet.group.sample, sampling=sampling, min_version=0)
            work = asyncio.ensure_future(sample(prompt(7), kept=(groups.to_wire(begun),)))
            other = asyncio.ensure_future(sample(prompt(8)))
            await asyncio.sleep(3.5)  # one has taken a little more than a second, and was handed over
            kept = fleet.group.slots[0].in_flight[7].kept
            assert len(kept) == 2 and all(isinstance(part, pa.Buffer) for part in kept)
            ((finished,),) = groups.from_wire(kept[1])["completion_ids"].to_pylist()
            assert finished[:300] == [3] * 300 and len(finished) > 300
            fleet.handles[0].kill()
            row = await row_of(await work)
            assert finished in row["completion_ids"] and len(row["completion_ids"]) == K
            assert len((await row_of(await other))["completion_ids"]) == K
            assert fleet.notes == [("engine", "engines-0", "its process or its node died")]

    run(main())


def test_what_a_drained_engine_returned_waits_for_the_next_one_at_the_driver(
    run: Callable[..., Any],
) -> None:
    async def main() -> None:
        fleet = Fleet(
            {"num": 1, "drain_s": 1, "max_groups": 1},
            lambda i: Actor(i, seconds_per_token=0.01, median_tokens=800, sigma=0.0),
        )
        async with running(fleet):
            work = asyncio.ensure_future(fleet.group.sample(prompt(), SAMPLING, 0))
            await asyncio.sleep(1)
            fleet.group.slots[0].leaves.set()
            await asyncio.sleep(1.5)  # the node goes: whatever is in its store is lost
            assert fleet.handles[0].dead.done() and len(fleet.handles) == 2
            row = await row_of(await work)
            # 2 s of tokens were there, and only the rest was sampled
            assert fleet.group.slots[0].num_tokens == sum(map(len, row["completion_ids"]))

    run(main())


# --- restarts -----------------------------------------------------------------------------------------------


def test_each_engine_has_its_own_back_off_and_its_own_restarts_of_an_hour(run: Callable[..., Any]) -> None:
    async def main() -> None:
        fleet = Fleet({"num": 2, "max_restarts_per_hour": 5})
        first, second = fleet.group.slots
        async with running(fleet):
            for _ in range(6):
                first.engine.kill()
                await asyncio.sleep(61)
            assert first.state == EngineState.DEAD and second.state == EngineState.RUNNING
            assert len(fleet.handles) == 2 + 5
            second.engine.kill()  # its first death
            await asyncio.sleep(1.1)
            assert second.state == EngineState.RUNNING and len(fleet.handles) == 2 + 6
            await asyncio.sleep(3600)
            assert first.state == EngineState.RUNNING  # the hour is over

    run(main())


def test_a_run_stops_when_the_restarts_of_all_its_engines_are_used_up(run: Callable[..., Any]) -> None:
    async def main() -> None:
        fleet = Fleet({"num": 2, "max_restarts_per_hour": 1})
        with pytest.raises(ExceptionGroup) as raised:
            async with running(fleet) as task:
                for slot in (0, 0, 1):
                    fleet.group.slots[slot].engine.kill()
                    await asyncio.sleep(10)
                assert not task.done()
                fleet.group.slots[1].engine.kill()
                await asyncio.sleep(10)
        error = raised.value
        while isinstance(error, BaseExceptionGroup):
            (error,) = error.exceptions
        assert isinstance(error, RunError) and str(error).endswith(
            "died 2 times within an hour (max_restarts_per_hour: 1), last: its process or its node died"
        )

    run(main())


# --- errors beside ------------------------------------------------------------------------------------------


def test_what_scales_the_pools_says_an_error_that_may_pass_and_goes_on(run: Callable[..., Any]) -> None:
    async def main() -> None:
        failures = 3

        async def waits() -> dict[str, float]:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise OSError(errno.ESTALE, "Stale file handle")
            return {"learner": asyncio.get_running_loop().time(), "bound": 0.0, "driver": 0.0}

        fleet = Fleet({"num": 1, "max_num": 2, "scale_window_s": 5}, waits=waits)
        async with running(fleet):
            await asyncio.sleep(100)
        said = [note for note in fleet.notes if note[1] == "autoscaling"]
        assert len(said) == 3 and all("Stale file handle" in why for *_, why in said)
        assert any("grows to 2 engines" in why for *_, why in fleet.notes)

    run(main())


def test_a_mistake_in_what_reads_the_notices_ends_the_run_with_its_cause(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def notices() -> None:
        with pytest.raises(ExceptionGroup) as raised:
            async with running(Fleet({"num": 1})):
                monkeypatch.setattr(supervisor, "draining_nodes", lambda: {}["x"])
                await asyncio.sleep(100)
        assert cause_of(raised.value) == "KeyError: 'x'"

    run(notices())


def test_the_run_ends_with_the_weights(run: Callable[..., Any]) -> None:
    async def main() -> None:
        fleet = Fleet({"num": 2, "pools": {"own": {}, "teacher": {"url": "http://t/v1"}}})
        async with running(fleet) as task:
            fleet.end()
            await asyncio.sleep(1)
            assert task.done()

    run(main())


# --- which group goes where ---------------------------------------------------------------------------------


def mixed() -> tuple[EngineGroup, Any, Any]:
    pools = {"own": {"num": 1, "max_groups": 1}, "teacher": {"url": "http://t/v1", "max_groups": 100}}
    config = EnginesConfig.model_validate({"pools": pools})
    group = EngineGroup(config, K, lambda *_: None, None, lambda *_: None)
    for slot in group.slots:
        slot.state = EngineState.RUNNING
    return group, *group.slots


def test_groups_that_only_our_own_engines_may_take_hold_up_nobody_at_an_idle_server(
    run: Callable[..., Any],
) -> None:
    async def main() -> None:
        group, own, teacher = mixed()
        own.load = K
        slot = group._dispatcher._slot
        ours = [asyncio.ensure_future(slot(K, 1, True)) for _ in range(200)]
        new = [asyncio.ensure_future(slot(K, 2, False)) for _ in range(5)]
        await asyncio.sleep(0)
        assert [future.result() for future in new] == [teacher] * 5 and teacher.load == 5 * K
        assert not any(future.done() for future in ours)
        assert group.num_free() == 95 and group.max_groups == 101
        own.load = 0
        group._dispatcher.changed()
        await asyncio.sleep(0)
        assert [future.done() for future in ours] == [True] + [False] * 199 and ours[0].result() is own
        for future in ours:
            future.cancel()

    run(main())


def test_groups_are_served_by_priority_and_then_in_order_and_cancelled_ones_take_no_room(
    run: Callable[..., Any],
) -> None:
    async def main() -> None:
        group, own, teacher = mixed()
        teacher.state, own.load = EngineState.DEAD, K
        slot = group._dispatcher._slot
        waiting = {
            name: asyncio.ensure_future(slot(K, priority, ours))
            for name, priority, ours in (
                ("new", 2, False),
                ("gone", 1, True),
                ("evaluation", 1, True),
                ("again", 1, False),
            )
        }
        await asyncio.sleep(0)
        waiting["gone"].cancel()
        order = []
        for _ in range(3):
            own.load = 0
            group._dispatcher.changed()
            await asyncio.sleep(0)
            order += [name for name, future in waiting.items() if future.done() and name not in order]
        assert order == ["gone", "evaluation", "again", "new"] and group.num_free() == 0

    run(main())
