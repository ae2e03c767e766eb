"""What must outlive a power failure is on the disk before anybody is told that it is there."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gvpo_ray import files
from gvpo_ray.learner.checkpoints import finish_checkpoint, latest_checkpoint, prune_checkpoints


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
        (folder / name).mkdir(parents=True)
        (folder / name / "state.json").write_text("{}")
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
