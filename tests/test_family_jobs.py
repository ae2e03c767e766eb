"""The jobs of one objective each: what they ask for is there, and those without engines train."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from learners import Recorder

from gvpo_ray import GVPOConfig, groups
from gvpo_ray.cli import main
from gvpo_ray.learner.loop import learn
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import Settings
from gvpo_ray.learner.warm_start import warm_start
from gvpo_ray.losses.registry import OBJECTIVES
from gvpo_ray.run.algorithm import GVPO
from gvpo_ray.run.inputs import Inputs, read_inputs
from gvpo_ray.run.session import Session
from gvpo_ray.verifiers.verifier import Verifier
from gvpo_ray.weights.transfer import ObjectPublisher

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


def few_steps(name: str) -> GVPOConfig:
    few = ["num_steps=3", "groups_per_step=16", "learner.learning_rate=2e-3", f"run_dir=runs/few/{name}"]
    config = GVPOConfig.from_file(OF_OBJECTIVES[name], [*few, *([SCORED] if name == "poft" else [])])
    assert OFFLINE[name] in config.sources and config.engines.num == 0
    return config


def check_trained(made: Path, name: str, lines: list[dict[str, Any]]) -> None:
    """That three steps lowered the loss, and left a checkpoint with other weights than the first."""
    first, *_, last = (line["loss"] for line in lines)
    assert len(lines) == 3 and last < first
    assert all(line["sources/offline"] == 1 and line["groups/untrainable"] == 0 for line in lines)
    start = made / "runs" / "family" / ("sft/checkpoints/step-40" if name == "poft" else "model")
    saved = made / "runs" / "few" / name / "checkpoints" / "step-3"
    assert {path.name for path in saved.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert (saved / "model.safetensors").read_bytes() != (start / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def embedded(made: Path) -> Iterator[None]:
    session = Session(GVPOConfig.from_file(OF_OBJECTIVES["sft"]).ray)
    yield
    session.stop()


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", ["epa", "poft"])
def test_a_job_without_engines_trains_and_leaves_a_checkpoint(
    made: Path, embedded: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of pairs with weak negatives, and one of groups of one."""
    monkeypatch.chdir(made)
    with GVPO(few_steps(name), say=lambda line: None) as algo:
        while not algo.done:
            algo.train()
        lines = list(algo.metrics.lines)
    check_trained(made, name, lines)


class OfAJob(Recorder):
    """A learner's buffer with the groups that the ring would bring: the job's own, scored as it says."""

    def __init__(self, config: GVPOConfig, inputs: Inputs) -> None:
        super().__init__(config.num_steps)
        self._size, self._inputs, self.lines = config.groups_per_step, inputs, list[dict[str, Any]]()
        self._verifier = Verifier(config.verifiers)

    def batch(self, step: int) -> pa.Table:
        whole = [self._inputs.group((step - 1) * self._size + i) for i in range(self._size)]
        assert all(is_whole for _, is_whole in whole)
        prompts = pa.concat_tables([group for group, _ in whole], promote_options="default")
        return groups.log_columns(self._verifier.score(prompts))

    def published(self, version: int, weights: Any, metrics: dict[str, Any] | None) -> None:
        self.lines += [] if metrics is None else [metrics]


@pytest.mark.components
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_learner_of_a_job_without_engines_trains_its_groups_in_this_process_too(
    made: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others: on the ring a job's sections alone differ."""
    monkeypatch.chdir(made)
    config = few_steps(name).absolute()
    Path(config.run_dir).mkdir(parents=True)
    buffer = OfAJob(config, read_inputs(config, {}))
    settings = Settings(
        run_dir=config.run_dir,
        num_steps=3,
        last_step=3,
        loss=config.loss,
        learner=config.learner,
        checkpoint=config.checkpoint,
        model_path=config.model.path,
        parity_every=0,
    )
    torch.manual_seed(config.seed)
    policy = Policy(config.model, config.learner, config.model.path, resumes=False)
    try:
        learn(policy, buffer, ObjectPublisher(copy.deepcopy, torch.float32, is_sender=True), settings)
    finally:
        buffer._verifier.close()
    policy.wait_for_saving(60)
    check_trained(made, name, buffer.lines)
