"""Learners, batches of every kind, and a buffer that writes down what it is told: for the tests of learner,
passes and objective.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import make_group, make_model, table

from gvpo_ray.buffer.states import Command
from gvpo_ray.config.learner import CheckpointConfig, LearnerConfig
from gvpo_ray.config.loss import loss_config
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import Settings

BACKENDS = [("ddp", 0), ("fsdp", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]


LEARNING_RATE = 1e-3


def settings(
    run_dir: str | Path = "",
    reference: str = "behaviour",
    num_steps: int = 4,
    every: int = 100,
    **learner: Any,
) -> Settings:
    return Settings(
        run_dir=str(run_dir),
        num_steps=num_steps,
        last_step=num_steps,
        loss=loss_config(beta=0.1, reference=reference),
        learner=LearnerConfig(
            **{"backend": "ddp", "learning_rate": LEARNING_RATE, "num_mini_batches": 1, **learner}
        ),
        checkpoint=CheckpointConfig(every=every, keep=10),
        model_path=str(Path(run_dir) / "model"),
        parity_every=0,
    )


def load(path: str | Path, given: Settings) -> Policy:
    return Policy(ModelConfig(path=str(path)), given.learner, path)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.named_tensors()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def mixed_batch(step: int) -> list[dict[str, Any]]:
    """Groups of many kinds: sizes 2 to 5, unverifiable completions, older, mixed and foreign data, and two
    that cannot be trained on.
    """
    first, version = 10 * step, step - 1
    return [
        make_group(first, (1.0, 0.0, 0.5), version),
        make_group(first + 1, (None, None, None), version),
        make_group(first + 2, (0.0, 1.0), 0),
        make_group(first + 3, (0.25, None, 1.0, 0.0, 0.5), version, version_min=[0] * 5),
        make_group(first + 4, (None, 1.0), version),
        make_group(first + 5, (1.0, 1.0, 0.0, 0.0), None),
        make_group(first + 6, (0.0, 0.75), version),
        make_group(first + 7, (1.0, 1.0), version),
    ]


def shared_model(folder: Path, kind: str = "qwen2") -> Path:
    if dist.get_rank() == 0:
        make_model(folder / "model", kind)
    dist.barrier()
    return folder / "model"


class Recorder:
    """A buffer of prepared batches that writes down what it is told."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.told: list[tuple[Any, ...]] = []

    def next_command(self, step: int, saved: bool) -> Command:
        return Command.TRAIN if step <= self.num_steps else Command.STOP

    def batch(self, step: int) -> Any:
        return table(*mixed_batch(step))

    def learner_started(self, step: int) -> None:
        self.told.append(("started", step))

    def report_references(self, version: int, references: dict[int, list[float | None]]) -> None:
        self.told.append(("learned", version, references))

    def published(self, version: int, weights: Any, metrics: dict[str, Any] | None) -> None:
        self.told.append(
            ("published", version, sorted(weights["probe"] or []) if weights else None, metrics is not None)
        )

    def saved(self, step: int) -> None:
        self.told.append(("saved", step))


def with_loss(given: Settings, **loss: Any) -> Settings:
    return dataclasses.replace(given, loss=loss_config(**loss))
