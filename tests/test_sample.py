"""`gvpo-ray check --sample`: what people look at first with a new model or data set."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from gvpo_ray.cli import main
from gvpo_ray.config.shown import visible
from gvpo_ray.observe.samples import HEAD, TAIL, sample_lines, summary


def group(*rewards: float | None, **columns: Any) -> dict[str, Any]:
    return {
        "prompt_ids": [5, 6],
        "answer": "7",
        "rewards": list(rewards),
        "reward_parts": {"math": list(rewards), "format": [0.5] * len(rewards)},
        "reward_reasons": [None if reward is not None else "timeout: over 1 s" for reward in rewards],
        "finish_reasons": ["stop"] * len(rewards),
        "completion_ids": [[8, 9]] * len(rewards),
        **columns,
    }


def decode(ids: list[int]) -> str:
    return {5: "<|user|>1 + 1\n?\x1b[2J<|end|>", 8: "2<|end|>"}[ids[0]]


def test_a_group_is_shown_as_the_model_sees_it_with_rewards_reasons_and_where_it_was_cut_off() -> None:
    rows = [group(1.0, None, finish_reasons=["stop", "length"])]
    assert "\n".join(map(visible, sample_lines(rows, decode, 2))) == (
        "prompt 1 of 1, 2 tokens, answer '7':\n"
        "  | <|user|>1 + 1\n"
        "  | ?\\x1b[2J<|end|>\n"
        "  completion 1: reward 1 · math 1 · format 0.5 · ended after 2 tokens\n"
        "    | 2<|end|>\n"
        "  completion 2: reward null · math null · format 0.5 · cut off after 2 tokens · timeout: over 1 s\n"
        "    | 2<|end|>\n"
        "in all: 1 prompts, 2 completions · reward 1 on average · 1 above 0 · 1 unverifiable · 1 cut off at "
        "sampling.max_tokens (2): 50% · 1 groups with equal rewards, from which nothing is learned"
    )


def test_what_an_environment_wrote_stands_apart_from_what_the_policy_wrote() -> None:
    row = group(1.0, 0.0, completion_ids=[[8, 5, 9], [8, 9]], trained_tokens=[[True, False, True], None])
    lines = "\n".join(sample_lines([row], lambda ids: "".join(f"<{i}>" for i in ids), 9))
    assert "ended after 3 tokens · 2 of 3 tokens trained\n    | <8>\n    : <5>\n    | <9>\n" in lines
    assert "ended after 2 tokens\n    | <8><9>\n" in lines


def test_the_summary_counts_over_all_groups() -> None:
    rows = [group(1.0, 0.0, 0.0), group(0.0, 0.0, finish_reasons=["length"] * 2), group(None, None)]
    assert summary(rows, 64) == (
        "in all: 3 prompts, 7 completions · reward 0.2 on average · 1 above 0 · 2 unverifiable · 2 cut off "
        "at sampling.max_tokens (64): 29% · 2 groups with equal rewards, from which nothing is learned"
    )
    assert "no completion has a reward" in summary([group(None)], 64)


def test_of_a_long_text_both_ends_are_shown() -> None:
    text = "a" * HEAD + "b" * 1234 + "c" * TAIL
    lines = "\n".join(sample_lines([group(1.0)], lambda ids: text, 9))
    assert f"{'a' * HEAD} … (1,234 characters) … {'c' * TAIL}" in lines and "bb" not in lines


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.make_model(tmp_path / "model")
    rows = [{"prompt": f"{a}+{a}", "answer": str(2 * a)} for a in range(6)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run_dir": "run",
        "num_steps": 2,
        "groups_per_step": 2,
        "model": {"path": "./model"},
        "prompts": {"path": "train.jsonl", "template": "{prompt}<eos>=", "shuffle": False},
        "sampling": {"num_completions": 3, "max_tokens": 4},
        "engines": {
            "num": 2,
            "num_cpus": 0.5,
            "kv_cache_gib": 1,
            "num_threads": 1,
            "max_num": 3,
        },
        "verifiers": {"num": 2, "rewards": {"exact_match": 1.0}},
        "learner": {"num_mini_batches": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["--sample", "0"], "--sample: 0: must be at least 1"),
        (["--sample", "4", "engines={url: 'http://h/v1'}"], "engines.num: no engine of our own is there"),
        (["--sample", "4", "prompts.max_tokens=2"], "prompts.max_tokens: 2 tokens are too few"),
        (["--sample", "4", "engines.num_cpus=100000"], "engines.num: 1 x 100000 CPUs are more than the "),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    complaint: str,
) -> None:
    monkeypatch.setattr("gvpo_ray.run.once.Session", lambda *_: pytest.fail("Ray is started"))
    assert main(["check", "config.yaml", *overrides]) == 2
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1


def test_check_sample_shows_prompts_completions_and_rewards_of_one_engine_and_ends(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model, for real: vLLM, a verifier and the command's status."""
    tiny.vllm_model().save_pretrained(folder / "model")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        status = main(["check", "config.yaml", "--sample", "4"])
    finally:
        signal.signal(signal.SIGTERM, handler)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    shown = printed.out[printed.out.index("prompt 1 of 4") :]
    heads = re.findall(r"prompt (\d) of 4, 5 tokens, answer '(\d)':\n  \| (.*)\n", shown)
    assert heads == [(str(i + 1), str(2 * i), f"{i}+{i}<eos>=") for i in range(4)]
    form = r"completion \d: reward ([01]) · (ended|cut off) after (\d) tokens.*\n    \| (.*)"
    completions = re.findall(form, shown)
    assert len(completions) == 12
    for _, end, num_tokens, text in completions:
        assert (end == "ended") == text.endswith("<eos>") and (end == "ended" or num_tokens == "4")
    rewards = [int(reward) for reward, *_ in completions]  # a random model may guess right
    num_cut = sum(end == "cut off" for _, end, *_ in completions)
    num_equal = sum(len({*rewards[i : i + 3]}) == 1 for i in range(0, 12, 3))
    assert shown.rstrip().splitlines()[-1] == (
        f"in all: 4 prompts, 12 completions · reward {sum(rewards) / 12:.3g} on average · "
        f"{sum(rewards)} above 0 · 0 unverifiable · {num_cut} cut off at sampling.max_tokens (4): "
        f"{num_cut / 12:.0%} · {num_equal} groups "
        "with equal rewards, from which nothing is learned"
    )
    assert not (folder / "run").exists()
