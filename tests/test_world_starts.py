"""A world that cannot begin costs its own episode alone, and no call is blamed for the end of the forks."""

from __future__ import annotations

import asyncio
import os
import resource
import select
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil  # type: ignore[import-untyped]
import pytest
from clocks import leaping
from episodes import Calculator
from fragile import Fragile, InServer, no_confinement, two_forks
from test_broken_worlds import eventually, gone

from gvpo_ray.data.calls import Call
from gvpo_ray.environments.fork_server import framed
from gvpo_ray.environments.forks import LOOK_AGAIN_S, NUM_CLEARS, BrokenError, Forks, WorldProcess, _Process
from gvpo_ray.environments.host import GONE, Host
from gvpo_ray.environments.python import Python
from gvpo_ray.environments.world import Answer, Limits, Outcome, World
from gvpo_ray.sandbox.scratch import Scratch, _remove


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks(Fragile, {"text": "say"}, Limits())
    folder = made._scratches[-1].folder
    yield made
    made.close()
    assert not folder.exists()


RAISED = "environment: the start of its process raised "


async def add(host: Host, name: str) -> str:
    answer = await host.act(name, 0, 0, {}, [Call("add", {"a": 1})], "")
    assert answer.reason is None
    return answer.messages[0]["content"]


def test_a_fork_that_fails_costs_the_episode_that_it_was_for() -> None:
    async def main() -> None:
        forks = Forks(Fragile, {"text": InServer(two_forks)}, Limits())
        host = Host(forks.world)
        opened = await host.open(0, {"answer": "7"}, 4)
        lost = [one for one in opened if one.reason is not None]
        fine = [one for one in opened if one.reason is None]
        assert [one.reason for one in lost] == [
            RAISED + "BlockingIOError: [Errno 11] Resource temporarily unavailable"
        ] * 2
        os.kill(forks._server.pid, signal.SIGSTOP)
        cancelled = asyncio.ensure_future(forks.world())
        await asyncio.sleep(0.1)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        await asyncio.sleep(0.1)
        os.kill(forks._server.pid, signal.SIGCONT)  # which tells nobody that this fork fails
        (late,) = await host.open(1, {"answer": "7"}, 1)
        assert late.reason == lost[0].reason
        for one in fine:
            assert await add(host, one.name) == "2"
            assert await host.finish(one.name, 0, {}) == (0.5, None, False)
        forks.close()

    asyncio.run(main())


def test_the_end_of_the_fork_server_is_blamed_on_no_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def main() -> None:
        forks = Forks(Fragile, {"text": "say"}, Limits())
        host = Host(forks.world)
        busy, idle, done = await host.open(0, {"answer": "7"}, 3)
        assert await host.finish(done.name, 0, {}) == (0.5, None, False)
        under_way = asyncio.ensure_future(host.act(busy.name, 0, 0, {}, [Call("freeze", {})], ""))
        await asyncio.sleep(0.1)
        forks._server.kill()
        assert await under_way == Answer(reason=GONE)
        assert await host.finish(idle.name, 0, {}) == Outcome(None, GONE)
        (late,) = await host.open(1, {"answer": "7"}, 1)
        died = "environment: the process that worlds are forked from died"
        assert late.reason == died
        forks.close()
        # nor do any begin after it, also where an episode was just about to
        assert [one.reason for one in await host.open(2, {"answer": "7"}, 2)] == [died] * 2
        assert not [*tmp_path.iterdir()]
        forks._scratches.append(Scratch())
        before = {*os.listdir("/proc/self/fd")}
        forks._closing.clear()
        assert [one.reason for one in await host.open(3, {"answer": "7"}, 2)] == [died] * 2
        assert {*os.listdir("/proc/self/fd")} <= before
        forks._scratches.pop().remove()

    asyncio.run(main())


def test_a_folder_that_a_cleaner_has_taken_is_made_anew_and_one_that_cannot_be_costs_its_episode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def main() -> None:
        forks = Forks(Fragile, {"text": "say"}, Limits(), is_confined=True)
        host = Host(forks.world)

        def clean() -> None:
            for path in tmp_path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

        (first,) = await host.open(0, {"answer": "7"}, 1)
        clean()
        (second,) = await host.open(1, {"answer": "7"}, 1)
        clean()
        tmp_path.rmdir()
        (third,) = await host.open(2, {"answer": "7"}, 1)
        assert first.reason is None and second.reason is None
        assert third.reason is not None and third.reason.startswith(RAISED + "FileNotFoundError: ")
        tmp_path.mkdir()
        for one in (first, second):
            assert await add(host, one.name) == "2"
        forks.close()
        assert not [*tmp_path.iterdir()]

    asyncio.run(main())


def test_without_descriptors_for_all_some_episodes_of_a_group_begin(forks: Forks) -> None:
    async def main() -> None:
        host = Host(forks.world)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most, held = max(map(int, os.listdir("/proc/self/fd"))), [os.dup(0)]
        while held[-1] < most:  # so that numbers below it are taken
            held.append(os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1] + 6, hard))
        try:
            opened = await host.open(0, {"answer": "7"}, 10)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in held:
                os.close(descriptor)
        lost = {one.reason for one in opened if one.reason is not None}
        assert lost == {RAISED + "OSError: [Errno 24] Too many open files"}
        fine = [one for one in opened if one.reason is None]
        assert fine and await add(host, fine[-1].name) == "2"
        assert {*host._episodes} == {one.name for one in fine}
        await host.release(0)

    asyncio.run(main())


def test_a_folder_that_cannot_be_removed_holds_up_no_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Path] = []

    def remove(folder: Path) -> bool:
        tries.append(folder)
        return folder not in stay and _remove(folder)

    stay: set[Path] = set()
    monkeypatch.setattr("gvpo_ray.environments.forks._remove", remove)

    async def main() -> None:
        forks = Forks(Fragile, {"text": "say"}, Limits())
        begun = [await forks.world() for _ in range(3)]
        first, second, third = folders = [process.folder for process in forks._living.values()]
        stay.update(folder for folder in (first, third) if folder is not None)
        for world in begun[:2]:
            await world.close()
        await eventually(lambda: second is not None and not second.exists())
        assert tries == [first] * NUM_CLEARS + [second]
        forks.close()  # which tries once, and removes all of them in the end
        assert tries[NUM_CLEARS + 1 :] == [third]
        assert not any(folder is None or folder.exists() for folder in folders)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(16, "seccomp: no"), "OSError: [Errno 16] seccomp: no"),
        (ValueError("not allowed to raise maximum limit"), "ValueError: not allowed to raise maximum limit"),
    ],
)
def test_an_episode_that_cannot_be_confined_says_why(error: Exception, text: str) -> None:
    async def main() -> None:
        made = {"text": InServer(no_confinement, error)}
        forks = Forks(Fragile, made, Limits(), is_confined=True)
        (opened,) = await Host(forks.world).open(0, {"answer": "7"}, 1)
        assert opened.reason == RAISED + text
        forks.close()

    asyncio.run(main())


def test_where_a_host_fails_as_a_group_begins_it_keeps_no_episode_of_it() -> None:
    made: list[Any] = []
    closed: list[Any] = []

    class Noted(World):
        async def close(self) -> None:
            closed.append(self)
            await super().close()

    async def world() -> World:
        if len(made) == 1:
            raise ZeroDivisionError
        made.append(Noted(Calculator, {}, Limits()))
        return made[-1]

    async def main() -> None:
        host = Host(world)
        with pytest.raises(ZeroDivisionError):
            await host.open(0, {}, 2)
        assert closed == made and not host._episodes

    asyncio.run(main())


def test_no_number_of_episodes_at_once_stops_the_host(forks: Forks) -> None:
    async def main() -> None:
        size = forks._control.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
        forks._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # which holds six commands or so
        os.kill(forks._server.pid, signal.SIGSTOP)
        goes_on = [False]

        def go_on() -> None:
            os.kill(forks._server.pid, signal.SIGCONT)
            goes_on[0] = True

        late = threading.Timer(60, go_on)  # for a host that stands still
        late.start()
        beginning = [asyncio.ensure_future(forks.world()) for _ in range(20)]
        await asyncio.sleep(0.5)
        assert not goes_on[0] and not any(one.done() for one in beginning)
        go_on()
        begun = await asyncio.gather(*beginning)
        os.kill(forks._server.pid, signal.SIGSTOP)
        goes_on[0] = False
        for world in begun:
            await world.close()
        assert not goes_on[0]
        go_on()
        late.cancel()
        forks._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        await gone([world.pid for world in begun])

    asyncio.run(main())


@pytest.mark.parametrize(("tool", "size"), [("add", 1), ("smile", 100_000)])  # one packet, and 1.2 MB
def test_an_answer_that_came_while_the_host_stood_still_is_not_late(
    tool: str, size: int, forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gvpo_ray.environments.forks.LOOK_AGAIN_S", 60.0)  # a busy machine reads 1.2 MB

    async def main() -> None:
        world = await forks.world()
        assert await world.open({"answer": "7"}) == ("say 7", None)
        world.limit_s = 0.05
        under_way = asyncio.ensure_future(world.act([Call(tool, {"a": size})], ""))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # it is sent
        assert world._process is not None and world._process.writer is not None
        ends = select.poll()
        ends.register(world._process.writer.get_extra_info("socket").fileno(), select.POLLIN)
        assert ends.poll(60_000)
        time.sleep(0.1)  # longer than the limit
        (message,) = (await under_way).messages
        assert message["content"] == ("2" if tool == "add" else "\N{GRINNING FACE}" * size)
        await world.close()

    asyncio.run(main())


@pytest.mark.parametrize(("num", "is_answered"), [(6, True), (7, False), (40, False)])
def test_frames_that_come_late_are_together_waited_for_no_longer_than_one(
    num: int, is_answered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code of the policy's may send that a call begins, again and again."""

    async def main() -> None:
        ours, theirs = socket.socketpair()
        process = _Process(0, 100)
        await process.connect(ours)
        _, writer = await asyncio.open_connection(sock=theirs)
        world = WorldProcess(cast(Forks, Alone()), process, Limits(timeout_s=1, max_calls=num))
        world.limit_s, now = 100.0, asyncio.get_running_loop().time
        end = now() + 100 + num - 1
        asked = asyncio.ensure_future(world.act([Call("add", {})] * num, ""))

        async def send(at: float, frame: Any) -> None:
            await asyncio.sleep(at - now())
            if not asked.done():
                writer.write(framed(frame))
            for _ in range(9):  # until it is read, or nobody reads it
                await asyncio.sleep(0)

        await send(end - 50, None)
        for i in range(num - 1):
            await send(end - 0.1 + 0.21 * i, None)
        await send(end - 0.1 + 0.21 * (num - 1), Answer())
        if is_answered:
            assert await asked == Answer()
        else:
            with pytest.raises(BrokenError, match="gave no sign of life"):
                await asked
            assert given_up[0] == pytest.approx(end + LOOK_AGAIN_S)
        await world.close()
        writer.close()

    given_up: list[float] = []

    class Alone:
        def is_alive(self) -> bool:
            return True

        def end(self, process: _Process) -> None:
            assert process.writer is not None
            process.writer.close()
            given_up.append(asyncio.get_running_loop().time())

    leaping(monkeypatch)(main())


def test_a_world_that_is_given_up_as_it_begins_leaves_nothing(
    forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        os.kill(forks._server.pid, signal.SIGSTOP)
        cancelled = [asyncio.ensure_future(forks.world()) for _ in range(3)]
        await asyncio.sleep(0.1)
        for one in cancelled:
            one.cancel()
        monkeypatch.setattr("gvpo_ray.environments.forks.START_S", 0.0)
        monkeypatch.setattr("gvpo_ray.environments.forks.LOOK_AGAIN_S", 0.0)
        with pytest.raises(BrokenError, match="gave no sign of life and was killed"):
            await forks.world()
        os.kill(forks._server.pid, signal.SIGCONT)
        assert all(
            isinstance(one, asyncio.CancelledError)
            for one in await asyncio.gather(*cancelled, return_exceptions=True)
        )
        monkeypatch.undo()
        world = await forks.world()  # all before it has been forked and ended
        server, folder = psutil.Process(forks._server.pid), forks._scratches[-1].folder
        await eventually(lambda: [child.pid for child in server.children()] == [world.pid])
        assert world._process is not None
        await eventually(lambda: [*folder.iterdir()] == [world._process.folder])
        await world.close()

    asyncio.run(main())


def test_what_an_episode_keeps_in_temporary_files_goes_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def main() -> None:
        forks = Forks(Python, {}, Limits())
        before = {*tmp_path.iterdir()}
        world = await forks.world()
        assert await world.open({}) == (None, None)
        (message,) = (await world.act([Call("python", {"code": "print(6 * 7)"})], "")).messages
        assert message["content"] == "42\n"
        assert world._process is not None and world._process.folder is not None
        folder = world._process.folder
        assert len([*folder.iterdir()]) == 2  # the sandbox's scratch folder, and its lock
        await world.close()
        await eventually(lambda: not folder.exists())
        assert {*tmp_path.iterdir()} == before
        forks.close()
        assert not [*tmp_path.iterdir()]

    asyncio.run(main())
