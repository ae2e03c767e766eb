"""The buffer: order of arrival, the dial, every wait and its waker, and a log that loses nothing to kill -9."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tiny import make_group, table

from gvpo_ray import buffer as buffer_module
from gvpo_ray import groups
from gvpo_ray.buffer import GroupBuffer, GroupLog, Quarantine


def make(folder, groups_per_step=2, num_steps=100, max_staleness=None, version=0) -> GroupBuffer:
    return GroupBuffer(folder, groups_per_step, num_steps, max_staleness, version)


def put(buffer: GroupBuffer, *group_ids: int) -> Awaitable[None]:
    async def all_of_them() -> None:
        for group_id in group_ids:
            await buffer.put(table(make_group(group_id)))

    return all_of_them()


def ids(batch) -> list[int]:
    return batch.column("group_id").to_pylist()


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
        started.append(task.result())


def run(main: Callable[[], Awaitable]) -> None:
    asyncio.run(asyncio.wait_for(main(), timeout=60))


# ----------------------------------------------------------------------------------------------------------------- batches


def test_what_a_reference_model_said_of_a_group_comes_with_it_when_it_is_asked_for_again_until_a_checkpoint_is_past_it(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await put(buffer, 4, 0, 2, 3)
        first = await answer(buffer.batch(1))
        assert "reference_logprobs" not in first.column_names
        await buffer.referenced(0, {0: [-1.5, None, -0.25]})  # one rank's; group 4 is another's
        await answer(buffer.batch(2))
        again = await answer(buffer.batch(1))
        assert ids(again) == [4, 0]
        assert again["reference_logprobs"].to_pylist() == [None, [-1.5, None, -0.25]]
        assert again["reference_versions"].to_pylist() == [None, [0, None, 0]]
        assert groups.validate(again, groups.LOGGED_COLUMNS).drop_columns(list(groups.REFERENCE_COLUMNS)) == first
        await buffer.referenced(0, {2: [-1.0, -2.0, -3.0]})
        await buffer.saved(1)
        assert (await answer(buffer.batch(1))).column_names == first.column_names
        assert (await answer(buffer.batch(2)))["reference_logprobs"].to_pylist() == [[-1.0, -2.0, -3.0], None]

    run(main)


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
        assert (await answer(buffer.batch(1))).equals(first)  # its rows are no longer in memory: from disk
        assert (await answer(buffer.batch(2))).equals(second.result())

    run(main)


def test_a_new_buffer_on_the_same_folder_gives_the_same_batches_and_goes_on_behind_them(tmp_path):
    async def main():
        buffer = make(tmp_path)
        await put(buffer, 3, 1, 2, 0, 7)
        batches = [await answer(buffer.batch(step)) for step in (1, 2)]
        again = make(tmp_path, version=1)
        await put(again, 5)
        assert (await answer(again.batch(2))).equals(batches[1])  # step 2 first: the run resumes from version 1
        assert (await answer(again.batch(1))).equals(batches[0])
        assert ids(await answer(again.batch(3))) == [7, 5]  # one row from either segment
        third = make(tmp_path, version=3)
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
        again = make(tmp_path)
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
        assert await answer(buffer.start()) == (0, 0)
        waiting = await waits(buffer.start())
        await put(buffer, 0)
        await settle()
        assert not waiting.done()  # finished is not yet trained
        await buffer.published(1, {})
        assert await answer(waiting) == (1, 1)

    run(main)


def test_start_hands_out_every_id_once_even_to_many_at_a_time(tmp_path):
    async def main():
        buffer = make(tmp_path, groups_per_step=3, num_steps=4, max_staleness=1)
        tasks = [asyncio.ensure_future(buffer.start()) for _ in range(15)]
        for version in range(4):
            await settle()
            await buffer.published(version, {})
        await settle()
        done = sorted(task.result()[0] for task in tasks if task.done())
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
        again = make(tmp_path, groups_per_step=2, num_steps=4)
        assert [group_id for group_id, _ in await start_all(again)] == [1, 2, 4, 6, 7]

    run(main)


def test_after_a_restart_no_group_waits_for_weights_that_are_not_there(tmp_path):
    async def main():
        await put(make(tmp_path, groups_per_step=1), 0, 1, 2, 3, 4)
        again = make(tmp_path, groups_per_step=1, max_staleness=5, version=0)
        assert await answer(again.start()) == (5, 0)
        await again.published(2, {})
        assert await answer(again.start()) == (6, 1)

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
        for _ in range(5):
            await buffer.start()
        await put(buffer, 0, 3, 1)
        await answer(buffer.batch(1))
        status = await buffer.status()
        want = {"version": 0, "groups_finished": 3, "groups_running": 2, "groups_waiting": 1, "oldest_running": 2}
        assert {key: status[key] for key in want} == want

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
            again = make(tmp_path)
            assert file.read_bytes() == whole
            assert again.log.assigned == {1: (0, 2), 2: (2, 4)}
            assert ids(await answer(again.batch(3))) == [5, 6]
            assert make(tmp_path).log.assigned[3] == (4, 6)
            file.write_bytes(whole)
        file.write_bytes(b'{"step": 1, "begin"')
        assert make(tmp_path).log.assigned == {} and file.read_bytes() == b""

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
    written, real = [], log._writer

    class DiskFull:
        def write_batch(self, batch):
            log._file.write(b"\xff\xff\xff\xff\x40\x00\x00\x00half a message")
            written.append(batch)
            raise OSError(28, "No space left on device")

    log._writer = DiskFull()
    with pytest.raises(OSError, match="No space"):
        log.append(table(make_group(2)))
    assert written and real is not None and log.group_ids == [1]
    log.append(table(make_group(3)))
    assert GroupLog(tmp_path).group_ids == log.group_ids == [1, 3]
    assert ids(log.read(0, 2)) == [1, 3]


WRITER = textwrap.dedent(
    """
    import asyncio, os, sys
    from tiny import make_group, table
    from gvpo_ray.buffer import GroupBuffer

    async def write(folder):
        buffer = GroupBuffer(folder, groups_per_step=3, num_steps=10**6, max_staleness=None)
        step = 0
        while True:
            group_id, _ = await buffer.start()
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
