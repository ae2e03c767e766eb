"""What `gvpo-ray bench chaos` kills by."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from ring import until
from safetensors.torch import save_file
from tiny import make_group, table

from gvpo_ray import GVPOConfig
from gvpo_ray.bench import chaos
from gvpo_ray.buffer.log import GroupLog

RUN = {"run_dir": "r", "num_steps": 1, "model": {"path": "m"}, "prompts": {"path": "p.jsonl"}}


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


def _run(folder: Path, group_ids: list[int], steps: dict[int, tuple[int, int]]) -> chaos.Outcome:
    log = GroupLog(folder / "groups")
    for group_id in group_ids:
        log.append(table(make_group(group_id)))
    for step in steps:
        log.assign(step, *steps[step])
    lines = [json.dumps({"step": step, "loss": 0.0}) for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return chaos.Outcome([], 0, "", folder, 1.0)


PAIRS = {step: (2 * step - 2, 2 * step) for step in range(1, 5)}


@pytest.mark.parametrize(
    ("group_ids", "steps", "wrong"),
    [
        ([1, 0, 2, 4, 3, 5, 7, 6, 8], PAIRS, ""),
        ([0, 1, 2, 3, 4, 5, 6, 8, 9], PAIRS, ""),  # 7 was under way at the end
        ([0, 1, 3, 4, 5, 6, 7, 8, 9], PAIRS, r"begun and have never come: \[2\]"),
        ([0, 1, 2, 2, 3, 4, 5, 6], PAIRS, r"in the log twice: \[2\]"),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], {**PAIRS, 4: (7, 9)}, "not every step has trained its own"),
        ([0, 1, 2, 3, 4, 5, 6, 7], {**PAIRS, 4: (5, 7)}, "not every step has trained its own"),
        ([0, 1, 2, 3, 4, 5], {step: PAIRS[step] for step in (1, 2, 3)}, "metrics.jsonl does not hold"),
    ],
)
def test_chaos_notices_a_group_that_is_lost_left_out_or_trained_twice(
    tmp_path: Path, group_ids: list[int], steps: dict[int, tuple[int, int]], wrong: str
) -> None:
    small = {"num_steps": 4, "groups_per_step": 2, "learner": {"num_mini_batches": 1}}
    config = GVPOConfig.from_dict(RUN | small)
    found = chaos.problems(_run(tmp_path, group_ids, steps), config)
    assert bool(found) is bool(wrong) and re.search(wrong, "\n".join(found))


def test_chaos_says_only_what_it_has_looked_at(tmp_path: Path) -> None:
    small = {"num_steps": 4, "groups_per_step": 2, "learner": {"num_mini_batches": 1}}
    config = GVPOConfig.from_dict(RUN | small)
    outcome = _run(tmp_path, [1, 0, 2, 4, 3, 5, 7, 6, 8], PAIRS)
    outcome.kills = chaos.schedule(2, 4, seed=0)
    assert chaos.problems(outcome, config) == [
        "no process was killed: the run was over before the first of 2 kills"
    ]
    outcome.kills[0].at = 1.0
    assert chaos.problems(outcome, config) == []
    said = chaos.praise(outcome)
    assert said.startswith("after 1 of 2 kills ") and "its own, none was left out, and" in said
    (tmp_path / "quarantine.jsonl").write_text('{"row": 3}\n')  # groups of its are skipped
    assert chaos.problems(outcome, config) == []
    assert "its own, whether others were left out was not checked (1 prompts are quarantined), and" in (
        chaos.praise(outcome)
    )


def test_chaos_kills_what_a_run_has() -> None:
    plain = GVPOConfig.from_dict(RUN)
    assert chaos.kinds_of(plain) == chaos.KINDS
    rewards = {"rewards": {"math": {}, "rm": {"model": "org/rm"}}}
    more = GVPOConfig.from_dict(RUN | {"verifiers": rewards, "loss": {"reference": {"model": "org/teacher"}}})
    assert {*chaos.kinds_of(more)} == {*chaos.KINDS, "reward model", "reference"}
    assert {kill.kind for kill in chaos.schedule(9, 100, 0, chaos.kinds_of(more))} == {*chaos.kinds_of(more)}
    agent = GVPOConfig.from_dict(RUN | {"environment": {"agent": "a.py:f"}, "engines": {"serve": True}})
    assert "environment" in chaos.kinds_of(agent)
