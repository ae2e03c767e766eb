"""The completions whose tokens a report colours: which they are, and that their numbers are the learner's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import Recorder, load, mixed_batch, same, settings, weights, with_loss
from pydantic import ValidationError
from tiny import make_group, make_model

from gvpo_ray.learner.examples import Examples
from gvpo_ray.learner.loop import learn
from gvpo_ray.learner.references import ReferenceLogprobs
from gvpo_ray.learner.step import train_step
from gvpo_ray.observe.token_examples import (
    MAX_FIRST,
    MAX_LAST,
    TokenExample,
    example_files,
    read_examples,
    write_examples,
)
from gvpo_ray.weights.transfer import ObjectPublisher

NEAR = pytest.approx


def examples_of(
    folder: Path, batch: list[dict[str, Any]], version: int = 3, loss: Any = None, **learner: Any
) -> list[TokenExample]:
    given = settings(folder, **learner)
    given = with_loss(given, **loss) if loss else given
    policy = load(given.model_path, given)
    if given.loss.reference == "initial":
        policy.reference.load(given.model_path)
    policy.step = version
    examples = Examples()
    train_step(policy, batch, given, examples)
    return examples.chosen()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    make_model(folder / "model")
    return folder


def test_the_numbers_are_those_of_the_model_of_the_log_and_of_the_papers_gradient(folder: Path) -> None:
    row = make_group(1, (1.0, 0.0, 0.5), version=1)
    given = settings(folder)
    own = [tokens.tolist() for tokens in load(given.model_path, given).token_logprobs([row])]
    found = examples_of(folder, [row], loss={"preset": "paper"})
    # D is 0 with the reference `previous`, so d loss / d log pi = -beta (R_i - mean R) / ((m - 1) |D|)
    pushes = [0.1 * (reward - 0.5) / 2 for reward in (1.0, 0.0, 0.5)]
    ratios = [sum(own[i]) - sum(row["sampling_logprobs"][i]) for i in range(3)]
    by_kind = {kind: one for one in found for kind in one.kinds}
    assert by_kind["pushed up"].completion == 0 and by_kind["pushed down"].completion == 1
    assert max(ratios) < 0 and "more likely" not in by_kind
    assert by_kind["less likely"].completion == ratios.index(min(ratios))
    for one in found:
        i = one.completion
        assert one.ids == row["completion_ids"][i] and one.num_tokens == len(one.ids)
        assert one.policy == NEAR(own[i], rel=1e-4) and one.reference == NEAR(own[i], rel=1e-4)
        assert one.sampler == NEAR(row["sampling_logprobs"][i])
        assert one.push == NEAR([pushes[i]] * len(one.ids), rel=1e-4, abs=1e-9)
        assert (one.sampler_ratio, one.reference_ratio) == (NEAR(ratios[i], rel=1e-4), 0.0)
        assert (one.reward, one.group_reward) == (row["rewards"][i], 0.5)
    assert len(found) == len({one.completion for one in found})


def test_groups_that_a_pass_cannot_hold_give_the_same_examples_and_none_of_them_changes_the_training(
    folder: Path,
) -> None:
    def trained(tokens: int, examples: Examples | None) -> dict[str, Any]:
        given = settings(folder, micro_batch_tokens=tokens, num_mini_batches=2)
        policy = load(given.model_path, given)
        train_step(policy, mixed_batch(1), given, examples)
        return weights(policy)

    whole, parts = Examples(), Examples()
    assert same(trained(4096, whole), trained(4096, None)) and same(trained(1, parts), trained(1, None))
    assert len(whole.chosen()) >= 2
    for one, other in zip(whole.chosen(), parts.chosen(), strict=True):
        assert (one.group_id, one.completion, one.kinds) == (other.group_id, other.completion, other.kinds)
        assert one.push == NEAR(other.push, rel=1e-2) and one.policy == NEAR(other.policy, rel=1e-2)


def test_of_what_others_sampled_and_of_a_reference_known_by_its_sum_no_token_numbers_are_made_up(
    folder: Path,
) -> None:
    (up, down) = examples_of(folder, [make_group(1, (0.0, 1.0), None)], loss={"reference": "initial"})[::-1]
    assert (up.kinds, down.kinds) == (["pushed up"], ["pushed down"])
    assert up.sampler is None and up.sampler_ratio is None and up.reference is None
    assert up.reference_ratio == NEAR(0.0, abs=1e-4) and up.source == "offline:people"


def test_tokens_of_the_environment_have_no_numbers(folder: Path) -> None:
    row = make_group(1, (1.0, 0.0), version=3)
    mask = [[token % 2 == 0 for token in range(len(ids))] for ids in row["completion_ids"]]
    for one in examples_of(folder, [{**row, "trained_tokens": mask}]):
        for values in (one.policy, one.sampler, one.reference, one.push):
            assert values is not None
            assert [value is not None for value in values] == mask[one.completion]
        assert one.kinds and one.sampler_ratio == 0.0  # this step's own: exactly


@pytest.mark.parametrize("more", [0, 1, 40])
def test_of_a_long_completion_both_ends_are_kept(more: int) -> None:
    num = MAX_FIRST + MAX_LAST + more
    row = make_group(1, (1.0,), completion_ids=[[*range(num)]], sampling_logprobs=[[-1.0] * num])
    row["reference_logprobs"] = [-2.0 * num]
    examples, places = Examples(), torch.arange(num, dtype=torch.float64)
    examples.add([row], -places, ReferenceLogprobs(None, None), torch.full((num,), -0.5))
    (one,) = examples.chosen()
    kept = [*range(MAX_FIRST), *range(num - MAX_LAST, num)]
    assert one.ids == kept and one.policy == [-float(place) for place in kept]
    assert one.num_tokens == num and one.push == [0.5] * len(kept)
    assert one.sampler_ratio == NEAR(num - num * (num - 1) / 2)  # over all tokens


def test_a_likelihood_that_is_not_a_number_is_no_example_and_no_crash(tmp_path: Path) -> None:
    row = make_group(1, (1.0, 0.0), completion_ids=[[5], [6]], sampling_logprobs=[[-1.0], [-1.0]])
    row["reference_logprobs"] = [-1.0, float("nan")]
    examples = Examples()
    logprobs, gradient = torch.tensor([-3.0, float("nan")]), torch.tensor([0.5, float("nan")])
    examples.add([row], logprobs, ReferenceLogprobs(None, None), gradient)
    write_examples(tmp_path, 1, examples.chosen())
    (one,) = read_examples(tmp_path / "tokens" / "step-000001.json") or []
    assert one.kinds == ["less likely", "pushed down"] and one.policy == [-3.0]
    assert one.group_reference_ratio is None


def test_the_steps_of_powers_of_two_and_the_newest_with_a_checkpoint_stay(tmp_path: Path) -> None:
    given = settings(tmp_path, num_steps=7, every=3)
    policy = load(make_model(tmp_path / "model"), given)

    def steps() -> list[int]:
        return [step for step, _ in example_files(tmp_path)]

    seen = []

    class Watched(Recorder):
        def batch(self, step: int) -> Any:
            seen.append(steps())
            return super().batch(step)

    learn(policy, Watched(7), ObjectPublisher(copy.deepcopy, torch.float32, is_sender=True), given)
    assert seen == [[], [1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4], [1, 2, 4, 6]]
    assert steps() == [1, 2, 4, 7]
    assert all(read_examples(file) for _, file in example_files(tmp_path))
    write_examples(tmp_path, 2, [])  # a run that was taken up from an earlier checkpoint
    assert steps() == [1, 2]


def test_a_file_that_somebody_edited_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    for text in ("", "[{}]", "[7]", '{"a": 1}'):
        (tmp_path / "tokens" / "step-000001.json").write_text(text)
        assert read_examples(tmp_path / "tokens" / "step-000001.json") is None
    assert read_examples(tmp_path / "tokens" / "step-000002.json") is None


@pytest.mark.parametrize("wrong", [{"push": [0.5]}, {"sampler": []}, {"policy": [-1.0, float("inf")]}, {}])
def test_an_example_has_a_finite_value_or_none_for_each_token(wrong: dict[str, Any]) -> None:
    right = {
        "kinds": [],
        "group_id": 0,
        "completion": 0,
        "prompt": "p",
        "answer": "1",
        "source": "policy",
        "version_min": 0,
        "version_max": 0,
        "num_tokens": 2,
        "ids": [5, 6],
        "policy": [-1.0, None],
        "sampler": None,
        "reference": [-1.0, -2.0],
        "push": [0.5, None],
        "sampler_ratio": None,
        "reference_ratio": 0.5,
        "group_reference_ratio": 0.0,
        "reward": 1.0,
        "group_reward": 0.5,
    }
    if not wrong:
        assert TokenExample.model_validate(right).push == [0.5, None]
        return
    with pytest.raises(ValidationError, match=r"not as long as ids|not finite"):
        TokenExample.model_validate(right | wrong)
