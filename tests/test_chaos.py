"""What `gvpo-ray bench chaos` kills by."""

from __future__ import annotations

import os
import signal
import subprocess

import psutil
import pytest
from ring import until

from gvpo_ray.bench import chaos


def test_the_killer_finds_processes_while_the_clock_is_adjusted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**9, 0, -1))
    # each process seems to be older than the one asked before it
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: float(next(clock)))
    parent = subprocess.Popen(["sh", "-c", "sleep 4711 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    try:
        until(lambda: chaos.descendants(os.getpid(), "sleep 4711") == [pid])  # it is sh for a moment
        assert chaos.descendants(parent.pid, "sleep") == [pid] and chaos.descendants(pid, "sleep") == []
    finally:
        os.kill(pid, signal.SIGKILL)
        parent.wait()
