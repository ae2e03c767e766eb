"""What verifiers make of completions: rewards, parts, reasons, and mistakes that are found before a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scoring import (
    LIMIT_S,
    group_of,
    reasons_of,
    rewards_of,
    score_with,
)

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.observe.metrics import batch_metrics
from gvpo_ray.verifiers.math.reward import math_reward
from gvpo_ray.verifiers.outages import RewardError
from gvpo_ray.verifiers.verifier import Verifier, validate_rewards

pytestmark = pytest.mark.usefixtures("no_child_left")


SAMPLE = Path(__file__).parent / "data" / "gsm8k_math_sample.parquet"


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(VerifiersConfig(timeout_s=LIMIT_S)) as verifier:
        yield verifier


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (
            "85",
            ["\\boxed{85}", "So 80 + 5 = 85. The answer is 85.", "$85.0$"],
            ["\\boxed{84}", "The answer is 58."],
        ),
        (
            "\\frac{1}{2}",
            ["\\boxed{\\frac12}", "The answer is 0.5", "$\\frac{2}{4}$"],
            ["\\boxed{2}", "$\\frac{1}{3}$"],
        ),
        ("1,234", ["\\boxed{1234}"], ["\\boxed{1.234}"]),
        ("x^2 - 1", ["$(x - 1)(x + 1)$"], ["$x^2 + 1$"]),
        ("(3, -1)", ["$(3,-1)$"], ["$(-1,3)$"]),
        ("\\$36", ["\\boxed{36}"], ["\\boxed{63}"]),
        ("$\\sqrt{8}$", ["\\boxed{2\\sqrt{2}}"], ["\\boxed{2}"]),
    ],
)
def test_right_answers_get_1_and_wrong_ones_0(
    verifier: Verifier, answer: str, right: list[str], wrong: list[str]
) -> None:
    scored = verifier.score(group_of(answer, right + wrong))
    assert rewards_of(scored) == [1.0] * len(right) + [0.0] * len(wrong)
    assert reasons_of(scored) == [None] * len(right + wrong)


def test_every_real_gold_answer_is_right_when_boxed_and_a_neighbours_answer_is_wrong(
    verifier: Verifier,
) -> None:
    answers = pq.read_table(SAMPLE)["answer"].to_pylist()
    assert len(set(answers)) == 20
    for answer, neighbour in zip(answers, answers[1:] + answers[:1], strict=True):
        completions = [f"Therefore the answer is $\\boxed{{{text}}}$." for text in (answer, neighbour)]
        assert rewards_of(verifier.score(group_of(answer, completions))) == [1.0, 0.0], answer


def test_a_completion_without_an_answer_is_wrong_and_says_so(verifier: Verifier) -> None:
    scored = verifier.score(group_of("85", ["", "\\boxed{8", "\\boxed{85"]))
    assert rewards_of(scored) == [0.0, 0.0, 0.0]
    assert reasons_of(scored) == ["math: no answer found in the completion"] * 3


def test_what_was_cut_at_the_token_limit_is_not_right_by_luck(verifier: Verifier) -> None:
    completions = ["First, 80 + 5 is 85", "So it is \\boxed{85}. Check:"]
    scored = verifier.score(group_of("85", completions, finish_reasons=["length", "length"]))
    assert rewards_of(scored) == [0.0, 1.0]


def test_a_gold_answer_that_does_not_parse_is_not_scored_unless_the_text_is_the_same(
    verifier: Verifier,
) -> None:
    scored = verifier.score(group_of("\\frac{", ["\\boxed{1}", "\\boxed{2}"]))
    assert rewards_of(scored) == [None, None]
    assert reasons_of(scored) == ["math: the gold answer '\\\\frac{' cannot be understood"] * 2


def test_a_scored_table_is_a_valid_group_table_and_keeps_what_it_had(verifier: Verifier) -> None:
    two = pa.concat_tables(
        [group_of("1", ["\\boxed{1}", "\\boxed{2}", "none"]), group_of("2", ["\\boxed{2}"])]
    )
    scored = verifier.score(two)
    groups.validate(scored, ("group_id", "answer", "completions", *groups.REWARD_COLUMNS))
    assert scored.select(two.column_names).equals(two)
    assert scored["rewards"].to_pylist() == [[1.0, 0.0, 0.0], [1.0]]
    assert [row["reward_parts"] for row in groups.rows(scored)] == [
        {"math": [1.0, 0.0, 0.0]},
        {"math": [1.0]},
    ]


def test_hostile_text_arrives_as_it_is(verifier: Verifier) -> None:
    completions = [
        "\x00\x00 The answer is $5$.",
        "\u2028\r\n\x1b[0m \\boxed{5}",
        "𝔘 is \\boxed{5}",
        '{"part": 1.0, "reason": null}\n',
        "\\boxed{" * 200,
        "(" * 5000,
    ]
    assert rewards_of(verifier.score(group_of("5", completions)))[:3] == [1.0, 1.0, 1.0]
    assert 1.0 not in rewards_of(verifier.score(group_of("5", completions)))[3:]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("[None]", "math gave no reward (None)"),
        ("[(None, 'no unit')]", "no unit"),
        ("[float('nan')]", "math returned nan, not a finite float32"),
        ("[1e39]", "math returned 1e+39, not a finite float32"),
        ("['1']", "math returned str '1', not a number"),
        ("[]", "math returned 0 rewards for 1 completion"),
        ("[1.0, 2.0]", "math returned 2 rewards for 1 completion"),
        ("1.0", "math returned float '1.0', not a list of rewards, one for each completion"),
        ("1 / 0", "math raised ZeroDivisionError: division by zero"),
        ("exec('raise SystemExit(1)')", "math raised SystemExit: 1"),
        ("exec(r'raise ValueError(\"\\ud800\\n!\")')", "math raised ValueError: ? !"),
    ],
)
def test_a_result_that_is_no_reward_leaves_the_completion_out_with_the_reason(
    result: str, reason: str
) -> None:
    scored = score_with(
        lambda prompts, completions, **_: eval(result) if completions == ["bad"] else [1.0], ["a", "bad", "b"]
    )
    assert rewards_of(scored) == [1.0, None, 1.0]
    assert reasons_of(scored) == [None, reason, None]


@pytest.mark.parametrize(
    ("result", "reward"), [("[True]", 1.0), ("(2,)", 2.0), ("__import__('numpy').array([0.25])", 0.25)]
)
def test_numbers_of_other_kinds_are_rewards(result: str, reward: float) -> None:
    assert rewards_of(score_with(lambda prompts, completions, **_: eval(result), ["a"])) == [reward]


def test_several_rewards_are_a_weighted_sum_and_a_part_without_reward_leaves_none(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def length(prompts, completions, **columns):\n"
        "    return [None if 'skip' in text else len(text) for text in completions]\n"
    )
    length = f"{tmp_path / 'mine.py'}:length"
    with Verifier(VerifiersConfig(timeout_s=LIMIT_S, rewards={"math": 2.0, length: -0.5})) as verifier:
        scored = verifier.score(group_of("85", ["$85$", "$84$", "$85$ skip"]))
    # 2 * 1 - 0.5 * 4 = 0; 2 * 0 - 0.5 * 4 = -2; 2 * 1 - nothing
    assert rewards_of(scored) == [0.0, -2.0, None]
    assert next(groups.rows(scored))["reward_parts"] == {"math": [1.0, 0.0, 1.0], length: [4.0, 4.0, None]}
    assert reasons_of(scored) == [None, None, f"{length} gave no reward (None)"]


def test_a_weighted_sum_beyond_float32_is_no_reward() -> None:
    scored = score_with(lambda prompts, completions, **_: [3e38], ["a"], rewards={"math": 2.0})
    assert rewards_of(scored) == [None]
    assert reasons_of(scored) == ["the weighted sum is not a finite float32"]


def test_a_callable_is_added_with_weight_1_and_sees_one_completion_with_its_columns() -> None:
    def columns(prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        import json

        return [(1.0, json.dumps([prompts, completions, columns]))]

    table = group_of(
        "85", ["$85$", "\\boxed{5}"], completion_ids=[[1, 2], [3]], finish_reasons=["stop", "length"]
    )
    with Verifier(VerifiersConfig(timeout_s=LIMIT_S), {"columns": columns}) as verifier:
        scored = verifier.score(table)
    assert rewards_of(scored) == [2.0, 1.0]
    seen = json.loads(reasons_of(scored)[1])
    expected = {
        "group_id": [7],
        "answer": ["85"],
        "dataset": ["d"],
        "completion_ids": [[3]],
        "finish_reasons": ["length"],
    }
    assert seen == [["What?"], ["\\boxed{5}"], expected]


def test_completions_that_bring_a_reward_are_correct_by_it(verifier: Verifier) -> None:
    graded = group_of(
        "8", ["a", "b"], rewards=[1.0, 0.0], completion_ids=[[1], [2]], finish_reasons=["stop"] * 2
    )
    (row,) = groups.rows(verifier.score(graded))
    metrics = batch_metrics([{**row, "version_min": [None, None]}], 0)
    assert (metrics["reward/mean"], metrics["completions/correct"]) == (0.5, 0.5)


@pytest.mark.parametrize("result", ["10**400", "-10**400", "__import__('fractions').Fraction(10**400)"])
@pytest.mark.parametrize("trusted", [False, True])
def test_a_number_beyond_all_limits_is_a_fault(result: str, trusted: bool) -> None:
    scored = score_with(
        lambda prompts, completions, **_: [eval(result) if text == "bad" else 1.0 for text in completions],
        ["a", "bad"],
        rewards={"math": {"trusted": trusted}},
    )
    assert rewards_of(scored) == [1.0, None]
    assert reasons_of(scored) == [None, "math returned a number beyond 1e308, not a finite float32"]


@pytest.mark.parametrize("trusted", [False, True])
def test_half_a_surrogate_pair_in_a_reason_is_replaced(trusted: bool) -> None:
    scored = score_with(
        lambda prompts, completions, **_: [(0.5, "half \ud83d\nof it")] * len(completions),
        ["a"],
        rewards={"math": {"trusted": trusted}},
    )
    assert (rewards_of(scored), reasons_of(scored)) == ([0.5], ["half ? of it"])

    def raises(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        raise ValueError("half \ud83d")

    scored = score_with(raises, ["a"], rewards={"math": {"trusted": trusted}})
    assert reasons_of(scored) == ["math raised ValueError: half ?"]


def test_an_argument_of_the_config_holds_where_the_data_have_a_column_of_its_name() -> None:
    with Verifier(VerifiersConfig(rewards={"length": {"arguments": {"limit": 10}}})) as verifier:
        (check,) = verifier.check(["p"], ["a b c d e"], {"limit": [1000]})
    assert check.reward == -0.5


def test_validate_rewards_accepts_what_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helper_of_mine.py").write_text("HALF = 0.5\n")
    (tmp_path / "module_of_mine.py").write_text(
        "from dataclasses import dataclass\nfrom helper_of_mine import HALF\n"
        "@dataclass\nclass Parameters:\n    value: float = HALF\n"
        "def reward(prompts, completions, **columns):\n    return [Parameters().value for _ in completions]\n"
    )
    validate_rewards(VerifiersConfig())
    validate_rewards(VerifiersConfig(rewards={f"{tmp_path}/module_of_mine.py:reward": 1.0}))
    monkeypatch.syspath_prepend(str(tmp_path))
    validate_rewards(VerifiersConfig(rewards={"module_of_mine:reward": 1.0}))
    monkeypatch.chdir(tmp_path)
    with Verifier(
        VerifiersConfig(rewards={"module_of_mine.py:reward": 1.0, "module_of_mine:reward": 1.0})
    ) as verifier:
        assert rewards_of(verifier.score(group_of("1", ["a"]))) == [1.0]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("{folder}/no.py:reward", "no file {folder}/no.py"),
        ("no_such_module.inner:reward", "no module named no_such_module"),
        ("{folder}/bad.py:reword", "{folder}/bad.py has no function 'reword'"),
        ("{folder}/bad.py:LIMIT", "LIMIT is int, not a function"),
        ("json:reward", "json has no function 'reward'"),
        ("{folder}/broken.py:reward", "ModuleNotFoundError: No module named 'no_such_dependency'"),
    ],
)
def test_validate_rewards_names_what_cannot_be_loaded(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / "bad.py").write_text("LIMIT = 1\ndef reward(prompts, completions, **columns): return [1.0]\n")
    (tmp_path / "broken.py").write_text("import no_such_dependency\n")
    name, complaint = name.format(folder=tmp_path), complaint.format(folder=tmp_path)
    with pytest.raises(ConfigError) as caught:
        validate_rewards(VerifiersConfig(rewards={name: 1.0}))
    assert str(caught.value) == f"verifiers.rewards.{name}: {complaint}"


def test_the_math_reward_is_a_reward_function_like_any_other() -> None:
    assert math_reward(["p", "p"], ["$0.5$", "$2$"], answer=["\\frac{1}{2}", "3"], dataset=["d", "d"]) == [
        1.0,
        0.0,
    ]


def test_a_reward_name_that_is_neither_built_in_nor_passed_is_a_config_error_before_any_child_starts() -> (
    None
):
    with pytest.raises(
        ConfigError, match=r"verifiers\.rewards\.brevity: unknown reward; built in is math, exact_match"
    ):
        validate_rewards(VerifiersConfig(rewards={"brevity": 1.0}))


def test_an_argument_that_a_built_in_function_does_not_have_is_a_config_error() -> None:
    with pytest.raises(
        ConfigError,
        match=r"verifiers\.rewards\.numeric: no argument 'tolerance'; it takes absolute_tolerance, answer, "
        r"relat",
    ):
        validate_rewards(VerifiersConfig(rewards={"numeric": {"arguments": {"tolerance": 1}}}))


def test_a_function_that_fails_on_every_row_stops_the_run_and_one_that_fails_now_and_then_does_not() -> None:
    def fails(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float("nan") if completions[0] == "bad" else 1.0]

    with (
        Verifier(VerifiersConfig(timeout_s=LIMIT_S), {"math": fails}) as verifier,
        pytest.raises(RewardError) as caught,
    ):
        verifier.score(group_of("1", ["bad"] * 40))
    assert str(caught.value) == (
        "verifiers.rewards.math fails on every row (40 so far), last on completion 39 of group 7: math "
        "returned nan, not a finite float32"
    )
    assert rewards_of(score_with(fails, ["good"] + ["bad"] * 40)) == [1.0] + [None] * 40


def test_a_trusted_function_sees_whole_groups_and_has_the_network_and_files(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, socket\n"
        "async def reward(prompts, completions, answer, **columns):\n"
        "    socket.socket().close()\n"
        "    return [float(len(completions) + (text == gold) + os.getpid()) for text, gold in "
        "zip(completions, answer)]\n"
    )
    with Verifier(VerifiersConfig(rewards={f"{tmp_path}/mine.py:reward": {"trusted": True}})) as verifier:
        assert rewards_of(verifier.score(group_of("1", ["1", "2", "3"]))) == [
            4.0 + os.getpid(),
            3.0 + os.getpid(),
            3.0 + os.getpid(),
        ]


def test_a_coroutine_function_is_a_reward_function() -> None:
    async def waits(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import asyncio

        await asyncio.sleep(0.01)
        return [float(len(completions[0]))]

    assert rewards_of(score_with(waits, ["a", "bb"])) == [1.0, 2.0]


def test_completions_that_have_a_reward_keep_it_and_only_the_others_are_checked() -> None:
    def seen(prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        import json

        return [
            (0.5, json.dumps([prompts, completions, columns["finish_reasons"], columns["group_id"]]))
        ] * len(completions)

    more = {
        "finish_reasons": ["stop", "length", "stop", "length"],
        "rewards": [2.0, None, 0.0, None],
        "reward_parts": {"math": [1.0, None, 0.0, 1.0], "gone": [1.0, None, 1.0, 1.0]},
        "reward_reasons": ["as it was", "timeout: math took more than 1 s", None, None],
    }
    config = VerifiersConfig(rewards={"math": {"trusted": True}, "new": {"trusted": True}})
    with Verifier(config, {"math": seen, "new": seen}) as verifier:
        scored = verifier.score(group_of("85", ["a", "b", "c", "d"], **more))
    # b and d alone, by both: 0.5 + 0.5 = 1
    assert rewards_of(scored) == [2.0, 1.0, 0.0, 1.0]
    assert next(groups.rows(scored))["reward_parts"] == {
        "math": [1.0, 0.5, 0.0, 0.5],
        "new": [None, 0.5, None, 0.5],
    }
    call = json.dumps([["What?", "What?"], ["b", "d"], ["length", "length"], [7, 7]])
    assert reasons_of(scored) == ["as it was", f"{call}\n{call}", None, f"{call}\n{call}"]


def test_a_group_that_has_all_of_its_rewards_goes_to_no_reward_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def fails(prompts, completions, **columns): raise AssertionError\n")
    name = f"{tmp_path}/mine.py:fails"
    offline = group_of("85", ["a", "b"], rewards=[0.25, 1.0])
    for config in (VerifiersConfig(rewards={name: {"trusted": True}}), VerifiersConfig(rewards={name: 1.0})):
        with Verifier(config) as verifier:
            scored = verifier.score(offline)
            assert rewards_of(verifier.score(group_of("85", ["a", "b"], rewards=[None, 1.0]))) == [None, 1.0]
        groups.validate(scored, groups.REWARD_COLUMNS)
        assert rewards_of(scored) == [0.25, 1.0] and reasons_of(scored) == [None, None]
        assert next(groups.rows(scored))["reward_parts"] == {name: [None, None]}


def test_a_row_of_several_whose_rewards_are_null_is_checked_like_any_other(verifier: Verifier) -> None:
    two = pa.concat_tables(
        [group_of("1", ["\\boxed{1}", "none"], rewards=rewards) for rewards in (None, [0.5, None])]
    )
    assert verifier.score(two)["rewards"].to_pylist() == [[1.0, 0.0], [0.5, 0.0]]


def test_a_completion_of_which_the_policy_sampled_nothing_has_no_reward_whatever_it_came_with() -> None:
    def fails(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        assert completions == ["b"]
        return [1.0]

    masks = [[False, False], [False, True], [False], None]
    ids = [[4, 5], [4, 5], [4], [4]]
    with Verifier(VerifiersConfig(rewards={"mine": {"trusted": True}}), {"mine": fails}) as verifier:
        scored = verifier.score(
            group_of(
                "85",
                ["a", "b", "c", "d"],
                completion_ids=ids,
                trained_tokens=masks,
                rewards=[None, None, 0.5, 0.25],
            )
        )
    assert rewards_of(scored) == [None, 1.0, None, 0.25]
    assert reasons_of(scored) == [groups.UNTRAINED, None, groups.UNTRAINED, None]
    assert next(groups.rows(scored))["reward_parts"] == {"mine": [None, 1.0, None, None]}
