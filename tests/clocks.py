"""A clock that leaps: how long what takes is exact on any machine, and nobody waits."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

Run = Callable[[Coroutine[Any, Any, Any]], Any]


def leaping(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> Run:
    """Returns a function that runs a coroutine on a clock that stands still while anyone has work to do and
    then leaps to the next moment for which something is planned. `modules` see the same clock as `time`.
    """
    now = 1000.0
    for module in modules:
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: now, monotonic=lambda: now))

    class Selector(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> Any:
            nonlocal now
            assert timeout is not None, "everyone waits, and nothing is planned"
            now += timeout
            return super().select(0.0)

    def loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.SelectorEventLoop(Selector())
        monkeypatch.setattr(loop, "time", lambda: now)
        return loop

    def run(main: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=loop) as runner:
            return runner.run(main)

    return run
