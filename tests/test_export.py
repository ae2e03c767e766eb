"""`gvpo-ray export` writes the model of a checkpoint, and nothing that only training needs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import load, same, settings
from safetensors.torch import load_file
from test_checkpoints import as_before, step
from tiny import make_model, tree
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo_ray import cli
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.learner.export import export_model
from gvpo_ray.learner.policy import Policy
from gvpo_ray.run.run_dir import FORMAT, FORMAT_FILE


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of a bfloat16 model with an own reference, and checkpoints of steps 1 and 2."""
    given = settings(tmp_path)
    make_model(tmp_path / "model")
    policy = Policy(ModelConfig(path=given.model_path, dtype="bfloat16"), given.learner, given.model_path)
    policy.reference.refresh(0)
    for number in (1, 2):
        step(policy, given, number)
        policy.save(tmp_path / "run" / "checkpoints" / f"step-{number}")
    config = {
        "run_dir": str(tmp_path / "run"),
        "num_steps": 2,
        "model": {"path": given.model_path, "dtype": "bfloat16"},
        "prompts": {"path": "train.jsonl"},
    }
    (tmp_path / "run" / "config.yaml").write_text(GVPOConfig.from_dict(config).dump(), encoding="utf-8")
    (tmp_path / "run" / FORMAT_FILE).write_text(json.dumps({"format": FORMAT, "gvpo_ray": "0"}))
    return tmp_path / "run"


def model_in(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("number", [None, 1, 2])
def test_the_folder_is_the_model_of_the_checkpoint_in_the_models_dtype_and_no_more(
    run_dir: Path, tmp_path: Path, number: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(run_dir)
    options = ["--step", str(number)] if number else []
    assert cli.main(["export", str(run_dir), "--out", str(tmp_path / "out"), *options]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n" and tree(run_dir) == before
    source = run_dir / "checkpoints" / f"step-{number or 2}"
    left_out = {"state.json", "optimizer", "reference"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == (
        {path.name for path in source.iterdir()} - left_out
    )
    assert all((source / name).exists() for name in left_out)
    got = model_in(tmp_path / "out")
    assert same(got, model_in(source)) and {weight.dtype for weight in got.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("a=7")["input_ids"]) == "a=7"


def test_a_checkpoint_of_the_version_before_is_written_in_the_models_dtype_too(
    run_dir: Path, tmp_path: Path
) -> None:
    given, source = settings(tmp_path), run_dir / "checkpoints" / "step-2"
    model = ModelConfig(path=given.model_path, dtype="bfloat16")
    want, policy = model_in(source), Policy(model, given.learner, source)
    as_before(source, policy)
    assert {weight.dtype for weight in load_file(source / "model.safetensors").values()} == {torch.float32}
    target = export_model(str(run_dir), model, None, None)
    assert target == run_dir / "export" / "step-2" and same(model_in(target), want)
    again = load(target, given)  # a model, from which a run begins
    assert again.step == 0 and not again.reference.exists


def test_what_cannot_be_exported_is_one_line(run_dir: Path, tmp_path: Path) -> None:
    model = ModelConfig(path="model", dtype="bfloat16")

    def says(step: int | None, out: Path | None, folder: Path = run_dir) -> str:
        with pytest.raises(ConfigError) as caught:
            export_model(str(folder), model, step, None if out is None else str(out))
        return str(caught.value)

    (tmp_path / "there").mkdir()
    assert says(None, tmp_path / "there") == f"--out: {tmp_path / 'there'} is there already"
    assert says(3, None) == f"--step: 3: the checkpoints in {run_dir} are of steps 1, 2"
    assert says(None, None, tmp_path) == f"RUN_DIR: no checkpoint in {tmp_path}"
    (run_dir / "checkpoints" / "step-2" / "model.safetensors").write_bytes(b"")
    assert says(2, None).startswith("--step: 2: its checkpoint is damaged: ")
    assert export_model(str(run_dir), model, None, None).name == "step-1"  # the newest that is whole
    assert not (run_dir / "export" / "step-2").exists()


def test_a_checkpoint_that_its_run_removes_meanwhile_is_not_exported(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree

    def removed_meanwhile(source: Path, *arguments: Any, **options: Any) -> Any:
        for name in ("state.json", "model.safetensors"):  # in the order of remove_checkpoint
            (source / name).unlink()
        return copy(source, *arguments, **options)

    monkeypatch.setattr(shutil, "copytree", removed_meanwhile)
    with pytest.raises(ConfigError, match=r"^--step: .*step-1 was removed by its run meanwhile"):
        export_model(str(run_dir), ModelConfig(path="model", dtype="bfloat16"), 1, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.components
def test_an_export_needs_no_ray_and_a_wrong_run_directory_is_status_2(run_dir: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from gvpo_ray.cli import main; "
        f"status = [main(['export', {str(run_dir)!r}]), main(['export', {str(tmp_path / 'no')!r}])]; "
        "assert status == [0, 2], status; "
        "assert not {'ray', 'vllm', 'deepspeed', 'torch'} & {*sys.modules}"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith(f"error: {tmp_path / 'no'}/config.yaml")
