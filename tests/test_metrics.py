"""Metrics: numbers redone by hand, and a metrics.jsonl that a killed run can go on with."""

import json
import math

import pytest

from gvpo_ray.files import append_line, read_lines
from gvpo_ray.observe.advice import HINT_STEPS, beta_hint
from gvpo_ray.observe.metrics import (
    age_bucket,
    batch_metrics,
    evaluation_metrics,
    mean,
)
from gvpo_ray.observe.metrics_log import MetricsLog

BATCH = [
    {
        "rewards": [1.0, 0.0, None],
        "completion_ids": [[4, 5, 1], [4], [4, 5, 6, 7]],
        "finish_reasons": ["stop", "stop", "length"],
        "sources": ["policy", "replay", "offline:people"],
        "version_min": [7, 5, None],
        "reward_reasons": [
            None,
            "math: no answer found in the completion",
            "timeout: math took more than 10 s",
        ],
    },
    {
        "rewards": [0.5, None],
        "completion_ids": [[4, 1], [4, 1]],
        "finish_reasons": ["stop", "length"],
        "version_min": [6, 6],
        "sources": ["policy", "offline:a:b"],
    },
]
EDGES = ("0", "1", "2", "4", "8", "16", "32", "64", "inf")


def test_batch_metrics_by_hand():
    # rewards 1, 0, 1/2: mean 1/2, variance (1/4 + 1/4 + 0) / 3; ages at version 7: 0, 2, 1, 1
    assert batch_metrics(BATCH, version=7) == pytest.approx(
        {
            "reward/mean": 0.5,
            "reward/std": math.sqrt(0.5 / 3),
            "groups/size_mean": 1.5,
            "groups/untrainable": 1,
            "groups/equal": 0,  # of one group: the other has a single reward
            "completions/correct": 2 / 5,
            "completions/extracted": 4 / 5,
            "completions/unverifiable": 2 / 5,
            "unverifiable/timeout": 1 / 5,
            "unverifiable/memory": 0,
            "unverifiable/crash": 0,
            "unverifiable/untrained": 0,
            "unverifiable/other": 1 / 5,
            "completions/length_mean": (3 + 1 + 4 + 2 + 2) / 5,
            "completions/truncated": 2 / 5,
            "staleness/mean": 1.0,
            "staleness/max": 2.0,
            **dict.fromkeys((f"staleness/histogram/{edge}" for edge in EDGES), 0),
            "staleness/histogram/0": 1 / 4,
            "staleness/histogram/1": 2 / 4,
            "staleness/histogram/2": 1 / 4,
            **dict.fromkeys((f"groups/size_histogram/{edge}" for edge in EDGES), 0),
            "groups/size_histogram/1": 1 / 2,
            "groups/size_histogram/2": 1 / 2,
            "sources/policy": 2 / 5,
            "sources/replay": 1 / 5,
            "sources/offline": 2 / 5,
            "sources/offline:people": 1 / 5,
            "sources/offline:a:b": 1 / 5,
        }
    )


def test_a_completion_of_which_no_token_is_trained_counts_as_one_without_a_reward():
    """Whether the verifier has said so or not, as in groups that another program recorded."""
    masks = [[False] * 3, None, [False, False, True, False]]
    for reward in (1.0, None):
        row = {**BATCH[0], "rewards": [reward, 0.0, 0.5], "trained_tokens": masks}
        metrics = batch_metrics([row], version=7)
        assert metrics["reward/mean"] == 0.25 and metrics["groups/size_mean"] == 2
        assert metrics["unverifiable/untrained"] == 1 / 3
        assert metrics["completions/unverifiable"] == pytest.approx(1 / 3)
        assert metrics["unverifiable/other"] == metrics["unverifiable/timeout"] == 0


def test_right_is_what_the_first_reward_function_says_and_not_the_sum():
    row = {
        **BATCH[0],
        "rewards": [0.1, 1.0, None],
        "reward_parts": {"math": [0.0, 1.0, None], "format": [1.0, 0.0, 1.0]},
    }
    assert batch_metrics([row], version=7)["completions/correct"] == 1 / 3


def test_a_bucket_ends_with_its_edge_and_the_last_has_no_end():
    ages = [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 1000, None]
    metrics = batch_metrics(
        [{**BATCH[0], "version_min": [None if age is None else 2000 - age for age in ages]}], version=2000
    )
    counts = {edge: round(15 * metrics[f"staleness/histogram/{edge}"], 9) for edge in EDGES}
    assert counts == {"0": 1, "1": 1, "2": 1, "4": 2, "8": 2, "16": 2, "32": 2, "64": 2, "inf": 2}
    # the last: by no version of ours
    assert [age_bucket(oldest, 2000) for oldest in (2001, 2000, 1997, 0, None)] == [0, 0, 3, 8, 9]
    sizes = [0, 3, 5, 64, 65]
    rows = [{**BATCH[1], "rewards": [1.0] * size} for size in sizes]
    metrics = batch_metrics(rows, version=6)
    shares = {
        edge: metrics[f"groups/size_histogram/{edge}"]
        for edge in EDGES
        if metrics[f"groups/size_histogram/{edge}"]
    }
    assert shares == {"0": 0.2, "4": 0.2, "8": 0.2, "64": 0.2, "inf": 0.2}


def test_batch_metrics_of_foreign_and_unverifiable_data_and_of_nothing_are_numbers():
    row = {
        "rewards": [None],
        "completion_ids": [[1]],
        "finish_reasons": ["stop"],
        "version_min": [None],
        "sources": ["offline:people"],
    }
    for rows in ([row], []):
        metrics = batch_metrics(rows, version=3)
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["reward/mean"] == metrics["staleness/mean"] == metrics["staleness/max"] == 0
        assert {metrics[f"staleness/histogram/{edge}"] for edge in EDGES} == {0}
    assert (
        batch_metrics([row], version=3)["completions/unverifiable"]
        == batch_metrics([row], version=3)["sources/offline"]
        == 1
    )
    nothing = batch_metrics([], version=3)
    assert nothing["sources/policy"] == nothing["sources/replay"] == nothing["sources/offline"] == 0


def test_evaluation_is_the_mean_over_prompts_and_an_unverifiable_completion_is_wrong():
    # per prompt: (1 + 0) / 2, 1, (1 + 0 for null) / 2: mean 2/3; variance (1/36 + 1/9 + 1/36) / 2 = 1/12;
    # stderr sqrt(1/36)
    rows = [
        {"rewards": [1.0, 0.0], "completion_ids": [[1], [1]], "finish_reasons": ["stop", "stop"]},
        {"rewards": [1.0], "completion_ids": [[1, 2, 3, 4]], "finish_reasons": ["length"]},
        {"rewards": [1.0, None], "completion_ids": [[1], [1]], "finish_reasons": ["stop", "stop"]},
    ]
    assert evaluation_metrics("gsm8k", rows) == pytest.approx(
        {
            "eval/gsm8k/pass@1": 2 / 3,
            "eval/gsm8k/stderr": 1 / 6,
            "eval/gsm8k/num_prompts": 3,
            "eval/gsm8k/extracted": 1,
            "eval/gsm8k/length_mean": 8 / 5,
            "eval/gsm8k/truncated": 1 / 5,
            "eval/gsm8k/unverifiable": 1 / 5,
        }
    )


def test_one_prompt_has_no_standard_error_and_no_prompt_no_mean():
    one = evaluation_metrics("x", [{"rewards": [1.0], "completion_ids": [[1]], "finish_reasons": ["stop"]}])
    assert one["eval/x/pass@1"] == 1 and one["eval/x/stderr"] == 0
    assert evaluation_metrics("x", [])["eval/x/pass@1"] == 0 and mean([]) == 0


def test_every_line_is_json_with_its_step_and_last_finds_the_newest(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_step=0)
    log.write(0, {"eval/x/pass@1": 0.25})
    assert log.write(1, {"loss": 0.5}) == {"step": 1, "loss": 0.5}
    log.write(2, {"loss": 0.125})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 0, "eval/x/pass@1": 0.25}, {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.125}]
    assert (log.last("loss"), log.last("eval/x/pass@1"), log.last("absent"), log.last("absent", 7)) == (
        0.125,
        0.25,
        None,
        7,
    )


def test_a_resumed_run_keeps_the_lines_up_to_its_checkpoint_and_writes_the_others_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, resume_step=0)
    for step in range(6):
        log.write(step, {"loss": step / 8})
    again = MetricsLog(path, resume_step=3)
    assert again.last("loss") == 3 / 8
    again.write(4, {"loss": 9.0})
    assert [(line["step"], line["loss"]) for line in map(json.loads, path.read_text().splitlines())] == [
        (0, 0.0),
        (1, 0.125),
        (2, 0.25),
        (3, 0.375),
        (4, 9.0),
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_whoever_listens_is_told_of_every_new_line(tmp_path):
    log, told = MetricsLog(tmp_path / "metrics.jsonl", resume_step=0), []
    log.write(1, {"loss": 0.5})
    log.on_line = told.append
    log.write(2, {"loss": 0.25})
    assert told == [{"step": 2, "loss": 0.25}]


@pytest.mark.parametrize("torn", [b"", b"{", b'{"step": 2, "lo', '{"why": "é'.encode()[:-1]])
@pytest.mark.parametrize("whole", [[], [{"step": 1}], [{"step": 1}, {"why": "é\n"}]])
def test_a_line_takes_the_place_of_a_torn_one(tmp_path, whole, torn):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(json.dumps(entry).encode() + b"\n" for entry in whole) + torn)
    assert read_lines(path) == whole
    append_line(path, {"step": 3})
    append_line(path, {"step": 4})
    assert read_lines(path) == [*whole, {"step": 3}, {"step": 4}]
    assert path.read_bytes().endswith(b'\n{"step": 4}\n')


def test_the_torn_last_line_of_a_killed_run_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for torn in ("{", '{"step": 2, "lo', '{"step": 2, "loss": 0.'):
        path.write_text('{"step": 1, "loss": 0.5}\n' + torn)
        MetricsLog(path, resume_step=5).write(2, {"loss": 0.25})
        assert [json.loads(line) for line in path.read_text().splitlines()] == [
            {"step": 1, "loss": 0.5},
            {"step": 2, "loss": 0.25},
        ]


def training_lines(active, implied=0.0004, reward=0.25, beta=0.1, correlation=0.3):
    return [
        {
            "gvpo/kl_active_share": active,
            "gvpo/implicit_reward_var": implied,
            "gvpo/reward_var": reward,
            "gvpo/beta": beta,
            "gvpo/reward_correlation": correlation,
        }
        for _ in range(HINT_STEPS)
    ]


def test_a_beta_that_binds_nothing_for_long_is_said_with_one_that_would():
    lines = training_lines(active=0.0)
    # sd(beta D) = 0.02 and a tenth of sd(R) is 0.05: 2.5 times as much
    assert "loss.beta of some 0.25 would" in beta_hint(lines)
    assert "num_mini_batches of 2 or more" in beta_hint(training_lines(active=0.0, implied=0.0))


def test_a_beta_that_binds_now_and_then_or_has_had_little_time_or_no_signal_is_not():
    lines = training_lines(active=0.0)
    assert beta_hint(lines[1:]) is None and beta_hint([]) is None
    assert beta_hint([*lines[:5], *training_lines(active=0.02)[:1], *lines[6:]]) is None
    assert beta_hint([*training_lines(active=0.5), *lines]) is not None  # it is the last that count
    assert beta_hint(training_lines(active=0.0, reward=0.0)) is None


def test_a_policy_that_beta_only_calls_back_is_said_with_what_would_let_it_go():
    hint = beta_hint(training_lines(active=1.0, implied=1.0))
    assert (
        "varies 2.0 times as much as they do, with a correlation of 0.30" in hint
        and "loss.beta of some 0.025 lets it go" in hint
    )
    # it went where it was sent
    assert beta_hint(training_lines(active=1.0, implied=1.0, correlation=0.9)) is None
    assert beta_hint(training_lines(active=1.0, implied=0.2)) is None
    assert beta_hint(training_lines(active=1.0, implied=1.0)[1:]) is None
