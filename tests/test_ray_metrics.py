"""Tracking: what metrics are called on Ray, and what the dashboard asks for; trackers, by their own
libraries.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray.job_submission import JobInfo, JobSubmissionClient
from test_metrics import BATCH

from gvpo_ray import GVPO, GVPOConfig
from gvpo_ray.learner.objective import AGES
from gvpo_ray.losses.diagnostics import RESIDUAL_EDGES
from gvpo_ray.observe.metrics import METRICS, batch_metrics, evaluation_metrics
from gvpo_ray.observe.ray_metrics import Gauges, of_line, of_status, series_of

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
        ("gvpo/residual_var/external", "gvpo_residual_var_by_staleness", {"staleness": "external"}),
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


def test_ray_still_has_no_place_for_a_jobs_progress_on_the_jobs_page() -> None:
    """docs/guides/watching.md says so: when this fails, the job's page may show step and reward."""
    asked = {name for name in dir(JobSubmissionClient) if not name.startswith("_")}
    assert asked == {
        *("submit_job", "stop_job", "delete_job", "list_jobs", "get_job_info", "get_job_status"),
        *("get_job_logs", "tail_job_logs", "get_address", "get_version"),
    }
    shown = {field.name for field in dataclasses.fields(JobInfo) if not field.name.startswith("entrypoint")}
    assert shown == {
        *("status", "message", "error_type", "start_time", "end_time", "metadata", "runtime_env"),
        *("driver_agent_http_address", "driver_node_id", "driver_exit_code"),
    }


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
