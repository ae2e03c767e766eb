"""Preferences and conversations in TRL's forms become groups; a bad row is named with its column."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import learners
import pyarrow as pa
import pytest
import torch
from tiny import EOS, make_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import SourceConfig
from gvpo_ray.config.loss import loss_config
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.data.offline import OfflineSource
from gvpo_ray.learner.step import train_step
from gvpo_ray.verifiers.verifier import Verifier

CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}={{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}?{% endfor %}"
    "{% if add_generation_prompt %}a={% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    found = AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("model")))
    found.chat_template = CHAT
    return found


def source(
    folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], objective: str, **keys: Any
) -> OfflineSource:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SourceConfig(path=str(file), group_share=1, shuffle=False, **keys)
    return OfflineSource(
        config,
        tokenizer,
        name="people",
        max_tokens=None,
        max_length=100,
        num_completions=2,
        loss=loss_config(objective=objective),
    )


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


PAIRS: dict[str, dict[str, Any]] = {
    "explicit": {"prompt": "1+1", "chosen": "2", "rejected": "3"},
    "explicit, conversational": {
        "prompt": [user("1+1")],
        "chosen": [assistant("2")],
        "rejected": [assistant("3")],
    },
    "implicit, conversational": {
        "chosen": [user("1+1"), assistant("2")],
        "rejected": [user("1+1"), assistant("3")],
    },
    "prompt repeated": {
        "prompt": "1+1",
        "chosen": [user("1+1"), assistant("2")],
        "rejected": [user("1+1"), assistant("3")],
        "score_chosen": 8.5,
    },
    "messages repeated": {
        "prompt": [user("1+1")],
        "chosen": [user("1+1"), assistant("2")],
        "rejected": [user("1+1"), assistant("3")],
    },
    "messages as json": {
        "prompt": json.dumps([user("1+1")]),
        "chosen": json.dumps([assistant("2")]),
        "rejected": json.dumps([assistant("3")]),
    },
}


@pytest.mark.parametrize("num_behind", [0, 1, 2])
def test_what_others_say_behind_the_assistants_last_turn_is_no_part_of_a_completion(
    num_behind: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    behind = [user("bye"), {"role": "tool", "content": "9"}][:num_behind]
    chosen, rejected = [assistant("2"), *behind], [assistant("3"), user("no"), assistant("4"), *behind]
    rows = [
        {"prompt": "1+1", "chosen": chosen, "rejected": rejected},
        {"prompt": "1+1", "completions": [chosen, rejected], "scores": [1, 0]},
        {"prompt": "1+1", "completion": chosen, "reward": 1},
    ]
    for row in rows:
        keys = {"reward_column": "reward", "answer_column": ""} if "reward" in row else {}
        data = [row, row | {"completion": rejected}] if keys else [row]
        (made,) = source(tmp_path, tokenizer, data, "gvpo", **keys).group(0, 0).to_pylist()
        own = [marked(tokenizer, ids, mask or [True] * len(ids))
               for ids, mask in zip(made["completion_ids"], made["trained_tokens"], strict=True)]  # fmt: skip
        assert sorted(own) == ["«2<eos>»", "«3<eos>»?u=no?a=«4<eos>»"]
        assert sorted(made["completions"])[0] == "2" and "bye" not in "".join(made["completions"])


@pytest.mark.parametrize("form", PAIRS)
def test_a_preference_is_a_group_of_two_with_rewards_1_and_0(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, form: str
) -> None:
    made = source(tmp_path, tokenizer, [PAIRS[form]] * 3, "dpo")
    assert len(made) == 3 and made.brings_rewards and "chosen has the reward 1" in made.notes[0]
    (row,) = made.group(7, 0).to_pylist()
    assert row["prompt"] == "1+1" and text(tokenizer, row["prompt_ids"]) == "u=1+1?a="
    assert row["completions"] == ["2", "3"] and row["rewards"] == [1.0, 0.0]
    assert [text(tokenizer, ids) for ids in row["completion_ids"]] == ["2<eos>", "3<eos>"]
    assert "trained_tokens" not in row
    groups.validate(made.group(7, 0), groups.PROMPT_COLUMNS + groups.COMPLETION_COLUMNS)


def test_the_prompt_of_two_texts_is_how_both_begin(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = {"chosen": "the sky is blue.", "rejected": "the sky is green."}
    (got,) = source(tmp_path, tokenizer, [row], "dpo", template="{prompt}").group(0, 0).to_pylist()
    assert (got["prompt"], got["completions"]) == ("the sky is", [" blue.", " green."])  # as TRL splits it


def test_a_reward_column_beside_a_preference_is_refused_and_a_completion_column_leaves_rows_as_they_are(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(
        ConfigError, match=r"sources\.people\.reward_column: x is not read: these are preferences"
    ):
        source(tmp_path, tokenizer, [PAIRS["explicit"]], "dpo", reward_column="x")
    rows = [{**PAIRS["explicit"], "score": 0.5}, {**PAIRS["explicit"], "score": 1.0, "chosen": "4"}]
    made = source(tmp_path, tokenizer, rows, "dpo", completion_column="chosen", reward_column="score")
    assert made.group(0, 0)["completions"].to_pylist() == [["2", "4"]]


def test_pairs_of_one_prompt_are_groups_of_their_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"prompt": "q", "chosen": f"{i}", "rejected": f"{i}0"} for i in range(3)]
    made = source(tmp_path, tokenizer, rows, "dpo")
    assert [made.group(i, i)["completions"].to_pylist() for i in range(3)] == [
        [[f"{i}", f"{i}0"]] for i in range(3)
    ]


def test_several_rejected_and_scored_completions_are_larger_groups(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"prompt": "q", "chosen": "1", "rejected": ["2", "3", "4"]}]
    (row,) = source(tmp_path, tokenizer, rows, "epa").group(0, 0).to_pylist()
    assert row["completions"] == ["1", "2", "3", "4"] and row["rewards"] == [1.0, 0.0, 0.0, 0.0]
    rows = [{"prompt": "q", "completions": ["1", "2", "3"], "scores": [0.5, 4, -1.0]}]
    (row,) = source(tmp_path, tokenizer, rows, "gvpo").group(0, 0).to_pylist()
    assert row["completions"] == ["1", "2", "3"] and row["rewards"] == [0.5, 4.0, -1.0]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "q", "chosen": "1", "rejected": "1"}, "chosen and rejected are equal"),
        ({"prompt": "q", "chosen": "1", "rejected": ["2", "1"]}, "chosen and rejected are equal"),
        ({"prompt": "q", "chosen": " ", "rejected": "1"}, "chosen is empty"),
        ({"prompt": "q", "chosen": "1", "rejected": ""}, "rejected is empty"),
        ({"prompt": "q", "chosen": "1", "rejected": []}, "rejected is empty"),
        ({"prompt": "q", "chosen": [assistant("")], "rejected": [assistant("1")]}, "chosen is empty"),
        (
            {
                "prompt": "q",
                "chosen": [assistant("1"), user("a")],
                "rejected": [assistant("1"), user("b")],
            },
            "what the assistant says in chosen and rejected is equal",
        ),
        (
            {
                "prompt": [user("q")],
                "chosen": [user("q"), user("x"), assistant("1")],
                "rejected": [user("q"), user("y"), assistant("2")],
            },
            "chosen begins with user, not with the assistant",
        ),
        (
            {"prompt": [user("q")], "chosen": [user("q"), user("x")], "rejected": [user("q"), user("y")]},
            "chosen has no turn of the assistant",
        ),
        ({"prompt": "q", "chosen": "1", "rejected": None}, "rejected is NoneType, not text or a list"),
        ({"prompt": "q", "chosen": "1", "rejected": [assistant("2")]}, "one a list of messages"),
        ({"chosen": "1", "rejected": "2"}, "no common beginning"),
        ({"chosen": "12", "rejected": "1"}, "rejected is empty"),
        ({"chosen": [assistant("1")], "rejected": [assistant("2")]}, "no common beginning"),
        (
            {
                "prompt": "other",
                "chosen": [user("q"), assistant("1")],
                "rejected": [user("q"), assistant("2")],
            },
            "prompt is not how chosen and rejected begin",
        ),
        (
            {
                "prompt": [user("q")],
                "chosen": [user("q"), assistant("1")],
                "rejected": [user("z"), assistant("2")],
            },
            "prompt is not how chosen and rejected begin",
        ),
    ],
)
def test_a_bad_preference_is_named_with_its_row_and_column(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], complaint: str
) -> None:
    good = (
        {"prompt": "q", "chosen": "1", "rejected": "2"}
        if "prompt" in row
        else {"chosen": "q 1", "rejected": "q 2"}
    )
    with pytest.raises(ConfigError) as caught:
        source(tmp_path, tokenizer, [good, row], "dpo")
    said = str(caught.value)
    assert said.startswith(f"sources.people.path: {tmp_path}/data.jsonl: row 1: ")
    assert complaint in said and "\n" not in said


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "q", "completions": ["1"], "scores": [1, 2]}, "are not lists of one length"),
        ({"prompt": "q", "completions": [], "scores": []}, "completions is empty"),
        ({"prompt": "q", "completions": ["1", ""], "scores": [1, 2]}, "completions is empty"),
        ({"prompt": "q", "completions": ["1", None], "scores": [1, 2]}, "completions has NoneType, not text"),
        (
            {"prompt": "q", "completions": [{"response": "1"}], "scores": [1]},
            "completions has dict, not text",
        ),
        (
            {"prompt": "q", "completions": ["1", "2"], "scores": [1, "x"]},
            "scores is 'x', not a finite number",
        ),
    ],
)
def test_a_bad_row_of_scored_completions_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], complaint: str
) -> None:
    good = {"prompt": "q", "completions": ["1", "2"], "scores": [1, 2]}
    with pytest.raises(ConfigError, match="row 1: ") as caught:
        source(tmp_path, tokenizer, [good, row], "gvpo")
    assert complaint in str(caught.value)


# ---------------------------------------------------------------------------------------------- conversations

TURNS = [
    user("1+1"),
    assistant("add"),
    {"role": "tool", "content": "2"},
    assistant("so2"),
    user("2+2"),
    assistant("4"),
]
WRITTEN = "«add<eos>»?t=2?a=«so2<eos>»?u=2+2?a=«4<eos>»"


def marked(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[bool]) -> str:
    """The text of a completion, with what is trained between «»."""
    parts = [
        f"«{text(tokenizer, [i])}»" if is_own else text(tokenizer, [i])
        for i, is_own in zip(ids, mask, strict=True)
    ]
    return "".join(parts).replace("»«", "")


def test_of_a_conversation_the_turns_of_the_assistant_are_trained_and_the_rest_is_context(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"messages": TURNS, "id": 3}, {"messages": [user("q"), assistant("1"), user("bye")]}]
    made = source(tmp_path, tokenizer, rows, "sft")
    (row,) = made.group(0, 0).to_pylist()
    assert text(tokenizer, row["prompt_ids"]) == "u=1+1?a="
    ((ids,), (mask,)) = row["completion_ids"], row["trained_tokens"]
    assert marked(tokenizer, ids, mask) == WRITTEN and row["rewards"] == [1.0]
    groups.validate(made.group(0, 0), groups.PROMPT_COLUMNS + groups.COMPLETION_COLUMNS)
    # what comes after the last turn of the assistant is nothing to learn from
    (short,) = made.group(1, 1).to_pylist()
    assert text(tokenizer, short["completion_ids"][0]) == "1<eos>" and "trained_tokens" not in short
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert whole == text(tokenizer, [*row["prompt_ids"], *ids]) + "?"  # as the template writes it, once


def test_a_completion_that_is_a_list_of_messages_has_its_turns_as_well(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [
        {"prompt": [user("1+1")], "completion": TURNS[1:]},
        {"prompt": "1", "completion": [assistant("2")]},
    ]
    made = source(tmp_path, tokenizer, rows, "sft")
    first, second = (made.group(i, i).to_pylist()[0] for i in range(2))
    assert marked(tokenizer, first["completion_ids"][0], first["trained_tokens"][0]) == WRITTEN
    assert second["completion_ids"] == [[5, EOS]] and second["completions"] == ["2"]
    pair = {"prompt": "1+1", "chosen": TURNS[1:], "rejected": [assistant("3")]}
    (row,) = source(tmp_path, tokenizer, [pair], "dpo").group(0, 0).to_pylist()
    assert row["trained_tokens"][1] is None and row["rewards"] == [1.0, 0.0]
    assert marked(tokenizer, row["completion_ids"][0], row["trained_tokens"][0]) == WRITTEN


def test_a_special_token_that_a_turn_spells_stays_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    turns = [user("q"), assistant("1<eos>2"), user("<eos>"), assistant("3")]
    (row,) = source(tmp_path, tokenizer, [{"messages": turns}], "sft").group(0, 0).to_pylist()
    ((ids,), (mask,)) = row["completion_ids"], row["trained_tokens"]
    assert ids.count(EOS) == 2 and all(is_own for i, is_own in zip(ids, mask, strict=True) if i == EOS)


def test_a_template_without_an_end_of_turn_gets_one_behind_each_turn(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = CHAT.replace("<eos>", "")
    (row,) = source(tmp_path, bare, [{"messages": TURNS}], "sft").group(0, 0).to_pylist()
    got = marked(bare, row["completion_ids"][0], row["trained_tokens"][0])
    assert got == WRITTEN


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"messages": [user("q")]}, "messages has no turn of the assistant"),
        ({"messages": [assistant("1"), user("q")]}, "messages begins with the assistant"),
        ({"messages": [user("q"), assistant(" "), user("r"), assistant("2")]}, "messages is empty"),
        ({"messages": "hello"}, "messages is no list of messages"),
    ],
)
def test_a_bad_conversation_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match="row 1: ") as caught:
        source(tmp_path, tokenizer, [{"messages": TURNS}, row], "sft")
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_rewrites_earlier_turns_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    forgets = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    forgets.chat_template = CHAT.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '' }}")
    with pytest.raises(ConfigError, match="row 0: the chat template writes an earlier turn in another way"):
        source(tmp_path, forgets, [{"messages": TURNS}], "sft")
    with pytest.raises(ConfigError, match="needs the tokenizer's chat template"):
        source(tmp_path, tokenizer, [{"messages": TURNS}], "sft", template="{prompt}")


def test_nothing_to_imitate_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "q", "completion": "1"}, {"prompt": "q", "completion": ""}]
    with pytest.raises(ConfigError, match="row 1: completion is empty"):
        source(tmp_path, tokenizer, rows, "sft")


def test_a_run_with_a_bad_row_or_without_sources_is_refused_before_anything_starts(
    refused: Callable[..., str], folder: Path
) -> None:
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "1", "rejected": "1"}) + "\n")
    sources = "sources={pairs: {path: pairs.jsonl, group_share: 1}}"
    said = refused(
        "train", "config.yaml", "loss.objective=dpo", "evaluation.every=0", "engines.num=0", sources
    )
    assert "sources.pairs.path: pairs.jsonl: row 0: chosen and rejected are equal" in said
    said = refused("train", "config.yaml", "loss.objective=sft")
    assert "loss.objective: sft imitates what it is given" in said


def fails(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    raise AssertionError("a completion is verified that nobody asked about")


@pytest.mark.parametrize("objective", ["sft", "epa"])
def test_what_is_read_is_scored_logged_and_learned(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, objective: str
) -> None:
    """From the file to the weights, with the table that the log holds in between."""
    made = source(
        tmp_path,
        tokenizer,
        [{"messages": TURNS}, {"messages": [user("2+3"), assistant("5")]}]
        if objective == "sft"
        else [{"prompt": f"1+{i}", "chosen": f"{1 + i}", "rejected": ["0", f"{5 + i}"]} for i in range(3)],
        objective,
    )
    with Verifier(VerifiersConfig(rewards={"mine": {"trusted": True}}), {"mine": fails}) as verifier:
        scored = [groups.log_columns(verifier.score(made.group(i, i))) for i in range(len(made))]
    table = groups.validate(pa.concat_tables(scored), groups.LOGGED_COLUMNS)
    given = replace(
        learners.settings(tmp_path, learning_rate=3e-3),
        loss=loss_config(objective=objective, **({"num_weak": 2} if objective == "epa" else {})),
    )
    policy = learners.load(tokenizer.name_or_path, given)
    if objective == "epa":
        policy.reference.load(tokenizer.name_or_path)
    lines = [train_step(policy, list(groups.rows(table)), given) for _ in range(8)]
    losses = [line["loss"] for line in lines]
    assert losses[-1] < 0.7 * losses[0] and lines[0]["groups/untrainable"] == 0
    if objective == "sft":
        rows = list(groups.rows(table))
        fresh = learners.load(tokenizer.name_or_path, given)
        own = torch.cat(fresh.token_logprobs(rows))
        assert losses[0] == pytest.approx(-float(own.double().mean()), abs=1e-5)
        assert lines[0]["tokens/trained"] == len(own) == len("add so2 4 5".replace(" ", "")) + 4
    else:  # one positive, two strong negatives and two weak ones of one group each, at the reference
        assert losses[0] == pytest.approx(math.log(5)) and lines[0]["tokens/trained"] == 3 * 5 * 2
