"""`gvpo-ray score`: the log-probs of aligned models beside the data, and PoFT, which reads them."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_scoring_model import PLAIN, make_teacher
from test_scoring_model import teacher_folder as teacher_folder
from transformers import AutoTokenizer

from gvpo_ray import GVPOConfig
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import SourceConfig
from gvpo_ray.config.loss import loss_config
from gvpo_ray.config.model import ScoringModelConfig
from gvpo_ray.data.files import read_file, to_list
from gvpo_ray.data.offline import OfflineSource
from gvpo_ray.run import score
from gvpo_ray.verifiers.scoring_model import PROMPTS, Score, ScoringModel, Text


class _InProcess:
    """Stands for ReferenceGroup, with one model in this process."""

    def __init__(self, config: ScoringModelConfig, renderings: Any, note: Any, kind: str) -> None:
        self._model = ScoringModel(config.model, renderings, config.batch_size)

    async def score_texts(self, texts: Any, key: str) -> list[Score]:
        return self._model.score(texts, key)

    async def close(self) -> None:
        pass


class _Session:
    def __init__(self, config: Any) -> None:
        self.on_stop, self.stop = (lambda close: None), (lambda: None)

    def guard(self, coroutine: Any) -> Any:
        return asyncio.run(coroutine)


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`scores(rows, suffix, models, **source)`: the lines of `gvpo-ray score`, and the file's rows."""
    monkeypatch.setattr(score, "ReferenceGroup", _InProcess)
    monkeypatch.setattr(score, "Session", _Session)
    monkeypatch.setattr(score, "TEXTS_OF_A_CALL", 2)

    def of(folder: Path, rows: list[dict[str, Any]], suffix: str, models: dict[str, Path]) -> Any:
        data, out = folder / "data.jsonl", folder / f"scored{suffix}"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = GVPOConfig.from_dict(poft_config(data, models))
        lines = list(score.score(config, out))
        return lines, read_file(out, "out")

    return of


def poft_config(data: Path, models: dict[str, Path]) -> dict[str, Any]:
    aligned = {name: {"model": str(path)} for name, path in models.items()}
    return {
        "run_dir": "run",
        "num_steps": 1,
        "model": {"path": "model"},
        "engines": {"num": 0},
        "sources": {"chat": {"path": str(data), "group_share": 1, "template": "q{prompt}="}},
        "loss": {"objective": "poft", "aligned": aligned},
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_scores_of_several_models_stand_beside_the_data_by_name_and_poft_reads_their_mean(
    scores: Any, tmp_path: Path, teacher_folder: Path, suffix: str
) -> None:
    other = make_teacher(tmp_path / "other", ["bb"], context=99)
    said = [{"role": "assistant", "content": "bb"}]
    rows = [
        {"prompt": "p", "completion": "ab", "id": 0},
        {"prompt": "p", "completion": "x" * 30, "id": 1},
        {"prompt": "p", "completion": said if suffix == ".jsonl" else "bb", "id": 2},
        {"prompt": "", "completion": "a", "id": 3},
        {"prompt": "pp", "completion": "abba", "id": 4},
    ]
    lines, scored = scores(tmp_path, rows, suffix, {"one": teacher_folder, "two": other})
    assert [line.partition(",")[0] for line in lines] == [
        "one: 3 of 4 rows scored",
        "two: 4 of 4 rows scored",
        f"wrote {tmp_path}/scored{suffix}: 3 of 5 rows",
    ]
    assert "first left out is row 1: 34 tokens do not fit into its context of 24" in lines[0]
    assert to_list(scored["id"]) == [0, 2, 4]
    models = [ScoringModel(str(path), {PROMPTS: PLAIN}, 8) for path in (teacher_folder, other)]
    texts = [Text("p", None, "ab"), Text("p", None, "bb"), Text("pp", None, "abba")]
    means = [[s.logprob / s.num_tokens for s in model.score(texts)] for model in models]
    by_name = to_list(scored["aligned_logps"])
    assert [list(row) for row in by_name] == [["one", "two"]] * 3
    for i, name in enumerate(("one", "two")):
        assert [row[name] for row in by_name] == pytest.approx(means[i], abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(other)
    for names, want in (
        (("one", "two"), [(a + b) / 2 for a, b in zip(*means, strict=True)]),
        (("two",), means[1]),
    ):
        loss = loss_config(objective="poft", aligned={name: {"model": "x"} for name in names})
        source = OfflineSource(
            SourceConfig(
                path=f"{tmp_path}/scored{suffix}", group_share=1, template="q{prompt}=", shuffle=False
            ),
            tokenizer,
            name="chat",
            max_tokens=None,
            max_length=99,
            num_completions=2,
            loss=loss,
        )
        got = [reward for i in range(len(source)) for reward in source.group(i, i)["rewards"][0].as_py()]
        assert sorted(got) == pytest.approx(sorted(want), abs=1e-5)


def test_a_missing_aligned_log_prob_is_named_with_its_row_and_model(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    row = {"prompt": "p", "completion": "a"}

    def read(*aligned: dict[str, Any] | None, **loss: Any) -> str:
        file.write_text("".join(json.dumps({**row, "aligned_logps": each}) + "\n" for each in aligned))
        with pytest.raises(ConfigError) as refused:
            OfflineSource(
                SourceConfig(path=str(file), group_share=1, template="{prompt}"),
                AutoTokenizer.from_pretrained(tiny.make_model(tmp_path / "model")),
                name="chat",
                max_tokens=None,
                max_length=99,
                num_completions=2,
                loss=loss_config(objective="poft", **loss),
            )
        return str(refused.value).replace(str(file), "data.jsonl")

    where = "sources.chat.path: data.jsonl: row 1: aligned_logps"
    assert read({"yi": -1.0}, {"yi": None}) == f"{where} has no log-prob of yi"
    assert read({"yi": -1.0}, None).startswith(f"{where} is null")
    two = {name: {"model": "x"} for name in ("yi", "zephyr")}
    said = read({"yi": -1.0, "zephyr": -2.0}, {"yi": -1.0}, aligned=two)
    assert said == f"{where} has no log-prob of zephyr"


@pytest.mark.parametrize(
    ("rows", "out", "changes", "said"),
    [
        ([{"prompt": "p", "completion": "a"}], "o.jsonl", {"aligned": {}}, "loss.aligned: no model to score"),
        ([{"prompt": "p", "completion": "a"}], "o.txt", {}, "--out: o.txt ends neither in .jsonl nor in"),
        ([{"prompt": "p", "completion": "a", "id": i} for i in ("a", 1)], "o.parquet", {}, "write .jsonl"),
        ([{"prompt": "p", "completion": "a"}], "no/o.jsonl", {}, "--out: no folder "),
        (
            [{"prompt": "p", "completion": "a"}],
            "o.jsonl",
            {"aligned": {"yi": {"model": "./nowhere"}}},
            "loss.aligned.yi.model: no folder ",
        ),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], "o.jsonl", {}, "one completion each"),
        ([{"prompt": "p", "completion": "x" * 30}], "o.jsonl", {}, "no row could be scored by all models"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    scores: Any,
    tmp_path: Path,
    teacher_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, Any]],
    out: str,
    changes: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = poft_config(data, {"one": teacher_folder})
    config["loss"] |= changes
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        list(score.score(GVPOConfig.from_dict(config), out))
    assert "\n" not in str(refused.value)
