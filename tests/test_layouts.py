"""Data sets in the layouts of other systems: found by their columns, rendered as chats, golds read.

Every data set here is one problem, 12 + 34 with the gold 46, as the named system stores it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prompts import CHAT, _tokenizer

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import DataLayout, PromptsConfig
from gvpo_ray.data.columns import fields, steps
from gvpo_ray.data.layouts import LAST, LAYOUTS, Layout, columns_of
from gvpo_ray.data.prompts import PromptSet

Q = "What is 12 + 34?"
USER = [{"role": "user", "content": Q}]
ASKED = f"<s>u:{Q};a:"


def write(folder: Path, row: Any, suffix: str = ".parquet") -> Path:
    path = folder / f"data{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row, row]), path)
    else:
        path.write_text(json.dumps([row, row]))
    return path


def prompts(path: Path, chat_template: str = CHAT, **keys: Any) -> PromptSet:
    config = PromptsConfig(path=str(path), **keys)
    return PromptSet(config, _tokenizer(chat_template), name="d", max_tokens=None)


def rendered(found: PromptSet) -> str:
    tokenizer = _tokenizer()
    ids = found.all()["prompt_ids"].to_pylist()[0]
    letters = {i: letter for letter, i in tokenizer.get_vocab().items()}
    return "".join(letters[i] for i in ids).replace("Ġ", " ").replace("Ċ", "\n")


def error(path: Path, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        prompts(path, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_config_knows_the_names_of_the_layouts() -> None:
    assert set(get_args(DataLayout)) == set(LAYOUTS)


CASES: dict[str, tuple[str, dict[str, Any] | list[Any], str]] = {
    "verl": (
        "verl",
        {
            "data_source": "openai/gsm8k",
            "prompt": USER,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "46"},
            "extra_info": {"index": 0, "answer": "Ones 6 #### 46"},
        },
        "reward_model.ground_truth",
    ),
    "SkyRL": (
        "skyrl",
        {"prompt": USER, "env_class": "gsm8k", "reward_spec": {"method": "rule", "ground_truth": "46"}},
        "reward_spec.ground_truth",
    ),
    "TRL, conversational": ("trl", {"prompt": USER, "solution": "46"}, "solution"),
    "TRL": ("trl", {"prompt": Q, "ground_truth": "46"}, "ground_truth"),
    "OpenRLHF": ("openrlhf", {"input": Q, "label": "46"}, "label"),
    "OpenRLHF, messages": ("openrlhf", {"context_messages": USER, "label": "46"}, "label"),
    "slime": ("slime", {"prompt": USER, "label": "46"}, "label"),
    "AReaL": ("areal", {"prompt": Q, "task": "math", "query_id": "q0", "solutions": ["46"]}, "solutions"),
    "NeMo-RL": ("nemo", {"input": Q, "output": "46"}, "output"),
    "NeMo-RL, messages": (
        "nemo",
        {"messages": [*USER, {"role": "assistant", "content": "46"}]},
        "the assistant's last message",
    ),
    "NeMo Gym": (
        "nemo_gym",
        {"responses_create_params": {"input": USER}, "expected_answer": "46"},
        "expected_answer",
    ),
    "RLVR": ("rlvr", {"messages": USER, "ground_truth": "46", "dataset": "gsm8k"}, "ground_truth"),
    "Open-Reasoner-Zero": (
        "orz",
        [{"from": "human", "value": Q}, {"from": "assistant", "ground_truth": {"value": "46"}}],
        "messages[-1].ground_truth.value",
    ),
    "ShareGPT": (
        "sharegpt",
        {"id": "0", "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": "46"}]},
        "the assistant's last message",
    ),
    "DeepScaleR": ("deepscaler", {"problem": Q, "answer": "46", "solution": "Ones 6 ..."}, "answer"),
    "NuminaMath": ("deepscaler", {"problem": Q, "solution": "46"}, "solution"),
    "GSM8K": ("gsm8k", {"question": Q, "answer": "46"}, "answer"),
    "OlympiadBench": ("olympiadbench", {"question": Q, "final_answer": ["46"]}, "final_answer"),
    "Alpaca": ("alpaca", {"instruction": Q, "input": "", "output": "46"}, "output"),
    "Alpaca, without inputs": ("alpaca", {"instruction": Q, "output": "46", "text": "Below ..."}, "output"),
    "Alpaca, with its parts": (
        "alpaca",
        {"instruction": "What is", "input": "12 + 34?", "output": "46"},
        "output",
    ),
    "verl, with a column of answers": (
        "verl",
        {"prompt": USER, "answer": "12 + 34 = 46", "reward_model": {"ground_truth": "46"}},
        "reward_model.ground_truth",
    ),
    "messages as JSON text": ("rlvr", {"messages": json.dumps(USER), "ground_truth": "46"}, "ground_truth"),
    "a conversation as JSON text": (
        "nemo",
        {"messages": json.dumps([*USER, {"role": "assistant", "content": "46"}])},
        "the assistant's last message",
    ),
}


@pytest.mark.parametrize("system", CASES)
def test_a_known_layout_is_found_used_and_said(tmp_path: Path, system: str) -> None:
    layout, row, gold = CASES[system]
    path = write(tmp_path, row, ".json" if isinstance(row, list) else ".parquet")
    found = prompts(path)
    assert rendered(found).replace("\n\n", " ") == ASKED
    assert found.all()["answer"].to_pylist() == ["46", "46"]
    assert found.layout.startswith(f"layout {layout}: the prompt is ") and found.layout.endswith(
        f"the gold is {gold}"
    )
    assert prompts(path, layout=layout).all().equals(found.all())


def put(row: dict[str, Any], path: str, value: Any) -> None:
    """Put a value at a path of a row, making what is on the way."""
    at: Any = row
    *way, last = steps(path)
    for step, after in zip(way, [*way, last][1:], strict=True):
        made: Any = {} if isinstance(after, str) else [{"role": "user", "content": Q}]
        at = at.setdefault(step, made) if isinstance(step, str) else at[step]
    at[last] = value


def files_of(layout: Layout) -> Iterator[dict[str, list[Any]]]:
    """Every file that a layout's own rule describes: each of its prompts with each of its golds and marks."""
    for prompt, gold, mark in itertools.product(layout.prompts, layout.golds, layout.marks or ("",)):
        row: dict[str, Any] = {"id": 3}
        if gold == LAST:
            put(row, prompt, [*USER, {"role": "assistant", "content": "46"}])
        else:
            put(row, gold, "46")
            for column in fields(prompt) or [prompt]:
                if column not in row:
                    put(row, column, Q)
        if mark and mark not in row:
            put(row, mark, "x")
        yield {name: [value] for name, value in row.items()}


def test_no_layout_takes_the_files_of_another() -> None:
    """Named or found, every file of every layout is read alike, and each layout finds files of its own."""
    config = PromptsConfig(path="x")
    for name, layout in LAYOUTS.items():
        by_name = config.model_copy(update={"layout": name})
        found = []
        for data in files_of(layout):
            got, want = columns_of(config, data, "prompts"), columns_of(by_name, data, "prompts")
            assert (got.prompt, got.gold) == (want.prompt, want.gold), (name, data)
            found.append(got.layout or "plain")
        assert name in found, (name, found)


def test_prompt_and_answer_need_no_layout_and_no_words(tmp_path: Path) -> None:
    assert prompts(write(tmp_path, {"prompt": Q, "answer": "46", "label": "x"})).layout == ""
    assert prompts(write(tmp_path, {"q": Q, "g": "46"}), prompt_column="q", answer_column="g").layout == ""


def test_the_keys_of_the_config_come_before_a_layout(tmp_path: Path) -> None:
    path = write(tmp_path, {"problem": Q, "answer": "1", "gold": "46"})
    for keys in ({}, {"layout": "deepscaler"}):
        assert prompts(path, answer_column="gold", **keys).all()["answer"].to_pylist() == ["46", "46"]


def test_a_layout_that_the_data_does_not_have_is_refused_with_what_is_there(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": USER, "label": "46"})
    assert error(path, layout="verl") == (
        f"prompts.layout: verl has the gold in reward_model.ground_truth, and {path} has prompt, label, "
        "prompt[0], prompt[0].role, prompt[0].content"
    )


@pytest.mark.parametrize(
    ("row", "prompt", "gold"),
    [
        (
            {"question": Q, "choices": ["1", "46"], "final_answer": "46"},
            "{question} {choices[0]}",
            "final_answer",
        ),
        (
            {"prompt": USER, "reward_model": {"ground_truth": "46"}},
            "prompt[0].content",
            "reward_model.ground_truth",
        ),
        ({"prompt": USER, "level": 1, "label": "46"}, "{level}: {prompt[0].content}", "label"),
    ],
)
def test_a_template_or_path_over_a_layouts_prompt_has_the_layouts_gold(
    tmp_path: Path, row: dict[str, Any], prompt: str, gold: str
) -> None:
    found = prompts(write(tmp_path, row), prompt_column=prompt)
    assert found.all()["answer"].to_pylist() == ["46", "46"]
    assert found.layout.endswith(f"the prompt is {prompt}, the gold is {gold}")


def test_labels_that_are_true_or_false_are_golds_only_by_the_config(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": Q, "completion": "46", "label": True})
    assert error(path) == (
        f"prompts.answer_column: {path} has no column 'answer', and its label is true or false, which may "
        "say whether a completion is good: name it here if it is the gold answer"
    )
    for keys in ({"answer_column": "label"}, {"layout": "slime"}):
        assert prompts(path, **keys).all()["answer"].to_pylist() == ["True", "True"]
    assert prompts(write(tmp_path, {"prompt": Q, "label": "true"})).all()["answer"][0].as_py() == "true"


@pytest.mark.parametrize("suffix", [".parquet", ".json"])
def test_a_column_that_few_rows_have_is_found(tmp_path: Path, suffix: str) -> None:
    """A thousand rows have nothing there, more than are looked at for a message or at a time."""
    rows: list[dict[str, Any]] = [{"prompt": Q, "reward_model": {"ground_truth": None}}] * 1001
    rows.append({"prompt": Q, "reward_model": {"ground_truth": "46"}})
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows))
    for keys in ({}, {"answer_column": "reward_model.ground_truth"}, {"layout": "verl"}):
        found = prompts(path, **keys)
        assert found.all()["answer"].to_pylist() == ["46"] and found.num_without_gold == 1001


def test_options_that_are_not_in_the_prompt_are_said(tmp_path: Path) -> None:
    row = {"prompt": "Which?", "choices": ["apple", "pear"], "answer": "A"}
    (note,) = prompts(write(tmp_path, row)).notes
    assert note.startswith(
        "the column choices is not in the prompt; if it should be, write prompts.prompt_column"
    )
    for fine in ({**row, "prompt": "Which? A. apple B. pear"}, {**row, "choices": None}):
        assert prompts(write(tmp_path, fine, ".json")).notes == []
    assert prompts(write(tmp_path, row), prompt_column="{prompt} {choices[0]}").notes == []


# --------------------------------------------------------------------------------------------------- by path


def test_a_column_is_named_by_a_path_into_it(tmp_path: Path) -> None:
    row = {
        "chat": USER,
        "reward_model": {"ground_truth": "46"},
        "extra_info": {"index": 7, "golds": ["1", "46"]},
        "dotted.name": "46",
        "nested_text": '{"answers": ["46"]}',
    }
    path = write(tmp_path, row)
    for gold in (
        "reward_model.ground_truth",
        "extra_info.golds[1]",
        "extra_info.golds[-1]",
        "dotted.name",
        "nested_text.answers[0]",
    ):
        found = prompts(path, prompt_column="chat[0].content", answer_column=gold)
        assert found.all()["answer"].to_pylist() == ["46", "46"], gold
        assert found.all()["prompt"].to_pylist() == [Q, Q]
    assert (
        prompts(path, prompt_column="chat", answer_column="extra_info.index").all()["answer"][0].as_py()
        == "7"
    )


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("reward_model.ground_thruth", "reward_model.ground_truth"),
        ("reward_spec.ground_truth", "reward_model.ground_truth"),
        ("reward_model.truth", "reward_model.ground_truth"),
        ("rewards_model", "reward_model"),
        ("extra_info.idx", "extra_info.index"),
        ("answer[0]", "answers[0]"),
    ],
)
def test_a_wrong_path_is_answered_with_the_nearest_right_one(tmp_path: Path, wrong: str, near: str) -> None:
    row = {
        "prompt": Q,
        "reward_model": {"ground_truth": "46"},
        "extra_info": {"index": 0},
        "answers": ["46"],
    }
    path = write(tmp_path, row)
    assert error(path, answer_column=wrong) == (
        f"prompts.answer_column: {path} has no column {wrong!r}; it has prompt, reward_model, extra_info, "
        f"answers; did you mean {near}?"
    )


def test_a_gold_with_fields_of_its_own_names_them(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": Q, "reward_model": {"style": "rule", "ground_truth": "46"}})
    assert error(path, answer_column="reward_model") == (
        f"prompts.path: {path}: row 0: reward_model has fields of its own: name one of them "
        "(reward_model.style, reward_model.ground_truth)"
    )


@pytest.mark.parametrize(
    ("gold", "match", "text", "golds"),
    [
        (46, "any", "46", None),
        (0.5, "any", "0.5", None),
        (True, "any", "True", None),
        (False, "any", "False", None),
        (["46"], "any", "46", None),
        (["5", None, "-5"], "any", "5 or -5", ["5", "-5"]),
        ([1, True], "all", "1, True", ["1", "True"]),
    ],
)
def test_golds_are_texts_numbers_booleans_and_lists(
    tmp_path: Path, gold: Any, match: str, text: str, golds: list[str] | None
) -> None:
    found = prompts(write(tmp_path, {"prompt": Q, "answer": gold}, ".json"), answer_match=match).all()
    assert found["answer"].to_pylist() == [text, text]
    data = json.loads(found["data"][0].as_py()) if golds else {}
    assert data == ({"golds": golds, "match": match} if golds else {})
    assert ("data" in found.column_names) == bool(golds)


# --------------------------------------------------------------------------------------------------- messages


def test_system_message_earlier_turns_and_parts_are_rendered(tmp_path: Path) -> None:
    chat = [
        {"role": "system", "content": "Think."},
        {"from": "human", "value": "1 + 1?"},
        {"from": "gpt", "value": "2"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "12 + 34?"}],
        },
    ]
    path = write(tmp_path, {"prompt": chat, "answer": "46"}, ".json")
    want = f"<s>s:Think.;u:1 + 1?;a:2;u:{Q};a:"
    assert rendered(prompts(path)) == want
    assert rendered(prompts(path, system_prompt="Not this.")) == want  # the row's own system message holds
    assert rendered(
        prompts(write(tmp_path, {"prompt": USER, "answer": "46"}), system_prompt="Be brief.")
    ) == (f"<s>s:Be brief.;u:{Q};a:")
    assert prompts(path).all()["prompt"][0].as_py() == (
        f"system: Think.\n\nuser: 1 + 1?\n\nassistant: 2\n\nuser: {Q}"
    )


def test_a_last_message_of_the_assistant_is_never_in_the_prompt(tmp_path: Path) -> None:
    chat = [*USER, {"role": "assistant", "content": "It is 46."}]
    path = write(tmp_path, {"messages": chat, "ground_truth": "46"})
    found = prompts(path)
    assert rendered(found) == ASKED and found.all()["answer"][0].as_py() == "46"
    assert error(write(tmp_path, {"messages": chat[1:], "ground_truth": "46"})) == (
        f"prompts.path: {path}: no row has a prompt: messages is empty in all 2 rows"
    )


def test_what_is_no_text_in_a_message_is_named(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image_url"}]}]
    path = write(tmp_path, {"prompt": chat, "answer": "1"}, ".json")
    assert (
        error(path)
        == f"prompts.path: {path}: row 0: prompt[0].content has a part of type image_url, not text"
    )


def test_messages_in_json_text_are_read_if_the_whole_column_is_such_and_said(tmp_path: Path) -> None:
    text = json.dumps(USER)
    found = prompts(write(tmp_path, {"prompt": text, "answer": "46"}))
    assert rendered(found) == ASKED and found.layout == "the prompt is prompt (messages in JSON text)"
    (tmp_path / "data.json").write_text(
        json.dumps([{"prompt": prompt, "answer": "46"} for prompt in (text, "What is [1, 2]?", "[1, 2]")])
    )
    found = prompts(tmp_path / "data.json")
    assert found.all()["prompt"].to_pylist() == [text, "What is [1, 2]?", "[1, 2]"] and found.layout == ""
    assert found.notes == [
        "row 0 is a list of messages in JSON text (1 of 3 rows are), and most rows are not: all prompts are "
        "plain text"
    ]
    assert prompts(write(tmp_path, {"prompt": text, "answer": "46"})).notes == []
    for no_messages in ("[]", "[1]", "[{}]", '["a"]', '{"role": "user", "content": "a"}', "[" * 10_000):
        assert prompts(write(tmp_path, {"prompt": no_messages, "answer": "1"})).layout == ""


@pytest.mark.parametrize("odd", ["What is 1 + 1?", "[1, 2]", '[{"role": "user", "content": "cut'])
@pytest.mark.parametrize(("num", "is_refused"), [(1, False), (2, True), (9, True)])
def test_a_row_that_is_no_messages_where_most_are_is_named(
    tmp_path: Path, odd: str, num: int, is_refused: bool
) -> None:
    """Without that, one broken row made all others the text of their own JSON."""
    texts = [*[json.dumps(USER)] * num, odd]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"prompt": text, "answer": "46"} for text in (*texts, "", None)]))
    if not is_refused:
        assert prompts(path).all()["prompt"].to_pylist() == texts
        return
    assert error(path) == (
        f"prompts.path: {path}: row {num}: prompt is no list of messages, as in {num} of {num + 1} rows, "
        "whether as a list or in JSON text"
    )


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"images": [{"bytes": "x"}]}, "row 0 has images"),
        ({"image": "cat.png"}, "row 0 has image"),
        ({"Audio": {"path": "a.wav"}}, "row 0 has Audio"),
        ({"figure": {"bytes": b"x", "path": None}}, "row 0 has figure"),
        ({"figures": [{"bytes": b"x", "path": None}]}, "row 0 has figures"),
    ],
)
def test_data_with_images_or_sound_are_refused(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    path = write(tmp_path, {"prompt": Q, "answer": "46", **row})
    (column,) = row
    assert error(path) == (
        f"prompts.path: {path}: {complaint}, and only text is trained: leave the column {column} out of the "
        "data if the prompts do not need it"
    )


def test_empty_columns_of_images_and_what_is_only_called_so_are_fine(tmp_path: Path) -> None:
    row = {"prompt": Q, "answer": "46", "images": [], "image": None, "imagery": "x", "path": "a.png"}
    assert len(prompts(write(tmp_path, row, ".json"))) == 2


def test_images_beside_a_messages_text_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": [{**USER[0], "images": ["a.png"]}], "answer": "46"})
    assert error(path) == f"prompts.path: {path}: row 0: prompt[0] has images, and only text is trained"


def test_a_config_template_takes_the_text_of_a_conversation(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": USER, "answer": "46"})
    assert rendered(prompts(path, template="Q: {prompt}\nA:")) == f"<s>Q: {Q}\nA:"


def test_template_arguments_reach_the_chat_template(tmp_path: Path) -> None:
    thinks = CHAT + "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
    path = write(tmp_path, {"prompt": Q, "answer": "46"})
    assert rendered(prompts(path, thinks)) == ASKED
    assert (
        rendered(prompts(path, thinks, template_arguments={"enable_thinking": False})) == ASKED + "</think>"
    )


def test_a_prompt_may_join_several_columns(tmp_path: Path) -> None:
    row = {"question": r"Which \frac{1}{2}?", "choices": ["a", "b"], "level": 3, "answer": "A"}
    path = write(tmp_path, row)
    column = "{question} (level {level})\nA. {choices[0]}\nB. {choices[1]} {} {0}"
    assert prompts(path, prompt_column=column).all()["prompt"][0].as_py() == (
        "Which \\frac{1}{2}? (level 3)\nA. a\nB. b {} {0}"
    )
    assert error(path, prompt_column="{question} {choice[0]}") == (
        f"prompts.prompt_column: {path} has no column 'choice[0]'; it has question, choices, level, answer; "
        "did you mean choices[0]?"
    )
