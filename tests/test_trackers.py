"""Trackers get every line of a run once, whatever fails or is resumed: TensorBoard, W&B, MLflow."""

from __future__ import annotations

import importlib.util
import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_ray_metrics import config

from gvpo_ray import GVPOConfig
from gvpo_ray.config.base import ConfigError
from gvpo_ray.observe import trackers as tracking
from gvpo_ray.observe.metrics_log import MetricsLog
from gvpo_ray.observe.trackers import Tracking, check_trackers, parameters_of


class Recorder:
    """A tracker that may be out of reach."""

    def __init__(self, arguments: Any, run_dir: Path, run: str | None, parameters: dict[str, Any]) -> None:
        self.arguments, self.parameters = arguments, parameters
        self.run = run or "run-1"
        self.told: list[tuple[int, int, dict[str, float]]] = []
        self.is_down = False
        self.closed = 0

    def log(self, step: int, at: int, values: dict[str, float]) -> None:
        if self.is_down:
            raise ConnectionError("nobody answers\nat all")
        self.told.append((step, at, values))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Every tracker that is made in place of W&B's."""
    trackers: list[Recorder] = []

    def make(*arguments: Any) -> Recorder:
        trackers.append(Recorder(*arguments))
        return trackers[-1]

    monkeypatch.setattr(tracking, "TRACKERS", tracking.TRACKERS | {"wandb": (make, "json")})
    return trackers


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def a_run(
    run_dir: Path,
    resume_step: int,
    lines: list[tuple[int, dict[str, Any]]],
    say: Callable[[str], None] = print,
    **tracking: Any,
) -> None:
    """One process of a run that is killed or ends after these lines."""
    log = MetricsLog(run_dir / "metrics.jsonl", resume_step)
    to = Tracking(config(run_dir, **tracking), log.lines, say)
    log.on_line = to.line
    for step, values in lines:
        log.write(step, values)
    to.close()


def test_a_resumed_run_goes_on_in_the_same_run_of_the_tracker_and_no_line_comes_twice(
    made: list[Recorder], tmp_path: Path
) -> None:
    run_dir = tmp_path / "math"
    evaluation = {"eval/x/pass@1": 0.5}
    a_run(
        run_dir,
        0,
        [(0, evaluation), (1, {"loss": 1.0}), (2, {"loss": 2.0}), (3, {"loss": 3.0})],
        wandb={"project": "p"},
    )
    # killed before step 3 was evaluated, with a checkpoint of step 1; and again, after fewer steps
    a_run(run_dir, 1, [(2, {"loss": 2.0})], wandb={"project": "p"})
    a_run(
        run_dir,
        1,
        [(2, {"loss": 2.0}), (3, {"loss": 3.0}), (3, evaluation), (4, {"loss": 4.0, "gvpo/beta": None})],
        wandb={"project": "p"},
    )
    assert [[(step, at) for step, at, _ in tracker.told] for tracker in made] == [
        [(0, 1), (1, 2), (2, 4), (3, 6)],
        [],
        [(3, 7), (4, 8)],
    ]
    assert made[2].told == [(3, 7, {"eval/x/pass@1": 0.5}), (4, 8, {"loss": 4.0})]
    assert [tracker.run for tracker in made] == ["run-1"] * 3 and made[0].arguments == {"project": "p"}
    assert [tracker.closed for tracker in made] == [1, 1, 1]


def test_a_tracker_that_fails_warns_once_the_run_goes_on_and_what_was_missed_is_sent_later(
    made: list[Recorder], tmp_path: Path
) -> None:
    said: list[str] = []
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    to = Tracking(config(tmp_path / "math", wandb={}, tensorboard={}), log.lines, said.append)
    log.on_line = to.line
    (tracker,) = made
    log.write(1, {"loss": 1.0})
    until(lambda: len(tracker.told) == 1)
    tracker.is_down = True
    for step in (2, 3):
        log.write(step, {"loss": float(step)})
        until(lambda: bool(said))
    tracker.is_down = False
    log.write(4, {"loss": 4.0})
    until(lambda: len(tracker.told) == 4)
    to.close()
    assert [step for step, _, _ in tracker.told] == [1, 2, 3, 4]
    assert said == [
        "tracking wandb: ConnectionError: nobody answers; the training goes on, and what is missing there "
        "is sent again later"
    ]
    assert [
        step for name, step, _ in tensorboard_of(tmp_path / "math" / "tensorboard") if name == "loss"
    ] == [1, 2, 3, 4]


def test_a_tracker_that_comes_to_a_run_late_gets_its_earlier_lines(
    made: list[Recorder], tmp_path: Path
) -> None:
    a_run(tmp_path / "math", 0, [(1, {"loss": 1.0}), (2, {"loss": 2.0})])
    a_run(tmp_path / "math", 2, [(3, {"loss": 3.0})], wandb={})
    assert [step for step, _, _ in made[0].told] == [1, 2, 3]


def test_a_tracker_that_does_not_start_is_a_bad_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tracking\.tensorboard: TypeError: .*logdirr"):
        Tracking(config(tmp_path / "math", tensorboard={"logdirr": "x"}), [], print)


def test_a_library_that_is_missing_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        check_trackers(config(tmp_path, mlflow={}).tracking)
    assert (
        str(caught.value)
        == "tracking.mlflow: the package mlflow is not installed; pip install -e '.[tracking]' brings it"
    )
    check_trackers(config(tmp_path).tracking)


def test_the_parameters_are_the_resolved_config_without_secrets(tmp_path: Path) -> None:
    data = config(tmp_path, wandb={"project": "p", "notes": "hush"}).model_dump(mode="json")
    reward = {
        "url": "https://me:hush@judge:8000/score?api_key=hush&k=2",
        "arguments": {"api_key": "hush", "depth": 3, "auth": {"bearer": "hush"}},
    }
    data["verifiers"]["rewards"] = {"judge": reward}
    data["engines"]["vllm"] = {"hf_token": "hush", "max_num_seqs": 4}
    parameters = parameters_of(GVPOConfig.from_dict(data))
    assert "hush" not in json.dumps(parameters)
    assert parameters["verifiers.rewards.judge.url"] == "https://…@judge:8000/score?api_key=…&k=2"
    assert (
        parameters["verifiers.rewards.judge.arguments.depth"] == 3
        and parameters["engines.vllm.max_num_seqs"] == 4
    )
    assert (
        parameters["num_steps"] == 3
        and parameters["sampling.max_tokens"] == 256
        and parameters["evaluation.pass_k"].startswith("[1, 2, 4")
    )
    assert {"engines.url_key_variable", "learner.micro_batch_tokens"} <= set(parameters)


# ----------------------------------------------------------------------------------------- trackers, for real

LINES = [
    (0, {"eval/x/pass@1": 0.5}),
    (1, {"loss": 1.0, "gvpo/residual_var": 2.0, "gvpo/residual_var/0": 2.0}),
    (2, {"loss": 0.5}),
]
MORE = [(2, {"loss": 0.5}), (2, {"eval/x/pass@1": 0.75}), (3, {"loss": 0.25})]
"""Of the process that takes the run up from its checkpoint of step 1."""


def two_processes(run_dir: Path, **tracking: Any) -> None:
    a_run(run_dir, 0, LINES, **tracking)
    a_run(run_dir, 1, MORE, **tracking)


def tensorboard_of(folder: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) of every scalar. A record is its length, a checksum, itself, and a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            found += [
                (value.tag, event.step, value.simple_value)
                for value in event.summary.value
                if value.HasField("simple_value")
            ]
    return found


def test_tensorboard_has_every_line_once_in_files_that_are_read_as_one(tmp_path: Path) -> None:
    two_processes(tmp_path / "math", tensorboard={})
    scalars = tensorboard_of(tmp_path / "math" / "tensorboard")
    assert [(step, value) for name, step, value in scalars if name == "loss"] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.25),
    ]
    assert [(step, value) for name, step, value in scalars if name == "eval/x/pass_at_1"] == [
        (0, 0.5),
        (2, 0.75),
    ]
    assert b"learner.num_workers: 1" in b"".join(
        file.read_bytes() for file in (tmp_path / "math" / "tensorboard").iterdir()
    )


def wandb_records(folder: Path) -> Iterator[Any]:
    """Of an offline run's file: seven bytes, then blocks of 32 KiB with records of (checksum, length, whole
    or first to last part, itself).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("run-*.wandb")
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, part = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):
            yield Record.FromString(record)
            record = b""


def test_wandb_offline_has_every_line_once_in_one_run_with_steps_that_grow(tmp_path: Path) -> None:
    import wandb

    two_processes(tmp_path / "math", wandb={"project": "adding", "mode": "offline"})
    # finish() does not wait until W&B's service has closed its file, the end of a process does
    wandb.teardown()
    histories, runs = [], []
    for folder in sorted((tmp_path / "math" / "wandb").glob("offline-run-*")):
        for record in wandb_records(folder):
            if record.HasField("run"):
                runs.append(record.run)
            if record.HasField("history"):
                row = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                histories.append(
                    {name: row[name] for name in row if name in ("_step", "step", "loss", "eval/x/pass@1")}
                )
    assert histories == [
        {"_step": 1, "step": 0, "eval/x/pass@1": 0.5},
        {"_step": 2, "step": 1, "loss": 1.0},
        {"_step": 4, "step": 2, "loss": 0.5},
        {"_step": 5, "step": 2, "eval/x/pass@1": 0.75},
        {"_step": 6, "step": 3, "loss": 0.25},
    ]
    assert (
        len({run.run_id for run in runs}) == 1
        and {run.project for run in runs} == {"adding"}
        and {run.display_name for run in runs} == {"math"}
    )
    parameters = {item.key or ".".join(item.nested_key): item.value_json for item in runs[0].config.update}
    assert parameters["learner.num_workers"] == "1"


def test_mlflow_has_every_line_once_in_one_run_of_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    two_processes(tmp_path / "math", mlflow={"experiment": "adding", "tags": {"who": "me"}})
    client = MlflowClient(f"sqlite:///{tmp_path}/math/mlflow/runs.db")
    experiment = client.get_experiment_by_name("adding")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "math" and run.info.status == "FINISHED" and run.data.tags["who"] == "me"
    assert run.data.params["learner.num_workers"] == "1"
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in losses] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert [metric.value for metric in client.get_metric_history(run.info.run_id, "eval/x/pass_at_1")] == [
        0.5,
        0.75,
    ]
