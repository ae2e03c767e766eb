"""The buffer: order of arrival, the staleness bound, every wait and its waker."""

import asyncio
import json
import os
import time
from collections.abc import Awaitable
from pathlib import Path

import pytest
from buffers import answer, ids, make, make_again, put, run, settle, start_all, waits
from ray.exceptions import ObjectLostError

from gvpo_ray.buffer import buffer as buffer_module
from gvpo_ray.buffer.actor import BufferClient
from gvpo_ray.buffer.buffer import GroupBuffer
from gvpo_ray.buffer.log import GroupLog


def status(buffer: GroupBuffer, *names: str) -> Awaitable:
    async def of_them():
        told = await buffer.status()
        return [told[name] for name in names] if len(names) > 1 else told[names[0]]

    return of_them()


# ---------------------------------------------------------------------------------------------------- batches


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
        # step 2 first: the run resumes from version 1
        assert (await answer(again.batch(2))).equals(batches[1])
        assert (await answer(again.batch(1))).equals(batches[0])
        assert ids(await answer(again.batch(3))) == [7, 5]  # one row from either segment
        third = make_again(again, version=3)
        assert [ids(await answer(third.batch(step))) for step in (1, 2, 3)] == [[3, 1], [2, 0], [7, 5]]
        assert third.log.end == len(third.log) == 6

    run(main)


def test_the_assignment_is_on_disk_before_the_answer(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").resolve().name))

    async def main():
        buffer = make(tmp_path)
        await put(buffer, 8, 6)
        assert not synced
        await answer(buffer.batch(1))
        # The rows first: an assignment of rows that the disk does not have would be worse than none.
        assert synced == ["00000.arrow", tmp_path.name, "assignments.jsonl", tmp_path.name]
        assert json.loads((tmp_path / "assignments.jsonl").read_text()) == {"step": 1, "begin": 0, "end": 2}
        await answer(buffer.batch(1))
        assert len(synced) == 4

    run(main)


def test_an_assignment_that_cannot_be_written_is_not_answered(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    async def main():
        buffer = make(tmp_path)
        await put(buffer, 8, 6)
        monkeypatch.setattr(os, "fsync", full)
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


# ---------------------------------------------------------------------------------------- the staleness bound


@pytest.mark.parametrize(
    ("max_staleness", "counts"),
    # groups_per_step 4, 5 steps: with version v published, (v + max_staleness + 1) * 4 groups have started,
    # 20 at most
    [
        (0, [4, 8, 12, 16, 20, 20]),
        (1, [8, 12, 16, 20, 20, 20]),
        (3, [16, 20, 20, 20, 20, 20]),
        (None, [20, 20, 20, 20, 20, 20]),
    ],
)
def test_the_bound_starts_exactly_so_many_groups_per_version(tmp_path, max_staleness, counts):
    async def main():
        buffer = make(tmp_path, groups_per_step=4, num_steps=5, max_staleness=max_staleness)
        started = []
        for version, count in enumerate(counts):
            await buffer.published(version, {})
            started += await start_all(buffer)
            assert len(started) == count
            if version < len(counts) - 1:
                # finished or not: it counts
                await put(buffer, *[group_id for group_id, _ in started[4 * version : 4 * version + 4]])
        assert [group_id for group_id, _ in started] == list(range(20))
        # The bound from the engine's side: the group in the batch after v + max_staleness others asks for
        # version v.
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

    run(main)


def test_one_question_starts_as_many_groups_as_asked_for_and_as_the_bound_allows(tmp_path):
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
        await again.permit(3)
        for step, rows in ((2, [2, 3]), (3, [4, 5])):
            assert await answer(again.next_command(step, saved=step == 2)) == "train"
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


# ----------------------------------------------------------------------------------------------------- orders


def test_the_learner_waits_until_the_driver_allows_the_step(tmp_path):
    async def main():
        buffer = make(tmp_path)
        order = await waits(buffer.next_command(1))
        await buffer.permit(2)
        assert await answer(order) == "train" and await answer(buffer.next_command(2)) == "train"
        await waits(buffer.next_command(3))

    run(main)


def test_every_rank_gets_the_same_order_whenever_it_asks(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await buffer.published(0, {})
        await buffer.permit(1)
        assert await answer(buffer.next_command(1)) == "train"
        saving = await waits(buffer.save())  # between the questions of two ranks
        assert await answer(buffer.next_command(1)) == "train"
        await buffer.published(1, {})
        ranks = [await answer(buffer.next_command(2)) for _ in range(2)]
        assert ranks == ["save", "save"]
        await buffer.saved(1)
        assert await answer(saving) == 1
        # the third rank is late, and must not train while the others save
        assert await answer(buffer.next_command(2)) == "save"
        buffer.release()
        buffer = make(tmp_path)  # it died
        await buffer.permit(9)
        assert [await answer(buffer.next_command(step)) for step in (1, 2)] == ["train", "save"]
        await buffer.close()
        assert await answer(buffer.next_command(2)) == "save"
        assert await answer(buffer.next_command(2, saved=True)) == "stop"

    run(main)


def test_save_asks_for_a_checkpoint_before_training_goes_on_and_answers_its_step(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await buffer.published(0, {})
        saving = await waits(buffer.save())
        await buffer.permit(1)
        assert await answer(buffer.next_command(1)) == "save"  # also of version 0
        await buffer.saved(0)
        assert await answer(saving) == 0
        assert await answer(buffer.next_command(1, saved=True)) == "train"

    run(main)


def test_save_is_immediate_when_a_checkpoint_is_there(tmp_path):
    async def main():
        buffer = make(tmp_path, version=7)  # a run that is taken up starts from one
        assert await answer(buffer.save()) == 7
        await buffer.permit(8)
        await buffer.published(8, {})
        await buffer.saved(8)
        assert await answer(buffer.save()) == 8
        assert await answer(buffer.next_command(8, saved=True)) == "train"  # and asks nothing of the learner

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
        assert await answer(buffer.next_command(4)) == "save"
        # It writes step-3, dies, and the new one resumes from there.
        await buffer.learner_started(3)
        assert await answer(saving) == 3

    run(main)


def test_save_waits_for_a_checkpoint_that_a_thread_of_the_learner_still_writes(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await buffer.permit(1)
        await buffer.published(1, {})
        saving = await waits(buffer.save())
        asked = await waits(buffer.next_command(2, saved=True))  # it is due, and is being written
        assert not saving.done()
        await buffer.saved(1)
        assert await answer(saving) == 1 and not asked.done()
        assert await status(buffer, "learner_state") == "waits for the driver"  # not: has saved
        await buffer.permit(2)
        assert await answer(asked) == "train"

    run(main)


def test_a_learner_that_died_in_its_checkpoint_is_asked_for_it_again(tmp_path):
    async def main():
        buffer = make(tmp_path, version=2)
        await buffer.permit(3)
        assert await answer(buffer.next_command(3, saved=True)) == "train"
        await buffer.published(3, {})
        saving = await waits(buffer.save())
        assert await answer(buffer.next_command(4)) == "save"
        # It dies while it writes step-3; the new one resumes from step-2.
        await buffer.published(2, {})
        assert await answer(buffer.next_command(3, saved=True)) == "train"
        assert not saving.done()
        await buffer.published(3, {})
        assert await answer(buffer.next_command(4)) == "save"
        await buffer.saved(3)
        assert await answer(saving) == 3

    run(main)


# ----------------------------------------------------------------------------------------- driver and engines


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
        # a run that is taken up has no weights before the learner is there
        first = await waits(buffer.weights(-1))
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
        questions = [
            buffer.start(),
            buffer.next_command(1),
            buffer.batch(1),
            buffer.weights(0),
            buffer.trained(1),
        ]
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
        assert (
            await answer(buffer.start()) is None
            and await answer(buffer.next_command(5)) == "stop"
            and await answer(buffer.batch(5)) is None
        )

    run(main)


def test_after_close_every_rank_gets_the_batch_that_another_has_got_and_no_rank_a_new_one(tmp_path):
    """A rank without its batch would leave the others waiting for it."""

    async def main():
        for takes_turns in (False, True):
            buffer = GroupBuffer(tmp_path / str(takes_turns), 1, 9, None, takes_turns=takes_turns)
            first = await waits(buffer.batch(1))
            await put(buffer, 3, 4)
            await settle()
            await buffer.close("the disk is full")
            assert ids(await answer(first)) == ids(await answer(buffer.batch(1))) == [3]
            assert [await answer(buffer.batch(2)) for _ in range(2)] == [None, None]

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
        assert (
            before
            <= await status(buffer, "last_group_at")
            <= await status(buffer, "last_step_at")
            <= time.time()
        )
        await buffer.close("the disk is full")
        assert await status(buffer, "version", "closed", "error") == [1, True, "the disk is full"]

    run(main)


def test_status_says_what_the_bound_allows(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=4, num_steps=2, max_staleness=0)
        assert await status(buffer, "staleness") == "open"
        await buffer.start(9)
        assert await status(buffer, "staleness") == "closed: 4 groups started, version 0 allows no more"
        await buffer.published(1, {})
        assert await status(buffer, "staleness") == "open"
        await buffer.start(9)
        assert await status(buffer, "staleness") == "all groups are started"

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
        order = await waits(buffer.next_command(1))
        assert await status(buffer, "learner") == "waits for the driver"
        await buffer.permit(1)
        assert await answer(order) == "train"
        now = 1002.0
        batch = await waits(buffer.batch(1))
        assert await status(buffer, "learner", "learner_since") == [
            "waits for groups: step 1 has 0 of 3",
            1002.0,
        ]
        now = 1003.0
        await put(buffer, 5, 6)
        other_rank = await waits(buffer.batch(1))
        assert await status(buffer, "learner", "learner_since") == [
            "waits for groups: step 1 has 2 of 3",
            1002.0,
        ]
        await put(buffer, 7)
        await answer(batch)
        now = 1004.0
        await answer(other_rank)
        assert await status(buffer, "learner", "learner_since") == ["trains step 1", 1003.0]
        await buffer.published(1, {}, {})
        saving = await waits(buffer.save())
        assert await answer(buffer.next_command(2)) == "save"
        assert await status(buffer, "learner") == "saves step 1"
        await buffer.saved(1)
        await answer(saving)
        assert await status(buffer, "learner") == "has saved step 1"
        await buffer.learner_failed("worker 1: killed")
        assert await status(buffer, "learner") == "died and is started again: worker 1: killed"
        await buffer.close()
        assert await answer(buffer.next_command(2, saved=True)) == "stop"
        assert await status(buffer, "learner") == "was told to stop"

    run(main)


# ---------------------------------------------------------------------------------------- the driver's client


def test_one_lost_group_of_several_that_are_put_together_costs_no_other(monkeypatch):
    client = BufferClient.__new__(BufferClient)
    client._to_put, client._putting = [], None
    calls = []

    async def call(self, method, *refs):
        calls.append(refs)
        await asyncio.sleep(0)
        if "lost" in refs:  # a verifier's node died with it
            raise ObjectLostError("ab" * 28, None, "")
        return [ref == "limits" for ref in refs]

    monkeypatch.setattr(BufferClient, "_call", call)

    async def main():
        scored = ("a", "b", "lost", "limits")
        found = await asyncio.gather(*map(client.put, scored), return_exceptions=True)
        assert [found[0], found[1], found[3]] == [False, False, True]
        assert isinstance(found[2], ObjectLostError)

    run(main)
    assert [len(refs) for refs in calls][-4:] == [1, 1, 1, 1]
