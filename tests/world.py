"""A world of files, processes and connections in which hostile completions are scored among honest ones.

None may be scored correct, cost a neighbour its reward, or leave a process, a file, a connection or a
descriptor behind.
"""

from __future__ import annotations

import gc
import os
import random
import socket
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
from hostile import GOLD, NUM, RIGHT, WRONG, Kind, Traps

from gvpo_ray import groups
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.verifiers.verifier import Verifier

MATH_LIMITS: dict[str, Any] = {"timeout_s": 20.0, "cpu_s": 1, "memory_gib": 1.0}
CODE_LIMITS: dict[str, Any] = {"timeout_s": 0.3, "cpu_s": 2, "memory_gib": 0.25}


class Scored(NamedTuple):
    completion: str
    reward: float | None
    reason: str | None
    expected: float | None
    """Of an honest neighbour; None: hostile."""


def _group(
    hostile: list[str], right: tuple[str, ...], wrong: tuple[str, ...]
) -> tuple[list[str], list[float | None]]:
    """Honest completions before, between and after the hostile ones, with what they deserve."""
    honest = [(text, 1.0) for text in right] + [(text, 0.0) for text in wrong]
    mixed: list[tuple[str, float | None]] = [(right[0], 1.0)]
    for i, text in enumerate(hostile):
        mixed += [(text, None), honest[i % len(honest)]]
    return [text for text, _ in mixed], [expected for _, expected in mixed]


class _Fleet:
    """Two verifiers, each used from a thread of its own."""

    def __init__(
        self, config: VerifiersConfig, functions: dict[str, Callable[..., Any]] | None = None
    ) -> None:
        self._threads = [ThreadPoolExecutor(1) for _ in range(2)]
        self._verifiers = [thread.submit(Verifier, config, functions) for thread in self._threads]

    def score(
        self, hostile: list[str], right: tuple[str, ...] = RIGHT, wrong: tuple[str, ...] = WRONG
    ) -> list[Scored]:
        """Ten to a group."""
        waiting = []
        for i in range(0, len(hostile), 10):
            completions, expected = _group(hostile[i : i + 10], right, wrong)
            table = groups.table(
                [{"group_id": i, "prompt": "What?", "answer": GOLD, "completions": completions}]
            )
            turn = i // 10 % 2
            waiting.append(
                (
                    completions,
                    self._threads[turn].submit(self._verifiers[turn].result().score, table),
                    expected,
                )
            )
        scored = []
        for completions, future, expected in waiting:
            (row,) = groups.rows(future.result())
            scored += [
                Scored(*each)
                for each in zip(completions, row["rewards"], row["reward_reasons"], expected, strict=True)
            ]
        return scored

    def close(self) -> None:
        for thread, verifier in zip(self._threads, self._verifiers, strict=True):
            thread.submit(verifier.result().close).result()
            thread.shutdown()


def _processes(folder: Path) -> set[int]:
    """Descendants of this process, and whatever ran away from them: it has the folder for temporary files in
    its environment.
    """
    found = {process.pid for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR", "").startswith(str(folder)):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found - {os.getpid()}


class World:
    """A folder for temporary files, a working directory and listeners of our own, and what there is in and of
    them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("temporary", "working", "outside"):
            (root / name).mkdir()
        precious = root / "outside" / "precious"
        precious.write_text("as it was")
        self._tcp, self._udp = (
            socket.create_server(("127.0.0.1", 0)),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        )
        port = self._tcp.getsockname()[1]
        self._udp.bind(("127.0.0.1", port))
        for listener in (self._tcp, self._udp):
            listener.setblocking(False)
        self.traps = Traps(root / "outside" / "canary", precious, port)

    def count(self) -> dict[str, Any]:
        gc.collect()
        return {
            "processes": _processes(self.root / "temporary"),
            "files": sorted(
                (str(path), path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
                for path in self.root.rglob("*")
            ),
            "descriptors": psutil.Process().num_fds(),
            "sockets": sorted((c.family, c.type, c.status) for c in psutil.Process().net_connections("all")),
        }

    def num_visitors(self) -> int:
        """Connections and datagrams that have arrived."""
        num = 0
        try:
            while True:
                self._tcp.accept()[0].close()
                num += 1
        except BlockingIOError:
            pass
        try:
            while True:
                self._udp.recv(1)
                num += 1
        except BlockingIOError:
            return num


class Report(NamedTuple):
    """What there is when a kind has been scored, all verifiers closed."""

    scored: list[Scored]
    before: dict[str, Any]
    after: dict[str, Any]
    num_visitors: int
    most_processes: int


_world: World


def begin(root: Path) -> None:
    global _world
    _world = World(root)
    os.environ["TMPDIR"], tempfile.tempdir = str(root / "temporary"), None
    os.chdir(root / "working")


def call(check: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    check(_world, *arguments)


def report_of(
    world: World,
    kind: Kind,
    config: VerifiersConfig,
    functions: dict[str, Callable[..., Any]] | None = None,
    **honest: Any,
) -> Report:
    hostile = kind(random.Random(kind.__name__), world.traps)
    assert len(hostile) >= NUM
    before = world.count()
    fleet = _Fleet(config, functions)
    try:
        scored = fleet.score(hostile, **honest)
        most = len(_processes(world.root / "temporary") - before["processes"])
    finally:
        fleet.close()
    return Report(scored, before, world.count(), world.num_visitors(), most)


_fleet: _Fleet
_count_without_fleet: dict[str, Any]


def open_fleet(world: World, config: VerifiersConfig) -> None:
    """Start verifiers that serve several kinds: their start takes longer than most kinds do."""
    global _fleet, _count_without_fleet
    _count_without_fleet = world.count()
    _fleet = _Fleet(config)


def report_of_fleet(world: World, kind: Kind) -> Report:
    """Score a kind with the verifiers that are there already; each has a child when things are counted."""
    hostile = kind(random.Random(kind.__name__), world.traps)
    assert len(hostile) >= NUM

    def count() -> dict[str, Any]:
        _fleet.score(list(RIGHT) * 4)  # two groups, one for each verifier
        found = world.count()
        return {**found, "processes": len(found["processes"])}

    before = count()
    scored = _fleet.score(hostile)
    most = len(_processes(world.root / "temporary") - _count_without_fleet["processes"])
    return Report(scored, before, count(), world.num_visitors(), most)


def close_fleet(world: World) -> None:
    """End the verifiers; nothing of them may be left."""
    _fleet.close()
    assert world.count() == _count_without_fleet


def assert_harmless(report: Report) -> None:
    assert [
        each for each in report.scored if each.expected is not None and each.reward != each.expected
    ] == []
    hostile = [each for each in report.scored if each.expected is None]
    assert [
        (each.completion[:200], each.reward, each.reason)
        for each in hostile
        if each.reward not in (0.0, None)
    ] == []
    assert len(hostile) >= NUM
    for what, before in report.before.items():
        assert report.after[what] == before, what
    assert report.num_visitors == 0
    assert report.most_processes <= 4  # a template and a child of each verifier
