"""The config section `tracking` is in this file."""

from __future__ import annotations

from typing import Any

from gvpo_ray.config.base import Section


class MLflowConfig(Section):
    """This section names the place of a run in MLflow."""

    tracking_uri: str | None = None
    """Address of a tracking server or database; default: MLFLOW_TRACKING_URI, else run_dir/mlflow/runs.db."""
    experiment: str = "gvpo"
    """Name of the MLflow experiment."""
    run_name: str | None = None
    """Name of the run in MLflow; default: the name of run_dir."""
    tags: dict[str, str] = {}
    """Tags of the run in MLflow."""


class TrackingConfig(Section):
    """This section names the trackers that get every line of metrics.jsonl.

    A resumed run goes on in the same place. `{}` turns a tracker on with its defaults.
    """

    tensorboard: dict[str, Any] | None = None
    """Arguments for tensorboardX's SummaryWriter, which writes to run_dir/tensorboard."""
    wandb: dict[str, Any] | None = None
    """Arguments for wandb.init of Weights & Biases, such as {project: gvpo, mode: offline}; its files are in
    run_dir/wandb."""
    mlflow: MLflowConfig | None = None
    """Section that turns MLflow on, and says where it keeps the run."""
