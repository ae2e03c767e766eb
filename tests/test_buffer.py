"""The buffer: order of arrival, the dial, every wait and its waker, replay, and a log that loses nothing to kill -9."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tiny import make_group, table

from gvpo_ray import buffer as buffer_module
from gvpo_ray import groups
from gvpo_ray.buffer import GroupBuffer, GroupLog, Quarantine
from gvpo_ray.config import ReplayConfig


def make(folder, groups_per_step=2, num_steps=100, max_staleness=None, version=0, replay=None, seed=0) -> GroupBuffer:
    return GroupBuffer(folder, groups_per_step, num_steps, max_staleness, version, replay, seed)


def make_again(before: GroupBuffer, **changes) -> GroupBuffer:
    """Another buffer on the folder of one that is gone."""
    before.release()
    return make(before.log.folder, **changes)


def put(buffer: GroupBuffer, *group_ids: int) -> Awaitable[None]:
    async def all_of_them() -> None:
        for group_id in group_ids:
            await buffer.put(table(make_group(group_id)))

    return all_of_them()


def ids(batch) -> list[int]:
    return batch.column("group_id").to_pylist()


def status(buffer: GroupBuffer, *names: str) -> Awaitable:
    async def of_them():
        told = await buffer.status()
        return [told[name] for name in names] if len(names) > 1 else told[names[0]]

    return of_them()


async def settle() -> None:
    """Let every task run until it waits for news."""
    for _ in range(50):
        await asyncio.sleep(0)


async def waits(question: Awaitable) -> asyncio.Task:
    """The question as a task that has no answer yet."""
    task = asyncio.ensure_future(question)
    await settle()
    assert not task.done(), f"answered {task.result()!r}, should wait"
    return task


async def answer(task: Awaitable):
    """Its answer, due at once."""
    task = asyncio.ensure_future(task)
    await settle()
    assert task.done(), "still waits"
    return task.result()


async def start_all(buffer: GroupBuffer) -> list[tuple[int, int]]:
    """Start groups until the buffer makes one wait."""
    started = []
    while True:
        task = asyncio.ensure_future(buffer.start())
        await settle()
        if not task.done():
            task.cancel()
            await settle()
            return started
        started += task.result()


def run(main: Callable[[], Awaitable]) -> None:
    asyncio.run(asyncio.wait_for(main(), timeout=60))


# ----------------------------------------------------------------------------------------------------------------- batches


def test_batches_are_in_order_of_arrival_and_the_same_for_whoever_asks_again(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=3)
        await put(buffer, 4, 0, 2)
        first = await answer(buffer.batch(1))
        second = await waits(buffer.batch(2))
        other_rank = await waits(buffer.batch(2))
        await put(buffer, 1, 5)
        await settle()
        assert not second.done()
        await put(buffer, 3, 9)
        await settle()
        assert ids(first) == [4, 0, 2] and ids(second.result()) == ids(other_rank.result()) == [1, 5, 3]
        assert (await answer(buffer.batch(1))).equals(first)
        assert (await answer(buffer.batch(2))).equals(second.result())

    run(main)


def test_a_new_buffer_on_the_same_folder_gives_the_same_batches_and_goes_on_behind_them(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await put(buffer, 3, 1, 2, 0, 7)
        batches = [await answer(buffer.batch(step)) for step in (1, 2)]
        again = make_again(buffer, version=1)
        await put(again, 5)
        assert (await answer(again.batch(2))).equals(batches[1])  # step 2 first: the run resumes from version 1
        assert (await answer(again.batch(1))).equals(batches[0])
        assert ids(await answer(again.batch(3))) == [7, 5]  # one row from either segment
        third = make_again(again, version=3)
        assert [ids(await answer(third.batch(step))) for step in (1, 2, 3)] == [[3, 1], [2, 0], [7, 5]]
        assert third.log.end == len(third.log) == 6

    run(main)


def test_the_assignment_is_on_disk_before_the_answer(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(buffer_module.os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").resolve().name))

    async def main():
        buffer = make(tmp_path)
        await put(buffer, 8, 6)
        assert not synced
        await answer(buffer.batch(1))
        # The rows first: an assignment of rows that the disk does not have would be worse than none.
        assert synced == ["00000.arrow", "assignments.jsonl"]
        assert json.loads((tmp_path / "assignments.jsonl").read_text()) == {"step": 1, "begin": 0, "end": 2}
        await answer(buffer.batch(1))
        assert len(synced) == 2

    run(main)


def test_an_assignment_that_cannot_be_written_is_not_answered(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    async def main():
        buffer = make(tmp_path)
        await put(buffer, 8, 6)
        monkeypatch.setattr(buffer_module.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            await buffer.batch(1)
        assert buffer.log.assigned == {}

    run(main)


def test_a_group_that_is_there_is_not_stored_twice(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await put(buffer, 1, 2, 1, 2, 2)
        assert len(buffer.log) == 2
        again = make_again(buffer)
        await put(again, 2, 1, 3)
        assert again.log.group_ids == [1, 2, 3] == GroupLog(tmp_path).group_ids

    run(main)


# ---------------------------------------------------------------------------------------------------------------- the dial


@pytest.mark.parametrize(
    ("max_staleness", "counts"),
    # groups_per_step 4, 5 steps: with version v published, (v + max_staleness + 1) * 4 groups have started, 20 at most
    [(0, [4, 8, 12, 16, 20, 20]), (1, [8, 12, 16, 20, 20, 20]), (3, [16, 20, 20, 20, 20, 20]), (None, [20, 20, 20, 20, 20, 20])],
)
def test_the_dial_starts_exactly_so_many_groups_per_version(tmp_path, max_staleness, counts):
    async def main():
        buffer = make(tmp_path, groups_per_step=4, num_steps=5, max_staleness=max_staleness)
        started = []
        for version, count in enumerate(counts):
            await buffer.published(version, {})
            started += await start_all(buffer)
            assert len(started) == count
            if version < len(counts) - 1:
                await put(buffer, *[group_id for group_id, _ in started[4 * version : 4 * version + 4]])  # finished or not: it counts
        assert [group_id for group_id, _ in started] == list(range(20))
        # The dial from the engine's side: the group in the batch after v + max_staleness others asks for version v.
        bound = 99 if max_staleness is None else max_staleness
        assert [oldest for _, oldest in started] == [max(0, i // 4 - bound) for i in range(20)]

    run(main)


def test_publishing_wakes_a_group_that_waits_to_start(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=1, max_staleness=0)
        assert await answer(buffer.start()) == [(0, 0)]
        waiting = await waits(buffer.start())
        await put(buffer, 0)
        await settle()
        assert not waiting.done()  # finished is not yet trained
        await buffer.published(1, {})
        assert await answer(waiting) == [(1, 1)]

    run(main)


def test_start_hands_out_every_id_once_even_to_many_at_a_time(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=3, num_steps=4, max_staleness=1)
        tasks = [asyncio.ensure_future(buffer.start()) for _ in range(15)]
        for version in range(4):
            await settle()
            await buffer.published(version, {})
        await settle()
        done = sorted(task.result()[0][0] for task in tasks if task.done())
        assert done == list(range(12))
        await buffer.close()
        await settle()
        assert [task.result() for task in tasks].count(None) == 3

    run(main)


def test_after_a_restart_start_hands_out_exactly_the_ids_that_are_missing(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=2, num_steps=4)
        await start_all(buffer)
        await put(buffer, 5, 0, 3)
        again = make_again(buffer, groups_per_step=2, num_steps=4)
        assert [group_id for group_id, _ in await start_all(again)] == [1, 2, 4, 6, 7]

    run(main)


def test_after_a_restart_no_group_waits_for_weights_that_are_not_there(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=1)
        await put(buffer, 0, 1, 2, 3, 4)
        again = make_again(buffer, groups_per_step=1, max_staleness=5, version=0)
        assert await answer(again.start()) == [(5, 0)]
        await again.published(2, {})
        assert await answer(again.start()) == [(6, 1)]


def test_one_question_starts_as_many_groups_as_asked_for_and_as_the_dial_allows(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=2, num_steps=3, max_staleness=1)
        assert await answer(buffer.start(3)) == [(0, 0), (1, 0), (2, 0)]
        assert await answer(buffer.start(3)) == [(3, 0)]  # (0 + 1 + 1) * 2 groups
        waiting = await waits(buffer.start(9))
        await buffer.published(1, {})
        assert await answer(waiting) == [(4, 1), (5, 1)]  # 4 // 2 - 1

    run(main)


def test_a_run_taken_up_behind_its_log_repeats_its_steps_and_then_starts_groups(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await put(buffer, *range(6))
        for step in (1, 2, 3):
            await answer(buffer.batch(step))
        # Step 3 was given to a learner that had version 2; the checkpoint is of step 1.
        again = make_again(buffer, max_staleness=0, version=1)
        assert again.version == 2
        engine, slot = await waits(again.weights(-1)), await waits(again.start())
        assert await answer(again.save()) == 1  # what the learner has, not what it had
        await again.published(1, "one")
        assert await answer(engine) == (1, "one")
        await again.allow(3)
        for step, rows in ((2, [2, 3]), (3, [4, 5])):
            assert await answer(again.order(step, saved=step == 2)) == "train"
            assert ids(await answer(again.batch(step))) == rows
            assert not slot.done()
            await again.published(step, step)
            assert await answer(again.weights(step - 1)) == (step, step)
        assert await answer(slot) == [(6, 3)]

    run(main)


def test_a_group_started_behind_the_log_asks_for_a_version_that_the_repeated_steps_make(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await put(buffer, *range(6))
        for step in (1, 2, 3):
            await answer(buffer.batch(step))
        again = make_again(buffer, max_staleness=1, version=0)
        assert await answer(again.start(9)) == [(6, 2), (7, 2)]  # 3 - 1, by batches that are in the log

    run(main)

    run(main)


# ------------------------------------------------------------------------------------------------------------------ orders


def test_the_learner_waits_until_the_driver_allows_the_step(tmp_path):
    async def main():
        buffer = make(tmp_path)
        order = await waits(buffer.order(1))
        await buffer.allow(2)
        assert await answer(order) == "train" and await answer(buffer.order(2)) == "train"
        await waits(buffer.order(3))

    run(main)


def test_every_rank_gets_the_same_order_whenever_it_asks(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await buffer.published(0, {})
        await buffer.allow(1)
        assert await answer(buffer.order(1)) == "train"
        saving = await waits(buffer.save())  # between the questions of two ranks
        assert await answer(buffer.order(1)) == "train"
        await buffer.published(1, {})
        ranks = [await answer(buffer.order(2)) for _ in range(2)]
        assert ranks == ["save", "save"]
        await buffer.saved(1)
        assert await answer(saving) == 1
        assert await answer(buffer.order(2)) == "save"  # the third rank is late, and must not train while the others save
        buffer.release()
        buffer = make(tmp_path)  # it died
        await buffer.allow(9)
        assert [await answer(buffer.order(step)) for step in (1, 2)] == ["train", "save"]
        await buffer.close()
        assert await answer(buffer.order(2)) == "save"
        assert await answer(buffer.order(2, saved=True)) == "stop"

    run(main)


def test_save_asks_for_a_checkpoint_before_training_goes_on_and_answers_its_step(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await buffer.published(0, {})
        saving = await waits(buffer.save())
        await buffer.allow(1)
        assert await answer(buffer.order(1)) == "save"  # also of version 0
        await buffer.saved(0)
        assert await answer(saving) == 0
        assert await answer(buffer.order(1, saved=True)) == "train"

    run(main)


def test_save_is_immediate_when_a_checkpoint_is_there(tmp_path):
    async def main():
        buffer = make(tmp_path, version=7)  # a run that is taken up starts from one
        assert await answer(buffer.save()) == 7
        await buffer.allow(8)
        await buffer.published(8, {})
        await buffer.saved(8)
        assert await answer(buffer.save()) == 8
        assert await answer(buffer.order(8, saved=True)) == "train"  # and asks nothing of the learner

    run(main)


def test_save_is_answered_although_the_learner_has_trained_on(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await buffer.published(1, {})
        saving = await waits(buffer.save())
        await buffer.saved(1)
        await buffer.published(2, {})
        assert await answer(saving) == 1

    run(main)


def test_a_learner_that_died_after_its_checkpoint_and_before_saying_so_does_not_block_save(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await buffer.published(3, {})
        saving = await waits(buffer.save())
        assert await answer(buffer.order(4)) == "save"
        # It writes step-3, dies, and the new one resumes from there.
        await waits(buffer.order(4, saved=True))
        assert await answer(saving) == 3

    run(main)


def test_a_learner_that_died_in_its_checkpoint_is_asked_for_it_again(tmp_path):
    async def main():
        buffer = make(tmp_path, version=2)
        await buffer.allow(3)
        assert await answer(buffer.order(3, saved=True)) == "train"
        await buffer.published(3, {})
        saving = await waits(buffer.save())
        assert await answer(buffer.order(4)) == "save"
        # It dies while it writes step-3; the new one resumes from step-2.
        await buffer.published(2, {})
        assert await answer(buffer.order(3, saved=True)) == "train"
        assert not saving.done()
        await buffer.published(3, {})
        assert await answer(buffer.order(4)) == "save"
        await buffer.saved(3)
        assert await answer(saving) == 3

    run(main)


# ------------------------------------------------------------------------------------------------------- driver and engines


def test_the_driver_gets_a_steps_metrics_once_it_is_trained(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await buffer.published(0, {}, None)
        one = await waits(buffer.trained(1))
        await buffer.published(1, {}, {"loss": 0.5})
        await buffer.published(2, {}, {"loss": 0.25})
        assert await answer(one) == {"loss": 0.5}
        assert await answer(buffer.trained(1)) == {"loss": 0.5}  # asked again
        assert await answer(buffer.trained(2)) == {"loss": 0.25}

    run(main)


def test_engines_get_the_newest_weights_once_they_are_newer(tmp_path):
    async def main():
        buffer = make(tmp_path, version=3)
        first = await waits(buffer.weights(-1))  # a run that is taken up has no weights before the learner is there
        await buffer.published(3, "three")
        assert await answer(first) == (3, "three")
        next_one = await waits(buffer.weights(3))
        late = await answer(buffer.weights(-1))
        assert late == (3, "three")
        await buffer.published(4, "four")
        assert await answer(next_one) == (4, "four")

    run(main)


def test_close_wakes_everybody_and_keeps_the_first_error(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=1, max_staleness=0)
        await buffer.start()
        questions = [buffer.start(), buffer.order(1), buffer.batch(1), buffer.weights(0), buffer.trained(1)]
        tasks = [await waits(question) for question in questions]
        await buffer.close("the disk is full")
        await buffer.close("and everything after it fails")
        await buffer.close()
        await settle()
        assert [task.result() for task in tasks] == [None, "stop", None, None, None]
        assert buffer.error == "the disk is full"
        saving = make(tmp_path / "other")
        task = await waits(saving.save())
        await saving.close()
        assert await answer(task) is None
        assert await answer(buffer.start()) is None and await answer(buffer.order(5)) == "stop" and await answer(buffer.batch(5)) is None

    run(main)


def test_close_without_an_error_leaves_none(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await buffer.close()
        assert buffer.error is None
        await put(buffer, 1)  # finished is not thrown away, even now
        assert GroupLog(tmp_path).group_ids == [1]
        await put(buffer, 2)
        assert await answer(buffer.batch(1)) is None  # but nothing more is trained

    run(main)


def test_status_counts(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=2)
        await buffer.start(5)
        assert await status(buffer, "last_group_at", "last_step_at") == [None, None]
        before = time.time()
        await put(buffer, 0, 3, 1)
        await answer(buffer.batch(1))
        names = ("version", "num_finished", "num_running", "num_waiting", "oldest_running", "closed", "error")
        assert await status(buffer, *names) == [0, 3, 2, 1, 2, False, None]
        await buffer.published(1, {}, {"loss": 0.5})
        assert before <= await status(buffer, "last_group_at") <= await status(buffer, "last_step_at") <= time.time()
        await buffer.close("the disk is full")
        assert await status(buffer, "version", "closed", "error") == [1, True, "the disk is full"]

    run(main)


def test_status_says_what_the_dial_allows(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=4, num_steps=2, max_staleness=0)
        assert await status(buffer, "dial") == "open"
        await buffer.start(9)
        assert await status(buffer, "dial") == "closed: 4 groups started, version 0 allows no more"
        await buffer.published(1, {})
        assert await status(buffer, "dial") == "open"
        await buffer.start(9)
        assert await status(buffer, "dial") == "all groups are started"

    run(main)


def test_status_says_what_the_learner_does_and_since_when(tmp_path, monkeypatch):
    async def main():
        now = 1000.0
        monkeypatch.setattr(buffer_module.time, "time", lambda: now)
        buffer = make(tmp_path, groups_per_step=3)
        assert await status(buffer, "learner", "learner_since") == ["has not started", 1000.0]
        now = 1001.0
        await buffer.learner_started(0)
        assert await status(buffer, "learner", "learner_since") == ["starts from step 0", 1001.0]
        await buffer.published(0, {})
        assert await status(buffer, "learner") == "has published version 0"
        order = await waits(buffer.order(1))
        assert await status(buffer, "learner") == "waits for the driver"
        await buffer.allow(1)
        assert await answer(order) == "train"
        now = 1002.0
        batch = await waits(buffer.batch(1))
        assert await status(buffer, "learner", "learner_since") == ["waits for groups: step 1 has 0 of 3", 1002.0]
        now = 1003.0
        await put(buffer, 5, 6)
        other_rank = await waits(buffer.batch(1))
        assert await status(buffer, "learner", "learner_since") == ["waits for groups: step 1 has 2 of 3", 1002.0]
        await put(buffer, 7)
        await answer(batch)
        now = 1004.0
        await answer(other_rank)
        assert await status(buffer, "learner", "learner_since") == ["trains step 1", 1003.0]
        await buffer.published(1, {}, {})
        saving = await waits(buffer.save())
        assert await answer(buffer.order(2)) == "save"
        assert await status(buffer, "learner") == "saves step 1"
        await buffer.saved(1)
        await answer(saving)
        assert await status(buffer, "learner") == "has saved step 1"
        await buffer.learner_failed("worker 1: killed")
        assert await status(buffer, "learner") == "died and is started again: worker 1: killed"
        await buffer.close()
        assert await answer(buffer.order(2, saved=True)) == "stop"
        assert await status(buffer, "learner") == "was told to stop"

    run(main)


# ------------------------------------------------------------------------------------------------------------------ deaths


def test_a_learner_that_comes_back_offers_older_weights_and_the_dial_stays(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=1, max_staleness=0)
        for version in range(4):
            await buffer.published(version, f"weights {version}")
        assert [group_id for group_id, _ in await start_all(buffer)] == [0, 1, 2, 3]
        await buffer.published(1, "weights 1 again")
        assert await status(buffer, "version") == 3
        assert await answer(buffer.weights(-1)) == (1, "weights 1 again")  # those of version 3 went with the one that made them
        engine = await waits(buffer.weights(2))
        assert await start_all(buffer) == []
        await buffer.published(2, "weights 2 again")
        await settle()
        assert not engine.done()
        await buffer.published(3, "weights 3 again")
        assert await answer(engine) == (3, "weights 3 again")
        await buffer.published(4, "weights 4")
        assert await start_all(buffer) == [(4, 4)]

    run(main)


def test_a_step_that_is_trained_again_has_the_same_order_and_the_same_rows(tmp_path):
    async def main():
        buffer = make(tmp_path, replay=ReplayConfig(share=0.5))
        await buffer.allow(2)
        await put(buffer, 4, 0, 2, 3)
        before = [(await answer(buffer.order(step)), await answer(buffer.batch(step))) for step in (1, 2)]
        await buffer.learned(0, {4: [-1.0, -2.0, -3.0]}, {4: [0.5, -0.5, 0.0]})
        await buffer.published(2, {})
        after = [(await answer(buffer.order(step)), await answer(buffer.batch(step))) for step in (1, 2)]
        assert after == before
        assert before[0][1]["reference_logprobs"].to_pylist() == [None, None]

    run(main)


def test_save_asks_a_learner_that_came_back_for_nothing_before_it_is_where_it_was(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await buffer.allow(4)
        await buffer.published(3, {})
        saving = await waits(buffer.save())
        await buffer.published(1, {})  # it died first; step-1 is the last checkpoint
        assert [await answer(buffer.order(step, saved=step == 2)) for step in (2, 3, 4)] == ["train", "train", "save"]
        await buffer.saved(3)
        assert await answer(saving) == 3

    run(main)


def test_a_learner_that_dies_three_times_without_a_step_between_ends_the_run(tmp_path):
    async def main():
        buffer = make(tmp_path)
        for attempt in range(3):
            await buffer.learner_started(0)
            await buffer.published(0, {})  # its weights as they were: no step
            assert not buffer._closed, attempt
            await buffer.learner_failed(f"out of memory, attempt {attempt}")
        waiting = await waits(buffer.order(1))
        await buffer.learner_started(0)
        assert await answer(waiting) == "stop"
        assert buffer.error == "the learner died 3 times in a row without a step between: out of memory, attempt 2"
        restarts = await status(buffer, "learner_restarts")
        assert [(entry["step"], entry["cause"][-1]) for entry in restarts] == [(0, "0"), (0, "1"), (0, "2")]
        assert restarts[0]["time"] <= restarts[2]["time"] <= time.time()

    run(main)


def test_deaths_with_a_step_between_do_not_end_the_run_even_one_that_was_trained_before(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await buffer.learner_started(0)
        for version in range(8):
            await buffer.published(version, {})
        for _ in range(10):
            await buffer.learner_failed("preempted")
            await buffer.learner_started(5)
            await buffer.published(5, {})
            await buffer.published(6, {})
        for _ in range(2):
            await buffer.learner_failed("preempted")
            await buffer.learner_started(5)
            assert not buffer._closed
        assert len(await status(buffer, "learner_restarts")) == 12
        await buffer.learner_failed("preempted")
        await buffer.learner_started(5)
        assert buffer._closed
        buffer.release()
        again = make(tmp_path)  # of a driver that died before it had heard of them
        await again.learner_started(5)
        assert [entry["cause"] for entry in await status(again, "learner_restarts")] == ["preempted"] * 13

    run(main)


def test_a_new_buffer_is_told_what_is_in_flight_and_takes_it_once(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=4, num_steps=3, max_staleness=0)
        assert [group_id for group_id, _ in await start_all(buffer)] == [0, 1, 2, 3]
        await put(buffer, 2)
        again = make_again(buffer, groups_per_step=4, num_steps=3, max_staleness=0)
        await again.reconnect([0, 1, 2, 3], allowed=1, closed=False, error=None)  # that 2 is there the driver has not heard
        assert await status(again, "num_running", "num_finished", "oldest_running") == [3, 1, 0]
        slot = await waits(again.start())
        await put(again, 2, 3, 1, 0, 3)
        assert again.log.group_ids == [2, 3, 1, 0]
        assert await answer(again.order(1)) == "train" and ids(await answer(again.batch(1))) == [2, 3, 1, 0]
        await again.published(1, {})
        assert await answer(slot) == [(4, 1)]
        await waits(again.order(2))

    run(main)


def test_a_new_buffer_opens_the_dial_as_far_as_the_log_shows_that_the_learner_was(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=1, max_staleness=1)
        for version in range(3):
            await buffer.published(version, {})
            await put(buffer, version)
            await answer(buffer.batch(version + 1))
        again = make_again(buffer, groups_per_step=1, max_staleness=1)  # Ray starts it with what the first was started with
        assert again.version == 2
        await again.reconnect([], 3, False, None)
        assert await start_all(again) == [(3, 2)]

    run(main)


def test_a_new_buffer_of_a_run_that_is_over_says_so(tmp_path):
    async def main():
        buffer = make(tmp_path)
        questions = [await waits(question) for question in (buffer.order(1), buffer.batch(1), buffer.weights(-1), buffer.trained(1))]
        await buffer.reconnect([], 0, closed=True, error="the verifiers failed")
        assert [await answer(question) for question in questions] == ["stop", None, None, None]
        assert await answer(buffer.start()) is None and buffer.error == "the verifiers failed"

    run(main)


def test_two_buffers_do_not_write_to_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(buffer_module, "LOCK_WAIT_S", 0.0)
    buffer = make(tmp_path)
    with pytest.raises(RuntimeError, match=f"another process writes to {tmp_path}"):
        make(tmp_path)
    assert GroupLog(tmp_path).group_ids == []  # readers are free to look
    make_again(buffer)
    monkeypatch.undo()


def test_a_buffer_waits_for_the_one_before_it_to_go_down(tmp_path, monkeypatch):
    before = make(tmp_path)
    naps = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            before.release()

    monkeypatch.setattr(buffer_module.time, "sleep", nap)
    assert make(tmp_path).version == 0 and len(naps) == 3


# ------------------------------------------------------------------------------------------------------------------ replay


def one_prompt(group_id: int, *versions: int, **columns) -> pa.Table:
    """A group of the one prompt that all of these tests ask for; a completion per version."""
    m = len(versions)
    row = {**make_group(group_id, tuple(float(i) for i in range(m))), "prompt": "p", "answer": "7", "dataset": "d"}
    texts = [f"{group_id}.{i}" for i in range(m)]
    return table({**row, "completions": texts, "version_min": [0] * m, "version_max": [*versions], **columns})


def texts(history: pa.Table) -> list[str]:
    return history["completions"][0].as_py()


PROMPT = one_prompt(1000).select(list(groups.PROMPT_COLUMNS))


def replaying(folder, policy="newest", window=None, **arguments) -> GroupBuffer:
    return make(folder, replay=ReplayConfig(share=0.5, policy=policy, window=window), **arguments)


def test_the_newest_completions_of_a_prompt_come_first_with_everything_that_is_known_of_them(tmp_path):
    async def main():
        buffer = replaying(tmp_path)
        first, second = one_prompt(0, 1, 3, 3), one_prompt(1, 3, 2)
        for group in (first, second, table(make_group(2, version=9))):  # the last is another prompt's
            await buffer.put(group)
        history = await buffer.history(PROMPT, 4)
        # version 3: the later row, then by index; then version 2
        assert texts(history) == ["1.0", "0.1", "0.2", "1.1"]
        assert groups.validate(history, groups.LOGGED_COLUMNS).schema == groups.SCHEMA
        row, logged = next(groups.rows(history)), [next(groups.rows(group)) for group in (first, second)]
        picked = [(logged[1], 0), (logged[0], 1), (logged[0], 2), (logged[1], 1)]
        for name in ("completion_ids", "finish_reasons", "version_min", "version_max", "sampling_logprobs", "rewards", "reward_reasons"):
            assert row[name] == [group[name][i] for group, i in picked], name
        assert row["reward_parts"] == {"math": [0.0, 1.0, 2.0, 1.0]}
        assert row["sources"] == ["replay"] * 4
        assert row["reference_logprobs"] is None and row["reference_versions"] is None
        assert {name: row[name] for name in groups.PROMPT_COLUMNS} == next(groups.rows(PROMPT))
        assert texts(await buffer.history(PROMPT, 9)) == ["1.0", "0.1", "0.2", "1.1", "0.0"]
        assert texts(await buffer.history(PROMPT, 2)) == ["1.0", "0.1"]  # once more: for another group

    run(main)


def test_there_is_no_history_of_a_new_prompt_and_none_without_replay(tmp_path):
    async def main():
        with_replay, without = replaying(tmp_path / "with"), make(tmp_path / "without", replay=ReplayConfig())
        for buffer in (with_replay, without):
            await buffer.put(one_prompt(0, 1, 2))
        for buffer, prompt in ((with_replay, groups.with_columns(PROMPT, answer=["8"])), (without, PROMPT)):
            history = await buffer.history(prompt, 4)
            assert groups.validate(history, groups.LOGGED_COLUMNS).schema == groups.SCHEMA and texts(history) == []
        assert texts(await with_replay.history(PROMPT, 0)) == []

    run(main)


def test_prompts_whose_hashes_are_equal_do_not_get_each_others_completions(tmp_path, monkeypatch):
    monkeypatch.setattr(buffer_module, "hash", lambda key: 0, raising=False)

    async def main():
        buffer = replaying(tmp_path)
        await buffer.put(one_prompt(0, 1))
        await buffer.put(one_prompt(1, 1, answer="8"))
        assert texts(await buffer.history(PROMPT, 9)) == ["0.0"]

    run(main)


def test_only_the_policys_own_completions_that_can_be_trained_on_are_replayed(tmp_path):
    async def main():
        buffer = replaying(tmp_path)
        columns = {
            "sources": ["policy", "replay", "offline:people", "policy", "policy", "policy"],
            "rewards": [1.0, 1.0, 1.0, None, 1.0, 1.0],
            "completion_ids": [[3, 1]] * 4 + [[], [3, 1]],
            "sampling_logprobs": [[-1.0, -1.0]] * 4 + [[], None],
        }
        await buffer.put(one_prompt(0, *[1] * 6, **columns))
        assert texts(await buffer.history(PROMPT, 9)) == ["0.0"]

    run(main)


def test_uniform_replay_is_a_sample_that_the_seed_and_the_group_fix(tmp_path):
    async def main():
        buffer = replaying(tmp_path, "uniform", seed=5)
        await buffer.put(one_prompt(0, *range(20)))
        await buffer.put(one_prompt(1, *range(20)))
        everything = [f"{group_id}.{i}" for group_id in (0, 1) for i in range(20)]
        picked = texts(await buffer.history(PROMPT, 6))
        assert picked == [everything[i] for i in np.random.default_rng([5, 1000]).choice(40, 6, replace=False)]
        assert picked == texts(await buffer.history(PROMPT, 6)) and len(set(picked)) == 6
        assert picked != texts(await buffer.history(groups.with_columns(PROMPT, group_id=[1001]), 6))
        assert sorted(texts(await buffer.history(PROMPT, 99))) == sorted(everything)

    run(main)


def test_residual_replay_picks_what_is_farthest_from_its_optimum(tmp_path):
    async def main():
        buffer = replaying(tmp_path, "residual")
        # |R - mean R|: 1, 0, 1 of the first; of the second, whose mean is over the two that are trained on, 2.5, - and 2.5
        await buffer.put(one_prompt(0, 1, 1, 1))
        await buffer.put(one_prompt(1, 1, 1, 1, rewards=[0.0, None, 5.0]))
        assert texts(await buffer.history(PROMPT, 9)) == ["1.0", "1.2", "0.0", "0.2", "0.1"]
        await buffer.learned(0, {}, {0: [-0.25, 2.75, 0.5], 1: [-2.5, None, None]})
        assert texts(await buffer.history(PROMPT, 9)) == ["0.1", "1.0", "1.2", "0.2", "0.0"]  # 2.75, 2.5, 2.5 (not told), 0.5, 0.25
        await buffer.learned(1, {}, {0: [9.0, 0.0, 0.0]})  # trained on again
        assert texts(await buffer.history(PROMPT, 2)) == ["0.0", "1.0"]
        # Group 1000 begins with these two: what is known of them now is 0.25 and 0.125, and 4.0 of a completion of its own.
        await buffer.learned(2, {}, {1000: [0.25, -0.125, 4.0]})
        assert texts(await buffer.history(PROMPT, 9))[:2] == ["1.2", "0.0"]  # 2.5 (not told), 0.25; 1.0 has 0.125 now

    run(main)


def test_only_completions_of_the_last_steps_are_replayed_and_what_fell_out_is_forgotten(tmp_path):
    async def main():
        buffer = replaying(tmp_path, window=2, groups_per_step=1)
        for step, group in enumerate([one_prompt(0, 0, 0), one_prompt(1, 0, 1), one_prompt(2, 2, 1), one_prompt(3, 3, 3)], start=1):
            await buffer.put(group)
            await answer(buffer.batch(step))
            await buffer.published(step, {})
        # version 4: from 4 - 2 on
        assert texts(await buffer.history(PROMPT, 9)) == ["3.0", "3.1", "2.0"]
        assert list(buffer._history._rows) == [2, 3]  # steps 1 and 2 were written before version 2
        again = make_again(buffer, replay=ReplayConfig(share=0.5, window=2), version=4)
        assert texts(await again.history(PROMPT, 9)) == ["3.0", "3.1", "2.0"]
        assert list(again._history._rows) == [2, 3]
        await again.learned(0, {0: [-1.0, -1.0]}, {0: [-1.0, -1.0]})
        assert list(again._history._rows) == [2, 3]
        await again.published(6, {})
        await again.put(table(make_group(9)))
        assert texts(await again.history(PROMPT, 9)) == []
        assert list(again._history._rows) == [9] and sum(map(len, again._history._by_prompt.values())) == 1

    run(main)


def test_what_a_reference_model_said_of_a_completion_comes_with_it_when_it_is_replayed(tmp_path):
    async def main():
        buffer = replaying(tmp_path)
        for group_id in (0, 1, 2):
            await buffer.put(one_prompt(group_id, group_id, group_id))
        precise = -40.123456789012345
        await buffer.learned(4, {0: [precise, None]}, {0: [0.0, None]})  # one rank's; group 2 is another's
        await buffer.learned(7, {2: [-3.0, -4.0]}, {})
        history = next(groups.rows(await buffer.history(PROMPT, 9)))
        assert history["completions"] == ["2.0", "2.1", "1.0", "1.1", "0.0", "0.1"]
        assert history["reference_logprobs"] == [-3.0, -4.0, None, None, precise, None]
        assert history["reference_versions"] == [7, 7, None, None, 4, None]
        await buffer.learned(9, {2: [-5.0, None]}, {})
        assert next(groups.rows(await buffer.history(PROMPT, 2)))["reference_versions"] == [9, None]

    run(main)


def test_a_group_with_replayed_completions_is_logged_with_their_references(tmp_path):
    async def main():
        buffer = replaying(tmp_path)
        await buffer.put(one_prompt(0, 1, 2))
        await buffer.learned(0, {0: [-1.5, -2.5]}, {})
        new = one_prompt(1000, 3)
        await buffer.put(groups.join(PROMPT, await buffer.history(PROMPT, 1), new))
        _, logged = groups.rows(await answer(buffer.batch(1)))
        assert logged["completions"] == ["0.1", "1000.0"] and logged["sources"] == ["replay", "policy"]
        assert logged["reference_logprobs"] == [-2.5, None] and logged["reference_versions"] == [0, None]
        assert texts(await buffer.history(PROMPT, 9)) == ["1000.0", "0.1", "0.0"]  # the copy is not history of its own
        with pytest.raises(groups.GroupError, match="reference_logprobs has 1 entries, completions has 2"):
            await buffer.put(groups.with_columns(one_prompt(7, 1, 2), reference_logprobs=[[-1.0]]))

    run(main)


def test_the_history_is_that_of_the_log_whoever_reads_it(tmp_path):
    async def main():
        buffer = replaying(tmp_path, "uniform")
        for group_id in range(7):
            await buffer.put(one_prompt(group_id, 1, 2, 3))
        again = make_again(buffer, replay=ReplayConfig(share=0.5, policy="uniform"))
        await again.put(one_prompt(7, 4))
        histories = [texts(await b.history(PROMPT, 5)) for b in (again, make_again(again, replay=ReplayConfig(share=0.5, policy="uniform")))]
        assert histories[0] == histories[1] and len(histories[0]) == 5

    run(main)


# --------------------------------------------------------------------------------------------------------------------- log


def test_a_torn_tail_of_a_segment_costs_only_the_group_it_belongs_to(tmp_path):
    log = GroupLog(tmp_path / "whole")
    ends = []
    for group_id in (5, 6, 7):
        log.append(table(make_group(group_id)))
        ends.append((tmp_path / "whole" / "00000.arrow").stat().st_size)
    data = (tmp_path / "whole" / "00000.arrow").read_bytes()
    cuts = [0, 1, ends[0] - 1, ends[0], ends[0] + 1, ends[0] + 7, (ends[0] + ends[1]) // 2, ends[1] - 1, ends[1], ends[2] - 8, ends[2]]
    for cut in cuts:
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        (folder / "00000.arrow").write_bytes(data[:cut])
        torn = GroupLog(folder)
        whole = [group_id for group_id, end in zip((5, 6, 7), ends, strict=True) if end <= cut]
        assert torn.group_ids == whole
        torn.append(table(make_group(8)))
        again = GroupLog(folder)
        assert again.group_ids == [*whole, 8]
        assert again.read(0, len(again)).column("group_id").to_pylist() == [*whole, 8]


def test_a_torn_line_of_the_assignments_was_never_answered(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await put(buffer, 1, 2, 3, 4, 5, 6)
        for step in (1, 2):
            await answer(buffer.batch(step))
        file = tmp_path / "assignments.jsonl"
        whole = file.read_bytes()
        for tail in (b"{", b'{"step": 3, "beg', b'{"step": 3, "begin": 4, "end": 6}'):
            file.write_bytes(whole + tail)
            buffer = again = make_again(buffer)
            assert file.read_bytes() == whole
            assert again.log.assigned == {1: (0, 2), 2: (2, 4)}
            assert ids(await answer(again.batch(3))) == [5, 6]
            assert GroupLog(tmp_path).assigned[3] == (4, 6)
            file.write_bytes(whole)
        file.write_bytes(b'{"step": 1, "begin"')
        assert make_again(buffer).log.assigned == {} and file.read_bytes() == b""

    run(main)


def test_a_torn_line_is_cut_off_and_the_whole_ones_are_never_written_again(tmp_path, monkeypatch):
    # Writing the file anew would leave a moment in which kill -9 loses every assignment, and the run trains everything twice.
    file = tmp_path / "assignments.jsonl"
    file.write_bytes(b'{"step": 1, "begin": 0, "end": 2}\n{"st')
    inode = file.stat().st_ino
    monkeypatch.setattr(type(file), "write_text", None)
    monkeypatch.setattr("builtins.open", None)
    assert GroupLog(tmp_path).assigned == {1: (0, 2)}
    assert file.stat().st_ino == inode


def test_a_failed_write_does_not_hide_what_comes_after_it(tmp_path):
    log = GroupLog(tmp_path)
    log.append(table(make_group(1)))
    real, written = log._file, []

    class DiskFull:
        tell = real.tell

        def write(self, data):
            if written:
                raise OSError(28, "No space left on device")
            written.append(real.write(data[:100]))  # as much as there is room for
            return written[0]

    log._file = DiskFull()
    with pytest.raises(OSError, match="No space"):
        log.append(table(make_group(2)))
    assert written == [100] and log.group_ids == [1]
    log.append(table(make_group(3)))
    assert GroupLog(tmp_path).group_ids == log.group_ids == [1, 3]
    assert ids(log.read(0, 2)) == [1, 3]


def test_any_rows_are_read_in_any_order_across_segments(tmp_path):
    everything = {}
    for segment in range(3):
        log = GroupLog(tmp_path)  # a process each
        for group_id in range(5 * segment, 5 * segment + 5):
            everything[group_id] = table(make_group(group_id, (1.0,) * (2 + group_id % 3)))
            log.append(everything[group_id])
    (tmp_path / "00001.arrow").write_bytes((tmp_path / "00001.arrow").read_bytes()[:-20])  # the last row, of group 9, is torn
    del everything[9]
    log = GroupLog(tmp_path)
    log.append(everything.setdefault(15, table(make_group(15))))
    assert len(list(tmp_path.glob("*.arrow"))) == 4 and log.group_ids == [*everything]
    for rows in ([13, 0, 9, 4, 4], [14], [8, 9, 5], [*range(15)], []):
        want = [everything[log.group_ids[row]] for row in rows]
        got = log.rows(rows)
        assert got.schema == groups.SCHEMA and ids(got) == [group["group_id"][0].as_py() for group in want]
        assert not want or got.equals(groups.log_columns(pa.concat_tables(want)))
    assert log.read(3, 12).equals(log.rows(range(3, 12)))


def test_a_row_is_read_without_the_rows_before_it(tmp_path):
    log = GroupLog(tmp_path)
    for group_id in range(3):
        log.append(table(make_group(group_id)))
    places = [*log._places[1], (tmp_path / "00000.arrow").stat().st_size]
    with open(tmp_path / "00000.arrow", "r+b") as file:
        file.write(b"\xff" * places[1])  # neither the head nor the first row is there any more
    assert ids(log.rows([2, 1])) == [2, 1]


def test_a_log_that_an_older_version_wrote_is_read_and_goes_on(tmp_path):
    old = [table(make_group(group_id)) for group_id in (4, 2)]
    assert set(groups.REFERENCE_COLUMNS).isdisjoint(old[0].schema.names)
    with pa.OSFile(str(tmp_path / "00000.arrow"), "wb") as sink, pa.ipc.new_stream(sink, old[0].schema) as writer:
        for group in old:
            writer.write_table(group)
    (tmp_path / "assignments.jsonl").write_text('{"step": 1, "begin": 0, "end": 2}\n')

    async def main():
        buffer = make(tmp_path, replay=ReplayConfig(share=0.5))
        new = groups.with_columns(table(make_group(7)), reference_logprobs=[[-1.0, None, -2.0]], reference_versions=[[3, None, 3]])
        await buffer.put(new)
        await buffer.put(table(make_group(8)))
        assert (await answer(buffer.batch(1))).equals(groups.log_columns(pa.concat_tables(old)))
        assert (await answer(buffer.batch(2)))["reference_logprobs"].to_pylist() == [[-1.0, None, -2.0], None]
        assert ids(GroupLog(tmp_path).rows([2, 0])) == [7, 4] and ids(groups.load(tmp_path)) == [4, 2, 7, 8]
        assert texts(await buffer.history(old[1], 1)) == ["text"]

    run(main)


def test_groups_that_wait_for_the_learner_are_not_in_memory(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=1, replay=ReplayConfig(share=0.5))
        long = {"completion_ids": [[5] * 10_000] * 3, "sampling_logprobs": [[-0.5] * 10_000] * 3}
        group = table(make_group(0, **long))
        there = weakref.ref(group)
        await buffer.put(group)
        del group
        assert there() is None
        before = pa.total_allocated_bytes()
        for group_id in range(1, 100):
            await buffer.put(table(make_group(group_id, **long)))
        assert len(buffer.log) == 100 and pa.total_allocated_bytes() - before < 1_000_000  # of 24 MB
        batches = [await answer(buffer.batch(step)) for step in range(1, 101)]
        assert pa.total_allocated_bytes() - before < 1_000_000  # read from the page cache
        assert [ids(batch) for batch in batches] == [[group_id] for group_id in range(100)]

    run(main)


WRITER = textwrap.dedent(
    """
    import asyncio, os, sys
    from tiny import make_group, table
    from gvpo_ray.buffer import GroupBuffer

    async def write(folder):
        buffer = GroupBuffer(folder, groups_per_step=3, num_steps=10**6, max_staleness=None)
        step = 0
        while True:
            [(group_id, _)] = await buffer.start()
            await buffer.put(table(make_group(group_id)))
            os.write(1, b"group %d\\n" % group_id)
            while len(buffer.log) >= 3 * (step + 1):
                step += 1
                batch = await buffer.batch(step)
                os.write(1, b"step %d %s\\n" % (step, b",".join(b"%d" % i for i in batch.column("group_id").to_pylist())))

    while sys.stdin.readline():  # one writer per line; it dies by the hand of the test
        pid = os.fork()
        if pid == 0:
            asyncio.run(write(sys.argv[1]))
        os.write(1, b"pid %d\\n" % pid)
        os.waitpid(pid, 0)
        os.write(1, b"dead\\n")
    """
)


def test_kill_9_loses_no_acknowledged_group_and_stores_none_twice(tmp_path):
    seed = random.Random(0)
    groups_there: set[int] = set()
    steps: dict[int, list[int]] = {}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        for _ in range(10):
            parent.stdin.write("\n")
            parent.stdin.flush()
            pid, num_answers, seen = None, seed.randrange(1, 25), 0
            while (line := parent.stdout.readline().split()) != ["dead"]:
                assert line, "the writer's parent died"
                if line[0] == "pid":
                    pid = int(line[1])
                elif line[0] == "group":
                    assert int(line[1]) not in groups_there, "started again although it was finished"
                    groups_there.add(int(line[1]))
                    seen += 1
                else:
                    batch = [int(i) for i in line[2].split(",")]
                    assert steps.setdefault(int(line[1]), batch) == batch, "a step got other groups after a kill"
                if pid is not None and seen >= num_answers:
                    os.kill(pid, signal.SIGKILL)  # the writer goes on while we read: this lands anywhere in its loop
                    num_answers = 10**9
            log = GroupLog(tmp_path)
            assert len(set(log.group_ids)) == len(log.group_ids)
            # A group may be on disk without having been acknowledged; then it must not be started again, which start() proves above.
            assert groups_there <= set(log.group_ids)
            groups_there |= set(log.group_ids)
            anywhere = seed.choices(range(len(log)), k=5)
            assert list(groups.rows(log.rows(anywhere))) == [
                next(groups.rows(groups.log_columns(table(make_group(log.group_ids[row]))))) for row in anywhere
            ]
            assert {step: log.group_ids[slice(*log.assigned[step])] for step in steps} == steps
        parent.stdin.close()
    assert len(groups_there) > 50 and len(list(tmp_path.glob("*.arrow"))) == 10
    assert sorted(groups_there) == list(range(len(groups_there)))  # no gap either
    trained = [group_id for step in sorted(log.assigned) for group_id in log.group_ids[slice(*log.assigned[step])]]
    assert len(trained) == len(set(trained))


# -------------------------------------------------------------------------------------------------------------- quarantine


def test_put_says_whether_every_check_hit_its_limit(tmp_path):
    def group(group_id, rewards, reasons):
        return groups.with_columns(table(make_group(group_id)), rewards=[rewards], reward_reasons=[reasons])

    async def main():
        buffer = make(tmp_path)
        size = len(make_group(0)["completions"])
        cut_off = ["timeout: math took more than 10 s", "memory: x", "crash: y"] * size
        assert await buffer.put(group(0, [None] * size, cut_off[:size]))
        assert not await buffer.put(group(1, [None] * size, ["no gold answer", *cut_off][:size]))
        assert not await buffer.put(group(2, [0.0, *[None] * size][:size], cut_off[:size]))

    run(main)


def test_a_skipped_group_gives_its_place_to_the_next_and_is_not_finished(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=2, num_steps=1, max_staleness=0)
        assert [group_id for group_id, _ in await start_all(buffer)] == [0, 1]
        await buffer.skip(0)
        assert [group_id for group_id, _ in await start_all(buffer)] == [2]
        await put(buffer, 1, 2)
        assert ids(await buffer.batch(1)) == [1, 2]
        assert await start_all(buffer) == []

    run(main)


def test_a_quarantined_prompt_is_known_again_by_whoever_takes_the_run_up(tmp_path):
    bad, good = (table({**make_group(i), "prompt": f"problem {i}"}) for i in (0, 1))
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    assert not quarantine.holds(bad)
    quarantine.add(bad)
    quarantine.add(bad)
    with open(tmp_path / "quarantine.jsonl", "a") as file:
        file.write('{"dataset": "to')  # killed while it wrote
    again = Quarantine(tmp_path / "quarantine.jsonl")
    assert len(again) == 1 and again.holds(bad) and not again.holds(good)
    assert [entry["prompt"] for entry in again.entries()] == ["problem 0"]
