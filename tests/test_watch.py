"""What is read of a running program, from a /proc of our own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gvpo_ray.sandbox import watch
from gvpo_ray.sandbox.watch import Times


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(watch, "PROC", tmp_path)
    return tmp_path


def thread(proc: Path, number: int, ran_s: float, waited_s: float, sleeps: int, preempted: int) -> None:
    folder = proc / "7" / "task" / str(number)
    folder.mkdir(parents=True)
    (folder / "schedstat").write_text(f"{round(ran_s * 1e9)} {round(waited_s * 1e9)} 5\n")
    (folder / "status").write_text(
        f"Name:\tx\nvoluntary_ctxt_switches:\t{sleeps}\nnonvoluntary_ctxt_switches:\t{preempted}\n"
    )


START = Times(0.5, 1.0, 0.0)


@pytest.mark.parametrize(
    ("sleeps", "preempted", "num_answers", "waited"),
    [
        (0, 1000, 0, 8.0),  # it computes
        (20, 1000, 0, 8.0),  # and reads from a disk now and then
        (5020, 0, 0, 0.0),  # it sleeps and wakes
        (1020, 1000, 0, 4.0),  # half of its waits are after sleeps
        (1020, 1000, 1000, 8.0),  # but those are for the next question
        (0, 0, 0, 8.0),  # it has never run
    ],
)
def test_waiting_for_others_counts_and_waiting_after_a_sleep_does_not(
    proc: Path, sleeps: int, preempted: int, num_answers: int, waited: float
) -> None:
    thread(proc, 7, 2.5, 9.0, sleeps, preempted)
    assert watch.waited(7, START, 2.5, num_answers) == pytest.approx(waited)


@pytest.mark.parametrize(("cpu_s", "waited"), [(2.5, 8.0), (5.5, 5.0), (20.0, 0.0)])
def test_time_for_which_its_own_threads_ran_is_no_waiting_for_the_machine(
    proc: Path, cpu_s: float, waited: float
) -> None:
    thread(proc, 7, 2.5, 9.0, 0, 100)
    assert watch.waited(7, START, cpu_s, 0) == pytest.approx(waited)


def test_a_thread_that_computes_while_the_first_one_sleeps_may_wait_as_well(proc: Path) -> None:
    thread(proc, 7, 0.5, 1.0, 3, 0)
    thread(proc, 8, 2.0, 6.0, 0, 100)
    assert watch.waited(7, START, 2.5, 0) == pytest.approx(5.5)  # the first one's 0.5 s are its own


def test_what_the_kernel_does_not_say_is_unknown(proc: Path) -> None:
    assert watch.waited(7, START, 1.0, 0) is None
    assert watch.times(7, 1.0) is None and watch.own_wait() is None
    thread(proc, 7, 1.0, 2.0, 0, 0)
    (proc / "7" / "task" / "7" / "schedstat").unlink()
    assert watch.waited(7, START, 1.0, 0) is None


def test_the_times_at_the_start_are_told_apart(proc: Path) -> None:
    (proc / "7").mkdir()
    (proc / "7" / "schedstat").write_text("1000000000 3000000000 5")
    assert watch.times(7, 1.5) == Times(1.0, 3.0, 0.5)


@pytest.mark.parametrize(
    ("threads", "wchar", "mapped", "said"),
    [
        (64, 1000, 1000, None),
        (65, 1000, 1000, "it had more than 64 threads"),
        (1, 1001, 0, "it wrote more than 64 MiB"),
        (1, 0, 1001, "it wrote more than 64 MiB"),
    ],
)
def test_threads_and_bytes_have_limits(
    proc: Path, threads: int, wchar: int, mapped: int, said: str | None
) -> None:
    (proc / "7").mkdir()
    fields = ["S", *["0"] * 16, str(threads), *["0"] * 30]
    (proc / "7" / "stat").write_text(f"7 (a) b) {' '.join(fields)}")
    (proc / "7" / "io").write_text(f"rchar: 9999\nwchar: {wchar}\nwrite_bytes: {mapped}\n")
    assert watch.excess(7, proc / "scratch", 1000) == said


@pytest.mark.parametrize(("size", "said"), [(1000, None), (1001, "it wrote more than 64 MiB")])
def test_what_is_in_files_counts_whoever_wrote_it_and_holes_do_not(
    proc: Path, size: int, said: str | None
) -> None:
    """Files in memory, in a tmpfs, are written through a mapping without an account of it."""
    (proc / "scratch" / "a").mkdir(parents=True)
    (proc / "scratch" / "a" / "x").write_bytes(bytes(600))
    (proc / "scratch" / "y").write_bytes(bytes(size - 600))
    with (proc / "scratch" / "hole").open("wb") as file:
        file.truncate(1 << 20)
    assert watch.excess(7, proc / "scratch", 1000) == said


@pytest.mark.parametrize(("size", "said"), [(1000, None), (1001, "it wrote more than 64 MiB")])
def test_files_that_are_unlinked_count_while_they_are_open(proc: Path, size: int, said: str | None) -> None:
    (proc / "scratch").mkdir()
    (proc / "7" / "fd").mkdir(parents=True)
    with (proc / "scratch" / "x").open("wb", 0) as file:
        file.write(bytes(size))
        for number in (3, 4):  # one file, opened twice
            (proc / "7" / "fd" / str(number)).symlink_to(f"/proc/self/fd/{file.fileno()}")
        (proc / "7" / "fd" / "5").symlink_to(proc / "gone")
        assert watch.excess(7, proc / "scratch", 1000) == said  # one that has a name counts once
        (proc / "scratch" / "x").unlink()
        assert watch.excess(7, proc / "scratch", 1000) == said
    assert watch.excess(7, proc / "scratch", 1000) is None


def test_files_that_are_unlinked_and_not_its_own_do_not_count(proc: Path) -> None:
    (proc / "scratch").mkdir()
    (proc / "7" / "fd").mkdir(parents=True)
    with (proc / "shared").open("wb", 0) as shared, (proc / "own").open("wb", 0) as own:
        for number, file in enumerate((shared, own), 3):
            os.unlink(file.name)
            (proc / "7" / "fd" / str(number)).symlink_to(f"/proc/self/fd/{file.fileno()}")
        shared.write(bytes(5000))
        others = {(status.st_dev, status.st_ino) for status in [os.fstat(shared.fileno())]}
        own.write(bytes(1000))
        assert watch.excess(7, proc / "scratch", 1000, others) is None
        own.write(b"x")
        assert watch.excess(7, proc / "scratch", 1000, others) == "it wrote more than 64 MiB"
        assert watch.excess(7, proc / "scratch", 5500) == "it wrote more than 64 MiB"  # both are


def test_a_file_that_goes_while_its_folder_is_read_hides_no_other_one(tmp_path: Path) -> None:
    for number in range(1, 6):
        (tmp_path / str(number)).write_bytes(bytes(number))
    names = os.listdir(tmp_path)
    sizes = watch._files(tmp_path)
    found = [next(sizes)]
    (tmp_path / names[1]).unlink()
    assert [*found, *sizes] == [int(name) for name in (names[0], *names[2:])]


def test_files_have_a_limit_however_deep_they_lie(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_FILES", 20)
    scratch = proc / "scratch"
    (scratch / "a" / "b").mkdir(parents=True)
    for number in range(18):
        (scratch / "a" / "b" / str(number)).touch()
    assert watch.excess(7, scratch, 1000) is None
    (scratch / "one more").touch()
    assert watch.excess(7, scratch, 1000) == "it made more than 20 files"


def test_a_path_that_is_too_long_to_follow_is_beyond_every_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(17):  # 251 bytes each, of 4096 that a path may have
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    assert watch.excess(7, tmp_path, 1000) == "it made more than 1000 files"
