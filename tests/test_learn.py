"""The learner's loop: what it is ordered, what it publishes, and the same log, the same weights."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import (
    Recorder,
    load,
    same,
    settings,
    weights,
)
from tiny import make_group, make_model, sent_weights, table

from gvpo_ray import groups
from gvpo_ray.buffer.buffer import GroupBuffer
from gvpo_ray.buffer.states import Command
from gvpo_ray.learner.loop import learn, probe_logprobs
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import Settings
from gvpo_ray.weights.transfer import ObjectPublisher

# --------------------------------------------------------------------------------------------------- the loop


def test_a_learner_that_comes_back_says_from_which_step(tmp_path):
    given = settings(tmp_path, num_steps=3, every=2)
    run_learn(tmp_path, given, make_model(tmp_path / "model"), last_step=3)
    buffer = Recorder(2)
    learn(
        load(tmp_path / "checkpoints" / "step-2", given),
        buffer,
        ObjectPublisher(copy.deepcopy, torch.float32, is_sender=True),
        given,
    )
    assert [entry[:2] for entry in buffer.told] == [("started", 2), ("published", 2)]


class SyncBuffer:
    """A real GroupBuffer, asked from one thread: every answer must be there at once. `script` may change the
    orders.
    """

    def __init__(
        self, folder: Path, last_step: int, version: int = 0, save_before: int | None = None
    ) -> None:
        self.real = GroupBuffer(
            folder / "groups", groups_per_step=2, num_steps=100, max_staleness=None, version=version
        )
        self._last_step, self._save_before = last_step, save_before
        self.told: list[Any] = []
        self.shards: dict[int, Any] = {}
        self.metrics: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()  # a checkpoint is reported by the thread that has written it

    def _now(self, question: Any) -> Any:
        with self._lock:
            return asyncio.run(asyncio.wait_for(question, timeout=120))

    def fill(self, num_groups: int) -> None:
        for i in range(num_groups):
            self._now(self.real.put(table(make_group(i))))

    def next_command(self, step: int, saved: bool) -> Command:
        if step == self._save_before:
            self.real._save_wanted = step - 1  # what save() does before it waits
        self._now(self.real.close() if step > self._last_step and saved else self.real.permit(step))
        order = self._now(self.real.next_command(step, saved))
        self.told.append((order, step))
        return order

    def batch(self, step: int) -> Any:
        return self._now(self.real.batch(step))

    def learner_started(self, step: int) -> None:
        self._now(self.real.learner_started(step))

    def report_references(self, version: int, references: dict[int, list[float | None]]) -> None:
        self._now(self.real.report_references(version, references))

    def published(self, version: int, weights: Any, metrics: Any) -> None:
        self.told.append(("published", version))
        self.shards[version] = weights
        self.metrics[version] = metrics or {}
        self._now(self.real.published(version, weights, metrics))

    def saved(self, step: int) -> None:
        self.told.append(("saved", step))
        self._now(self.real.saved(step))


def run_learn(
    folder: Path, given: Settings, path: Path | str, last_step: int, **options: Any
) -> tuple[Policy, SyncBuffer, list[dict[str, Any]]]:
    policy = load(path, given)
    buffer, lines = SyncBuffer(folder, last_step, version=policy.step, **options), []
    buffer.fill(10)  # after the first time: all of them are there already
    learn(policy, buffer, ObjectPublisher(copy.deepcopy, torch.float32, is_sender=True), given, lines.append)
    buffer.real.release()
    return policy, buffer, lines


def test_learn_publishes_trains_saves_and_stops_as_it_is_ordered(tmp_path):
    given = settings(tmp_path, num_steps=5, every=2, num_mini_batches=2)
    policy, buffer, lines = run_learn(
        tmp_path, given, make_model(tmp_path / "model"), last_step=5, save_before=4
    )
    # a thread writes a checkpoint that is due, while the loop goes on; one that was asked for is waited for
    assert [told for told in buffer.told if told[0] != "saved"] == [
        ("published", 0),
        ("train", 1),
        ("published", 1),
        ("train", 2),
        ("published", 2),
        ("train", 3),
        ("published", 3),
        ("save", 4),
        ("train", 4),
        ("published", 4),
        ("train", 5),
        ("published", 5),
        ("stop", 6),
    ]
    assert [told for told in buffer.told if told[0] == "saved"] == [("saved", step) for step in (2, 3, 4, 5)]
    told = [told for told in buffer.told if told != ("saved", 2)]  # which a thread says when it is written
    asked = told.index(("save", 4))
    assert told[asked + 1 : asked + 3] == [("saved", 3), ("train", 4)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-2",
        "step-3",
        "step-4",
        "step-5",
    ]
    assert [line["step"] for line in lines] == [2, 4, 5] and (policy.step, policy.num_updates) == (5, 10)
    stalled = [version for version, metrics in buffer.metrics.items() if "time/checkpoint" in metrics]
    assert stalled == [3, 4, 5]  # the steps after the checkpoints of 2, 3 and 4
    assert all(buffer.metrics[version]["time/checkpoint"] > 0 for version in stalled)
    # parity_every 0: the first alone
    assert [version for version, sent in buffer.shards.items() if sent["probe"]] == [0]
    metrics = asyncio.run(buffer.real.trained(5))
    names = (
        "loss reward/mean policy/kl_ref gvpo/residual_var grad_norm staleness/mean groups/size_mean "
        "tokens/trained"
    )
    assert {*names.split(), "time/step", "time/wait_for_groups"} <= metrics.keys() and metrics[
        "staleness/mean"
    ] == 4


def test_what_learn_publishes_are_the_weights_and_logprobs_to_check_them_by(tmp_path):
    given = settings(tmp_path, num_steps=2)
    policy, buffer, _ = run_learn(tmp_path, given, make_model(tmp_path / "model"), last_step=2)
    assert same(sent_weights(buffer.shards[2]), weights(policy))
    probe = buffer.shards[0]["probe"]
    rows = [{"prompt_ids": ids[:1], "completion_ids": [ids[1:]]} for ids in probe["ids"]]
    first = load(tmp_path / "model", given).token_logprobs(rows)
    assert [tokens.tolist() for tokens in first] == probe["logprobs"] and len(probe["ids"]) == 4
    own = [[5 + i % 7 for i in range(40)], [7, 6, 5]]  # of the run's own data
    probe = probe_logprobs(policy, [], own)
    assert probe["ids"] == own and [*map(len, probe["logprobs"])] == [39, 2]


@pytest.mark.components
@pytest.mark.parametrize("reference", ["behaviour", "previous", "initial", "every: 3"])
def test_the_same_log_gives_bitwise_the_same_weights_again_and_from_any_checkpoint(tmp_path, reference):
    given = settings(tmp_path, reference, num_steps=5, every=2, num_mini_batches=2)
    model = make_model(tmp_path / "model")
    want = weights(run_learn(tmp_path, given, model, last_step=5)[0])
    for checkpoint in (None, 2, 4):
        path = tmp_path / "checkpoints" / f"step-{checkpoint}" if checkpoint else model
        policy, buffer, _ = run_learn(tmp_path, given, path, last_step=5)
        assert buffer.told[:2] == [("published", checkpoint or 0), ("train", (checkpoint or 0) + 1)]
        assert policy.step == 5 and same(weights(policy), want)
    assert [i for i, _ in enumerate(buffer.real.log.assigned)] == [0, 1, 2, 3, 4]


def test_learn_tells_the_buffer_what_the_current_reference_model_said_and_nothing_else(tmp_path, policy):
    class Attached(Recorder):
        """A group comes with what an older reference model said of it."""

        def batch(self, step: int) -> Any:
            rows = [make_group(1, version=None), make_group(2, version=None)]
            both = table(*rows)
            old = [None, [-7.0] * 3] if step > 1 else [None, None]
            return groups.with_columns(
                both, reference_logprobs=old, reference_versions=[None, [0] * 3 if step > 1 else None]
            )

    buffer = Attached(2)
    given = dataclasses.replace(settings(tmp_path, "every: 1", num_steps=2), reports_references=True)
    learn(policy, buffer, ObjectPublisher(copy.deepcopy, torch.float32, is_sender=True), given)
    told = [entry[1:] for entry in buffer.told if entry[0] == "learned"]
    assert [(version, sorted(references)) for version, references in told] == [(0, [1, 2]), (1, [1, 2])]
    assert -7.0 not in told[1][1][2]  # asked anew


def test_learn_ends_when_the_run_is_closed_while_it_waits_for_a_batch(tmp_path, policy):
    class Closed(Recorder):
        def batch(self, step: int) -> None:
            return None

    buffer = Closed(5)
    learn(policy, buffer, ObjectPublisher(copy.deepcopy, torch.float32, is_sender=True), settings(tmp_path))
    assert policy.step == 0 and [entry[:2] for entry in buffer.told] == [("started", 0), ("published", 0)]


def test_learn_refuses_a_table_that_is_not_one_of_groups(tmp_path, policy):
    class Wrong(Recorder):
        def batch(self, step: int) -> Any:
            return super().batch(step).drop_columns(["rewards"])

    with pytest.raises(groups.GroupError, match="rewards"):
        learn(
            policy,
            Wrong(5),
            ObjectPublisher(copy.deepcopy, torch.float32, is_sender=True),
            settings(tmp_path),
        )
