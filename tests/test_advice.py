"""A run that cannot learn says why once, after its first steps, with the key to change."""

from typing import Any

import pytest

from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.groups import NO_ANSWER
from gvpo_ray.observe.advice import FirstSteps, golds_out_of_reach, why_nothing_is_learned
from gvpo_ray.observe.console import RunConsole, time_left
from gvpo_ray.observe.metrics import batch_metrics

LENGTH = 12


def group(*rewards: float | None, reasons: Any = None, cut_off: int = 0, length: int = LENGTH) -> dict:
    """A group of freshly sampled completions, the first `cut_off` of them cut off."""
    num = len(rewards)
    return {
        "rewards": list(rewards),
        "completion_ids": [[1] * length] * num,
        "finish_reasons": ["length"] * cut_off + ["stop"] * (num - cut_off),
        "version_min": [0] * num,
        "sources": ["policy"] * num,
        "reward_reasons": [reasons] * num,
    }


def config(**sections: Any) -> GVPOConfig:
    base = {"run_dir": "x", "num_steps": 50, "groups_per_step": 8, "model": {"path": "m"}}
    return GVPOConfig.from_dict({**base, "prompts": {"path": "p"}, **sections}, where="test")


def steps(batch: list[dict], num: int = 2, damping: float = 1.0, skipped: float = 0.0) -> list[dict]:
    line = {**batch_metrics(batch, version=0), "gvpo/damping": damping, "updates/skipped": skipped}
    return [{"step": step + 1, **line} for step in range(num)]


HEALTHY = [group(1.0, 0.0, 0.0, 1.0) for _ in range(4)]
WRONG = [group(0.0, 0.0, 0.0, 0.0) for _ in range(8)]


@pytest.mark.parametrize(
    ("batch", "sections", "cause", "key"),
    [
        ([group(*[None] * 4, reasons="other: no gold answer")] * 8, {}, "no reward", "prompts.answer_column"),
        (
            [group(*[None] * 4, reasons="timeout: math took")] * 8,
            {},
            "take longer",
            "verifiers.timeout_s (10)",
        ),
        ([group(*[None] * 4, reasons="memory: math")] * 8, {}, "need more", "verifiers.memory_gib (2)"),
        ([group(*[None] * 4, reasons="crash: math")] * 8, {}, "crash", "verifiers.rewards"),
        (
            [group(*[None] * 4) | {"trained_tokens": [[False] * LENGTH] * 4}] * 8,
            {},
            "sampled no token",
            "trained_tokens",
        ),
        (
            [group(0.0, 0.0, 0.0, 0.0, cut_off=3, reasons=f"math: {NO_ANSWER}")] * 8,
            {"sampling": {"max_tokens": 64}},
            "75% of the completions are cut off",
            "sampling.max_tokens (64)",
        ),
        (
            [group(0.0, 0.0, 0.0, 0.0, reasons=f"math: {NO_ANSWER}")] * 8,
            {},
            "no answer was found in 100%",
            "prompts.system_prompt",
        ),
        ([group(0.0, 0.0, 0.0, 0.0, length=1)] * 8, {}, "are empty", "prompts.template"),
        (WRONG, {}, "100% of the completions are wrong", "easier problems in prompts.path"),
        ([group(1.0, 1.0, 1.0, 1.0)] * 8, {}, "100% of the completions are right", "harder problems"),
        (
            [group(1.0, 1.0, 1.0, 1.0), group(0.0, 0.0, 0.0, 0.0)] * 4,
            {"sampling": {"temperature": 0.7}},
            "differ between prompts",
            "sampling.temperature (0.7)",
        ),
        # one group of eleven says something: a model that is right once in 44 tries
        ([*[group(0.0, 0.0, 0.0, 0.0)] * 10, group(0.0, 1.0, 0.0, 0.0)], {}, "91% of the groups", "easier"),
        (HEALTHY, {"learner": {"learning_rate": 1e-12}}, "no weight moves", "learner.learning_rate (1e-12)"),
        (
            HEALTHY,
            {"learner": {"learning_rate": 1e-7, "warmup_steps": 100000}},
            "no weight moves",
            "learner.warmup_steps (100000)",
        ),
    ],
)
def test_each_cause_has_its_line_with_the_key_to_change(
    batch: list[dict], sections: dict[str, Any], cause: str, key: str
) -> None:
    text = why_nothing_is_learned(steps(batch), config(**sections))
    assert text is not None and cause in text and key in text and "\n" not in text


PROGRAMS = [
    '{"inputs": ["1\\n"], "outputs": ["2\\n"]}',  # APPS, TACO, Eurus
    '{"fn_name": "f", "inputs": [[1]]}',
    '[{"input": "1", "output": "2", "testtype": "stdin"}]',  # LiveCodeBench
    '["assert f(1) == 2", "assert f(2) == 3"]',  # MBPP
    "def check(candidate):\n    assert candidate(1) == 2",  # HumanEval
]
WORKED = ["Ann has 3 + 4 = <<3+4=7>>7.\n#### 7", r"So it is \boxed{7}."]


@pytest.mark.parametrize(
    ("golds", "reward", "text"),
    [
        (WORKED, "exact_match", "exact_match cannot match 2 of 2 gold answers, which are worked solutions"),
        (WORKED, "numeric", "name a column of the answers alone in prompts.answer_column"),
        (
            ["46.0", "-3.00", "0.5"],
            "exact_match",
            "cannot match 2 of 3 gold answers, which are whole numbers",
        ),
        (["46.0"] * 2, "exact_match", "(such as '46.0'): use numeric or math in verifiers.rewards"),
        *(
            (PROGRAMS, reward, f"{reward} cannot match 5 of 5 gold answers, which are tests of programs")
            for reward in ("math", "numeric", "exact_match")
        ),
        ([*PROGRAMS, *["46"] * 5], "math", "math cannot match 5 of 10 gold answers"),
    ],
)
def test_golds_that_no_completion_matches_are_said_with_the_key_to_change(
    golds: list[str], reward: str, text: str
) -> None:
    for verifiers in ({"rewards": {reward: 1}}, {"rewards": {"mine": {"function": reward}, "math": 1}}):
        line = golds_out_of_reach(golds, config(verifiers=verifiers).verifiers, "prompts")
        assert line is not None and line.startswith("prompts: ") and text in line and "\n" not in line


@pytest.mark.parametrize(
    ("golds", "reward"),
    [
        (WORKED, "math"),
        (["46.0"], "numeric"),
        ([r"\boxed{7}", "\\boxed{46.0}\n"], "numeric"),
        (["46", "0.5", "1.50", "v2.0 is out", "a.0"], "exact_match"),
        (["\\{1, 2\\}", "[0, 1)", "[[1, 2], [3, 4]]", "assertion", "the input"], "math"),
        (['{"name": "Ann"}', '["a", "b"]'], "exact_match"),  # such an answer can be given
        (["46.0", *["46"] * 99], "exact_match"),  # one in a hundred is no habit of the column
        ([], "exact_match"),
    ],
)
def test_golds_that_completions_can_match_get_no_line(golds: list[str], reward: str) -> None:
    assert golds_out_of_reach(golds, config(verifiers={"rewards": {reward: 1}}).verifiers, "prompts") is None


def test_a_damping_of_nothing_is_a_cause_of_its_own() -> None:
    text = why_nothing_is_learned(steps(HEALTHY, damping=1e-9), config())
    assert text is not None and "loss.damped" in text
    # updates that were skipped have no damping, and their steps say so themselves
    assert why_nothing_is_learned(steps(HEALTHY, damping=0.0, skipped=4.0), config()) is None


@pytest.mark.parametrize(
    "batch",
    [
        HEALTHY,
        # hard and easy prompts beside some that teach
        [group(1.0, 1.0, 1.0, 1.0)] * 2 + [group(0.0, 0.0, 0.0, 0.0)] * 4 + [group(0.0, 1.0, 0.0, 0.0)] * 2,
        [group(0.0, 1.0, 0.0, 0.0, cut_off=4)] * 4,  # most are cut off, and there is something to learn
        [group(1.0, None, 0.0, None)] * 4,
    ],
)
def test_a_run_that_can_learn_gets_no_line(batch: list[dict]) -> None:
    assert why_nothing_is_learned(steps(batch), config()) is None
    # the defaults' smallest run: 1e-6 and one update
    short = config(num_steps=1, learner={"num_mini_batches": 1})
    assert why_nothing_is_learned(steps(batch, num=1), short) is None


def test_two_steps_are_judged_and_of_a_shorter_run_the_only_one() -> None:
    assert why_nothing_is_learned([], config()) is None
    assert why_nothing_is_learned(steps(WRONG, num=1), config()) is None
    text = why_nothing_is_learned(steps(WRONG, num=1), config(num_steps=1))
    assert text is not None and "the first step shows" in text
    # a first step without a right answer, and then some
    assert why_nothing_is_learned([*steps(WRONG, 1), *steps(HEALTHY, 1)], config()) is None


def test_it_is_said_once_and_not_after_each_step() -> None:
    first = FirstSteps(config())
    said = [first.judge(line) for line in steps(WRONG, num=6)]
    assert [text is not None for text in said] == [False, True, False, False, False, False]


def test_a_step_whose_metrics_are_lost_is_not_judged_and_ends_no_run() -> None:
    judge = FirstSteps(config()).judge
    lines = [{"step": 1, "tokens/generated": 3.0}, *steps(WRONG)]
    said = [judge(line) for line in lines]
    assert said[:2] == [None, None] and said[2] is not None


def test_the_time_left_counts_whole_steps_and_not_the_start() -> None:
    assert time_left([], 10) is None
    assert time_left([(1, 100.0)], 10) is None  # what came before it was the start of engines
    assert time_left([(1, 100.0), (2, 103.0)], 10) == 3.0 * 8
    assert time_left([(5, 100.0), (6, 103.0), (7, 104.0)], 10) == 2.0 * 3


def test_the_first_line_of_a_process_promises_no_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    line = {
        "reward/mean": 0.5,
        "loss": 0.1,
        "policy/kl_ref": 0.0,
        "tokens/trained": 10.0,
        "time/step": 90.0,
        "staleness/mean": 0.0,
        "time/wait_for_groups": 80.0,
    }
    console = RunConsole(config(loss={"objective": "rloo"}), done=3, num_steps=50)
    console.step({"step": 4, **line})
    console.step({"step": 5, **line})
    first, second = capsys.readouterr().out.splitlines()
    assert "step  4/50" in first and "left" not in first
    assert "step  5/50" in second and "left 0:00" in second


def test_equal_rewards_are_no_mistake_where_another_model_is_the_reference() -> None:
    learns = {"learner": {"learning_rate": 1e-3}}
    assert why_nothing_is_learned(steps(WRONG), config(**learns)) is not None
    distils = config(**learns, loss={"reference": {"model": "teacher"}})
    assert why_nothing_is_learned(steps(WRONG), distils) is None
