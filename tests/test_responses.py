"""`verify` takes other systems' dumps: their names of columns, lists of messages, arrays of JSON."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gvpo_ray.cli import main
from gvpo_ray.verifiers.responses import MalformedRow, Names, NoColumn, read_row

USER, ASSISTANT = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2."}


def read(row: dict[str, Any], response: str | None = None, gold: str | None = None) -> tuple[str, str, Any]:
    found = read_row(row, Names(response, gold), 3)
    return found.prompt, found.response, found.columns["answer"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1 + 1?", "response": "It is 2.", "gold": "2"},
        {"input": "1 + 1?", "output": "It is 2.", "gts": "2", "score": 1.0, "step": 5},  # verl's validation
        {"prompt": "1 + 1?", "completion": "It is 2.", "ground_truth": 2},  # TRL
        {"input": "1 + 1?", "output": "It is 2.", "label": "2"},  # OpenRLHF
        {"question": "1 + 1?", "gen": "It is 2.", "answer": "2"},
        {"problem": "1 + 1?", "generation": "It is 2.", "expected_answer": "2"},  # NeMo Skills
        {"messages": [USER, ASSISTANT], "ground_truth": "2"},
        {"prompt": [USER], "completion": [ASSISTANT], "solution": ["2"]},
        {
            "conversations": [],
            "prompt": "1 + 1?",
            "response": "It is 2.",
            "reward_model": {"ground_truth": "2"},
        },
    ],
)
def test_the_usual_names_of_other_systems_are_known(row: dict[str, Any]) -> None:
    assert read(row) == ("1 + 1?", "It is 2.", "2")


def test_the_options_name_a_column_or_a_path_and_come_first() -> None:
    row = {"response": "no", "gold": "no", "out": {"texts": ["a", "It is 2."]}, "meta": {"gold": True}}
    assert read(row, "out.texts[1]", "meta.gold") == ("", "It is 2.", "True")
    with pytest.raises(MalformedRow, match=r"^line 3: no out\.text$"):
        read(row, "out.text")


def test_several_golds_come_as_a_list_and_an_empty_one_as_nothing() -> None:
    row = {"response": "5", "gold": ["5", "-5"]}
    assert read(row)[2] == ["5", "-5"] and read_row(row, Names(), 1).columns["answer_match"] == "any"
    for empty in (None, "", float("nan"), []):
        assert read({"response": "5", "gold": empty})[2] == ""
        assert read({"response": "5", "answer": empty, "ground_truth": "6"})[2] == (
            "" if empty in ("", []) else "6"
        )


def test_a_label_beside_a_gold_is_none_even_where_the_gold_is_empty() -> None:
    for empty in (None, float("nan")):
        assert read({"response": "5", "answer": empty, "label": 1})[2] == ""
    assert read({"response": "5", "answer": "5", "label": 1})[2] == "5"
    assert (
        read({"response": "5", "label": 1})[2] == "1" == read({"response": "5", "label": 0, "target": 1})[2]
    )
    assert read({"response": "5", "answer": None, "label": 1}, gold="label")[2] == "1"
    for gold in ("solution", "target", "final_answer"):
        assert read({"response": "42", "label": True, gold: "42"})[2] == "42"
    with pytest.raises(NoColumn):
        read({"response": "5", "label": True})
    assert read({"response": "5", "label": True}, gold="label")[2] == "True"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"response": True, "gold": "1"}, "line 3: response is bool, not text"),
        ({"response": ["a", "b"], "gold": "1"}, "line 3: response is list, not text"),
        ({"messages": [USER], "gold": "1"}, "line 3: messages does not end with a message of the assistant"),
        (
            {"response": "a", "gold": {"x": 1}},
            "line 3: gold has fields of its own: name one of them (gold.x)",
        ),
    ],
)
def test_what_is_no_response_or_gold_is_named_with_its_line(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(MalformedRow) as caught:
        read(row)
    assert str(caught.value) == complaint


ROWS = [
    {"prompt": "q", "out": [USER, {"role": "assistant", "content": r"\boxed{2}"}], "key": "2"},
    {"prompt": "q", "out": [USER, {"role": "assistant", "content": r"\boxed{3}"}], "key": "2"},
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dump.json", json.dumps(ROWS, indent=2).encode()),
        ("dump.jsonl", json.dumps(ROWS).encode()),
        ("dump.jsonl.gz", gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())),
    ],
)
def test_an_array_or_a_compressed_file_is_scored_with_named_columns(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    arguments = [
        "--response-column",
        "out",
        "--gold-column",
        "key",
        "rewards={exact_match: 1}",
        "--workers",
        "1",
    ]
    arguments += ["timeout_s=60"]
    assert main(["verify", str(tmp_path / name), "--out", str(tmp_path / "out.jsonl"), *arguments]) == 0
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["verdict"] for row in scored] == ["correct", "incorrect"]
    assert [row["out"] for row in scored] == [row["out"] for row in ROWS]


def test_a_function_that_asks_for_a_column_the_file_lacks_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"response": "a", "gold": "1", "level": 2, "expected": true}\n')
    for column in ("levels", "expected"):  # the label is not for the functions
        (tmp_path / "own.py").write_text(f"def f(completions, {column}): return [0.0]\n")
        reward = f"rewards={{{tmp_path}/own.py:f: {{trusted: true}}}}"
        assert main(["verify", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), reward]) == 2
        assert f"it needs the argument '{column}', and INPUT has no such column" in capsys.readouterr().err
