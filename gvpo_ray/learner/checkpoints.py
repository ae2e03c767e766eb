"""These functions find and remove the checkpoints of a run directory, without importing torch.

For the contents of a checkpoint see learner/checkpoint.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from gvpo_ray.files import part_of


def latest_checkpoint(run_dir: str | Path) -> tuple[int, Path] | None:
    """Return step and folder of the newest complete checkpoint of a run; None where there is none."""
    found = [
        (int(path.parent.name.removeprefix("step-")), path.parent)
        for path in Path(run_dir).glob("checkpoints/step-*/state.json")
    ]
    return max(found, default=None)


def prune_checkpoints(run_dir: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and the remains of interrupted saves and removals."""
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
    """Remove a checkpoint; state.json goes first, so that an interrupted removal leaves no checkpoint."""
    (checkpoint / "state.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
