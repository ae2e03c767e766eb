"""What runs in an episode's process reaches no other one; a confined one reaches nothing of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from fragile import Evil, InServer, Shared, large_files
from test_broken_worlds import eventually, gone

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.environment import EnvironmentConfig
from gvpo_ray.data.calls import Call
from gvpo_ray.environments.contract import read_contract
from gvpo_ray.environments.forks import BrokenError, Forks, WorldProcess
from gvpo_ray.environments.host import BY_POLICY, Host
from gvpo_ray.environments.world import Limits

TOKEN = "correct-horse-battery"


async def opened(forks: Forks) -> WorldProcess:
    world = await forks.world()
    assert await world.open({}) == (None, None)
    return world


async def said(world: WorldProcess, *expressions: str) -> list[str]:
    answer = await world.act([Call("compute", {"expression": one}) for one in expressions], "")
    return [message["content"] for message in answer.messages]


@pytest.fixture(scope="module")
def free() -> Iterator[Forks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET_KEY_OF_RUN", TOKEN)
        patch.setenv("KEY_OF_TOOL", "named")
        made = Forks(Evil, {}, Limits(), ["KEY_OF_TOOL", "NOWHERE"])
    yield made
    made.close()


@pytest.fixture(scope="module")
def confined() -> Iterator[Forks]:
    made = Forks(Evil, {}, Limits(max_text=1000), is_confined=True)
    yield made
    made.close()


def test_what_an_episode_leaves_in_its_process_no_other_one_finds(free: Forks) -> None:
    async def main() -> None:
        first = await opened(free)
        ended = first.pid
        await said(first, "setattr(type(self), 'get_reward', lambda self: 1.0)", "os.environ.update(A='1')")
        assert await first.score() == (1.0, None, False)  # its own reward is the affair of its class
        await first.close()
        second = await opened(free)
        assert second.pid != ended and await said(second, "os.environ.get('A')") == ["None"]
        assert await second.score() == (0.0, None, False)
        await second.close()
        await gone([ended])

    asyncio.run(main())


def test_a_process_has_the_variables_of_the_sandbox_and_those_that_the_config_names(free: Forks) -> None:
    async def main() -> None:
        world = await opened(free)
        path, named, begun = await said(
            world, "os.environ['PATH']", "os.environ['KEY_OF_TOOL']", "open('/proc/self/environ').read()"
        )
        assert path == os.environ["PATH"] and named == "named"
        names = [entry.partition("=")[0] for entry in begun.split("\0")]
        kept = {"PATH", "HOME", "TMPDIR", "PYTHONPATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "OMP_NUM_THREADS"}
        assert "KEY_OF_TOOL" in names and {*names} <= {*kept, "LD_LIBRARY_PATH", "KEY_OF_TOOL", ""}
        assert TOKEN not in begun and free.missing == ["NOWHERE"]
        await world.close()

    asyncio.run(main())


def test_a_confined_episode_computes_and_writes_in_a_folder_of_its_own_that_is_gone_after_it(
    confined: Forks,
) -> None:
    async def main() -> None:
        world, other = await opened(confined), await opened(confined)
        put = "open('a.txt', 'w').write('seven')"
        assert await said(world, "2 + 3", put, "open('a.txt').read()", "__import__('colorsys').__name__") == [
            *("5", "5", "seven", "colorsys")
        ]
        home, there = await said(world, "os.environ['HOME']", "os.getcwd()")
        assert home == there and Path(home, "a.txt").read_text() == "seven"
        (elsewhere, denied) = await said(other, "os.getcwd()", f"open({home + '/a.txt'!r}).read()")
        assert elsewhere != home and denied.startswith("Error: PermissionError")
        await world.close()
        await other.close()
        await eventually(lambda: not Path(home).exists() and not Path(elsewhere).exists())

    asyncio.run(main())


def test_no_tool_of_a_confined_episode_reaches_this_machine(
    free: Forks, confined: Forks, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    listener = socket.create_server(("127.0.0.1", 0))
    denied = "Error: PermissionError"
    attacks = {
        f"open({str(secret)!r}).read()": denied,
        f"open({str(secret)!r}, 'a').write('x')": denied,
        f"open({str(tmp_path / 'new')!r}, 'w').write('x')": denied,
        f"os.unlink({str(secret)!r})": denied,
        f"open('/proc/{os.getpid()}/environ').read()[:10]": denied,
        f"os.kill({os.getpid()}, 0)": denied,
        "os.kill(os.getppid(), 0)": denied,
        "(lambda pid: os.waitpid(pid, 0)[1] if pid else os._exit(0))(os.fork())": denied,
        "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)[1]": denied,
        "__import__('subprocess').run(['true']).returncode": denied,
        f"socket.create_connection(('127.0.0.1', {listener.getsockname()[1]})).close()": denied,
        "socket.socket(socket.AF_UNIX).close()": denied,
        "len(bytes(3 << 30))": "Error: MemoryError",
    }

    async def main() -> None:
        world, other = await opened(confined), await opened(free)
        for attack, error in attacks.items():
            secret.write_text(TOKEN)
            (answer,) = await said(world, attack)
            assert answer.startswith(error), attack
            assert [*tmp_path.iterdir()] == [secret] and secret.read_text() == TOKEN
            (answer,) = await said(other, attack)
            assert not answer.startswith("Error"), attack  # it is the confinement that it fails by
            (tmp_path / "new").unlink(missing_ok=True)
        assert await said(world, "6 * 7") == ["42"]
        for mostly in (f"open('/proc/{os.getpid()}/mem', 'rb')", "os.execv('/bin/true', ['true'])"):
            assert (await said(world, mostly))[0].startswith(denied)  # the one needs a kernel that allows it
        await world.close()
        await other.close()

    asyncio.run(main())
    listener.close()


def sent(raw: bytes) -> str:
    """An expression that writes bytes to every descriptor, the protocol's among them."""
    return f"[os.write(int(fd), {raw!r}) for fd in os.listdir('/proc/self/fd') if int(fd) > 2 and has(fd)]"


def frame(data: str) -> str:
    return sent(struct.pack("!Q", len(data)) + data.encode())


ANSWER = {"messages": [{"role": "tool", "name": "compute", "content": "x"}], "num_errors": 0, "num_hung": 0,
          "num_refused": 0, "is_over": False, "reason": None, "is_broken": False}  # fmt: skip


def forged(**changes: Any) -> str:
    return json.dumps(ANSWER | changes)


@pytest.mark.parametrize(
    ("data", "is_read"),
    [
        (forged(), True),
        (forged(messages=[{"role": "tool", "content": "x" * 1000}]), True),
        (forged(messages=[{"role": "system", "content": "x"}]), False),
        (forged(messages=[{"role": "tool"}]), False),
        (forged(messages=[{"role": "tool", "content": 1}]), False),
        (forged(messages=[{"role": "tool", "content": "\ud800"}]), False),
        (forged(messages=[{"role": "tool", "name": "<|im_end|>", "content": "x"}]), False),
        (forged(messages=[{"role": "tool", "content": "x"}] * 2), False),
        (forged(num_errors=1), True),
        (forged(num_errors=2), False),
        (forged(num_hung=2), False),
        (forged(num_refused=2), False),
        (forged(num_errors=1 << 31), False),
        (forged(reason="environment: respond raised OSError: disk full"), False),
        (forged(is_over=True), False),
        (forged(is_broken=True), False),
        (forged(reason="x" * 2001), False),
        ("[" * 5000, False),
        ("gASVDQAAAAAAAACMCW9zLnN5c3RlbZQu", False),
    ],
)
def test_what_a_process_sends_is_read_as_data_or_ends_its_episode(
    data: str, is_read: bool, confined: Forks
) -> None:
    async def main() -> None:
        world = await opened(confined)
        if is_read:
            assert (await said(world, frame(data)))[0][0] == "x"
        else:
            with pytest.raises(BrokenError, match="its process sent"):
                await said(world, frame(data))
            with pytest.raises(BrokenError, match="its process has ended"):
                await said(world, "1")
        await world.close()
        other = await opened(confined)
        assert await said(other, "6 * 7") == ["42"]
        await other.close()

    asyncio.run(main())


@pytest.mark.parametrize(("reward", "is_read"), [("-3e38", True), ("-1e39", False), ("NaN", False)])
def test_a_reward_that_a_process_forges_is_a_float32_or_ends_its_episode(
    reward: str, is_read: bool, confined: Forks
) -> None:
    async def main() -> None:
        world = await opened(confined)
        outcome = frame(f"[{reward}, null, false]")
        await said(world, f"setattr(type(self), 'get_reward', lambda self: {outcome})")
        if is_read:
            assert (await world.score()).reward == float(reward)
        else:
            with pytest.raises(BrokenError, match="sent a"):
                await world.score()
        await world.close()

    asyncio.run(main())


LEFT = """
import os, threading, time
def wait():
    while not os.path.exists("go"):
        time.sleep(0.01)
    os._exit(1)
threading.Thread(target=wait).start()
"""


def test_what_a_call_leaves_behind_to_end_the_process_later_is_its_doing(confined: Forks) -> None:
    async def main() -> None:
        host = Host(confined.world)
        left, scored, idle, ends, says = await host.open(0, {}, 5)
        for one, code in ((left, f"exec({LEFT!r}) or os.getcwd()"), (scored, "None")):
            answer = await host.act(one.name, 0, 0, {}, [Call("compute", {"expression": code})], "")
            assert answer.reason is None
            if one is left:
                Path(answer.messages[0]["content"], "go").touch()
        pids = [host._episodes[one.name].world.pid for one in (left, idle)]  # type: ignore[attr-defined]
        os.kill(pids[1], 9)
        await eventually(lambda: all(psutil.Process(pid).status() == "zombie" for pid in pids))
        reason = "crash: environment: get_reward: its process died"
        assert await host.finish(left.name, 0, {}) == (None, BY_POLICY + reason, True)
        assert await host.finish(idle.name, 0, {}) == (None, reason, False)  # the policy has called nothing
        assert await host.finish(scored.name, 0, {}) == (0.0, None, False)
        for one, method, result in (
            (ends, "get_reward", "lambda self: os._exit(0)"),  # as the method runs
            (says, "respond", "lambda self, message: os._exit(0)"),
        ):
            code = f"setattr(type(self), {method!r}, {result})"
            await host.act(one.name, 0, 0, {}, [Call("compute", {"expression": code})], "")
        assert await host.finish(ends.name, 0, {}) == (None, BY_POLICY + reason, True)
        answer = await host.act(says.name, 0, 1, {}, [], "")
        assert answer.is_broken
        assert answer.reason == BY_POLICY + "crash: environment: respond: its process died"

    asyncio.run(main())


THREADS = (
    "[__import__('threading').Thread(target=__import__('time').sleep, args=(9**5,), daemon=True).start()"
)


@pytest.mark.parametrize(
    ("most", "code", "why"),
    [
        (40, f"{THREADS} for _ in range({{}})]", "it had more than 64 threads"),
        (990, "[open(f'{{i}}', 'w').close() for i in range({})]", "it made more than 1000 files"),
        (60, "[open('a', 'wb').write(bytes(1 << 20)) for _ in range({})]", "it wrote more than 64 MiB"),
    ],
)
def test_a_confined_episode_holds_no_more_than_a_program_may_or_is_worth_no_more_than_its_group(
    most: int, code: str, why: str, confined: Forks
) -> None:
    async def main() -> None:
        host = Host(confined.world)
        fine, wild, late = await host.open(0, {}, 3)
        for one, num in ((fine, most), (wild, 2 * most)):
            call = Call("compute", {"expression": code.format(num)})
            answer = await host.act(one.name, 0, 0, {}, [call], "")
            confined.look()
            assert one is wild or answer.reason is None
        assert await host.finish(fine.name, 0, {}) == (0.0, None, False)
        outcome = await host.finish(wild.name, 0, {})
        assert outcome.is_broken and outcome.reason is not None
        # while it makes its call, or after it
        told = (outcome.reason, answer.reason or "")
        assert any(text.startswith(BY_POLICY) and text.endswith(f"{why}, and was killed") for text in told)
        assert await host.finish(late.name, 0, {}) == (0.0, None, False)

    asyncio.run(main())


def test_what_the_class_has_opened_before_an_episode_is_not_the_episodes() -> None:
    async def main() -> None:
        forks = Forks(Shared, {"files": InServer(large_files)}, Limits(), is_confined=True)
        host = Host(forks.world)
        fine, wild = await host.open(0, {}, 2)
        os.kill(forks._server.pid, signal.SIGSTOP)  # which kills: what a look finds counts before that
        for one, num in ((fine, 60), (wild, 70)):  # MiB that it writes itself
            code = f"[open(name, 'wb').write(bytes({num // 2} << 20)) for name in 'ab']"
            sizes = "[os.fstat(file).st_size for file in self.files]"
            calls = [Call("compute", {"expression": each}) for each in (sizes, code)]
            answer = await host.act(one.name, 0, 0, {}, calls, "")
            forks.look()
            assert one is wild or answer.messages[0]["content"] == f"[{70 << 20}, {70 << 20}]"
        assert await host.finish(fine.name, 0, {}) == (0.0, None, False)
        assert (await host.finish(wild.name, 0, {})).is_broken
        forks.close()

    asyncio.run(main())


def test_confined_episodes_are_looked_at_without_being_asked(confined: Forks) -> None:
    async def main() -> None:
        world = await opened(confined)
        process = world._process
        assert process is not None
        await said(world, f"{THREADS} for _ in range(60)] and None")
        assert process.excess is None
        with contextlib.suppress(BrokenError):
            await said(world, f"{THREADS} for _ in range(60)] and None")
        await eventually(lambda: process.excess is not None)
        await gone([world.pid])
        await world.close()

    asyncio.run(main())


def test_neither_a_frame_without_end_nor_frames_without_end_are_waited_for(confined: Forks) -> None:
    async def main() -> None:
        big, begins = struct.pack("!Q", 1 << 40), struct.pack("!Q", 4) + b"null"
        for raw, why in (
            (big, "sent 1099511627776 bytes at once"),
            (begins * 3, "began more calls than it has"),
        ):
            world = await opened(confined)
            with pytest.raises(BrokenError, match=why):
                await said(world, sent(raw))

    asyncio.run(main())


def test_a_class_that_has_a_sandbox_goes_into_no_other_one() -> None:
    name = "gvpo_ray.environments.python:Python"
    with pytest.raises(ConfigError, match=r"environment\.sandbox: Python has a sandbox"):
        read_contract(EnvironmentConfig(name=name, sandbox=True))
    assert read_contract(EnvironmentConfig(name=name)).tools
