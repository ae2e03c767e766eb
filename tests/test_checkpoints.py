"""Checkpoints are written while training goes on: what is in them, who waits for them, and what a failure
does; and those of versions before are read.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learners import Recorder, load, same, settings, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_group, make_model
from transformers import AutoModelForCausalLM

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.files import DiskFull
from gvpo_ray.learner import checkpoint as checkpoint_module
from gvpo_ray.learner import parts
from gvpo_ray.learner.adapter import trained_parameters
from gvpo_ray.learner.checkpoints import latest_checkpoint
from gvpo_ray.learner.loop import learn
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import Settings, train_step

WAIT_S = 60.0


@pytest.fixture
def given(tmp_path: Path) -> Settings:
    make_model(tmp_path / "model")
    return settings(tmp_path, num_steps=4, every=1)


def step(policy: Policy, given: Settings, number: int) -> None:
    train_step(policy, [make_group(number), make_group(9 + number)], given)


class Held:
    """Holds the thread that writes where it would write a rank's part, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

        def wait_and_save(*arguments: Any, **options: Any) -> None:
            self.begun.set()
            assert self.go_on.wait(WAIT_S)
            save_file(*arguments, **options)

        monkeypatch.setattr(parts, "save_file", wait_and_save)


def test_equal_checkpoints_are_equal_files(given: Settings, tmp_path: Path) -> None:
    """safetensors writes several keys of metadata in an order that differs from process to process."""
    policy = load(given.model_path, given)
    step(policy, given, 1)
    policy.begin_saving(tmp_path / "step-1")
    policy.finish_saving()
    files = list((tmp_path / "step-1").rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        with safe_open(file, "pt") as opened:
            assert len(opened.metadata()) == 1, file


def test_a_run_that_begins_with_another_runs_checkpoint_takes_its_weights_alone(
    given: Settings, tmp_path: Path
) -> None:
    policy = load(given.model_path, given)
    for number in (1, 2):
        step(policy, given, number)
    policy.begin_saving(tmp_path / "saved")
    policy.finish_saving()
    bare = tmp_path / "bare"
    shutil.copytree(tmp_path / "saved", bare)
    (bare / "state.json").unlink()
    shutil.rmtree(bare / "optimizer")
    model = ModelConfig(path=str(tmp_path / "saved"))
    policy = Policy(model, given.learner, tmp_path / "saved", resumes=False)
    assert (policy.step, policy.num_updates, policy.beta) == (0, 0, None)
    plain = Policy(ModelConfig(path=str(bare)), given.learner, bare)
    resumed = Policy(model, given.learner, tmp_path / "saved")
    assert (
        resumed.step == 2 and same(weights(policy), weights(plain)) and same(weights(resumed), weights(plain))
    )
    for each in (policy, plain, resumed):
        step(each, given, 3)
    assert same(weights(policy), weights(plain)) and not same(weights(resumed), weights(plain))


def test_training_goes_on_while_a_checkpoint_is_written_which_holds_what_was_there_when_it_began(
    given: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, held = load(given.model_path, given), Held(monkeypatch)
    policy.reference.refresh(policy.step)
    step(policy, given, 1)
    was = weights(policy)
    was_said = policy.token_logprobs([make_group(0)], reference=True)
    told: list[bool] = []
    policy.begin_saving(tmp_path / "step-1", lambda: told.append((tmp_path / "step-1").is_dir()))
    assert held.begun.wait(WAIT_S)
    step(policy, given, 2)
    policy.reference.refresh(policy.step)
    assert not (tmp_path / "step-1").exists() and told == []
    held.go_on.set()
    policy.finish_saving()
    assert told == [True] and policy.saving is None
    again = load(tmp_path / "step-1", given)
    assert same(weights(again), was) and not same(was, weights(policy))
    assert all(map(torch.equal, again.token_logprobs([make_group(0)], reference=True), was_said))
    step(again, given, 2)
    assert same(weights(again), weights(policy))


def test_the_next_checkpoint_waits_until_the_one_before_is_written(
    given: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, held = load(given.model_path, given), Held(monkeypatch)
    policy.begin_saving(tmp_path / "step-1")
    assert held.begun.wait(WAIT_S)
    threading.Timer(0.1, held.go_on.set).start()
    policy.begin_saving(tmp_path / "step-2")
    assert (tmp_path / "step-1" / "state.json").is_file()
    policy.finish_saving()
    assert (tmp_path / "step-2" / "state.json").is_file()


@pytest.mark.parametrize("asked", ["batch", "next_command"])
def test_a_checkpoint_that_cannot_be_written_ends_a_learner_that_waits_and_the_one_before_stays(
    given: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    never = threading.Event()

    class Waits(Recorder):
        """The learner's question after the second step has no answer."""

        def batch(self, step: int) -> Any:
            if asked == "batch" and step == 3:
                never.wait()
            return super().batch(step)

        def next_command(self, step: int, saved: bool) -> Any:
            if asked == "next_command" and step == 3:
                never.wait()
            return super().next_command(step, saved)

    def fill(tensors: dict[str, Any], path: Path, **options: Any) -> None:
        if "step-2" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, **options)

    monkeypatch.setattr(parts, "save_file", fill)
    buffer = Waits(4)
    with pytest.raises(DiskFull, match=r"no room for .*step-2 on the file system at"):
        learn(load(given.model_path, given), buffer, Nowhere(), given)
    never.set()
    assert latest_checkpoint(tmp_path) == (1, tmp_path / "checkpoints" / "step-1")
    assert [told for told in buffer.told if told[0] == "saved"] == [("saved", 1)]


class Nowhere:
    """Sends no weights."""

    def publish(self, version: int, named_tensors: Any) -> None:
        return None


def test_a_learner_that_stops_waits_for_its_last_checkpoint(
    given: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)

    class Stops(Recorder):
        def next_command(self, step: int, saved: bool) -> Any:
            if step == 2:
                assert held.begun.wait(WAIT_S)
                threading.Timer(0.1, held.go_on.set).start()
            return super().next_command(step, saved)

    buffer = Stops(1)
    learn(load(given.model_path, given), buffer, Nowhere(), given)
    assert buffer.told[-1] == ("saved", 1)
    assert latest_checkpoint(tmp_path) == (1, tmp_path / "checkpoints" / "step-1")


def test_parts_that_rank_0_does_not_see_are_named_with_what_to_change(
    given: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "save_file", lambda *arguments, **options: None)
    monkeypatch.setattr(parts, "sync_to_disk", lambda path: None)
    with pytest.raises(ConfigError, match=r"run_dir: rank 0 does not see 00000.safetensors.*nodes share"):
        load(given.model_path, given).save(tmp_path / "step-1")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_of_a_checkpoint_is_in_the_models_dtype_and_training_goes_on_from_float32(
    given: Settings, tmp_path: Path, dtype: str
) -> None:
    def of(path: Path | str) -> Policy:
        return Policy(ModelConfig(path=str(path), dtype=dtype), given.learner, path)

    policy, half = of(given.model_path), getattr(torch, dtype)
    step(policy, given, 1)
    policy.save(tmp_path / "step-1")
    was = weights(policy)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "step-1", dtype="auto")
    assert model.dtype == half
    assert same(dict(model.named_parameters(remove_duplicate=False)), {n: w.to(half) for n, w in was.items()})
    again = of(tmp_path / "step-1")
    assert {weight.dtype for weight in was.values()} == {torch.float32}
    assert same(weights(again), was)
    for one in (policy, again):
        step(one, given, 2)
    assert same(weights(again), weights(policy))


def as_before(folder: Path, policy: Policy) -> None:
    """Make of a checkpoint what 0.2 wrote: AdamW's moments whole, in files of no rank, and the weights in
    the learner's type in the model alone.
    """
    held = load_file(folder / "optimizer" / "00000.safetensors")
    (folder / "optimizer" / "00000.safetensors").unlink()
    tensors = [(name, tensor) for name, tensor in held.items() if not name.startswith("master.")]
    for i in (0, 1):
        save_file(dict(tensors[i::2]), folder / "optimizer" / f"{i:05d}.safetensors")
    model = policy._module.model
    own = {name: parameter.data for name, parameter in trained_parameters(model)}
    model.save_pretrained(folder, state_dict=own)
    state = json.loads((folder / "state.json").read_text())
    del state["files"]
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("read_bytes", [1, 4 * 2048, 1 << 30])  # each parameter alone, some, all at a time
@pytest.mark.parametrize("change", [as_before, lambda folder, policy: None], ids=["before", "now"])
def test_a_checkpoint_of_the_version_before_resumes_bitwise(
    given: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, Policy], None],
    read_bytes: int,
) -> None:
    monkeypatch.setattr(checkpoint_module, "READ_BYTES", read_bytes)
    policy = load(given.model_path, given)
    step(policy, given, 1)
    policy.save(tmp_path / "step-1")
    change(tmp_path / "step-1", policy)
    named = list(trained_parameters(policy._module.model))
    num_lists = len(list(checkpoint_module._by_size(named)))
    assert num_lists == len(named) if read_bytes == 1 else num_lists < len(named)
    again = load(tmp_path / "step-1", given)
    assert same(weights(again), weights(policy)) and (again.step, again.num_updates) == (1, 1)
    for one in (policy, again):
        step(one, given, 2)
    assert same(weights(again), weights(policy))


@pytest.mark.parametrize("lost", ["exp_avg", "exp_avg_sq"])
def test_a_checkpoint_without_a_moment_is_an_error_and_not_a_moment_of_zero(
    given: Settings, tmp_path: Path, lost: str
) -> None:
    policy = load(given.model_path, given)
    step(policy, given, 1)
    policy.save(tmp_path / "step-1")
    file = tmp_path / "step-1" / "optimizer" / "00000.safetensors"
    save_file({n: t for n, t in load_file(file).items() if not n.startswith(f"{lost}.model.norm")}, file)
    with pytest.raises(RuntimeError, match=f"Missing key in checkpoint state_dict: {lost}.model.norm.weight"):
        load(tmp_path / "step-1", given)


def test_what_fails_beside_a_checkpoint_waits_for_it_without_its_error_and_not_for_ever() -> None:
    failed, unfinished = Future[None](), Future[None]()
    failed.set_exception(OSError("no room"))
    for saving in (None, failed, unfinished):
        Policy.wait_for_saving(SimpleNamespace(saving=saving), 0.0)  # type: ignore[arg-type]
    unfinished.set_result(None)
    Policy.wait_for_saving(SimpleNamespace(saving=unfinished), 1e9)  # type: ignore[arg-type]
