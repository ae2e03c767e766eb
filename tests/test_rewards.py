import asyncio
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from gvpo_ray import groups
from gvpo_ray.config.verifiers import RewardConfig, VerifiersConfig
from gvpo_ray.sandbox.functions import Part, call
from gvpo_ray.verifiers import rewards
from gvpo_ray.verifiers.pool import VerifierGroup
from gvpo_ray.verifiers.reward_model import RewardModel
from gvpo_ray.verifiers.rewards import exact_match, format_reward, length_reward, numeric
from gvpo_ray.verifiers.verifier import Verifier


@pytest.mark.parametrize(
    ("gold", "completion", "expected"),
    [
        ("Paris", "The answer is \\boxed{ paris }.", 1.0),
        ("New York", "new  york.", 1.0),
        ("42", "\\boxed{\uff14\uff12}", 1.0),  # full-width digits
        ("42", "\\boxed{42.0}", 0.0),
        ("Paris", "It is not Paris but \\boxed{Lyon}", 0.0),
        ("Paris", "", 0.0),
    ],
)
def test_exact_match_compares_letters(gold: str, completion: str, expected: float) -> None:
    assert exact_match(["p"], [completion], answer=[gold]) == [expected]


def test_numeric_gives_nothing_for_a_fraction_of_the_prompt() -> None:
    for prompt, score in (("What is 48 divided by 2?", 0.0), ("Think.", 1.0)):
        assert numeric([prompt], ["\\boxed{48/2}"], answer=["24"]) == [score]


@pytest.mark.parametrize("gold", ["", " ", "."])
def test_exact_match_without_a_gold_answer_gives_null(gold: str) -> None:
    (score,) = exact_match(["p"], ["<think>foo"], answer=[gold])
    assert score == (None, "exact_match: there is no gold answer")


def test_exact_match_minds_case_where_it_is_told_to() -> None:
    assert exact_match(
        ["p", "p"], ["\\boxed{paris}", "\\boxed{Paris}"], answer=["Paris"] * 2, ignore_case=False
    ) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("gold", "completion", "arguments", "expected"),
    [
        ("1250.5", "The answer is \\boxed{1,250.50}", {}, 1.0),
        ("$1,250.50", "\\boxed{\\$1250.5}", {}, 1.0),
        ("0.75", "\\boxed{\\frac{3}{4}}", {}, 1.0),
        ("3/4", "\\boxed{0.75}", {}, 1.0),
        ("-2", "\\boxed{2}", {}, 0.0),
        ("3.14159", "\\boxed{3.1416}", {}, 1.0),
        ("3.14159", "\\boxed{3.14}", {}, 0.0),
        ("3.14159", "\\boxed{3.14}", {"relative_tolerance": 0.01}, 1.0),
        ("0", "\\boxed{0.001}", {"absolute_tolerance": 0.01}, 1.0),
        ("2.5e3", "\\boxed{2.5 \\times 10^{3}}", {}, 1.0),
        ("5 km", "\\boxed{5 \\text{ km}}", {}, 1.0),
        ("5 km", "\\boxed{5 \\text{ m}}", {}, 0.0),
        ("5 meters", "\\boxed{5\\text{ meter}}", {}, 1.0),
        ("5 km", "\\boxed{5}", {}, 1.0),
        ("5 km", "\\boxed{5}", {"require_unit": True}, 0.0),
        ("5", "\\boxed{5 km}", {"require_unit": True}, 1.0),
        ("1/0", "\\boxed{0}", {}, None),
        ("many", "\\boxed{3}", {}, None),
        ("3", "\\boxed{many}", {}, 0.0),
        ("2\\frac{1}{2}", "\\boxed{2.5}", {}, 1.0),
        ("2\\frac{1}{2}", "\\boxed{2}", {}, 0.0),
        ("1 1/2", "\\boxed{1.5}", {}, 1.0),
        ("5 million", "\\boxed{5,000,000}", {}, 1.0),
        ("5 million", "\\boxed{5}", {}, 0.0),
        ("5", "\\boxed{5 million}", {}, 0.0),
        ("5", "\\boxed{5 to 7}", {}, 0.0),
        ("5", "\\boxed{5or7}", {}, 0.0),
        ("5", "\\boxed{5 \\pm 3}", {}, 0.0),
        ("3", "\\boxed{3\\pi}", {}, 0.0),
        ("3", "\\boxed{3i}", {}, 0.0),
        ("3", "\\boxed{3x}", {}, 0.0),
        ("68", "\\boxed{23 + 45}", {}, 0.0),
        ("12%", "\\boxed{0.12}", {}, 1.0),
        ("12%", "\\boxed{12}", {}, 1.0),
        ("5 V", "\\boxed{5.0 \\text{ V}}", {}, 1.0),
        ("9.8 m/s^2", "\\boxed{9.8 \\text{ m}/\\text{s}^2}", {}, 1.0),
        ("9.8 m/s^2", "\\boxed{9.8 \\text{ m}/\\text{s}}", {}, 0.0),
        ("5", "\\boxed{1e999}", {}, 0.0),
        ("1e999", "\\boxed{5}", {}, 0.0),
        ("10 or 12", "\\boxed{10}", {}, None),
    ],
)
def test_numeric_compares_numbers_within_a_tolerance_and_their_units(
    gold: str, completion: str, arguments: dict[str, Any], expected: float | None
) -> None:
    (score,) = numeric(["p"], [completion], answer=[gold], **arguments)
    assert (score[0] if isinstance(score, tuple) else score) == expected


@pytest.mark.parametrize(
    ("completion", "boxed", "boxed_after_thoughts"),
    [
        ("so \\boxed{\\frac{1}{2}}", 1.0, 0.0),
        ("no box", 0.0, 0.0),
        ("\\boxed{1} or \\boxed{2}", 0.0, 0.0),
        ("\\boxed{}", 0.0, 0.0),
        ("\\boxed{{1}", 0.0, 0.0),
        ("\\boxed 1", 0.0, 0.0),
        ("<think>\\boxed{7}?</think> \\boxed{8}", 1.0, 1.0),
        ("<think>\\boxed{7}</think> eight", 0.0, 0.0),
        ("<think></think> \\boxed{8}", 1.0, 0.0),
        ("a chat template opened it</think> \\boxed{8}", 1.0, 1.0),
        ("</think> \\boxed{8}", 1.0, 0.0),
        ("first <think>x</think> \\boxed{8}", 1.0, 0.0),
        ("<think>a</think><think>b</think> \\boxed{8}", 1.0, 0.0),
        ("\\boxed{" * 10_000, 0.0, 0.0),
    ],
)
def test_format_wants_one_closed_box_and_thoughts_before_it(
    completion: str, boxed: float, boxed_after_thoughts: float
) -> None:
    assert format_reward(["p"], [completion]) == [boxed]
    assert format_reward(["p"], [completion], think=True) == [boxed_after_thoughts]


def test_length_falls_in_a_line_from_the_free_tokens_to_the_limit() -> None:
    ids = [[0] * 10, [0] * 20, [0] * 25, [0] * 30, [0] * 99]
    assert length_reward(["p"] * 5, [""] * 5, completion_ids=ids, free=20, limit=30) == [
        0.0,
        0.0,
        -0.5,
        -1.0,
        -1.0,
    ]
    assert length_reward(["p"], ["five words are in this"], limit=10) == [-0.5]
    with pytest.raises(ValueError, match=r"free \(30\) must be at least 0 and below limit \(30\)"):
        length_reward(["p"], [""], free=30, limit=30)


def test_arguments_of_the_config_reach_the_function() -> None:
    config = VerifiersConfig(
        rewards={
            "numeric": {"arguments": {"relative_tolerance": 0.1}},
            "length": {"weight": 2, "arguments": {"limit": 4}},
        }
    )
    with Verifier(config) as verifier:
        scored = verifier.score(
            groups.table(
                [{"prompt": "p", "answer": "100", "completions": ["about \\boxed{105}", "\\boxed{120}"]}]
            )
        )
    assert scored["rewards"].to_pylist() == [[1.0 - 2 * 2 / 4, 0.0 - 2 * 1 / 4]]


def test_what_a_function_raises_or_returns_in_place_of_rewards_is_a_fault_with_its_name() -> None:
    def of(result: Any) -> list[Part]:
        return call("f", lambda prompts, completions, **_: result, ["p", "p"], ["a", "b"], {})

    assert of([1, (0.5, "half")]) == [Part(1.0), Part(0.5, "half")]
    assert of([None, (None, "no unit")]) == [Part(None, "f gave no reward (None)"), Part(None, "no unit")]
    assert of([1.0]) == [Part(None, "f returned 1 rewards for 2 completions", is_fault=True)] * 2
    assert (
        of({})
        == [Part(None, "f returned dict '{}', not a list of rewards, one for each completion", is_fault=True)]
        * 2
    )
    assert of(["x", float("inf")]) == [
        Part(None, "f returned str 'x', not a number", is_fault=True),
        Part(None, "f returned inf, not a finite float32", is_fault=True),
    ]
    assert call("f", lambda **_: 1 / 0, ["p"], ["a"], {}) == [
        Part(None, "f raised ZeroDivisionError: division by zero", is_fault=True)
    ]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny.make_model(tmp_path_factory.mktemp("tokenizer")))
    config = LlamaConfig(
        vocab_size=tiny.VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        max_position_embeddings=32,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_reward_model_scores_each_completion_as_it_would_alone(classifier: str) -> None:
    prompts, completions = ["1+1="] * 3, ["2", "12 or so", "3"]
    together = RewardModel(classifier, batch_size=2).score(prompts, completions)
    alone = [
        RewardModel(classifier, batch_size=1).score([prompt], [text])[0]
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    assert together == pytest.approx(alone, abs=1e-6)
    assert len({round(float(value), 6) for value in together}) == 3


def test_a_text_that_a_reward_model_cannot_read_whole_has_no_reward(classifier: str) -> None:
    scores = RewardModel(classifier, batch_size=2).score(["1+1="] * 2, ["2", "2" * 100])
    assert isinstance(scores[0], float) and scores[1] == (None, "104 tokens do not fit into the reward model")


def test_a_text_with_a_token_that_a_reward_model_lacks_has_no_reward(classifier: str, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier, tmp_path / "grown")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    scores = RewardModel(str(folder), batch_size=2).score(["1+1="] * 2, ["2", "<think>2"])
    token = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<think>")
    has = f"token {token}, and the model has {tiny.VOCAB_SIZE} (vocab_size of its config.json)"
    assert token >= tiny.VOCAB_SIZE and isinstance(scores[0], float)
    assert scores[1] == (None, f"the reward model's tokenizer writes {has}")


def test_a_reward_model_pads_with_a_token_that_it_has(classifier: str, tmp_path: Path) -> None:
    texts = ["2", "2+3"]  # of unlike lengths
    want = RewardModel(classifier, batch_size=1).score(["1+1="] * 2, texts)
    folder = shutil.copytree(classifier, tmp_path / "grown")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id >= tiny.VOCAB_SIZE
    assert RewardModel(str(folder), batch_size=2).score(["1+1="] * 2, texts) == pytest.approx(want, abs=1e-5)
    tokenizer.eos_token = "[PAD]"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="has no token to pad with"):
        RewardModel(str(folder), batch_size=2)


def test_all_actors_of_a_reward_model_of_the_hub_have_the_commit_that_the_driver_has_seen(
    classifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart, or another node, would otherwise load what `main` is by then."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    seen, later, place = "a" * 40, "b" * 40, tmp_path / "models--org--rm"
    shutil.copytree(classifier, place / "snapshots" / seen)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(seen)
    started: list[Any] = []

    class Remote:
        def __init__(self, _: Any) -> None:
            self.options = lambda **_: SimpleNamespace(remote=lambda *given: started.append(given))

    monkeypatch.setattr("gvpo_ray.verifiers.pool.ray.remote", Remote)
    section = RewardConfig.model_validate({"model": "org/rm", "num": 2})
    VerifierGroup._reward_model(SimpleNamespace(_models=[]), "rm", section)  # type: ignore[arg-type]
    assert started == [("org/rm", 32, False, seen)] * 2
    (place / "refs" / "main").write_text(later)  # of which nothing is here
    RewardModel(*started[0])
    with pytest.raises(OSError, match="cached files"):
        RewardModel("org/rm", 32, False, later)


def test_a_reward_model_is_called_like_any_other_reward() -> None:
    config = VerifiersConfig(rewards={"format": 0.25, "rm": {"model": "no/such", "weight": 2.0}})
    with Verifier(
        config, models={"rm": lambda prompts, completions, **_: [len(text) for text in completions]}
    ) as verifier:
        scored = verifier.score(
            groups.table([{"prompt": "p", "answer": "1", "completions": ["\\boxed{1}", "1"]}])
        )
    assert scored["rewards"].to_pylist() == [[18.25, 2.0]]


def test_the_built_in_rewards_accept_every_column_and_are_plain_functions() -> None:
    columns = {
        "answer": ["1"],
        "dataset": ["d"],
        "group_id": [0],
        "completion_ids": [[1]],
        "finish_reasons": ["stop"],
    }
    for name, function in rewards.BUILT_IN.items():
        assert not asyncio.iscoroutinefunction(function)
        (part,) = call(name, function, ["p"], ["\\boxed{1}"], columns)
        assert part.value is not None and not part.is_fault, name
