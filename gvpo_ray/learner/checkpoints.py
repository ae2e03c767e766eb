"""The checkpoints of a run directory. What is in one: policy.py. Importing this does not import torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from gvpo_ray.files import part_of


def latest_checkpoint(run_dir: str | Path) -> tuple[int, Path] | None:
    """Step and folder of the newest whole checkpoint of a run."""
    found = [
        (int(path.parent.name.removeprefix("step-")), path.parent)
        for path in Path(run_dir).glob("checkpoints/step-*/state.json")
    ]
    return max(found, default=None)


def prune_checkpoints(run_dir: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted save or removal left."""
    folder = Path(run_dir) / "checkpoints"
    whole = sorted(
        (path.parent for path in folder.glob("step-*/state.json")),
        key=lambda path: int(path.name.removeprefix("step-")),
    )
    for path in {*folder.glob("step-*"), *folder.glob(part_of(Path("step-*")).name)}.difference(
        whole[-keep:]
    ):
        remove_checkpoint(path)


def remove_checkpoint(checkpoint: Path) -> None:
    """state.json goes first: what an interrupted removal leaves is no checkpoint."""
    (checkpoint / "state.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
