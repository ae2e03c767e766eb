"""Tokens that a tokenizer has, and its model lacks: refused before a run, left out where they come in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny
from transformers import AutoTokenizer

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.data.vocabulary import beyond, check_vocabulary
from gvpo_ray.run.inputs import read_inputs
from gvpo_ray.run.models import check_recorded_tokens


def grown(folder: Path, vocab_size: int) -> Path:
    """A model that has fewer tokens than its tokenizer, which is all that is read of it here."""
    path = tiny.make_model(folder)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": vocab_size}), encoding="utf-8")
    return path


def rows(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def config_of(tmp_path: Path, vocab_size: int, **sections: Any) -> GVPOConfig:
    sections = {
        "prompts": {"path": rows(tmp_path / "p.jsonl", {"prompt": "abc", "answer": "1"})},
        **sections,
    }
    named = [sections["prompts"], *sections.get("sources", {}).values()]
    for section in [*named, *sections.get("evaluation", {}).get("sets", {}).values()]:
        section["template"] = "{prompt}"
    return GVPOConfig.from_dict(
        {
            "run_dir": str(tmp_path / "run"),
            "num_steps": 1,
            "model": {"path": str(grown(tmp_path / "model", vocab_size))},
            "sampling": {"max_tokens": 8},
            **sections,
        }
    )


Z = 2 + tiny.ALPHABET.index("z")


@pytest.mark.parametrize("vocab_size", [Z, Z + 1, tiny.VOCAB_SIZE])
@pytest.mark.parametrize(
    ("where", "sections"),
    [
        ("the prompts", {"prompts": {"prompt": "xyz", "answer": "1"}}),
        ("the prompts of evaluation.sets.held", {"evaluation": {"prompt": "z", "answer": "1"}}),
        ("the prompts of sources.people", {"sources": {"prompt": "z", "completion": "a", "answer": "1"}}),
        ("the completions of sources.people", {"sources": {"prompt": "a", "completion": "z", "answer": "1"}}),
    ],
)
def test_data_with_a_token_that_the_model_lacks_are_refused_before_anything_starts(
    tmp_path: Path, where: str, sections: dict[str, dict[str, str]], vocab_size: int
) -> None:
    ((name, row),) = sections.items()
    data: dict[str, Any] = {"path": rows(tmp_path / "data.jsonl", row)}
    config = config_of(
        tmp_path,
        vocab_size,
        **{
            name: {"sets": {"held": data}, "every": 1}
            if name == "evaluation"
            else {"people": {**data, "share": 0.5}}
            if name == "sources"
            else data
        },
    )
    if vocab_size > Z:
        read_inputs(config)
        return
    with pytest.raises(ConfigError) as error:
        read_inputs(config)
    assert str(error.value) == (
        f"model.path: {config.model.path}: the tokenizer is not the model's, or has grown without it: "
        f"{where} have token {Z} ('z'), and the model has {Z} (vocab_size of its config.json)"
    )


@pytest.mark.parametrize("vocab_size", [Z, Z + 1])
@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids"])
def test_recorded_groups_with_a_token_that_the_model_lacks_are_refused(
    tmp_path: Path, column: str, vocab_size: int
) -> None:
    config = config_of(tmp_path, vocab_size)
    values: dict[str, Any] = {"prompt_ids": [2], "completion_ids": [[3, 1], [4, 1]]}
    values[column] = [2, Z] if column == "prompt_ids" else [[3, 1], [Z, 1]]
    recorded = groups.table([tiny.make_group(0, (1.0, 0.0), **values)])
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    if vocab_size > Z:
        check_recorded_tokens(config.model, tokenizer, recorded)
        return
    with pytest.raises(ConfigError, match=rf"the {column} of --groups have token {Z} \('z'\), and"):
        check_recorded_tokens(config.model, tokenizer, recorded)


def test_nothing_is_refused_where_there_are_no_tokens(tmp_path: Path) -> None:
    model = ModelConfig(path=str(grown(tmp_path, 4)))
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    for values in ([], [[]], [[[]]], [[3]]):
        check_vocabulary(model, {"x": pa.chunked_array([pa.array(values)])}, tokenizer)
    assert beyond([], 4) is beyond([3], 4) is beyond([9], None) is None and beyond([3, 4, 5], 4) == 4
