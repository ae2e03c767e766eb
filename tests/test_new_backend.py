"""A backend is a file, its name in the config and its class in the registry: no other code knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import pytest
import tiny
from learners import load, settings, weights, with_loss
from test_docs import ROOT, blocks_of

from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.learner.backends.registry import BACKENDS
from gvpo_ray.learner.step import train_step


class WithSgd(LearnerConfig):
    """The section once the new name is in it."""

    backend: Literal["sgd"] = "sgd"  # type: ignore[assignment]


def test_every_name_of_a_backend_in_the_config_has_its_class_in_the_registry() -> None:
    assert set(get_args(LearnerConfig.model_fields["backend"].annotation)) == BACKENDS.keys()


def test_a_backend_in_a_file_of_its_own_trains_a_step_through_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    title = "gvpo_ray/learner/backends/sgd.py"
    (block,) = (b for b in blocks_of(ROOT / "docs" / "guides" / "extending.md") if b.title == title)
    (tmp_path / "sgd.py").write_text(block.text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(BACKENDS, "sgd", __import__("sgd").SGDBackend)

    given = with_loss(settings(tmp_path), beta=0.1, reference="previous", damped=False)
    given.learner = WithSgd(learning_rate=0.25, max_grad_norm=1e6, num_mini_batches=1)
    policy = load(tiny.make_model(tmp_path / "model", tie=False), given)
    before = weights(policy)
    metrics = train_step(policy, [tiny.make_group(i) for i in range(4)], given)
    moved = sum(float((new - before[name]).square().sum()) for name, new in weights(policy).items())
    assert policy.step == 1 and metrics["grad_norm"] > 0.01
    assert moved**0.5 == pytest.approx(0.25 * metrics["grad_norm"], rel=1e-3)  # AdamW's length is another
