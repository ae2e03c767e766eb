"""What a buffer does when the learner, or a buffer before it, has died."""

import time

import pytest
from buffers import answer, ids, make, make_again, put, run, settle, start_all, waits
from test_buffer import status

from gvpo_ray.buffer import buffer as buffer_module
from gvpo_ray.buffer import log as log_module
from gvpo_ray.buffer.log import GroupLog
from gvpo_ray.config.data import ReplayConfig


def test_a_learner_that_comes_back_offers_older_weights_and_the_bound_stays(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=1, max_staleness=0)
        for version in range(4):
            await buffer.published(version, f"weights {version}")
        assert [group_id for group_id, _ in await start_all(buffer)] == [0, 1, 2, 3]
        await buffer.published(1, "weights 1 again")
        assert await status(buffer, "version") == 3
        # those of version 3 went with the one that made them
        assert await answer(buffer.weights(-1)) == (1, "weights 1 again")
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
        await buffer.permit(2)
        await put(buffer, 4, 0, 2, 3)
        before = [
            (await answer(buffer.next_command(step)), await answer(buffer.batch(step))) for step in (1, 2)
        ]
        await buffer.report_references(0, {4: [-1.0, -2.0, -3.0]})
        await buffer.published(2, {})
        after = [
            (await answer(buffer.next_command(step)), await answer(buffer.batch(step))) for step in (1, 2)
        ]
        assert after == before
        assert before[0][1]["reference_logprobs"].to_pylist() == [None, None]

    run(main)


def test_save_asks_a_learner_that_came_back_for_nothing_before_it_is_where_it_was(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await buffer.permit(4)
        await buffer.published(3, {})
        saving = await waits(buffer.save())
        await buffer.published(1, {})  # it died first; step-1 is the last checkpoint
        assert [await answer(buffer.next_command(step, saved=step == 2)) for step in (2, 3, 4)] == [
            "train",
            "train",
            "save",
        ]
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
        waiting = await waits(buffer.next_command(1))
        await buffer.learner_started(0)
        assert await answer(waiting) == "stop"
        assert (
            buffer.error
            == "the learner died 3 times in a row without a step between: out of memory, attempt 2"
        )
        restarts = await status(buffer, "learner_restarts")
        assert [(entry["step"], entry["cause"][-1]) for entry in restarts] == [(0, "0"), (0, "1"), (0, "2")]
        assert restarts[0]["time"] <= restarts[2]["time"] <= time.time()

    run(main)


def test_a_learner_that_dies_each_time_it_sends_a_steps_weights_has_finished_no_step(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await buffer.learner_started(0)
        for _ in range(3):
            assert not buffer._closed
            await buffer.published(0, {})
            await buffer.published(1, None, {"loss": 1.0})  # its weights find no room in the object store
            await buffer.learner_failed("the object store is full")
            await buffer.learner_started(0)
        assert buffer._closed and "3 times in a row without a step" in buffer.error

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
        # that 2 is there the driver has not heard
        await again.reconnect([0, 1, 2, 3], allowed=1, closed=False, error=None)
        assert await status(again, "num_running", "num_finished", "oldest_running") == [3, 1, 0]
        slot = await waits(again.start())
        await put(again, 2, 3, 1, 0, 3)
        assert again.log.group_ids == [2, 3, 1, 0]
        assert await answer(again.next_command(1)) == "train" and ids(await answer(again.batch(1))) == [
            2,
            3,
            1,
            0,
        ]
        await again.published(1, {})
        assert await answer(slot) == [(4, 1)]
        await waits(again.next_command(2))

    run(main)


def test_a_new_buffer_opens_the_bound_as_far_as_the_log_shows_that_the_learner_was(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=1, max_staleness=1)
        for version in range(3):
            await buffer.published(version, {})
            await put(buffer, version)
            await answer(buffer.batch(version + 1))
        # Ray starts it with what the first was started with
        again = make_again(buffer, groups_per_step=1, max_staleness=1)
        assert again.version == 2
        await again.reconnect([], 3, False, None)
        assert await start_all(again) == [(3, 2)]

    run(main)


def test_a_new_buffer_of_a_run_that_is_over_says_so(tmp_path):
    async def main():
        buffer = make(tmp_path)
        questions = [
            await waits(question)
            for question in (buffer.next_command(1), buffer.batch(1), buffer.weights(-1), buffer.trained(1))
        ]
        await buffer.reconnect([], 0, closed=True, error="the verifiers failed")
        assert [await answer(question) for question in questions] == ["stop", None, None, None]
        assert await answer(buffer.start()) is None and buffer.error == "the verifiers failed"

    run(main)


def test_two_buffers_do_not_write_to_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "LOCK_WAIT_S", 0.0)
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
