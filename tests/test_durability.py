"""What must outlive a power failure is on the disk before anybody is told that it is there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from buffers import make
from test_run_format import config
from tiny import make_checkpoint, make_group, table

from gvpo_ray import files, groups
from gvpo_ray.buffer import log as log_module
from gvpo_ray.buffer.log import GroupLog, LogError
from gvpo_ray.config.base import ConfigError
from gvpo_ray.learner.checkpoints import finish_checkpoint, latest_checkpoint, prune_checkpoints
from gvpo_ray.observe.console import RunConsole
from gvpo_ray.observe.metrics_log import MetricsLog
from gvpo_ray.run.run_dir import open_run_dir


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The paths below tmp_path that were given to fsync, in order; the folder itself is "."."""
    real, paths = os.fsync, []

    def fsync(opened: int) -> None:
        paths.append(os.path.relpath(os.readlink(f"/proc/self/fd/{opened}"), tmp_path))
        real(opened)

    monkeypatch.setattr(os, "fsync", fsync)
    return paths


def test_a_new_file_of_lines_is_synced_with_its_name_and_later_lines_alone(
    synced: list[str], tmp_path: Path
) -> None:
    files.append_line(tmp_path / "lines.jsonl", 1, sync=True)
    assert synced == ["lines.jsonl", "."]
    files.append_lines(tmp_path / "lines.jsonl", [2, 3], sync=True)
    assert synced[2:] == ["lines.jsonl"] and files.read_lines(tmp_path / "lines.jsonl") == [1, 2, 3]
    files.append_line(tmp_path / "others.jsonl", 1)
    assert len(synced) == 3


def test_a_file_that_is_replaced_durably_is_on_the_disk_before_it_has_its_name(
    synced: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace
    monkeypatch.setattr(Path, "replace", lambda part, path: (synced.append("replaced"), real(part, path)))
    files.write_whole(tmp_path / "config.yaml", "ü", sync=True)
    assert synced == [".config.yaml.part", "replaced", "."]
    assert (tmp_path / "config.yaml").read_bytes() == "ü".encode()


def test_every_new_folder_of_a_path_is_synced_into_its_parent(synced: list[str], tmp_path: Path) -> None:
    files.make_folder(tmp_path / "a" / "b")
    assert synced == [".", "a"]
    files.make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2


def test_a_checkpoint_is_on_the_disk_whole_before_it_has_its_name(
    synced: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tmp_path / ".step-2.part"
    (part / "optimizer").mkdir(parents=True)
    for name in ("model.safetensors", "state.json", "optimizer/0.safetensors"):
        (part / name).write_text("x")
    real = Path.rename
    monkeypatch.setattr(Path, "rename", lambda part, path: (synced.append("renamed"), real(part, path)))
    finish_checkpoint(part, tmp_path / "step-2")
    at = synced.index("renamed")
    assert sorted(synced[:at]) == sorted(
        [".step-2.part"]
        + [f".step-2.part/{name}" for name in ("model.safetensors", "state.json", "optimizer")]
        + [".step-2.part/optimizer/0.safetensors"]
    )
    assert synced[at:] == ["renamed", "."]


def test_a_file_system_that_cannot_sync_folders_is_used_and_a_failing_disk_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(number: int) -> Callable[[int], None]:
        def fsync(opened: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", fails(errno.EINVAL))
    files.sync_to_disk(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        files.sync_to_disk(tmp_path / "file")
    monkeypatch.setattr(os, "fsync", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        files.sync_to_disk(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_not_taken_for_a_held_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(files.NoLocks) as caught:
        files.lock(tmp_path / ".lock", wait_s=9.0)
    assert not isinstance(caught.value, BlockingIOError)
    assert caught.value.strerror.startswith(
        f"its file system has no file locks (flock: {os.strerror(number)})"
    )


# ----------------------------------------------------------------------- the user's files among the run's


def test_a_copied_checkpoint_and_other_foreign_names_are_neither_read_nor_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    foreign = ["step-20-best", "step-", "step-1e3", "step-007", "step-30.bak", "best", ".step-20-best.part"]
    for name in ("step-9", "step-10", "step-20", *foreign):
        make_checkpoint(folder / name)
    (folder / "step-20-mine").mkdir()  # without a state
    (folder / "step-40").write_text("a file")
    (folder / ".step-21.part").mkdir()
    (folder / "step-11").mkdir()  # a removal that was interrupted
    assert latest_checkpoint(tmp_path) == (20, folder / "step-20")
    prune_checkpoints(tmp_path, keep=2)
    assert {path.name for path in folder.iterdir()} == {
        "step-10",
        "step-20",
        "step-20-mine",
        "step-40",
        *foreign,
    }


# ---------------------------------------------------------------------------------------------- the group log


def log_of(folder: Path, *group_ids: int) -> GroupLog:
    log = GroupLog(folder)
    for group_id in group_ids:
        log.append(table(make_group(group_id)))
    return log


def test_an_assignment_covers_the_rows_of_a_process_before_and_their_names(
    synced: list[str], tmp_path: Path
) -> None:
    log_of(tmp_path / "groups", 0, 1, 2).close()  # that process is killed before it assigns anything
    log = log_of(tmp_path / "groups", 3)
    assert synced == ["."]  # the new folder groups/
    log.assign(1, 0, 2)
    assert synced[1:] == ["groups/00000.arrow", "groups", "groups/assignments.jsonl", "groups"]
    del synced[:]
    log.assign(2, 2, 4)
    assert synced == ["groups/00001.arrow", "groups", "groups/assignments.jsonl"]
    del synced[:]
    log.append(table(make_group(4)))
    log.assign(3, 4, 5)
    assert synced == ["groups/00001.arrow", "groups/assignments.jsonl"]


def test_a_new_writer_puts_the_last_assignment_of_a_killed_one_on_the_disk(
    synced: list[str], tmp_path: Path
) -> None:
    log_of(tmp_path, 0, 1).close()
    (tmp_path / "assignments.jsonl").write_text('{"step": 1, "begin": 0, "end": 1}\n')  # not yet synced
    log = GroupLog(tmp_path)
    assert synced == []
    log.repair()
    assert synced == ["assignments.jsonl", "00000.arrow", "."]


def test_several_steps_are_assigned_with_one_sync_of_the_rows(synced: list[str], tmp_path: Path) -> None:
    log = log_of(tmp_path, *range(6))
    log.assign_all({1: (0, 2), 2: (2, 4), 3: (4, 6)})
    assert synced == ["00000.arrow", ".", "assignments.jsonl", "."]
    assert GroupLog(tmp_path).assigned == log.assigned == {1: (0, 2), 2: (2, 4), 3: (4, 6)}


def test_an_assignment_beyond_the_log_is_an_error_and_no_place_for_new_groups(tmp_path: Path) -> None:
    log = log_of(tmp_path, *range(4))
    log.assign(1, 0, 4)
    log.close()
    segment = tmp_path / "00000.arrow"
    os.truncate(segment, segment.stat().st_size - 50)  # the power failed
    for opened in (GroupLog, lambda folder: make(folder, groups_per_step=4)):
        with pytest.raises(LogError, match="step 1 was trained on the groups up to row 4, and only 3 are"):
            opened(tmp_path)
    assert LogError.status == 2 and [path.name for path in groups.segments(tmp_path)] == ["00000.arrow"]


def test_a_reader_changes_nothing_while_a_writer_is_in_the_middle_of_a_line(tmp_path: Path) -> None:
    log = log_of(tmp_path / "groups", 0, 1)
    log.assign(1, 0, 1)
    with open(tmp_path / "groups" / "assignments.jsonl", "ab") as file:
        file.write(b'{"step": 2, "beg')
    before = {path: path.read_bytes() for path in (tmp_path / "groups").iterdir()}
    assert GroupLog(tmp_path / "groups").assigned == {1: (0, 1)}
    assert {path: path.read_bytes() for path in (tmp_path / "groups").iterdir()} == before
    assert len(GroupLog(tmp_path / "nothing")) == 0 and not (tmp_path / "nothing").exists()


def test_a_reader_never_sees_an_assignment_of_rows_that_it_has_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = log_of(tmp_path, 0, 1)
    real = log_module.read_assignments

    def read(path: Path) -> dict[int, tuple[int, int]]:
        found = real(path)
        log.append(table(make_group(2)))  # the writer goes on between the reader's two looks
        log.assign(1, 0, 3)
        return found

    monkeypatch.setattr(log_module, "read_assignments", read)
    reader = GroupLog(tmp_path)
    assert reader.assigned == {} and reader.group_ids == [0, 1, 2]


def test_copies_of_segments_and_other_files_of_a_person_are_not_part_of_the_log(tmp_path: Path) -> None:
    log_of(tmp_path, 0, 1).close()
    for name in ("00000 (copy).arrow", "backup.arrow", "00000.arrow.bak", "-1.arrow", "notes.txt"):
        (tmp_path / name).write_bytes((tmp_path / "00000.arrow").read_bytes())
    log = log_of(tmp_path, 2)
    assert log.group_ids == GroupLog(tmp_path).group_ids == [0, 1, 2]
    assert groups.load(tmp_path)["group_id"].to_pylist() == [0, 1, 2]


def test_segments_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    log_of(tmp_path, 1).close()
    (tmp_path / "00000.arrow").rename(tmp_path / "100000.arrow")
    log_of(tmp_path / "other", 0).close()
    (tmp_path / "other" / "00000.arrow").rename(tmp_path / "99999.arrow")
    log = log_of(tmp_path, 2)
    assert log.group_ids == [0, 1, 2] and (tmp_path / "100001.arrow").exists()


# ------------------------------------------------------------------------------------ the log at memory speed


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each message that is read of a log."""
    real, count = pa.ipc.read_message, []
    monkeypatch.setattr(pa.ipc, "read_message", lambda source: (count.append(1), real(source))[1])
    return count


@pytest.mark.parametrize("num", [40, 160])
def test_opening_a_log_reads_the_rows_that_are_not_assigned_and_one_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num: int
) -> None:
    for begin in (0, num // 2):  # two processes
        log = log_of(tmp_path, *range(begin, begin + num // 2))
        log.assign(begin + 1, begin, begin + num // 2 - 5)
        log.assign(begin + 2, begin + num // 2 - 5, begin + num // 2 - 3)
        log.close()
    count = reads(monkeypatch)
    again = GroupLog(tmp_path)
    # Of each segment the last row of the index and the end, and the three rows behind the last assignment.
    assert again.group_ids == list(range(num)) and len(count) == 2 * (1 + 1) + 3
    assert again.rows(range(num))["group_id"].to_pylist() == list(range(num))


def test_an_index_is_made_again_where_it_is_absent_and_is_not_believed_where_it_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = log_of(tmp_path, *range(9))
    log.assign(1, 0, 8)
    log.close()
    index = tmp_path / "00000.index"
    right = index.read_bytes()
    assert len(right) == 8 * 16
    count = reads(monkeypatch)
    index.unlink()  # as an older version leaves it
    log = GroupLog(tmp_path)
    assert log.group_ids == list(range(9)) and len(count) == 10
    log.repair()
    assert index.read_bytes() == right
    wrong = [
        b"",
        right[:-1],  # torn
        right[:16] + bytes(len(right) - 16),  # pages that did not reach the disk
        bytes(len(right)),
        right + right[-16:],
        right + (10**6).to_bytes(8, "little") + bytes(8),  # a row that the segment lacks
        right[:-8] + (77).to_bytes(8, "little"),  # another group's
        os.urandom(128),
    ]
    for data in wrong:
        index.write_bytes(data)
        log = GroupLog(tmp_path)
        assert log.group_ids == list(range(9)), data
        log.repair()
        assert index.read_bytes() == right
        assert log.rows([8, 0, 7])["group_id"].to_pylist() == [8, 0, 7]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_an_index_or_a_segment_that_cannot_be_read_is_an_error_and_not_the_end_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    log = GroupLog(tmp_path)
    for group_id in range(3):
        log.append(table(make_group(group_id)))
    log.assign(1, 0, 2)
    log.close()
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.suffix == ".index":
            raise OSError(number, os.strerror(number))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        with pytest.raises(OSError, match=os.strerror(number)):
            GroupLog(tmp_path)

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(log_module, "_group_id", fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            GroupLog(tmp_path)
    assert GroupLog(tmp_path).group_ids == [0, 1, 2]


def test_a_lock_that_cannot_be_looked_at_is_not_taken_for_a_free_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an engine that runs out of descriptors would remove the weights that another one takes."""
    path = tmp_path / ".lock"
    assert not files.is_locked(path)
    with files.lock(path):
        assert files.is_locked(path)
    assert not files.is_locked(path)

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Too many open files"):
        files.is_locked(path)


@pytest.mark.parametrize("name", ["format.json", "contents.json"])
def test_a_file_of_the_run_that_cannot_be_read_is_named_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with open_run_dir(config(tmp_path), {"prompts.path": "abc"}):
        pass
    real = Path.read_text

    def read_text(path: Path, **options: Any) -> str:
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(ConfigError) as said, open_run_dir(config(tmp_path), {"prompts.path": "abc"}):
        pass
    assert str(said.value) == f"run_dir: {tmp_path / 'run' / name} cannot be read: Input/output error"


def test_a_copied_evaluation_does_not_hurt_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evaluations").mkdir()
    for name in ("aime-step-000000", "aime-step-000004", "aime-step-000004-copy", "aime-step-best"):
        groups.save(table(make_group(0)), tmp_path / "evaluations" / f"{name}.arrow")
    console = RunConsole(config(tmp_path), 0, 2)
    console.summary(tmp_path, MetricsLog(tmp_path / "metrics.jsonl", 0))
    shown = capsys.readouterr()
    assert "aime: step" in shown.out + shown.err and "copy" not in shown.out + shown.err


def test_the_summary_shows_what_a_prompt_asks_after_its_worked_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [("user", "What is 1 + 1?"), ("assistant", "2"), ("user", "What is 3 + 4?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    told = groups.with_columns(table(make_group(0)), data=[json.dumps({"messages": messages})])
    (tmp_path / "evaluations").mkdir()
    groups.save(told, tmp_path / "evaluations" / "sums-step-000000.arrow")
    RunConsole(config(tmp_path), 0, 2).summary(tmp_path, MetricsLog(tmp_path / "metrics.jsonl", 0))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "(answer" in line]
    assert line.startswith("What is 3 + 4?  (answer ")
