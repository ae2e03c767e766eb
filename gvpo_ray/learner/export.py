"""The model of a checkpoint is written into a folder of its own, without what only training needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.files import new_folder
from gvpo_ray.learner.checkpoints import checkpoint_of, latest_checkpoint

TRAINING_ONLY = ("state.json", "optimizer", "reference")
"""What a checkpoint holds beside its Hugging Face folder and the adapter."""


def export_model(run_dir: str, model: ModelConfig, step: int | None, out: str | None) -> Path:
    """Write the Hugging Face folder of a checkpoint, in the model's dtype; return where it is.

    Args:
        run_dir: the run directory, which may be that of a run that goes on.
        model: the run's config section `model`.
        step: of the checkpoint; None: the newest.
        out: the folder to make; None: export/step-N in the run directory.

    Raises:
        ConfigError: there is no such checkpoint, or it is damaged or removed meanwhile; or the folder is
            there already.
        OSError: the folder cannot be written.
    """
    if step is not None:
        source = checkpoint_of(run_dir, step)
    elif newest := latest_checkpoint(run_dir):
        source = newest[1]
    else:
        raise ConfigError(f"RUN_DIR: no checkpoint in {run_dir}")
    target = Path(out) if out is not None else Path(run_dir) / "export" / source.name
    if target.exists():
        raise ConfigError(f"--out: {target} is there already")
    with new_folder(target) as part:
        try:
            shutil.copytree(source, part, ignore=shutil.ignore_patterns(*TRAINING_ONLY), dirs_exist_ok=True)
            # Checkpoints of 0.2 and older have it in the learner's dtype.
            if json.loads((source / "config.json").read_text(encoding="utf-8")).get("dtype") != model.dtype:
                _convert(source, part, model)
        except OSError:
            if _is_there(source):
                raise
        if not _is_there(source):  # the run has newer ones, and what was copied may lack files
            raise ConfigError(
                f"--step: {source} was removed by its run meanwhile: give a newer step, or none"
            )
    return target


def _is_there(checkpoint: Path) -> bool:
    """Return whether no run has begun to remove a checkpoint: its state.json goes first."""
    return (checkpoint / "state.json").is_file()


def _convert(source: Path, target: Path, model: ModelConfig) -> None:
    """Write the model in `source` into the folder `target` in the model's dtype."""
    from transformers import AutoModelForCausalLM

    trust = model.trust_remote_code
    read = AutoModelForCausalLM.from_pretrained(source, dtype=model.dtype, trust_remote_code=trust)
    for file in target.glob("*.safetensors*"):
        file.unlink()
    read.save_pretrained(target)
