"""The jobs of one objective each: what they ask for is there, and those without engines train."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gvpo_ray import GVPOConfig
from gvpo_ray.cli import main
from gvpo_ray.learner.warm_start import warm_start
from gvpo_ray.losses.registry import OBJECTIVES
from gvpo_ray.run.algorithm import GVPO
from gvpo_ray.run.session import Session

JOBS = Path(__file__).parents[1] / "jobs"
OF_OBJECTIVES = {
    path.stem.removesuffix("_cpu"): path
    for path in sorted(JOBS.glob("*_cpu.yaml"))
    if "runs/family" in path.read_text()
}
OFFLINE = {"sft": "careful", "dpo": "pairs", "epa": "pairs", "poft": "noisy"}
"""Jobs without engines, and the names of their sources."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data, and hardly trained models where the jobs' checkpoints would be."""
    folder = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runpy.run_path(str(JOBS / "family_cpu.py"))["main"]()
        cut(folder / "runs" / "family" / "data")
        warm_start(GVPOConfig.from_file(OF_OBJECTIVES["sft"], ["warm_start.data.limit=256"]))
    family = folder / "runs" / "family"
    for name in ("sft/checkpoints/step-40", "gvpo/checkpoints/step-60", "student"):
        shutil.copytree(family / "model", family / name)
        if name != "student":  # of another run's end, which a run that begins here must not go on from
            (family / name / "state.json").write_text('{"step": 40}')
    lines = [json.loads(line) for line in (family / "data" / "noisy.jsonl").read_text().splitlines()]
    scored = ({**line, "aligned_logps": {"sorter": -3.0 if line["is_noise"] else -0.25}} for line in lines)
    (family / "data" / "aligned.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scored))
    return folder


def cut(data: Path) -> None:
    """Leave few rows of each file: reading thousands for every job is nothing that a test is about."""
    for path in data.glob("*.parquet"):
        pq.write_table(pq.read_table(path).slice(0, 256), path)
    for path in data.glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:96]))


SCORED = "sources.noisy.path=runs/family/data/aligned.jsonl"


def test_there_is_a_job_for_every_objective_of_the_family() -> None:
    objectives = {GVPOConfig.from_file(path).loss.objective for path in OF_OBJECTIVES.values()}
    assert objectives == {*OBJECTIVES} - {"grpo", "dr_grpo", "rloo", "reinforce"}
    assert GVPOConfig.from_file(OF_OBJECTIVES["dpo"], ["loss.ipo=true"]).loss.arguments["ipo"]
    assert GVPOConfig.from_file(OF_OBJECTIVES["distil"]).loss.reference_model is not None


@pytest.mark.components
@pytest.mark.parametrize("name", OF_OBJECTIVES)
def test_check_finds_nothing_wrong_with_a_job_once_those_before_it_have_run(
    made: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    assert main(["check", str(OF_OBJECTIVES[name]), *([SCORED] if name == "poft" else [])]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "resource plan" in printed.out


@pytest.fixture(scope="module")
def embedded(made: Path) -> Iterator[None]:
    session = Session(GVPOConfig.from_file(OF_OBJECTIVES["sft"]).ray)
    yield
    session.stop()


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", OFFLINE)
def test_a_job_without_engines_trains_and_leaves_a_checkpoint(
    made: Path, embedded: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    few = ["num_steps=3", "groups_per_step=16", "learner.learning_rate=2e-3", f"run_dir=runs/few/{name}"]
    config = GVPOConfig.from_file(OF_OBJECTIVES[name], [*few, *([SCORED] if name == "poft" else [])])
    with GVPO(config, say=lambda line: None) as algo:
        while not algo.done:
            algo.train()
        lines = list(algo.metrics.lines)
    first, *_, last = (line["loss"] for line in lines)
    assert len(lines) == 3 and last < first
    assert all(line["sources/offline"] == 1 and line["groups/untrainable"] == 0 for line in lines)
    start = made / "runs" / "family" / ("model" if name == "sft" else "sft/checkpoints/step-40")
    saved = made / "runs" / "few" / name / "checkpoints" / "step-3"
    assert {path.name for path in saved.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert (saved / "model.safetensors").read_bytes() != (start / "model.safetensors").read_bytes()
    assert OFFLINE[name] in config.sources and config.engines.num == 0
