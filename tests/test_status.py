"""What `gvpo-ray status` and the watchdog say of a run's stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gvpo_ray.observe.status import EngineState, read_status, status_lines


def status_of(*engines: EngineState, **more: Any) -> dict[str, Any]:
    """The status of a run with engines in these states."""
    of_engines = [
        {
            "name": f"engines-{number}",
            "pool": "engines",
            "state": state,
            "since": 0.0,
            "wants": {"CPU": 1.0},
            "num_groups": 0,
        }
        for number, state in enumerate(engines)
    ]
    nothing = {"buffer": None, "verifiers": {}, "oldest": None, "resources": {}, "recoveries": {}}
    return {"step": 0, "num_steps": 2, "doing": "starts", "engines": of_engines, **nothing, **more}


@pytest.mark.parametrize(
    ("states", "recoveries", "says"),
    [
        (["wanted"], {}, "no engine is running yet"),  # its place is not there, or its process begins
        (["starting", "off"], {}, "no engine is running yet"),
        (["waits for weights"], {"learner": 1}, "no engine is running yet"),
        (["wanted"], {"engine": 1}, "no engine is running: the run waits for the first that comes back"),
        (["dead", "off"], {"engine": 2}, "no engine is running: the run waits for the first that comes back"),
        (["starting", "dead"], {"engine": 1}, "no engine is running yet"),
        (["running", "dead"], {"engine": 1}, None),
        ([], {}, None),
    ],
)
def test_a_run_whose_first_engine_has_not_come_waits_for_none_to_come_back(
    states: list[str], recoveries: dict[str, int], says: str | None
) -> None:
    lines = status_lines(status_of(*map(EngineState, states), recoveries=recoveries))
    assert [line for line in lines if line.startswith("no engine")] == ([says] if says else [])


@pytest.mark.parametrize(
    ("step", "checkpoints", "says"),
    [
        (0, [], "not running; the same command goes on from its first step, for want of a checkpoint."),
        (1, [], "not running; the same command goes on from its first step, for want of a checkpoint."),
        (1, ["step-1"], "not running; the same command goes on from its newest checkpoint."),
        (2, ["step-2"], "complete."),
    ],
)
def test_a_run_that_stopped_says_where_the_same_command_goes_on(
    tmp_path: Path, step: int, checkpoints: list[str], says: str
) -> None:
    (tmp_path / "config.yaml").write_text("run_dir: r\n", encoding="utf-8")
    status = status_of(step=step, time=0.0)
    (tmp_path / "status.json").write_text(json.dumps(status), encoding="utf-8")
    for name in checkpoints:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert read_status(tmp_path)[0].startswith(f"{tmp_path}: {says} What it last said, ")
