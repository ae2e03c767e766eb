"""Weights are published while the next step trains: what is sent, who waits, and what a failure does."""

from __future__ import annotations

import asyncio
import threading
import weakref
from pathlib import Path
from typing import Any

import learners
import numpy as np
import pytest
import torch
from learners import Recorder, load, settings
from tiny import make_model

from gvpo_ray.buffer.buffer import GroupBuffer
from gvpo_ray.buffer.states import LearnerState
from gvpo_ray.learner.behind import Behind
from gvpo_ray.learner.loop import learn
from gvpo_ray.observe.computes import read_computes

WAIT_S = 60.0


class Publisher:
    """Keeps what it is given; `before` is called first, in the thread that publishes."""

    def __init__(self, before: Any = lambda version: None) -> None:
        self._before = before
        self.sent: dict[int, dict[str, torch.Tensor]] = {}

    def publish(self, version: int, named_tensors: Any) -> dict[str, Any]:
        self._before(version)
        self.sent[version] = {name: tensor.clone() for name, tensor in named_tensors}
        return {"bytes": 10 + version}


class Told(Recorder):
    def __init__(self, num_steps: int) -> None:
        super().__init__(num_steps)
        self.asked = {step: threading.Event() for step in range(1, num_steps + 1)}
        self.metrics: dict[int, dict[str, Any]] = {}

    def batch(self, step: int) -> Any:
        self.asked[step].set()
        return super().batch(step)

    def published(self, version: int, weights: Any, metrics: dict[str, Any] | None) -> None:
        self.told.append((version, weights is not None, metrics is not None))
        if metrics is not None:
            self.metrics[version] = metrics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_trains_while_the_one_before_is_published_and_its_weights_are_sent_as_they_were(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    make_model(tmp_path / "model")
    given = settings(tmp_path, num_steps=3)
    buffer = Told(3)

    def once_the_next_step_is_asked_for(version: int) -> None:
        if version < 3:
            assert buffer.asked[version + 1].wait(WAIT_S)

    publisher, alone = Publisher(once_the_next_step_is_asked_for), Publisher()
    behind = Behind(dtype, is_sender=True)
    policy = load(tmp_path / "model", given)
    learn(policy, buffer, publisher, given, behind=behind)
    learn(load(tmp_path / "model", given), Told(3), alone, given)
    assert sorted(publisher.sent) == [0, 1, 2, 3]  # also the last, which nothing follows
    assert read_computes(tmp_path) == policy.computes
    for version, want in alone.sent.items():
        got = publisher.sent[version]
        assert got.keys() == want.keys() and all(tensor.dtype == dtype for tensor in got.values())
        assert all(torch.equal(got[name], want[name].to(dtype)) for name in got)
    named = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(alone.sent[0][named], alone.sent[3][named])
    told = [entry for entry in buffer.told if entry[0] != "started" and entry[0] != "saved"]
    # the driver has a step's metrics first, then the engines have the weights
    assert [entry for entry in told if entry[2]] == [(version, False, True) for version in (1, 2, 3)]
    assert [entry for entry in told if entry[1]] == [(version, True, False) for version in (0, 1, 2, 3)]
    # what the sending took goes with the next step's metrics
    assert [buffer.metrics[step]["weights/bytes"] for step in (1, 2, 3)] == [10, 11, 12]
    assert all(metrics["time/publish_behind"] >= 0 for metrics in buffer.metrics.values())


def test_the_weights_of_a_step_are_sent_after_its_metrics_are_told(tmp_path: Path) -> None:
    """A buffer that is restarted between the two has the metrics on its disk when it hears of the weights."""
    make_model(tmp_path / "model")
    given = settings(tmp_path, num_steps=2)
    begun = [threading.Event() for _ in range(3)]

    class Slow(Told):
        def published(self, version: int, weights: Any, metrics: dict[str, Any] | None) -> None:
            if metrics is not None:
                assert not begun[version].wait(0.2)
            super().published(version, weights, metrics)

    behind = Behind(torch.float32, is_sender=True)
    buffer, publisher = Slow(2), Publisher(lambda version: begun[version].set())
    learn(load(tmp_path / "model", given), buffer, publisher, given, behind=behind)
    assert sorted(buffer.metrics) == [1, 2] and all(event.is_set() for event in begun)


def test_a_publication_that_fails_ends_a_learner_that_waits_for_groups_of_its_weights(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    given, never = settings(tmp_path, num_steps=3), threading.Event()

    class Waits(Told):
        def batch(self, step: int) -> Any:
            if step == 2:
                never.wait()
            return super().batch(step)

    def fail(version: int) -> None:
        if version == 1:
            raise OSError("the object store is full")

    with pytest.raises(OSError, match="the object store is full"):
        policy = load(tmp_path / "model", given)
        learn(policy, Waits(3), Publisher(fail), given, behind=Behind(torch.float32, is_sender=True))
    never.set()


def test_a_failure_at_the_end_is_raised_too(tmp_path: Path) -> None:
    make_model(tmp_path / "model")

    def fail(version: int) -> None:
        if version == 1:
            raise OSError("the object store is full")

    given = settings(tmp_path, num_steps=1)
    with pytest.raises(OSError, match="full"):
        policy = load(tmp_path / "model", given)
        learn(policy, Told(1), Publisher(fail), given, behind=Behind(torch.float32, is_sender=True))


@pytest.mark.parametrize("is_sender", [False, True])
def test_every_rank_gathers_one_tensor_at_a_time_and_those_that_do_not_send_copy_nothing(
    is_sender: bool,
) -> None:
    """Each tensor is whole on every rank: together they are the model, which no GPU has room for."""
    behind, seen = Behind(torch.bfloat16, is_sender), list[weakref.ref[Any]]()

    def gathered() -> Any:
        for name in "abc":
            assert all(memory() is None for memory in seen[:-1])
            memory = np.zeros(2, np.float32)  # as long as any tensor shares it
            seen.append(weakref.ref(memory))
            yield name, torch.from_numpy(memory)

    def send(named: Any) -> None:
        assert is_sender and [name for name, _ in named] == ["a", "b", "c"]

    behind.start(gathered(), send)
    behind.finish()
    assert len(seen) == 3 and len(behind._copies._copies) == 3 * is_sender


def test_weights_on_their_way_are_no_new_version_for_groups_and_engines(tmp_path: Path) -> None:
    async def told() -> None:
        buffer = GroupBuffer(tmp_path / "groups", groups_per_step=1, num_steps=9, max_staleness=0)
        await buffer.published(0, {"shards": []})
        await buffer.published(1, None, {"loss": 0.5})
        assert buffer.version == 0 and await buffer.weights(-1) == (0, {"shards": []})
        assert (await buffer.trained(1)) == {"loss": 0.5}
        await buffer.permit(2)
        assert await buffer.next_command(2, saved=True) == "train"
        await buffer.published(1, {"shards": [1]})
        assert buffer.version == 1 and await buffer.weights(0) == (1, {"shards": [1]})
        # the learner is in step 2: the weights that came meanwhile do not say otherwise
        assert buffer._learner_state is LearnerState.TRAINS and buffer._learner_detail == "step 2"
        buffer.release()

    asyncio.run(told())


@pytest.mark.parametrize("state", ["waits for the driver", "saves", "was told to stop"])
def test_weights_that_come_later_do_not_say_that_the_learner_has_done_nothing_since(
    tmp_path: Path, state: str
) -> None:
    async def told() -> None:
        buffer = GroupBuffer(tmp_path / "groups", groups_per_step=1, num_steps=9, max_staleness=1)
        await buffer.learner_started(0)
        await buffer.published(0, {"shards": []})
        assert buffer._learner_state is LearnerState.PUBLISHED
        await buffer.published(1, None, {"loss": 0.5})
        assert buffer._learner_state is LearnerState.PUBLISHED
        asked = [asyncio.ensure_future(buffer.next_command(2, saved=False))]
        if state == "saves":
            asked.append(asyncio.ensure_future(buffer.save()))
        elif state == "was told to stop":
            await buffer.close()
        await asyncio.sleep(0.01)
        assert buffer._learner_state == state
        await buffer.published(1, {"shards": [1]})
        assert buffer._learner_state == state
        for task in asked:
            task.cancel()
        buffer.release()

    asyncio.run(told())


def test_the_weights_of_every_step_are_the_same_whether_they_are_published_behind_or_not(
    tmp_path: Path,
) -> None:
    make_model(tmp_path / "model")
    given = settings(tmp_path, num_steps=2)
    results = []
    for behind in (None, Behind(torch.float32, is_sender=True)):
        policy = load(tmp_path / "model", given)
        learn(policy, Told(2), Publisher(), given, behind=behind)
        results.append(learners.weights(policy))
    assert learners.same(*results)
