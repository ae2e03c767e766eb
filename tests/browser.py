"""A Chromium that opens one page after the other: its start takes longer than most pages do."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-component-update",
    "--disable-background-networking",
    "--remote-debugging-pipe",
]

LIMIT_S = 300.0
"""Seconds within which there must be an answer, or a page."""

BUDGET_MS = 5000
"""Time that passes for a page's timers before it is looked at; while nothing is due, it costs no time."""


class Browser:
    """Chromium, told what to do in its DevTools protocol, over the descriptors 3 and 4."""

    def __init__(self, profile: Path) -> None:
        names = ("chromium", "chromium-browser", "google-chrome")
        program = next(filter(None, map(shutil.which, names)))
        to_it, self._orders = os.pipe()
        self._answers, from_it = os.pipe()
        move = f'exec "$@" 3<&{to_it} 4>&{from_it}'
        self._process = subprocess.Popen(
            ["bash", "-c", move, "bash", program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_it, from_it),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (to_it, from_it):
            os.close(fd)
        self._received, self._number = b"", 0
        self._events: list[dict[str, Any]] = []

    def close(self) -> None:
        self._ask("Browser.close")
        self._process.wait(60)
        for fd in (self._orders, self._answers):
            os.close(fd)

    def _message(self) -> Any:
        while b"\0" not in self._received:
            assert select.select([self._answers], [], [], LIMIT_S)[0], "the browser does not answer"
            data = os.read(self._answers, 1 << 20)
            assert data, "the browser is gone"
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def _ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        order = {"id": self._number, "method": method, "params": parameters}
        os.write(
            self._orders, json.dumps(order | ({"sessionId": session} if session else {})).encode() + b"\0"
        )
        while (message := self._message()).get("id") != self._number:
            self._events.append(message)
        assert "error" not in message, f"{method}: {message['error']}"
        return message["result"]  # type: ignore[no-any-return]

    def _until(self, session: str, method: str) -> None:
        while (session, method) not in [(one.get("sessionId"), one.get("method")) for one in self._events]:
            self._events.append(self._message())

    def open(
        self, url: str, width: int = 1200, height: int = 900, dark: bool = False
    ) -> tuple[str, list[str]]:
        """Open a page in a tab of its own, and close that; return its DOM when its scripts have run, and what
        the console said.
        """
        self._events.clear()
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        try:
            return self._open(target, url, width, height, dark)
        finally:
            self._ask("Target.closeTarget", targetId=target)

    def _open(self, target: str, url: str, width: int, height: int, dark: bool) -> tuple[str, list[str]]:
        session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

        def ask(method: str, **parameters: Any) -> dict[str, Any]:
            return self._ask(method, session, **parameters)

        for domain in ("Page", "Runtime", "Log"):
            ask(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        ask("Emulation.setEmulatedMedia", features=[scheme])
        assert "errorText" not in ask("Page.navigate", url=url)
        is_there = "document.readyState === 'complete' && location.href !== 'about:blank'"
        deadline = time.monotonic() + LIMIT_S
        while not ask("Runtime.evaluate", expression=is_there)["result"]["value"]:
            assert time.monotonic() < deadline, f"{url} is not complete"
            time.sleep(0.02)
        ask("Emulation.setVirtualTimePolicy", policy="pauseIfNetworkFetchesPending", budget=BUDGET_MS)
        self._until(session, "Emulation.virtualTimeBudgetExpired")
        dom: str = ask("Runtime.evaluate", expression="document.documentElement.outerHTML")["result"]["value"]
        own = [event for event in self._events if event.get("sessionId") == session]
        return dom, [text for event in own if (text := _said(event)) is not None]


def _said(event: dict[str, Any]) -> str | None:
    """What an event says in the console; None: nothing."""
    parameters: dict[str, Any] = event.get("params", {})
    said: dict[str, Callable[[], str]] = {
        "Log.entryAdded": lambda: parameters["entry"]["text"],
        "Runtime.consoleAPICalled": lambda: json.dumps(parameters["args"]),
        "Runtime.exceptionThrown": lambda: json.dumps(parameters["exceptionDetails"]),
    }
    return said[event["method"]]() if event.get("method") in said else None
