"""Tracking: what metrics are called on Ray, and what the dashboard asks for; trackers, by their own
libraries.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import struct
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from test_metrics import BATCH

from gvpo_ray import GVPO, GVPOConfig
from gvpo_ray.config.base import ConfigError
from gvpo_ray.learner.objective import AGES
from gvpo_ray.losses.diagnostics import RESIDUAL_EDGES
from gvpo_ray.observe import trackers as tracking
from gvpo_ray.observe.metrics import METRICS, batch_metrics, evaluation_metrics
from gvpo_ray.observe.metrics_log import MetricsLog
from gvpo_ray.observe.ray_metrics import Gauges, of_line, of_status, series_of
from gvpo_ray.observe.trackers import Tracking, check_trackers, parameters_of

DASHBOARD = Path(__file__).parent.parent / "cluster" / "grafana" / "gvpo.json"


def config(run_dir: Path, **tracking: Any) -> GVPOConfig:
    run_dir.mkdir(exist_ok=True)
    data = {
        "run_dir": str(run_dir),
        "num_steps": 3,
        "model": {"path": "models/x"},
        "prompts": {"path": "data/x.jsonl"},
        "tracking": tracking,
    }
    return GVPOConfig.from_dict(data)


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "ours", "labels"),
    [
        ("step", "gvpo_step", {}),
        ("loss", "gvpo_loss", {}),
        ("reward/mean", "gvpo_reward_mean", {}),
        ("gvpo/residual_var", "gvpo_residual_var", {}),
        ("gvpo/residual_var/foreign", "gvpo_residual_var_by_staleness", {"staleness": "foreign"}),
        ("gvpo/residual_histogram/-0.5", "gvpo_residual_histogram_ratio", {"edge": "-0.5"}),
        ("staleness/histogram/inf", "gvpo_staleness_histogram_ratio", {"edge": "inf"}),
        ("groups/size_histogram/8", "gvpo_groups_size_histogram_ratio", {"edge": "8"}),
        ("groups/size_mean", "gvpo_groups_size_mean", {}),
        ("staleness/mean", "gvpo_staleness_mean_steps", {}),
        ("policy/kl_ref", "gvpo_policy_kl_ref_nats", {}),
        ("gvpo/kl_active_share", "gvpo_kl_active_share_ratio", {}),
        ("completions/length_mean", "gvpo_completions_length_mean_tokens", {}),
        ("completions/truncated", "gvpo_completions_truncated_ratio", {}),
        ("unverifiable/timeout", "gvpo_unverifiable_ratio", {"reason": "timeout"}),
        ("sources/offline:a/b", "gvpo_sources_ratio", {"source": "offline:a/b"}),
        ("time/wait_for_groups", "gvpo_time_wait_for_groups_seconds", {}),
        ("tokens/generated_per_s", "gvpo_tokens_generated_per_second", {}),
        ("pools/h100-a/tokens_per_s", "gvpo_pool_tokens_per_second", {"pool": "h100-a"}),
        ("weights/pause_s", "gvpo_weights_pause_seconds", {}),
        ("weights/parity_max", "gvpo_weights_parity_max_nats", {}),
        ("weights/bytes", "gvpo_weights_bytes", {}),
        ("recoveries/engine", "gvpo_recoveries", {"who": "engine"}),
        ("eval/math-500/pass@16", "gvpo_eval_pass_ratio", {"set": "math-500", "k": "16"}),
        ("eval/x/stderr", "gvpo_eval_stderr_ratio", {"set": "x"}),
        ("eval/x/length_mean", "gvpo_eval_length_mean_tokens", {"set": "x"}),
        ("eval/x/num_prompts", "gvpo_eval_num_prompts", {"set": "x"}),
        ("new/thing@2", "gvpo_new_thing_2", {}),  # one that nobody has thought of here
    ],
)
def test_a_metrics_name_on_ray_has_its_unit_and_its_free_part_as_a_label(
    name: str, ours: str, labels: dict[str, str]
) -> None:
    assert series_of(name) == (ours, labels)


def test_no_two_metrics_share_a_series_and_a_name_has_the_same_labels_always() -> None:
    names = {"step", *batch_metrics(BATCH, 7), *evaluation_metrics("a", []), *evaluation_metrics("b", [])}
    names |= {
        "gvpo/residual_var",
        *(f"gvpo/residual_var/{age}" for age in AGES),
        *(f"gvpo/residual_histogram/{edge}" for edge in RESIDUAL_EDGES),
    }
    series = [series_of(name) for name in sorted(names)]
    assert len({json.dumps(entry) for entry in series}) == len(names)
    keys = {(name, *labels) for name, labels in series}
    assert len(keys) == len({name for name, _ in series})
    assert all(re.fullmatch(r"gvpo_[a-z0-9_]+", name) for name, _ in series)


def test_what_is_not_a_number_is_left_out() -> None:
    line = {
        "step": 4,
        "loss": math.nan,
        "reward/std": math.inf,
        "gvpo/beta": None,
        "who": "x",
        "reward/mean": 1,
    }
    assert of_line(line) == [("gvpo_step", {}, 4.0), ("gvpo_reward_mean", {}, 1.0)]


def engine(pool: str, state: str, num_groups: int = 0, version: int | None = None) -> dict[str, Any]:
    return {"pool": pool, "state": state, "num_groups": num_groups, "version": version}


STATUS: dict[str, Any] = {
    "time": 1000.0,
    "num_steps": 9,
    "doing": "training",
    "running": {"engines": 3, "buffer": 0},
    "oldest": {"since": 940.0},
    "verifiers": {"verifier-0": 2, "verifier-1": 0, "verifier-2": 1},
    "recoveries": {"engine": 2},
    "engines": [
        engine("a", "running", 2, 5),
        engine("a", "running", 1, 4),
        engine("a", "dead"),
        engine("b", "wanted"),
    ],
    "buffer": {
        "num_finished": 40,
        "num_waiting": 8,
        "num_running": 3,
        "bound": "open",
        "learner_state": "waits for groups",
        "learner_since": 970.0,
    },
}


def test_each_stages_state_and_queue_by_hand() -> None:
    values = {(name, *labels.values()): value for name, labels, value in of_status(STATUS)}
    expected = {
        ("gvpo_num_steps",): 9,
        ("gvpo_run_state", "training"): 1,
        ("gvpo_run_state", "evaluating"): 0,
        ("gvpo_groups", "engines"): 3,
        ("gvpo_groups", "verifiers"): 0,
        ("gvpo_oldest_group_seconds",): 60,
        ("gvpo_engines", "a", "running"): 2,
        ("gvpo_engines", "a", "dead"): 1,
        ("gvpo_engines", "a", "leaving"): 0,
        ("gvpo_engines", "b", "wanted"): 1,
        ("gvpo_engine_groups", "a"): 3,
        ("gvpo_engine_groups", "b"): 0,
        ("gvpo_engine_version", "a"): 4,
        ("gvpo_verifiers", "busy"): 2,
        ("gvpo_verifiers", "idle"): 1,
        ("gvpo_recoveries", "engine"): 2,
        ("gvpo_buffer_groups", "finished"): 40,
        ("gvpo_buffer_groups", "waiting"): 8,
        ("gvpo_buffer_groups", "running"): 3,
        ("gvpo_staleness_bound_open",): 1,
        ("gvpo_learner_state", "waits for groups"): 1,
        ("gvpo_learner_state", "trains"): 0,
        ("gvpo_learner_state_seconds",): 30,
    }
    assert {key: values[key] for key in expected} == expected
    assert ("gvpo_engine_version", "b") not in values
    assert sum(value for (name, *_), value in values.items() if name == "gvpo_learner_state") == 1


def test_a_buffer_that_does_not_answer_and_a_run_with_nothing_on_its_way_have_series_too() -> None:
    names = {
        name: value
        for name, _, value in of_status(
            STATUS | {"buffer": None, "oldest": None, "engines": [], "verifiers": {}}
        )
    }
    assert names["gvpo_oldest_group_seconds"] == 0 and not any(
        name.startswith(("gvpo_learner", "gvpo_buffer", "gvpo_engine")) for name in names
    )


class FakeGauge:
    values: ClassVar[dict[str, dict[tuple[str, ...], float]]] = {}

    def __init__(self, name: str, tag_keys: tuple[str, ...]) -> None:
        assert name not in self.values  # each once
        self._values, self._keys = self.values.setdefault(name, {}), tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self._keys)
        self._values[tuple(tags[key] for key in self._keys)] = value


def test_gauges_are_set_again_with_every_status_but_not_those_that_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray forgets a gauge after 20 s, and a step may take an hour."""
    monkeypatch.setattr("ray.util.metrics.Gauge", FakeGauge)
    monkeypatch.setattr(FakeGauge, "values", {})
    gauges = Gauges("math")
    gauges.show("training", of_line({"loss": 1.0, "gvpo/residual_var/4": 2.0}))
    for values in FakeGauge.values.values():
        values.clear()
    gauges.show("status", of_status(STATUS))
    assert FakeGauge.values["gvpo_loss"] == {("math",): 1.0}
    assert FakeGauge.values["gvpo_residual_var_by_staleness"] == {("math", "4"): 2.0}
    gauges.show("training", of_line({"loss": 0.5}))
    for values in FakeGauge.values.values():
        values.clear()
    gauges.show("status", of_status(STATUS))
    assert (
        FakeGauge.values["gvpo_loss"] == {("math",): 0.5}
        and not FakeGauge.values["gvpo_residual_var_by_staleness"]
    )


def test_without_a_ray_nothing_breaks() -> None:
    assert not ray.is_initialized()
    Gauges("alone").show("training", of_line({"loss": 1.0}))


# ------------------------------------------------------------------------------------- what a tracker is told


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


# ------------------------------------------------------------------------------- the dashboard and a real run

Samples = dict[str, list[tuple[dict[str, str], float]]]
"""Name -> (labels, value)."""


def scrape() -> Samples:
    """What Prometheus would read of the node now."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        text = answer.read().decode()
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def expressions(node: Any) -> Iterator[str]:
    """Every query in the dashboard: of panels, and of variables."""
    if isinstance(node, dict):
        yield from (
            value
            for key, value in node.items()
            if key in ("expr", "definition", "query") and isinstance(value, str) and "(" in value
        )
        for value in node.values():
            yield from expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from expressions(value)


def fits(labels: dict[str, str], matchers: list[tuple[str, str, str]]) -> bool:
    """Whether a query takes the series: `=~` are the dashboard's variables, which take all that have the
    label.
    """
    return all(
        label in labels and (sign == "=~" or (labels[label] == value) == (sign == "="))
        for label, sign, value in matchers
    )


def missing(samples: Samples) -> set[str]:
    """What the dashboard asks for and the samples do not have: metrics, and labels."""
    absent = set()
    for expression in expressions(json.loads(DASHBOARD.read_text())):
        by = {
            label
            for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression)
            for label in labels.split(", ")
        }
        asked = re.findall(r"\b(ray_\w+)(?:\{([^}]*)\})?", expression)
        assert asked, expression
        for name, matchers in asked:
            wanted = re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', matchers)
            if not any(fits(labels, wanted) for labels, _ in samples.get(name, ())):
                absent.add(f"{name}{{{matchers}}}")
        if not by <= {label for name, _ in asked for labels, _ in samples.get(name, ()) for label in labels}:
            absent.add(f"by {sorted(by)}: {expression}")
    return absent


def test_the_dashboard_has_a_panel_for_each_theme_with_a_unit_and_a_legend() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels:
        assert panel["fieldConfig"]["defaults"]["unit"] and panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"] and all("{{run}}" in target["legendFormat"] for target in panel["targets"])
    titles = " ".join(panel["title"].lower() for panel in panels)
    for theme in (
        "reward",
        "pass@1",
        "loss",
        "residual",
        "kl to the reference",
        "staleness",
        "group size",
        "tokens per second by pool",
        "what the learner waits for",
        "verdicts",
        "limits",
        "weight-update time",
        "restarts",
    ):
        assert theme in titles


def test_the_dashboard_asks_for_registered_metrics_alone_and_its_units_are_theirs() -> None:
    keys = {metric.name for metric in METRICS if " / " not in metric.name}
    keys |= {re.sub(r"\{\w+\}", "1", key) for key in keys} | {"step"}
    series = {series_of(key)[0] for key in keys} | {name for name, _, _ in of_status(STATUS)}
    units = {"seconds": "s", "ratio": "percentunit", "bytes": "bytes"}
    wrong = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            for name in re.findall(r"\bray_(\w+)", target["expr"]):
                ends = units.get(name.rpartition("_")[2], "short")
                # a state is drawn by how long it lasts
                ends = "s" if "_seconds{" in target["expr"] else ends
                if name not in series or panel["fieldConfig"]["defaults"]["unit"] != ends:
                    wrong.append((panel["title"], name, panel["fieldConfig"]["defaults"]["unit"]))
    assert not wrong


def shows_on_ray(algo: GVPO, line: dict[str, float]) -> None:
    """A real run (test_ring.py) shows there every series of the dashboard, and every metric of its lines."""
    last = {**algo.metrics.lines[0], **line}
    # A node's agent is told every 10 s.
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and (
        (absent := missing(samples := scrape()))
        or [value for _, value in samples["ray_gvpo_step"]] != [line["step"]]
    ):
        time.sleep(1)
    assert not absent
    without = missing({name: entries for name, entries in samples.items() if name != "ray_gvpo_loss"})
    assert any(entry.startswith("ray_gvpo_loss{") for entry in without)  # it would be seen
    own = {name: entries for name, entries in samples.items() if name.startswith("ray_gvpo_")}
    assert {labels["run"] for entries in own.values() for labels, _ in entries} == {algo.run_dir.name}
    assert sum(map(len, own.values())) < 250
    shown = {
        (name, *sorted(labels.items())): value for name, entries in own.items() for labels, value in entries
    }
    ray_labels = {label for (name, *labels) in shown for label, _ in labels} - {"run"}
    for name in last:
        ours, labels = series_of(name)
        values = [
            value
            for (shown_name, *pairs), value in shown.items()
            if shown_name == f"ray_{ours}" and labels.items() <= dict(pairs).items()
        ]
        assert values == [pytest.approx(last[name])], (name, ray_labels)
