"""Evaluation: the estimators against enumeration, the folder that resumes and refuses to mix, and the paired
comparison.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from gvpo_ray import groups
from gvpo_ray.cli import main
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.config.verifiers import RewardConfig, VerifiersConfig
from gvpo_ray.evaluation.compare import compare
from gvpo_ray.evaluation.folder import EvaluationDir, summary
from gvpo_ray.evaluation.run import evaluate
from gvpo_ray.groups import NO_ANSWER
from gvpo_ray.observe.metrics import (
    bootstrap_interval,
    evaluation_metrics,
    is_correct,
    mean,
    pass_at_k,
    right_tries,
)
from gvpo_ray.run.once import evaluation_sampling, prompt_seed
from gvpo_ray.verifiers.verifier import Verifier


def _config(folder: Path, **evaluation: Any) -> GVPOConfig:
    sets = evaluation.pop("sets", {"easy": {"path": "easy.parquet"}})
    return GVPOConfig.from_dict(
        {
            "run_dir": str(folder / "run"),
            "num_steps": 1,
            "model": {"path": str(folder / "model")},
            "prompts": {"path": "train.parquet"},
            "evaluation": {"num_samples": 4, "sets": sets, **evaluation},
        }
    )


def _group(group_id: int, rewards: list[float | None], prompt: str | None = None) -> dict[str, Any]:
    m = len(rewards)
    return {
        "group_id": group_id,
        "prompt": prompt or f"problem {group_id}",
        "answer": "7",
        "dataset": "easy",
        "prompt_ids": [1, 2],
        "completions": ["\\boxed{7}"] * m,
        "completion_ids": [[5] * (i + 1) for i in range(m)],
        "finish_reasons": ["stop"] * (m - 1) + ["length"],
        "sources": ["policy"] * m,
        "version_min": [0] * m,
        "version_max": [0] * m,
        "sampling_logprobs": [[-0.5] * (i + 1) for i in range(m)],
        "rewards": rewards,
        "reward_parts": [("math", rewards)],
        "reward_reasons": [None if r else f"math: {NO_ANSWER}" for r in rewards],
    }


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(num_samples: int) -> None:
    for num_correct in range(num_samples + 1):
        samples = [i < num_correct for i in range(num_samples)]
        for k in range(1, num_samples + 1):
            subsets = list(itertools.combinations(samples, k))
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(
                sum(map(any, subsets)) / len(subsets)
            )


def test_the_bootstrap_interval_is_that_of_resampled_means() -> None:
    values = [0.0] * 30 + [1.0] * 50 + [0.25] * 20
    low, high = bootstrap_interval(values, seed=3)
    resampled = np.random.default_rng(1).choice(values, size=(20_000, 100)).mean(axis=1)
    assert (low, high) == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.006)
    # Of n means in 0 or 1 with share p: p +- 1.96 sqrt(p (1 - p) / n), where n is large.
    low, high = bootstrap_interval([1.0] * 3000 + [0.0] * 7000)
    assert (low, high) == pytest.approx((0.3 - 0.00898, 0.3 + 0.00898), abs=3e-4)
    assert bootstrap_interval([0.5] * 7) == (0.5, 0.5) and bootstrap_interval([]) == (0.0, 0.0)


def test_right_is_what_the_first_reward_function_says_whatever_the_others_add() -> None:
    row = {
        "rewards": [1.1, 0.1, -0.5, None],
        "reward_parts": {"math": [1.0, 0.0, 1.0, 1.0], "format": [1.0, 1.0, -15.0, None]},
    }
    assert is_correct(row) == [True, False, True, False]


def test_metrics_of_a_set_by_hand() -> None:
    rows = list(groups.rows(groups.table([_group(0, [1.0, 0.0, 0.0, None]), _group(1, [1.0] * 4)])))
    metrics = evaluation_metrics("easy", rows, pass_k=[1, 2, 4, 8])
    assert {key.removeprefix("eval/easy/"): value for key, value in metrics.items()} == pytest.approx(
        {
            "pass@1": (1 / 4 + 1) / 2,
            "pass@2": (3 / 6 + 1) / 2,  # of the 6 pairs of the first prompt 3 hold its right sample
            "pass@4": 1.0,
            "stderr": math.sqrt(2 * 0.375**2 / 2),
            "num_prompts": 2,
            "extracted": 5 / 8,
            "length_mean": 2.5,
            "truncated": 2 / 8,
            "unverifiable": 1 / 8,
        }
    )


def _episodes(names: list[str | None]) -> list[str | None]:
    """Return entries of the column `episodes`; a name's second, third ... completion is a branch."""
    entries: list[str | None] = []
    counts = {"turns": 2, "tool_calls": 0, "tool_errors": 0, "end": "stop"}
    for i, name in enumerate(names):
        number = names[:i].count(name)
        own = {"name": name, **counts, **({"branch": number} if number else {})}
        entries.append(json.dumps(own) if name else None)
    return entries


def test_the_branches_of_an_episode_are_one_try(tmp_path: Path) -> None:
    # tries: a (two branches, right), b (wrong), c (three branches, of which one was held by no group)
    names = ["a", "b", "c", "a", "c", "c"]
    agent = _group(0, [1.0, 0.0, None, 1.0, 1.0, 1.0]) | {"episodes": _episodes(names)}
    plain = _group(1, [1.0, 0.0, 0.0]) | {"episodes": _episodes([None] * 3)}
    rows = list(groups.rows(groups.table([agent, plain])))
    assert [right_tries(row) for row in rows] == [[True, False, True], [True, False, False]]
    metrics = evaluation_metrics("easy", rows, pass_k=[1, 2, 3, 4])
    assert metrics["eval/easy/pass@1"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert metrics["eval/easy/pass@2"] == pytest.approx((1 + 2 / 3) / 2)
    # three tries have no pass@4, though there are six completions
    assert metrics["eval/easy/pass@3"] == 1 and "eval/easy/pass@4" not in metrics
    assert metrics["eval/easy/unverifiable"] == 1 / 9  # of completions
    config = _config(tmp_path, num_samples=3, pass_k=[2])
    numbers = summary(rows, config, "easy")
    assert numbers["mean@3"]["value"] == numbers["pass@1"]["value"] == pytest.approx(1 / 2)
    assert numbers["pass@2"]["value"] == pytest.approx(5 / 6)


def test_generations_and_comparisons_count_an_episode_once(tmp_path: Path) -> None:
    _model(tmp_path)
    folders = []
    for folder, names in (("one", ["a", "b", None, None]), ("other", ["a", "b", "b", "b"])):
        with _open(tmp_path, _config(tmp_path), out=folder) as results:
            group = _group(0, [1.0, 0.0, 0.0, None]) | {"episodes": _episodes(names)}
            results.add("easy", groups.table([group]))
            results.finish(_config(tmp_path), str(tmp_path / "model"))
        folders.append(str(tmp_path / folder))
    samples = pq.read_table(tmp_path / "other" / "generations.parquet").to_pylist()
    assert [(row["sample"], row["correct"]) for row in samples] == [
        (0, True),
        (1, False),
        (1, False),
        (1, False),
    ]
    result = compare(*folders)["easy"]
    assert (result["a"], result["b"]) == (1 / 4, 1 / 2)


def test_a_set_may_have_its_own_samples_temperature_and_length(tmp_path: Path) -> None:
    sets = {
        "easy": {"path": "a"},
        "aime": {"path": "b", "num_samples": 32, "temperature": 0.6, "max_completion_tokens": 99},
    }
    config = _config(tmp_path, sets=sets, num_samples=1, temperature=0)
    easy, aime = evaluation_sampling(config, "easy"), evaluation_sampling(config, "aime")
    assert (easy.num_completions, easy.temperature, easy.max_tokens) == (1, 0, 256)
    assert (aime.num_completions, aime.temperature, aime.max_tokens) == (32, 0.6, 99)


def test_greedy_samples_more_than_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"evaluation: easy has temperature 0 \(greedy\): all of its 4 samples would be the same",
    ):
        _config(tmp_path, temperature=0)


def test_what_a_run_without_engines_made_is_evaluated_with_one(tmp_path: Path) -> None:
    file = tmp_path / "offline.yaml"
    sets = {"easy": {"path": "e.parquet", "template": "{prompt}="}}
    run: dict[str, Any] = {"run_dir": "r", "num_steps": 3, "model": {"path": "m"}, "engines": {"num": 0}}
    run |= {"sources": {"s": {"path": "s.jsonl", "group_share": 1, "template": "{prompt}="}}}
    file.write_text(yaml.safe_dump(run | {"evaluation": {"every": 0, "sets": sets}}))
    config = GVPOConfig.from_file(file, ["engines.num=1"], for_evaluation=True)
    assert config.engines.num == 1 and config.rendered.template == "{prompt}="
    with pytest.raises(ConfigError, match="prompts: required, and not given"):  # to train on
        GVPOConfig.from_file(file, ["engines.num=1"])


def test_a_file_for_evaluation_alone_needs_no_training_keys_and_does_not_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text(
        yaml.safe_dump(
            {"run_dir": "r", "model": {"path": "m"}, "evaluation": {"sets": {"easy": {"path": "e.parquet"}}}}
        )
    )
    assert GVPOConfig.from_file(file, for_evaluation=True).evaluation.sets["easy"].path == "e.parquet"
    assert main(["train", str(file)]) == 2
    assert "num_steps: required" in capsys.readouterr().err


def _model(folder: Path, content: bytes = b"weights") -> str:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "model.safetensors").write_bytes(content)
    return str(folder / "model")


def _open(folder: Path, config: GVPOConfig, digest: str = "d", out: str = "out") -> EvaluationDir:
    return EvaluationDir(folder / out, config, str(folder / "model"), {"easy": digest})


def test_an_evaluation_goes_on_with_the_prompts_that_are_missing_and_writes_every_sample(
    tmp_path: Path,
) -> None:
    _model(tmp_path)
    config = _config(tmp_path)
    everything = groups.table([_group(i, [float(i > 0), 1.0, 0.0, None]) for i in range(3)])
    prompts = everything.select(list(groups.PROMPT_COLUMNS))
    with _open(tmp_path, config) as kept:
        assert kept.missing("easy", prompts).equals(prompts)
        kept.add("easy", everything.slice(2, 1))
    with _open(tmp_path, config) as kept:
        assert kept.missing("easy", prompts)["group_id"].to_pylist() == [0, 1]
        kept.add("easy", everything.slice(1, 1))
        kept.add("easy", everything.slice(0, 1))
        assert len(kept.missing("easy", prompts)) == 0
        result = kept.finish(config, "m")["sets"]["easy"]
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["sets"]["easy"] == result
    assert (
        result["num_prompts"] == 3
        and set(result) >= {"mean@4", "pass@1", "pass@2", "pass@4"}
        and "pass@8" not in result
    )
    assert (
        result["mean@4"]["value"] == pytest.approx((1 + 2 + 2) / 12)
        and result["mean@4"]["low"] <= result["mean@4"]["value"]
    )
    samples = pq.read_table(tmp_path / "out" / "generations.parquet").to_pylist()
    assert [(row["prompt_id"], row["sample"], row["correct"], row["num_tokens"]) for row in samples] == [
        (i, k, (k == 0 and i > 0) or k == 1, k + 1) for i in range(3) for k in range(4)
    ]


def test_every_column_of_the_data_reaches_reward_functions_when_an_evaluation_goes_on(tmp_path: Path) -> None:
    """Missing prompts bring the data's columns, as the first ones do; stored groups have them, too."""
    _model(tmp_path)
    config = _config(tmp_path)
    levels = [json.dumps({"columns": {"level": i, "tests": ["1 = 1"]}}) for i in range(3)]
    everything = groups.table([_group(i, [1.0, 0.0]) | {"data": level} for i, level in enumerate(levels)])
    prompts = everything.select([*groups.PROMPT_COLUMNS, *groups.DATA_COLUMNS])
    unscored = everything.drop_columns(list(groups.REWARD_COLUMNS))

    def reward(completions: list[str], level: list[int], tests: list[Any]) -> list[float]:
        return [10.0 * number + len(of_row) for number, of_row in zip(level, tests, strict=True)]

    rewards = {"own": RewardConfig(trusted=True)}
    verifiers = VerifiersConfig(rewards=rewards)
    for begin, num in ((0, 1), (1, 2)):
        with (
            _open(tmp_path, config) as kept,
            Verifier(verifiers, {"own": reward}, columns={"evaluation.sets.easy": ["level", "tests"]}) as own,
        ):
            missing = kept.missing("easy", prompts)
            assert missing.equals(prompts.slice(begin))
            for i in missing["group_id"].to_pylist()[:num]:
                kept.add("easy", own.score(unscored.slice(i, 1)))
    with _open(tmp_path, config) as kept:
        stored = kept.rows("easy")
    assert [row["rewards"] for row in stored] == [[1.0, 1.0], [11.0, 11.0], [21.0, 21.0]]
    assert [row["data"] for row in stored] == levels


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": 1}, "holds an evaluation with another seed"),
        (
            {"evaluation.num_samples": 8},
            r"with another evaluation\.sets\.easy\.num_samples \(4 there, 8 here\)",
        ),
        (
            {"evaluation.sets.easy.template": "Q: {prompt}"},
            r"with another evaluation\.sets\.easy\.template \(None there",
        ),
        ({"engines.vllm": {"quantization": "fp8"}}, r"with another engines\.vllm; use another folder"),
        ({"verifiers.rewards.math": 2}, r"with another verifiers\.rewards; use another folder"),
        ("weights", r"with another model\.path \(what is in it differs\)"),
        ("prompts", r"with another evaluation\.sets\.easy\.path \(what is in it differs\)"),
    ],
)
def test_results_of_another_model_or_config_are_not_mixed_in(
    tmp_path: Path, change: Any, complaint: str
) -> None:
    _model(tmp_path)
    config = _config(tmp_path)
    with _open(tmp_path, config):
        pass
    if change == "weights":
        _model(tmp_path, b"WEIGHTS")
    other = GVPOConfig.from_dict(config.model_dump(mode="json"), change if isinstance(change, dict) else {})
    with pytest.raises(ConfigError, match=complaint):
        _open(tmp_path, other, digest="other" if change == "prompts" else "d")


def test_a_folder_that_another_process_evaluates_into_is_refused(tmp_path: Path) -> None:
    _model(tmp_path)
    with (
        _open(tmp_path, _config(tmp_path)),
        pytest.raises(ConfigError, match="another process is evaluating into"),
    ):
        _open(tmp_path, _config(tmp_path))


def _finished(folder: Path, shares: dict[str, list[bool]]) -> str:
    folder.mkdir()
    rows = [
        {
            "dataset": "easy",
            "prompt_id": i,
            "prompt": prompt.rstrip("'"),
            "answer": "7",
            "sample": sample,
            "correct": right,
        }
        for i, (prompt, samples) in enumerate(shares.items())
        for sample, right in enumerate(samples)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "generations.parquet")
    (folder / "eval.json").write_text("{}")
    return str(folder)


def test_a_comparison_pairs_prompts_by_their_text_and_differences_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = _finished(
        tmp_path / "a",
        {"p": [False, False], "q": [True, False], "r": [True], "only a": [True], "p'": [False]},
    )
    # another order; p is there twice
    b = _finished(tmp_path / "b", {"r": [True], "q": [True, True], "p": [True, False], "p'": [True]})
    result = compare(a, b)["easy"]
    assert (result["num_prompts"], result["unmatched"]) == (4, 1)
    assert result["a"] == pytest.approx((0 + 0.5 + 1 + 0) / 4) and result["b"] == pytest.approx(
        (0.5 + 1 + 1 + 1) / 4
    )
    assert result["difference"]["value"] == pytest.approx(mean([0.5, 0.5, 0, 1]))
    assert (result["difference"]["low"], result["difference"]["high"]) == pytest.approx(
        bootstrap_interval([0.5, 0.5, 0.0, 1.0])
    )
    assert main(["compare", a, f"{b}/eval.json"]) == 0
    assert "4 (1 without a partner)" in capsys.readouterr().out


def test_bad_input_of_evaluate_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, c = _finished(tmp_path / "a", {"p": [True]}), _finished(tmp_path / "c", {"other": [True]})
    for arguments, complaint in (
        (["compare", a, str(tmp_path / "no")], "compare: no finished evaluation in"),
        (["compare", a, c], "have no prompt in common"),
        (["compare", a], "Missing argument 'B'"),
        (["compare", a, c, "more"], "unexpected extra argument"),
        (["evaluate"], "Missing argument 'CONFIG'"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert complaint in line
    config = _config(tmp_path)
    with pytest.raises(ConfigError, match=r"evaluation\.sets: name at least one prompt file"):
        evaluate(_config(tmp_path, sets={}))
    with pytest.raises(ConfigError, match=r"--checkpoint: no checkpoint in"):
        evaluate(config, checkpoint=str(tmp_path))
    with pytest.raises(ConfigError, match=r"model\.path: no folder"):
        evaluate(config)
    (tmp_path / "c" / "generations.parquet").write_bytes(b"junk")
    with pytest.raises(ConfigError, match=r"compare: the evaluation in .* cannot be read: "):
        compare(a, c)
    with pytest.raises(ConfigError, match=r"evaluation\.sets: the name '\.\./up' becomes a folder's"):
        _config(tmp_path, sets={"../up": {"path": "easy.parquet"}})


def test_no_two_samples_of_an_evaluation_share_their_random_numbers() -> None:
    # vLLM's sample i of a prompt has the seed of the prompt plus i; torch's generator on CPU looks at 32
    # bits.
    seeds = sorted(
        prompt_seed(seed, name, i) % 2**32
        for seed in (0, 1)
        for name in ("aime24", "amc")
        for i in range(100)
    )
    assert min(b - a for a, b in itertools.pairwise(seeds)) > 64
    assert prompt_seed(0, "amc", 7) == prompt_seed(0, "amc", 7) < 2**48  # the same in every process


def test_a_set_may_be_added_to_an_evaluation_but_not_taken_away(tmp_path: Path) -> None:
    _model(tmp_path)
    sets = {"easy": {"path": "easy.parquet"}}
    group = groups.table([_group(0, [1.0] * 4)])
    with _open(tmp_path, _config(tmp_path, sets=sets)) as kept:
        kept.add("easy", group)
    both = _config(tmp_path, sets={**sets, "hard": {"path": "hard.parquet"}})
    with EvaluationDir(tmp_path / "out", both, str(tmp_path / "model"), {"easy": "d", "hard": "e"}) as kept:
        prompts = group.select(list(groups.PROMPT_COLUMNS))
        assert (len(kept.missing("easy", prompts)), len(kept.missing("hard", prompts))) == (0, 1)
    with pytest.raises(ConfigError, match=r"holds an evaluation that also has evaluation\.sets\.hard"):
        _open(tmp_path, _config(tmp_path, sets=sets))


def test_a_model_folder_that_has_moved_is_the_same_model(tmp_path: Path) -> None:
    _model(tmp_path)
    config = _config(tmp_path)
    with _open(tmp_path, config):
        pass
    (tmp_path / "model").rename(tmp_path / "moved")
    moved = GVPOConfig.from_dict(config.model_dump(mode="json"), {"model.path": str(tmp_path / "moved")})
    with EvaluationDir(tmp_path / "out", moved, moved.model.path, {"easy": "d"}) as kept:
        assert kept.rows("easy") == []


def test_another_version_of_a_reward_function_is_not_mixed_in(tmp_path: Path) -> None:
    _model(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def short(prompts, completions, **columns): return [1.0 for text in completions]\n"
    )
    config = GVPOConfig.from_dict(
        _config(tmp_path).model_dump(mode="json"), {"verifiers.rewards": {f"{tmp_path}/mine.py:short": 1.0}}
    )
    with _open(tmp_path, config):
        pass
    (tmp_path / "mine.py").write_text(
        "def short(prompts, completions, **columns): return [0.0 for text in completions]\n"
    )
    with pytest.raises(
        ConfigError, match=r"with another verifiers\.rewards\..*mine\.py:short \(what is in it differs\)"
    ):
        _open(tmp_path, config)


def test_scores_of_another_commit_of_a_reward_model_are_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _model(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--org--rm"
    (place / "refs").mkdir(parents=True)
    rewards = {"verifiers.rewards": {"rm": {"model": "org/rm"}}}
    config = GVPOConfig.from_dict(_config(tmp_path).model_dump(mode="json"), rewards)

    def downloaded(commit: str) -> None:
        (place / "snapshots" / commit).mkdir(parents=True)
        (place / "snapshots" / commit / "config.json").write_text("{}")
        (place / "refs" / "main").write_text(commit)

    downloaded("a" * 40)
    for _ in range(2):
        with _open(tmp_path, config):
            pass
    assert f"org/rm@{'a' * 40}" in (tmp_path / "out" / "evaluation.yaml").read_text()
    downloaded("b" * 40)
    with pytest.raises(
        ConfigError, match=r"with another verifiers\.rewards\.rm\.model \(what is in it differs"
    ):
        _open(tmp_path, config)


def test_a_folder_whose_evaluation_yaml_is_no_evaluations_is_refused(tmp_path: Path) -> None:
    _model(tmp_path)
    (tmp_path / "out").mkdir()
    for text in ("", "a: [", "settings: 3"):
        (tmp_path / "out" / "evaluation.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"has an evaluation\.yaml that is not an evaluation's"):
            _open(tmp_path, _config(tmp_path))


def test_prompts_that_are_too_long_are_counted_in_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _model(tmp_path)
    config = _config(tmp_path)
    with _open(tmp_path, config) as kept:
        kept.add("easy", groups.table([_group(0, [1.0, 0.0, 0.0, None])]))
        assert kept.finish(config, "m", {"easy": 3})["sets"]["easy"]["left_out"] == 3
    verdicts = pq.read_table(tmp_path / "out" / "generations.parquet")["verdict"].to_pylist()
    assert verdicts == ["correct", "incorrect", "incorrect", "unverifiable"]


def test_a_comparison_says_what_else_differs_and_which_sets_have_no_partner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = _finished(tmp_path / "a", {"p": [True]}), _finished(tmp_path / "b", {"p": [False]})
    for folder, num_samples in ((a, 1), (b, 8)):
        (Path(folder) / "eval.json").write_text(json.dumps({"sets": {"easy": {"num_samples": num_samples}}}))
    easy = pq.read_table(Path(b) / "generations.parquet")
    hard = pa.Table.from_pylist([{**easy.to_pylist()[0], "dataset": "hard"}])
    pq.write_table(pa.concat_tables([easy, hard]), Path(b) / "generations.parquet")
    result = compare(a, b)
    assert result["easy"]["difference"] == {"value": -1.0, "low": -1.0, "high": -1.0}
    assert result["easy"]["notes"] == ["num_samples is 1 in A, 8 in B"] and result["hard"]["notes"] == [
        "no prompt in common"
    ]
    assert main(["compare", a, b]) == 0
    printed = capsys.readouterr().out
    assert "easy: num_samples is 1 in A, 8 in B" in printed and "hard: no prompt in common" in printed


def test_a_run_that_lacks_a_key_is_not_taken_for_an_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    data = {
        "run_dir": "r",
        "model": {"path": "m/m"},
        "prompts": {"path": "p/p"},
        "evaluation": {"sets": {"easy": {"path": "e/e"}}},
    }
    file.write_text(yaml.safe_dump(data))
    assert main(["check", str(file)]) == 2
    assert "num_steps: required" in capsys.readouterr().err
    file.write_text(yaml.safe_dump({"run_dir": "r", "model": {"path": "m/m"}}))
    assert main(["check", str(file), "evaluation.sets.easy.path=e/e"]) == 0
    assert main(["check", str(file)]) == 2
