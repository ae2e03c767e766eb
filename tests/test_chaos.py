"""What `gvpo-ray bench chaos` kills by."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from ring import until
from safetensors.torch import save_file

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


def test_what_differs_between_two_checkpoints_is_said_by_tensor(tmp_path: Path) -> None:
    one = {"a": torch.ones(2), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(0.0)}
    save_file(one, tmp_path / "one.safetensors")
    for change, names in (
        ({"b": torch.full((3,), 2.0, dtype=torch.bfloat16)}, ["b"]),
        ({"c": torch.tensor(-0.0), "a": torch.ones(1, 2)}, ["a", "c"]),
        ({"d": torch.ones(1)}, ["d"]),
        ({}, ["no tensor, but the files' headers"]),
    ):
        save_file({**one, **change}, tmp_path / "other.safetensors", metadata={"format": "pt"})
        assert chaos._unequal(tmp_path / "one.safetensors", tmp_path / "other.safetensors") == names
