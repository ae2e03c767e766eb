"""The section `tracking`."""

from __future__ import annotations

from typing import Any

from gvpo_ray.config.base import Section


class MLflowConfig(Section):
    tracking_uri: str | None = None
    """A tracking server or database; default: MLFLOW_TRACKING_URI, else run_dir/mlflow/runs.db."""
    experiment: str = "gvpo"
    """Name of the MLflow experiment."""
    run_name: str | None = None
    """Name of the run in MLflow; default: the name of run_dir."""
    tags: dict[str, str] = {}
    """Tags of the run in MLflow."""


class TrackingConfig(Section):
    """Who gets every line of metrics.jsonl beside it; a run that is resumed goes on in the same place. `{}`:
    with the defaults.
    """

    tensorboard: dict[str, Any] | None = None
    """Into run_dir/tensorboard: arguments of tensorboardX's SummaryWriter."""
    wandb: dict[str, Any] | None = None
    """Weights & Biases: arguments of wandb.init, such as {project: gvpo, mode: offline}; its files are in
    run_dir/wandb."""
    mlflow: MLflowConfig | None = None
    """Log to MLflow; the section says where."""
