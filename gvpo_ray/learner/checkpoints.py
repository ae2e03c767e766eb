"""These functions find and remove the checkpoints of a run directory, without importing torch.

For the contents of a checkpoint see learner/checkpoint.py.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from gvpo_ray.config.base import ConfigError
from gvpo_ray.files import lock, part_of, sync_to_disk, sync_tree
from gvpo_ray.learner.damage import damage_of

NAME = re.compile(r"step-(0|[1-9][0-9]*)")
"""The name of a checkpoint. Whatever else is in checkpoints/, such as a copy of one, is the user's."""

LOCK = Path("checkpoints", ".lock")
"""The file in a run directory that the learner which writes checkpoints has locked."""

LEARNER_END_S = 60.0
"""Seconds that a new process waits for the learner of a killed one to end."""


def _checkpoints(run_dir: str | Path) -> list[tuple[int, Path]]:
    """Return step and folder of everything that has a checkpoint's name, in order; some are not complete."""
    folders = [path for path in Path(run_dir).glob("checkpoints/step-*") if path.is_dir()]
    return sorted((int(match[1]), path) for path in folders if (match := NAME.fullmatch(path.name)))


def _complete(run_dir: str | Path) -> list[tuple[int, Path]]:
    """Return step and folder of the checkpoints that were written to their end, in order."""
    return [entry for entry in _checkpoints(run_dir) if (entry[1] / "state.json").is_file()]


def latest_checkpoint(run_dir: str | Path) -> tuple[int, Path] | None:
    """Return step and folder of the newest whole checkpoint of a run; None where there is none."""
    return next((entry for entry in _complete(run_dir)[::-1] if damage_of(entry[1]) is None), None)


def checkpoint_of(run_dir: str | Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    complete = dict(_complete(run_dir))
    if step not in complete:
        there = ", ".join(map(str, complete)) or "none"
        raise ConfigError(f"--step: {step}: the checkpoints in {run_dir} are of steps {there}")
    if found := damage_of(complete[step]):
        raise ConfigError(f"--step: {step}: its checkpoint is damaged: {found}")
    return complete[step]


def damaged_checkpoints(run_dir: str | Path) -> list[str]:
    """Return what is damaged in each checkpoint that is newer than latest_checkpoint, with its file."""
    newest = latest_checkpoint(run_dir)
    newer = (path for step, path in _complete(run_dir) if newest is None or step > newest[0])
    return [found for path in newer if (found := damage_of(path))]


def settled_checkpoint(run_dir: str | Path) -> tuple[int, Path] | None:
    """Return latest_checkpoint once no learner of an earlier process writes another one.

    After LEARNER_END_S it is returned in any case.
    """
    held = Path(run_dir) / LOCK
    if held.parent.is_dir():
        with contextlib.suppress(BlockingIOError):
            lock(held, LEARNER_END_S).close()
    return latest_checkpoint(run_dir)


def prune_checkpoints(run_dir: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints, and the remains of interrupted saves and removals.

    A damaged one takes no other's place, and stays while it is newer than those that are kept. Files and
    folders with other names than a checkpoint's are left alone.
    """
    complete = _complete(run_dir)
    whole = [entry for entry in complete if damage_of(entry[1]) is None]
    oldest = min(whole[-keep:], default=(0, None))[0]
    for step, path in _checkpoints(run_dir):
        if step < oldest or (step, path) not in complete:
            remove_checkpoint(path)
    for path in Path(run_dir).glob(f"checkpoints/{part_of(Path('step-*')).name}"):
        if NAME.fullmatch(path.name[1:].removesuffix(".part")):
            remove_checkpoint(path)


def finish_checkpoint(part: Path, checkpoint: Path) -> None:
    """Give a written folder the name of its checkpoint, once all of it is on the disk."""
    sync_tree(part)
    remove_checkpoint(checkpoint)
    part.rename(checkpoint)
    sync_to_disk(checkpoint.parent)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; state.json goes first, so that an interrupted removal leaves no checkpoint."""
    (checkpoint / "state.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
