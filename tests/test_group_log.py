"""The log, which loses nothing to kill -9, and the quarantine."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import weakref

import pyarrow as pa
import pytest
from buffers import answer, ids, make, make_again, put, run, start_all, texts
from tiny import make_group, table

from gvpo_ray import groups
from gvpo_ray.buffer.log import EndedBy, GroupLog, Quarantine
from gvpo_ray.config.data import ReplayConfig
from gvpo_ray.files import DiskFull

# -------------------------------------------------------------------------------------------------------- log


def test_a_torn_tail_of_a_segment_costs_only_the_group_it_belongs_to(tmp_path):
    log = GroupLog(tmp_path / "whole")
    ends = []
    for group_id in (5, 6, 7):
        log.append(table(make_group(group_id)))
        ends.append((tmp_path / "whole" / "00000.arrow").stat().st_size)
    data = (tmp_path / "whole" / "00000.arrow").read_bytes()
    cuts = [
        0,
        1,
        ends[0] - 1,
        ends[0],
        ends[0] + 1,
        ends[0] + 7,
        (ends[0] + ends[1]) // 2,
        ends[1] - 1,
        ends[1],
        ends[2] - 8,
        ends[2],
    ]
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
    # Writing the file anew would leave a moment in which kill -9 loses every assignment, and the run trains
    # everything twice.
    log = GroupLog(tmp_path)
    for group_id in (1, 2):
        log.append(table(make_group(group_id)))
    log.close()
    file, whole = tmp_path / "assignments.jsonl", b'{"step": 1, "begin": 0, "end": 2}\n'
    file.write_bytes(whole + b'{"st')
    inode = file.stat().st_ino
    monkeypatch.setattr(type(file), "write_text", None)
    monkeypatch.setattr("builtins.open", None)
    log = GroupLog(tmp_path)
    assert log.assigned == {1: (0, 2)}
    assert file.read_bytes() == whole + b'{"st'  # a reader changes nothing: the writer may be at it
    log.repair()
    assert file.read_bytes() == whole and file.stat().st_ino == inode


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
    with pytest.raises(OSError, match=r"no room for .*/00000\.arrow on the file system at /"):
        log.append(table(make_group(2)))
    assert written == [100] and log.group_ids == [1]
    log.append(table(make_group(3)))
    assert GroupLog(tmp_path).group_ids == log.group_ids == [1, 3]
    assert ids(log.read(0, 2)) == [1, 3]


def test_a_disk_that_is_full_at_the_index_is_named_and_the_step_is_assigned_later(tmp_path):
    """The learner takes an OSError without a name for a death, and starts again three times."""
    log = GroupLog(tmp_path)
    log.append(table(make_group(1)))
    index = tmp_path / "00000.index"
    index.symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=r"no room for .*/00000\.index on the file system at /"):
        log.assign(1, 0, 1)
    assert GroupLog(tmp_path).assigned == log.assigned == {}
    index.unlink()
    log.assign(1, 0, 1)
    assert GroupLog(tmp_path).assigned == {1: (0, 1)}


def test_any_rows_are_read_in_any_order_across_segments(tmp_path):
    everything = {}
    for segment in range(3):
        log = GroupLog(tmp_path)  # a process each
        for group_id in range(5 * segment, 5 * segment + 5):
            everything[group_id] = table(make_group(group_id, (1.0,) * (2 + group_id % 3)))
            log.append(everything[group_id])
    # the last row, of group 9, is torn
    (tmp_path / "00001.arrow").write_bytes((tmp_path / "00001.arrow").read_bytes()[:-20])
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
    with (
        pa.OSFile(str(tmp_path / "00000.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, old[0].schema) as writer,
    ):
        for group in old:
            writer.write_table(group)
    (tmp_path / "assignments.jsonl").write_text('{"step": 1, "begin": 0, "end": 2}\n')

    async def main():
        buffer = make(tmp_path, replay=ReplayConfig(share=0.5))
        new = groups.with_columns(
            table(make_group(7)), reference_logprobs=[[-1.0, None, -2.0]], reference_versions=[[3, None, 3]]
        )
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
    from gvpo_ray.buffer.buffer import GroupBuffer

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
                group_ids = b",".join(b"%d" % i for i in batch.column("group_id").to_pylist())
                os.write(1, b"step %d %s\\n" % (step, group_ids))

    while sys.stdin.readline():  # one writer per line; it dies by the hand of the test
        pid = os.fork()
        if pid == 0:
            asyncio.run(write(sys.argv[1]))
        os.write(1, b"pid %d\\n" % pid)
        os.waitpid(pid, 0)
        os.write(1, b"dead\\n")
    """
)


@pytest.mark.components
def test_kill_9_loses_no_acknowledged_group_and_stores_none_twice(tmp_path):
    seed = random.Random(0)
    groups_there: set[int] = set()
    steps: dict[int, list[int]] = {}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
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
                    assert steps.setdefault(int(line[1]), batch) == batch, (
                        "a step got other groups after a kill"
                    )
                if pid is not None and seen >= num_answers:
                    # the writer goes on while we read: this lands anywhere in its loop
                    os.kill(pid, signal.SIGKILL)
                    num_answers = 10**9
            log = GroupLog(tmp_path)
            assert len(set(log.group_ids)) == len(log.group_ids)
            # A group may be on disk without having been acknowledged; then it must not be started again,
            # which start() proves above.
            assert groups_there <= set(log.group_ids)
            groups_there |= set(log.group_ids)
            anywhere = seed.choices(range(len(log)), k=5)
            assert list(groups.rows(log.rows(anywhere))) == [
                next(groups.rows(groups.log_columns(table(make_group(log.group_ids[row])))))
                for row in anywhere
            ]
            assert {step: log.group_ids[slice(*log.assigned[step])] for step in steps} == steps
        parent.stdin.close()
    assert len(groups_there) > 50 and len(list(tmp_path.glob("*.arrow"))) == 10
    assert sorted(groups_there) == list(range(len(groups_there)))  # no gap either
    trained = [
        group_id for step in sorted(log.assigned) for group_id in log.group_ids[slice(*log.assigned[step])]
    ]
    assert len(trained) == len(set(trained))


# ------------------------------------------------------------------------------------------------- quarantine


def test_put_says_whether_every_check_hit_its_limit(tmp_path):
    def group(group_id, rewards, reasons):
        return groups.with_columns(table(make_group(group_id)), rewards=[rewards], reward_reasons=[reasons])

    async def main():
        buffer = make(tmp_path)
        size = len(make_group(0)["completions"])
        cut_off = ["timeout: math took more than 10 s", "memory: x", "crash: y"] * size
        other = ["no gold answer", *cut_off][:size]
        for number, rewards, reasons, ended_by in (
            (0, [None] * size, cut_off[:size], EndedBy.CHECKS),
            (1, [None] * size, other, EndedBy.NONE),
            (2, [0.0, *[None] * size][:size], cut_off[:size], EndedBy.NONE),
        ):
            assert await buffer.put(group(number, rewards, reasons)) == [ended_by]

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
