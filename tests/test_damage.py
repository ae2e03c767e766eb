"""Torn checkpoints are named, and the one before is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gvpo_ray.learner.checkpoints import damaged_checkpoints, latest_checkpoint, prune_checkpoints
from gvpo_ray.learner.damage import damage_of


def checkpoint(run_dir: Path, step: int) -> Path:
    """A folder with the files of a checkpoint."""
    folder = run_dir / "checkpoints" / f"step-{step}"
    (folder / "optimizer").mkdir(parents=True)
    save_file(
        {"a": torch.zeros(30), "b": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    parts = ["00000.safetensors", "00001.safetensors"]
    for part in parts:
        save_file({"exp_avg.a": torch.zeros(15)}, folder / "optimizer" / part)
    for name in ("config.json", "state.json"):
        (folder / name).write_text(json.dumps({"step": step, "files": parts}), encoding="utf-8")
    return folder


def cut(file: str, size: int) -> Callable[[Path], None]:
    """What cuts a file of a checkpoint to its first bytes; a negative size: without its last ones."""

    def damage(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[:size])

    return damage


def lose(*ranks: int) -> Callable[[Path], None]:
    """What removes the parts of some ranks."""

    def damage(folder: Path) -> None:
        for rank in ranks:
            (folder / "optimizer" / f"0000{rank}.safetensors").unlink()

    return damage


def point_nowhere(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    "damage, says",
    [
        (cut("model.safetensors", -1), "model.safetensors: its last 1 bytes are missing"),
        (cut("model.safetensors", 20), "model.safetensors: its header cannot be read"),
        (cut("model.safetensors", 0), "model.safetensors: its header cannot be read"),
        (
            cut("optimizer/00000.safetensors", -50),
            "optimizer/00000.safetensors: its last 50 bytes are missing",
        ),
        (cut("config.json", 4), "config.json: "),
        (cut("state.json", 0), "state.json: "),
        (lambda folder: (folder / "state.json").write_text("[7]"), "state.json: it is missing, or not as"),
        (lose(0, 1), "optimizer: no *.safetensors"),
        (lose(1), "optimizer/00001.safetensors: it is missing"),
        (point_nowhere, "model-00001-of-00002.safetensors: it is missing"),
    ],
)
def test_a_torn_file_of_the_newest_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    first, second = (checkpoint(tmp_path, step) for step in (2, 10))
    assert latest_checkpoint(tmp_path) == (10, second) and damaged_checkpoints(tmp_path) == []
    damage(second)
    assert latest_checkpoint(tmp_path) == (2, first)
    (found,) = damaged_checkpoints(tmp_path)
    assert found.startswith(str(second / says.rpartition(": ")[0])) and says in found


def test_a_run_whose_checkpoints_are_all_damaged_has_none(tmp_path: Path) -> None:
    for step in (1, 2):
        cut("model.safetensors", 100)(checkpoint(tmp_path, step))
    assert latest_checkpoint(tmp_path) is None and len(damaged_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("keep, left", [(1, {10, 20}), (2, {8, 10, 20})])
def test_a_damaged_checkpoint_does_not_take_the_place_of_one_that_was_just_written(
    tmp_path: Path, keep: int, left: set[int]
) -> None:
    for step in (4, 6, 8, 20):
        checkpoint(tmp_path, step)
    for step in (4, 20):
        cut("model.safetensors", -1)(tmp_path / "checkpoints" / f"step-{step}")
    newest = checkpoint(tmp_path, 10)  # the run went on from step 8
    prune_checkpoints(tmp_path, keep)
    assert latest_checkpoint(tmp_path) == (10, newest)
    assert {path.name for path in newest.parent.iterdir()} == {f"step-{step}" for step in left}


def test_a_checkpoint_that_does_not_name_the_parts_of_its_ranks_is_whole_with_those_that_are_there(
    tmp_path: Path,
) -> None:
    """Those of 0.2 and older had one rank's file, or some of it."""
    folder = checkpoint(tmp_path, 2)
    (folder / "state.json").write_text('{"step": 2}', encoding="utf-8")
    lose(1)(folder)
    assert damage_of(folder) is None
    lose(0)(folder)
    assert damage_of(folder) == f"{folder / 'optimizer'}: no *.safetensors"


def test_a_checkpoint_of_a_policy_is_whole(tmp_path: Path) -> None:
    import learners
    import tiny

    policy = learners.load(tiny.make_model(tmp_path / "model"), learners.settings(tmp_path))
    policy.save(tmp_path / "checkpoints" / "step-0")
    folder = tmp_path / "checkpoints" / "step-0"
    assert damage_of(folder) is None
    assert json.loads((folder / "state.json").read_text())["files"] == ["00000.safetensors"]
