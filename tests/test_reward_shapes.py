"""Reward functions in the shapes of other systems: what each gets of the data, and what it may return."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest
import torch
from test_prompts import _tokenizer

from gvpo_ray import groups
from gvpo_ray.buffer.replay import replayed
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig, SourceConfig
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.data.offline import OfflineSource
from gvpo_ray.data.prompts import PromptSet
from gvpo_ray.sandbox.adapters import adapted, check_signature
from gvpo_ray.sandbox.functions import call, load
from gvpo_ray.verifiers.rewards import BUILT_IN
from gvpo_ray.verifiers.verifier import Verifier, validate_rewards

# so that the sandbox need not import this file, and torch with it
cloudpickle.register_pickle_by_value(sys.modules[__name__])

USER = [{"role": "user", "content": "12 + 34?"}]
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": USER,
    "reward_model": {"style": "rule", "ground_truth": "46"},
    "extra_info": {"index": 7},
}


def prompt_set(folder: Path, *rows: dict[str, Any], **keys: Any) -> PromptSet:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PromptsConfig(**{"path": str(path), "template": "{prompt}", **keys})
    return PromptSet(config, _tokenizer(), name="mine", max_tokens=None)


def sampled(prompt: pa.Table, completions: list[str]) -> pa.Table:
    """What engines make of a prompt: its columns, and the completions, here twice."""
    num = len(completions)
    values = {
        "completions": completions,
        "completion_ids": [[1]] * num,
        "finish_reasons": ["stop"] * num,
        "sources": ["policy"] * num,
        "version_min": [0] * num,
        "version_max": [0] * num,
        "sampling_logprobs": [[-1.0]] * num,
    }
    group = groups.with_columns(prompt, **{name: [value] for name, value in values.items()})
    return groups.join(group, group, group)  # twice, joined as engines do that migrate completions


def scored(
    prompts: PromptSet, completions: list[str], function: Callable[..., Any], **section: Any
) -> pa.Table:
    config = VerifiersConfig(timeout_s=60, rewards={"f": section or {"trusted": True}})
    with Verifier(config, {"f": function}) as verifier:
        return verifier.score(sampled(prompts.group(0), completions))


def rewards(table: pa.Table) -> list[float | None]:
    return table["rewards"][0].as_py()


# ---------------------------------------------------------------------------------------- columns of the data


def trl(completions: list[Any], ground_truth: list[Any], **kwargs: Any) -> list[float]:
    return [float(gold in text) for text, gold in zip(completions, ground_truth, strict=True)]


@pytest.mark.parametrize("section", [{"trusted": True}, {"weight": 1.0}])
def test_a_function_written_for_trl_gets_the_columns_by_their_names(tmp_path: Path, section: dict) -> None:
    prompts = prompt_set(tmp_path, {"prompt": "12 + 34?", "ground_truth": "46", "level": 3})
    assert prompts.columns == ["ground_truth", "level", "answer"]
    assert rewards(scored(prompts, ["is 46", "is 45"], trl, **section)) == [1.0, 0.0] * 2


def test_columns_keep_their_types_and_are_given_to_every_completion(tmp_path: Path) -> None:
    row = {"prompt": "q", "answer": 5, "golds": [5, -5], "info": {"a": [None, 1.5]}, "dataset": "theirs"}

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        return [(0.0, json.dumps(columns))] * len(completions)

    table = scored(prompt_set(tmp_path, row), ["a"], reward)
    assert json.loads(table["reward_reasons"][0].as_py()[1]) == {
        "golds": [[5, -5]] * 2,
        "info": [{"a": [None, 1.5]}] * 2,
        "dataset": ["theirs"] * 2,
        "answer": ["5"] * 2,
        "group_id": [0] * 2,
        "completion_ids": [[1]] * 2,
        "finish_reasons": ["stop"] * 2,
    }


COLUMNS = {
    "text": "a",
    "number": 5,
    "share": 0.5,
    "yes": True,
    "nothing": None,
    "list": [1, None],
    "nested": {"a": {"b": [1]}},
    "answer": "a column of their own",
    "prompt": "another",
    "completion": "of somebody",
    "tools": [{"name": "add"}],
    "label": 1,
    "label space": "x",
}


def kept(prompts: list[Any], completions: list[Any], **columns: Any) -> list[Any]:
    return [
        (0.0, json.dumps({name: values[i] for name, values in columns.items()}))
        for i in range(len(completions))
    ]


def test_no_column_of_the_data_is_lost_on_any_way_to_a_reward_function(tmp_path: Path) -> None:
    """Training, an evaluation (the file's order), an offline source, replay, and the log of a resumed run."""
    row = {"question": "q", "gold": {"is": ["46", "47"]}, **COLUMNS}
    keys = {"prompt_column": "question", "answer_column": "gold.is"}
    prompts = prompt_set(tmp_path, row, **keys)
    assert set(COLUMNS) | {"question", "gold"} == set(prompts.columns)
    own = {"completion_column": "text", "group_share": 1}
    config = SourceConfig(path=str(tmp_path / "data.jsonl"), template="{prompt}", **keys, **own)
    tokenizer = _tokenizer()
    tokenizer.eos_token = "<s>"
    (tmp_path / "data.jsonl").write_text(2 * (tmp_path / "data.jsonl").read_text())
    about = {"max_tokens": None, "max_length": 100, "num_completions": 2}
    source = OfflineSource(config, tokenizer, name="s", **about)
    sampled_ones = [sampled(one, ["a"]) for one in (prompts.group(3), prompts.all())]
    replayed_one = replayed(prompts.group(0), [])
    assert json.loads(replayed_one["data"][0].as_py())["columns"] == row
    logged = [groups.log_columns(with_rewards) for with_rewards in _scored(sampled_ones)]
    ways = [*sampled_ones, source.group(0, 0), *(one.drop_columns(groups.REWARD_COLUMNS) for one in logged)]
    for table in ways:
        with Verifier(VerifiersConfig(rewards={"kept": {"trusted": True}}), {"kept": kept}) as verifier:
            told = json.loads(verifier.score(table)["reward_reasons"][0].as_py()[0])
        want = {name: value for name, value in row.items() if name != "text" or "text" in told}
        assert {name: told[name] for name in want} == want
    assert "text" not in source.columns  # the completion itself


def _scored(tables: list[pa.Table]) -> list[pa.Table]:
    with Verifier(VerifiersConfig(rewards={"kept": {"trusted": True}}), {"kept": kept}) as verifier:
        return [verifier.score(table) for table in tables]


def test_a_column_answer_beside_the_gold_leaves_the_gold_to_built_in_functions(tmp_path: Path) -> None:
    """A function of the user's gets the column by its name, verl's and OpenRLHF's the gold."""
    row = {"prompt": "q", "answer": "12 + 34 = 46", "reward_model": {"ground_truth": "46"}}
    prompts = prompt_set(tmp_path, row)
    config = VerifiersConfig(rewards={"exact_match": {"trusted": True}})
    with Verifier(config) as verifier:
        assert rewards(verifier.score(sampled(prompts.group(0), ["46", "47"]))) == [1.0, 0.0] * 2

    def own(completions: list[str], answer: list[str]) -> list[float]:
        return [float(text == "12 + 34 = 46") for text in answer]

    def of_verl(solution_str: str, ground_truth: str) -> float:
        return float(ground_truth == "46")

    def of_openrlhf(queries: list[str], prompts: list[str], labels: list[str]) -> list[float]:
        return [float(label == "46") for label in labels]

    for function in (own, of_verl, of_openrlhf):
        assert rewards(scored(prompts, ["x"], function)) == [1.0, 1.0], function


def test_columns_called_like_a_built_in_functions_options_do_not_set_them(tmp_path: Path) -> None:
    row = {
        "prompt": "q",
        "answer": "a",
        "ignore_case": False,
        "limit": 1,
        "boxed": 0,
        "relative_tolerance": "x",
    }
    prompts = prompt_set(tmp_path, row)
    for name, completion, want in (
        ("exact_match", "A", 1.0),
        ("length", "a", -1 / 1024),
        ("format", "a", 0.0),
    ):
        with Verifier(VerifiersConfig(rewards={name: {"trusted": True, "function": name}})) as verifier:
            assert rewards(verifier.score(sampled(prompts.group(0), [completion]))) == [want] * 2


def test_columns_with_the_names_of_the_runs_own_arguments_are_said(tmp_path: Path) -> None:
    prompts = prompt_set(tmp_path, {"prompt": "q", "answer": "a", "completions": ["b"], "group_id": 9})
    (note,) = prompts.notes
    assert note.startswith("reward functions get the run's own completions, group_id, not the data's column")
    assert rewards(scored(prompts, ["x"], lambda completions, group_id: group_id)) == [0.0, 0.0]


def test_a_conversational_prompt_gives_messages_as_trl_does(tmp_path: Path) -> None:
    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        assert prompts[0] == USER
        return [float(completion == [{"role": "assistant", "content": "46"}]) for completion in completions]

    prompts = prompt_set(tmp_path, VERL)
    assert rewards(scored(prompts, ["46", "45"], reward)) == [1.0, 0.0] * 2
    config = VerifiersConfig(timeout_s=60, rewards={"exact_match": 1.0})
    with Verifier(config) as verifier:  # a built-in function gets texts
        assert rewards(verifier.score(sampled(prompts.group(0), ["46", "45"]))) == [1.0, 0.0] * 2


def test_verls_compute_score_gets_a_row_at_a_time(tmp_path: Path) -> None:
    def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict) -> dict:
        assert (data_source, extra_info["index"]) == ("openai/gsm8k", 7)
        return {"score": float(solution_str == ground_truth), "acc": solution_str == ground_truth}

    table = scored(prompt_set(tmp_path, VERL), ["46", "45"], compute_score)
    assert rewards(table) == [1.0, 0.0] * 2
    assert table["reward_reasons"][0].as_py() == ["acc=True", "acc=False"] * 2

    # for data of another layout the gold and the data set's name stand in
    def short(solution_str: str, ground_truth: str, method: str = "strict", **_: Any) -> float:
        assert method == "strict"
        return float(solution_str == ground_truth)

    assert (
        rewards(scored(prompt_set(tmp_path, {"prompt": "q", "answer": 46}), ["46", "4"], short)) == [1, 0] * 2
    )


def test_an_async_and_a_batched_compute_score_run_too(tmp_path: Path) -> None:
    async def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> float:
        return float(solution_str == ground_truth)

    def batched(data_sources: Any, solution_strs: Any, ground_truths: Any, extra_infos: Any) -> Any:
        assert len(data_sources) == len(extra_infos) == 4
        return np.array([x == y for x, y in zip(solution_strs, ground_truths, strict=True)])

    for function in (compute_score, batched):
        assert rewards(scored(prompt_set(tmp_path, VERL), ["46", "45"], function)) == [1.0, 0.0] * 2


def test_openrlhfs_reward_func_gets_queries_prompts_and_labels(tmp_path: Path) -> None:
    def reward_func(
        queries: list[str], prompts: list[str], labels: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        assert [query.removeprefix(prompts[0]) for query in queries] == ["46", "45"] * 2
        found = torch.tensor([float(q.endswith(label)) for q, label in zip(queries, labels, strict=True)])
        return {"rewards": found, "scores": found, "extra_logs": {"dummy": found}}

    prompts = prompt_set(tmp_path, {"input": "12 + 34?", "label": "46"})
    assert rewards(scored(prompts, ["46", "45"], reward_func)) == [1.0, 0.0] * 2


def areal(
    prompt: str, completions: str, prompt_ids: Any, completion_ids: list[int], answer: str, **kwargs: Any
) -> float:
    assert prompt == "12 + 34?" and completion_ids == [1] and kwargs["level"] == 3
    assert not {"prompts", "answer_match", "prompt_messages", "gold_answer"} & kwargs.keys()
    return int(completions == answer)


def small_areal(prompt: str, completions: str, answer: str, weight: float = 1.0) -> float:
    return weight * (completions == answer)


async def async_areal(
    prompt: str, completions: str, prompt_ids: Any, completion_ids: list[int], answer: str, **kwargs: Any
) -> float:
    return areal(prompt, completions, prompt_ids, completion_ids, answer, **kwargs)


def test_areals_reward_fn_gets_one_text_at_a_time(tmp_path: Path) -> None:
    row = {"prompt": "12 + 34?", "answer": "46", "level": 3}
    chat = {"messages": USER, "solutions": ["46"], "level": 3}
    for data in (row, chat):
        for function in (areal, async_areal, small_areal):
            prompts = prompt_set(tmp_path, data)
            check_signature(function, {}, False, {"prompts": prompts.columns})
            assert rewards(scored(prompts, ["46", "45"], function)) == [1.0, 0.0] * 2
    # of the data's answer column, where the gold is another one
    both = prompt_set(tmp_path, {**row, "answer": "no", "final": "46"}, answer_column="final")
    assert (
        rewards(scored(both, ["46", "45"], small_areal, trusted=True, arguments={"weight": 0.5}))
        == [0.5, 0] * 2
    )
    with pytest.raises(ConfigError, match="it needs the argument 'answer', and prompts has no such column"):
        check_signature(areal, {}, False, {"prompts": ["level"]})


def slime(args: Any, sample: Any, **kwargs: Any) -> float:
    assert (sample.prompt, sample.metadata, sample.response_length, args.weight) == ("q", {"a": 1}, 1, 0.5)
    assert sample.status.value == "completed"
    return args.weight * (sample.response == sample.label)


async def async_slime(args: Any, sample: Any) -> float:
    return slime(args, sample)


async def slime_groups(args: Any, samples: list[Any], **kwargs: Any) -> list[float]:
    return [await async_slime(args, sample) for sample in samples]


@pytest.mark.parametrize(("function", "trusted"), [(slime, True), (async_slime, False), (slime_groups, True)])
def test_slimes_reward_func_gets_args_and_a_sample(
    tmp_path: Path, function: Callable[..., Any], trusted: bool
) -> None:
    prompts = prompt_set(tmp_path, {"prompt": "q", "label": "46", "metadata": {"a": 1}})
    section = {"trusted": trusted, "arguments": {"weight": 0.5}}
    assert rewards(scored(prompts, ["46", "45"], function, **section)) == [0.5, 0.0] * 2


def test_a_file_that_imports_slimes_sample_gets_that_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Status(Enum):
        COMPLETED = "completed"
        TRUNCATED = "truncated"

    @dataclass
    class Sample:
        prompt: str = ""
        response: str = ""
        label: Any = None
        metadata: dict[str, Any] = field(default_factory=dict)
        response_length: int = 0
        status: Status = Status.COMPLETED
        group_index: int | None = None

    Sample.Status = Status  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "slime.utils.types", SimpleNamespace(Sample=Sample))

    def reward(args: Any, sample: Any) -> float:
        assert isinstance(sample, Sample)
        return float(sample.status is Status.TRUNCATED)

    columns = {"finish_reasons": ["length", "stop"], "completion_ids": [[1], [2]], "group_id": [3, 3]}
    parts = call("f", adapted(reward, {}, False), ["q"] * 2, ["a"] * 2, columns)
    assert [part.value for part in parts] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"answer": "right", "label": "wrong", "ground_truth": "wrong"}, "right"),
        ({"answer": "46", "label": 46, "ground_truth": 46}, 46),  # the same gold, in the data's type
        ({"answer": ["5", "-5"], "label": [5, -5], "ground_truth": [5, -5]}, [5, -5]),
        ({"answer": "", "label": {"a": 1}, "ground_truth": {"a": 1}}, {"a": 1}),  # answer_column: ""
        ({"answer": "46"}, "46"),
    ],
)
def test_the_gold_of_every_form_is_the_configs(row: dict[str, Any], gold: Any) -> None:
    def verl(solution_str: str, ground_truth: Any) -> tuple[float, str]:
        return 0.0, json.dumps(ground_truth)

    def verl_batch(solution_strs: Any, ground_truths: Any) -> list[Any]:
        return [(0.0, json.dumps(truth)) for truth in ground_truths]

    def openrlhf(queries: Any, labels: Any) -> list[Any]:
        return [(0.0, json.dumps(label)) for label in labels]

    def slime(args: Any, sample: Any) -> tuple[float, str]:
        return 0.0, json.dumps(sample.label)

    columns = {name: [value] for name, value in row.items()}
    for function in (verl, verl_batch, openrlhf, slime):
        (part,) = call("f", adapted(function, {}, False), ["q"], ["a"], columns)
        assert json.loads(str(part.reason)) == gold
    in_model = {"answer": ["46"], "ground_truth": ["no"], "reward_model": [{"ground_truth": 46}]}
    (part,) = call("f", adapted(verl, {}, False), ["q"], ["a"], in_model)
    assert part.reason == "46"


def test_a_function_that_names_its_arguments_gets_no_others(tmp_path: Path) -> None:
    def only(completions: list[str], answer: list[str]) -> list[float]:
        return [float(x == y) for x, y in zip(completions, answer, strict=True)]

    def logs(completions: list[str], log_metric: Callable[..., None]) -> list[float]:
        log_metric("length", 1.0)
        return [0.5] * len(completions)

    prompts = prompt_set(tmp_path, {"prompt": "q", "answer": "46", "level": 1})
    assert rewards(scored(prompts, ["46"], only)) == [1.0, 1.0]
    assert rewards(scored(prompts, ["46"], logs)) == [0.5, 0.5]


def test_a_function_that_empties_its_arguments_harms_nobody(tmp_path: Path) -> None:
    def empties(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        num = len(completions)
        for values in (prompts, completions, *columns.values()):
            values.clear()
        return [1.0] * num

    prompts = prompt_set(tmp_path, {"prompt": "q", "answer": "46", "info": {"a": 1}})
    config = VerifiersConfig(timeout_s=60, rewards={"a": {"trusted": True}, "b": {"trusted": True}})
    with Verifier(config, {"a": empties, "b": lambda completions, info: [i["a"] for i in info]}) as verifier:
        assert rewards(verifier.score(sampled(prompts.group(0), ["46"]))) == [2.0, 2.0]


# ---------------------------------------------------------------------------------------------- several golds


@pytest.mark.parametrize(("match", "want"), [("any", [1.0, 1.0, 0.0, 0.0]), ("all", [0.0, 0.0, 1.0, 0.0])])
def test_any_or_all_of_several_golds_must_be_matched(tmp_path: Path, match: str, want: list[float]) -> None:
    prompts = prompt_set(tmp_path, {"prompt": "q", "answer": ["5", "-5"]}, answer_match=match)
    completions = [r"\boxed{5}", r"\boxed{-5}", r"\boxed{-5, 5}", r"\boxed{6}"]
    config = VerifiersConfig(timeout_s=60, cpu_s=30, rewards={"math": {"trusted": True}})
    with Verifier(config) as verifier:
        assert rewards(verifier.score(sampled(prompts.group(0), completions))) == want * 2


def test_a_users_function_gets_several_golds_as_a_list(tmp_path: Path) -> None:
    def reward(completions: list[str], answer: list[Any], answer_match: list[str]) -> list[float]:
        assert answer_match[0] == "any"
        return [float(x in golds) for x, golds in zip(completions, answer, strict=True)]

    prompts = prompt_set(tmp_path, {"prompt": "q", "answer": ["5", "-5"]})
    assert rewards(scored(prompts, ["-5", "6"], reward)) == [1.0, 0.0] * 2


def test_a_gold_that_cannot_be_compared_hides_no_match_and_no_doubt() -> None:
    numeric = adapted(BUILT_IN["numeric"], {}, True)
    for text, want in (("\\boxed{5}", 1.0), ("\\boxed{6}", None)):
        (part,) = call(
            "numeric", numeric, ["q"], [text], {"answer": [["none", "5"]], "answer_match": ["any"]}
        )
        assert part.value == want


# ------------------------------------------------------------------------------------------- what is returned


def _generates(completions: list[str], **_: Any) -> Iterator[float]:
    yield from (0.5 for _ in completions)


RETURNED = [
    [0.5, 0.5],
    (0.5, 0.5),
    np.array([0.5, 0.5]),
    torch.tensor([0.5, 0.5]),
    [np.float32(0.5), np.float64(0.5)],
    [torch.tensor(0.5), torch.tensor([0.5], requires_grad=True)],
    [np.array(0.5), Decimal("0.5")],
    [{"score": 0.5, "acc": True}, {"score": np.float32(0.5)}],
    {"rewards": [0.5, 0.5]},
    {"scores": torch.tensor([0.5, 0.5]), "extra_logs": {}},
    map(float, [0.5, 0.5]),
]


@pytest.mark.parametrize("returned", RETURNED, ids=range(len(RETURNED)))
def test_numbers_in_any_dress_are_taken(returned: Any) -> None:
    parts = call("f", adapted(lambda completions: returned, {}, False), ["q"] * 2, ["a"] * 2, {})
    assert [part.value for part in parts] == [0.5, 0.5] and not any(part.is_fault for part in parts)


def test_generators_and_booleans_of_numpy_and_torch_are_taken() -> None:
    assert [p.value for p in call("f", adapted(_generates, {}, False), ["q"] * 2, ["a"] * 2, {})] == [
        0.5,
        0.5,
    ]
    for returned in ([np.bool_(True), False], [torch.tensor(True), np.False_]):
        parts = call("f", adapted(lambda completions, r=returned: r, {}, False), ["q"] * 2, ["a"] * 2, {})
        assert [part.value for part in parts] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        (["1.0"], "str '1.0', not a number"),
        ([{"acc": 1}], "not a number"),
        ([{"score": "1"}], "str '1', not a number"),
        ([np.array([1.0, 2.0])], "not a number"),
        ([torch.ones(2)], "not a number"),
        ({"reward": 1}, "not a list of rewards"),
        (1.0, "not a list of rewards"),
        (iter([1.0, 2.0]), "returned 2 rewards for 1 completion"),
    ],
)
def test_what_is_no_reward_stays_refused(returned: Any, complaint: str) -> None:
    (part,) = call("f", adapted(lambda completions: returned, {}, False), ["q"], ["a"], {})
    assert part.is_fault and part.value is None and complaint in str(part.reason)


# ---------------------------------------------------------------------------------- before any actor starts


def _needs_solution(completions: Any, solution: Any, **_: Any) -> Any: ...


def _verl_form(data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any = None) -> Any: ...


def _verl_with_more(solution_str: Any, ground_truth: Any, tests: Any) -> Any: ...


def _has_default(completions: Any, solution: Any = None) -> Any: ...


def test_the_signature_is_checked_against_the_columns() -> None:
    columns = {"prompts": ["solutions", "answer"], "evaluation.sets.held": ["solution", "tests"]}
    for fits in (_verl_form, _has_default, _generates, lambda queries, prompts, labels: None):
        check_signature(fits, [], False, columns)
    check_signature(_needs_solution, ["solution"], False, columns)  # an argument of the config
    check_signature(slime, ["weight", "rm_url"], False, columns)
    with pytest.raises(ConfigError) as caught:
        check_signature(_needs_solution, [], False, columns)
    assert str(caught.value) == (
        "it needs the argument 'solution', and prompts has no such column; it has solutions, answer; did you "
        "mean solutions?"
    )
    with pytest.raises(ConfigError, match="argument 'tests', and prompts has no such column"):
        check_signature(_verl_with_more, [], False, columns)


class _Scorer:
    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [self.weight for _ in completions]


def _one(completions: list[str], answer: list[str]) -> float | None: ...


def _positional(completions: list[str], /, **_: Any) -> list[float]: ...


def _single(prompt: str, completion: str) -> Any: ...


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (_Scorer, "_Scorer is a class: name a function, or a callable object such as reward = _Scorer()"),
        (_one, "it says that it returns one number, and it is called with a list of completions"),
        (_positional, "its argument 'completions' cannot be given by name (there is a / behind it)"),
        (
            _single,
            "it needs the argument 'prompt', and data has no such column; it has answer; did you mean p",
        ),
        (lambda: [1.0], "it takes no arguments by name"),
        (lambda *columns: [1.0], "it takes no arguments by name"),
    ],
)
def test_what_a_signature_shows_is_refused_before_the_first_call(
    function: Callable[..., Any], complaint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_signature(function, [], False, {"data": ["answer"]})
    assert str(caught.value).startswith(complaint)
    config = VerifiersConfig(rewards={"mine": {"trusted": True}})
    with pytest.raises(ConfigError, match=r"^verifiers\.rewards\.mine: "):
        validate_rewards(config, {"mine": function}, {"data": ["answer"]})


def test_a_callable_object_is_a_function(tmp_path: Path) -> None:
    prompts = prompt_set(tmp_path, {"prompt": "q", "answer": "46"})
    assert rewards(scored(prompts, ["46"], _Scorer(0.5))) == [0.5, 0.5]


def test_what_a_function_imports_when_it_runs_is_imported_once_before_the_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check has a child of its own, which would import it anew."""
    for name in ("slow_one", "slow_two", "relative_one"):
        (tmp_path / f"{name}.py").write_text(f"import sys\nsys.{name} = getattr(sys, '{name}', 0) + 1\n")
    (tmp_path / "own.py").write_text(
        "def helper():\n    from slow_two import sys\n"
        "def unused():\n    from .relative_one import sys\n"
        "def reward(completions, **columns):\n"
        "    import slow_one, not_there_at_all\n"
        "    return [0.0]\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    source = {"place": f"{tmp_path}/own.py:reward", "arguments": {}, "is_strict": False}
    load(source)
    assert not {"slow_one", "slow_two"} & set(sys.modules)
    load(source, imports_ahead=True)
    assert {"slow_one", "slow_two"} <= set(sys.modules) and "relative_one" not in sys.modules
    for name in ("slow_one", "slow_two"):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("trusted", [True, False])
def test_validate_rewards_names_the_reward_and_the_column(trusted: bool) -> None:
    config = VerifiersConfig(rewards={"mine": {"trusted": trusted}})
    with pytest.raises(ConfigError, match=r"verifiers\.rewards\.mine: it needs the argument 'solution'"):
        validate_rewards(config, {"mine": _needs_solution}, {"prompts": ["answer"]})
    validate_rewards(config, {"mine": _needs_solution}, {"prompts": ["solution"]})


def test_a_built_in_function_that_needs_golds_is_refused_without(tmp_path: Path) -> None:
    prompts = prompt_set(tmp_path, {"prompt": "q"}, answer_column="")
    with pytest.raises(
        ConfigError, match=r"verifiers\.rewards\.math: it needs the argument 'answer', and prompts"
    ):
        validate_rewards(VerifiersConfig(), None, {"prompts": prompts.columns})
    validate_rewards(VerifiersConfig(rewards={"format": 1.0}), None, {"prompts": prompts.columns})
