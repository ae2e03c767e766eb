"""Each program runs in a process of its own and confines itself: what it gives up, it does not get back."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gvpo_ray.sandbox import confine, landlock

PREAMBLE = """
import ctypes, os, resource, signal, socket, sys, threading
from gvpo_ray.sandbox import confine, landlock
scratch, outside = sys.argv[1:3]
libc = ctypes.CDLL(None, use_errno=True)

def call(x86_64, aarch64, *arguments):
    number = {"x86_64": x86_64, "aarch64": aarch64}[os.uname().machine]
    if number is None or libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)) == -1:
        raise OSError(ctypes.get_errno() if number is not None else 1, "refused")
"""


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """(scratch, outside), with a file `there` in both."""
    for name in ("scratch", "outside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "there").write_text("as it was")
    return tmp_path / "scratch", tmp_path / "outside"


def _run(
    folders: tuple[Path, Path], program: str, pass_fds: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PREAMBLE + program, *map(str, folders)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, pass_fds=pass_fds
    )


def _try(attempts: dict[str, str]) -> str:
    """A program that prints for each attempt the name of what it raises, or "done"."""
    return "".join(
        f"try:\n    {attempt.replace(chr(10), chr(10) + '    ')}\nexcept BaseException as error:\n    "
        f"print({name!r}, type(error).__name__)\n"
        f"else:\n    print({name!r}, 'done')\n"
        for name, attempt in attempts.items()
    )


def _outcomes(folders: tuple[Path, Path], before: str, attempts: dict[str, str]) -> dict[str, str]:
    """What each attempt raises ("done": nothing) when all are made one after the other, by name."""
    ran = _run(folders, before + "\n" + _try(attempts))
    assert ran.returncode == 0, ran.stderr
    return dict(line.rsplit(" ", 1) for line in ran.stdout.splitlines())


def _state(folder: Path) -> list[tuple[str, str, int, int]]:
    """Names, contents, modes and times."""
    return sorted(
        (
            str(path),
            path.read_text() if path.is_file() else "",
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
        )
        for path in folder.rglob("*")
    )


# --- calls --------------------------------------------------------------------------------------------------

FORBIDDEN_CALLS = {
    "a TCP socket": "socket.socket()",
    "a UDP socket": "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
    "a UNIX socket": "socket.socket(socket.AF_UNIX)",
    "a netlink socket": "socket.socket(16, socket.SOCK_RAW)",
    "a pair of another family": "call(53, 199, 30, 1, 0, 0)",
    "connect": "old.connect(('127.0.0.1', 9))",
    "bind": "old.bind(('127.0.0.1', 0))",
    "listen": "old.listen()",
    "accept": "old.accept()",
    "sendto with an address": "datagram.sendto(b'x', ('127.0.0.1', 9))",
    "sendmsg": "datagram.sendmsg([b'x'], [], 0, ('127.0.0.1', 9))",
    "fork": "os.fork()",
    "vfork": "call(58, None)",
    "clone": "call(56, 220, 17, 0, 0, 0, 0)",
    "a thread in namespaces of its own": "call(56, 220, 0x10000 | 0x800 | 0x100 | 0x20000, 0, 0, 0, 0)",
    "posix_spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "subprocess": "__import__('subprocess').run(['true'])",
    "a multiprocessing child": "__import__('multiprocessing').Process(target=print).start()",
    "exec": "os.execv(sys.executable, [sys.executable, '-c', 'print(\"executed\")'])",
    "execveat": "call(322, 281, 0, 0, 0, 0, 0)",
    "kill the parent": "os.kill(os.getppid(), 0)",
    "kill the group": "os.kill(0, signal.SIGTERM)",
    "killpg": "os.killpg(os.getpgrp(), signal.SIGTERM)",
    "kill everybody": "os.kill(-1, 0)",
    "tkill": "call(200, 130, os.getppid(), 0)",
    "tgkill": "call(234, 131, os.getppid(), os.getppid(), 0)",
    "sigqueue": "call(129, 138, os.getppid(), 0, 0)",
    "tgsigqueue": "call(297, 240, os.getppid(), os.getppid(), 0, 0)",
    "pidfd_open": "os.pidfd_open(os.getppid())",
    "pidfd_send_signal": "signal.pidfd_send_signal(0, 0)",
    "pidfd_getfd": "call(438, 438, 0, 0, 0)",
    "a signal that the kernel sends (F_SETOWN)": "__import__('fcntl').fcntl(channel, 8, os.getppid())",
    "a signal that the kernel sends (F_SETSIG)": "__import__('fcntl').fcntl(channel, 10, 9)",
    "a signal that the kernel sends "
    "(FIOSETOWN)": "__import__('fcntl').ioctl(channel, 0x8901, os.getppid().to_bytes(4, 'little'))",
    "keys into a terminal": "__import__('fcntl').ioctl(0, 0x5412, b'x')",
    "a lease": "__import__('fcntl').fcntl(os.open(outside + '/there', os.O_RDONLY), 1024, 0)",
    "ptrace": "call(101, 117, 16, os.getppid(), 0, 0)",
    "process_vm_readv": "call(310, 270, os.getppid(), 0, 0, 0, 0, 0)",
    "process_vm_writev": "call(311, 271, os.getppid(), 0, 0, 0, 0, 0)",
    "setsid": "os.setsid()",
    "setpgid": "os.setpgid(0, 0)",
    "outliving the parent": "call(157, 167, 1, 0, 0, 0, 0)",
    "others' limits": "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)",
    "others' CPUs": "os.sched_setaffinity(os.getppid(), {0})",
    "others' priority": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 0)",
    "a real-time scheduler": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "a file in memory": "os.memfd_create('x')",
    "shared memory (SysV)": "call(29, 194, 0, 4096, 0o1600)",
    "semaphores (SysV)": "call(64, 190, 0, 1, 0o1600)",
    "messages (SysV)": "call(68, 186, 0, 0o1600)",
    "messages (POSIX)": "call(240, 180, 0, 0, 0, 0)",
    "io_uring": "call(425, 425, 1, 0)",
    "bpf": "call(321, 280, 0, 0, 0)",
    "userfaultfd": "call(323, 282, 0)",
    "perf_event_open": "call(298, 241, 0, 0, 0, 0, 0)",
    "keys (add_key)": "call(248, 217, 0, 0, 0, 0, 0)",
    "keys (request_key)": "call(249, 218, 0, 0, 0, 0)",
    "keys (keyctl)": "call(250, 219, 0, 0, 0, 0, 0)",
    "mount": "call(165, 40, 0, 0, 0, 0, 0)",
    "umount": "call(166, 39, 0, 0)",
    "fsopen": "call(430, 430, 0, 0)",
    "chroot": "os.chroot('/')",
    "pivot_root": "call(155, 41, 0, 0)",
    "unshare": "call(272, 97, 0x10000000)",
    "setns": "call(308, 268, 0, 0)",
    "setuid": "os.setuid(os.getuid())",
    "setgid": "os.setgid(os.getgid())",
    "setresuid": "os.setresuid(-1, -1, -1)",
    "setgroups": "os.setgroups([])",
    "capset": "call(126, 91, 0, 0)",
    "a module": "call(175, 105, 0, 0, 0)",
    "finit_module": "call(313, 273, 0, 0, 0)",
    "reboot": "call(169, 142, 0, 0, 0, 0)",
    "kexec_load": "call(246, 104, 0, 0, 0, 0)",
    "personality": "call(135, 92, 0xFFFFFFFF)",
    "the clock": "__import__('time').clock_settime(0, 0)",
    "the host's name": "socket.sethostname('x')",
    "another mode": "os.chmod(outside + '/there', 0o777)",
    "another mode by descriptor": "os.fchmod(there, 0o777)",
    "another owner": "os.chown(outside + '/there', -1, -1)",
    "another time": "os.utime(outside + '/there', (0, 0))",
    "another attribute": "os.setxattr(outside + '/there', 'user.x', b'x')",
    "one attribute less": "os.removexattr(outside + '/there', 'user.x')",
    "another size": "os.truncate(outside + '/there', 0)",
    "another size by opening to read": "os.open(outside + '/there', os.O_RDONLY | os.O_TRUNC)",
    "space beyond the limits": "os.posix_fallocate(there, 0, 1)",
}
BEFORE_CALLS = """
old, datagram = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
channel, peer = socket.socketpair()
there = os.open(outside + '/there', os.O_RDONLY)
import fcntl, multiprocessing, subprocess, time
"""


@pytest.fixture(scope="module", params=[False, True], ids=["calls", "calls and files"])
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Of every attempt in FORBIDDEN_CALLS, all made by one process; it alone stays, and what is outside stays
    as it was.
    """
    folders = tmp_path_factory.mktemp("scratch"), tmp_path_factory.mktemp("outside")
    (folders[1] / "there").write_text("as it was")
    before = _state(folders[1])
    yield _outcomes(
        folders, f"{BEFORE_CALLS}\nconfine.restrict_calls(files={request.param})", FORBIDDEN_CALLS
    )
    assert _state(folders[1]) == before


@pytest.mark.parametrize("name", FORBIDDEN_CALLS)
def test_a_forbidden_call_is_a_permission_error(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "PermissionError"


def test_no_attempt_is_refused_without_the_restriction_for_lack_of_rights_alone(
    folders: tuple[Path, Path],
) -> None:
    """What any process may do, tried in the same words: the table above would not notice an attempt that can
    never work.
    """
    harmless = [
        "a TCP socket",
        "a UDP socket",
        "a UNIX socket",
        "a netlink socket",
        "listen",
        "subprocess",
        "posix_spawn",
        "kill the parent",
        "tkill",
        "tgkill",
        "pidfd_open",
        "a signal that the kernel sends (F_SETSIG)",
        "setpgid",
        "outliving the parent",
        "others' limits",
        "a file in memory",
        "personality",
        "setuid",
        "setgid",
        "setresuid",
        "another mode",
        "another mode by descriptor",
        "another owner",
        "another time",
        "another size",
        "another size by opening to read",
    ]
    assert _outcomes(
        folders, BEFORE_CALLS, {name: FORBIDDEN_CALLS[name] for name in harmless}
    ) == dict.fromkeys(harmless, "done")


ALLOWED = {
    "signals to itself": "signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))\nos.kill(os.getpid(), "
    "signal.SIGUSR1)\nassert seen",
    "raise": "seen.clear(); signal.raise_signal(signal.SIGUSR1); assert seen",
    "alarms": "signal.setitimer(signal.ITIMER_REAL, 1000)",
    "threads": "threads = [threading.Thread(target=seen.append, args=[2]) for _ in range(20)]\n"
    "[thread.start() for thread in threads]; [thread.join() for thread in threads]; assert seen.count(2) "
    "== 20",
    "reading files": "assert open(outside + '/there').read() == 'as it was'",
    "listing folders": "assert os.listdir(outside) == ['there']",
    "its own limits and CPUs, to look at": "resource.getrlimit(resource.RLIMIT_AS); os.sched_getaffinity(0); "
    "os.sched_setaffinity(0, cpus)",
    "pipes": "read, write = os.pipe(); os.write(write, b'x'); assert os.read(read, 1) == b'x'",
    "pairs of sockets": "a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1) == b'x'",
    "asyncio": "import asyncio\nasync def wait():\n    await asyncio.sleep(0)\n    return await "
    "asyncio.to_thread(int, '3')\n"
    "assert asyncio.run(wait()) == 3",
    "time": "import time; time.sleep(0.001); assert time.time() > time.process_time() > 0",
    "random": "import random, secrets; secrets.token_bytes(8); random.random()",
    "big memory": "assert len(bytearray(2**26)) == 2**26",
    "numpy": "assert (numpy.ones((300, 300)) @ numpy.ones((300, 300)))[0, 0] == 300",
    "sympy": "assert str(sympy.factor('x**2 - 1')) == '(x - 1)*(x + 1)'",
    "imports": "import decimal, fractions, sqlite3, xml.dom.minidom",
    "the channel": "assert inherited.recv(9) == b'ping'; inherited.sendall(b'pong')\n"
    "os.write(inherited.fileno(), b'PONG'); assert os.read(inherited.fileno(), 9) == b'PING'",
}


@pytest.mark.parametrize("files", [False, True])
def test_what_a_check_needs_goes_on_working(folders: tuple[Path, Path], files: bool) -> None:
    ours, theirs = socket.socketpair()
    answers: list[bytes] = []

    def peer() -> None:
        ours.sendall(b"ping")
        while sum(map(len, answers)) < 8:
            answers.append(ours.recv(8))
        ours.sendall(b"PING")

    thread = threading.Thread(target=peer, daemon=True)
    thread.start()
    before = (
        f"import numpy, sympy\nseen = []\ninherited = socket.socket(fileno={theirs.fileno()})\ncpus = "
        "os.sched_getaffinity(0)\n"
        f"landlock.restrict_files(scratch, ['/']); confine.restrict_calls(files={files})\n"
    )
    with ours, theirs:
        ran = _run(folders, before + _try(ALLOWED), pass_fds=(theirs.fileno(),))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert dict(line.rsplit(" ", 1) for line in ran.stdout.splitlines()) == dict.fromkeys(ALLOWED, "done")
    assert b"".join(answers) == b"pongPONG"


def test_threads_that_run_already_are_confined_too(folders: tuple[Path, Path]) -> None:
    program = """
go, came = threading.Event(), []
def run():
    go.wait()
    for attempt in (os.fork, socket.socket):
        try:
            attempt()
        except PermissionError:
            came.append("refused")
threads = [threading.Thread(target=run) for _ in range(3)]
[thread.start() for thread in threads]
confine.restrict_calls(files=False)
go.set()
[thread.join() for thread in threads]
print(came.count("refused"))
"""
    ran = _run(folders, program)
    assert (ran.stdout, ran.stderr) == ("6\n", "")


def test_a_thread_that_cannot_follow_is_an_error(folders: tuple[Path, Path]) -> None:
    program = """
ready, stop = threading.Event(), threading.Event()
def run():
    confine._install([confine._return(confine._ALLOW)], all_threads=False)
    ready.set(); stop.wait()
thread = threading.Thread(target=run)
thread.start(); ready.wait()
try:
    confine.restrict_calls(files=False)
except OSError as error:
    print(str(error).replace(str(thread.native_id), "N"))
stop.set()
"""
    ran = _run(folders, program)
    assert (ran.stdout, ran.stderr) == ("[Errno 16] seccomp: thread N has a filter of its own\n", "")


def test_a_fork_bomb_stays_one_process(folders: tuple[Path, Path]) -> None:
    program = """
confine.restrict_calls(files=False)
refused = 0
for _ in range(200):
    spawn = lambda: os.posix_spawn("/bin/true", ["true"], {})
    execute = lambda: os.execv("/bin/true", ["true"])
    for attempt in (os.fork, spawn, execute):
        try:
            attempt()
        except PermissionError:
            refused += 1
children = open("/proc/self/task/%d/children" % os.getpid()).read().split()
print(refused, len(os.listdir("/proc/self/task")), children)
print(os.system("true") != 0)
"""
    assert _run(folders, program).stdout == "600 1 []\nTrue\n"


# mov eax, 20; int 0x80; ret
X32, I386 = f"call({0x40000000 | 39}, {0x40000000 | 39})", "run(bytes.fromhex('b814000000cd80c3'))"


@pytest.mark.parametrize("attempt", [X32, I386])
def test_a_call_by_the_numbers_of_another_architecture_kills_or_does_not_exist(
    folders: tuple[Path, Path], attempt: str
) -> None:
    program = f"""
import mmap
def run(code):
    if os.uname().machine != "x86_64":
        raise OSError(38, "refused")
    page = mmap.mmap(-1, len(code), prot=7)
    page.write(code)
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
confine.restrict_calls(files=False)
print("still", flush=True)
try:
    {attempt}
except OSError as error:
    print(error.errno)
"""
    ran = _run(folders, program)
    if os.uname().machine == "x86_64":
        # the latter from kernels without i386
        assert ran.stdout == "still\n" and -ran.returncode in (signal.SIGSYS, signal.SIGSEGV)
    else:
        assert ran.stdout == f"still\n{errno.ENOSYS}\n"


def test_a_call_newer_than_the_tables_does_not_exist(folders: tuple[Path, Path]) -> None:
    program = """
confine.restrict_calls(files=False)
for number in (435, 437, 463, 500, 5000):  # clone3, openat2, setxattrat, ...
    try:
        call(number, number, 0, 0, 0, 0, 0)
    except OSError as error:
        print(error.errno)
"""
    assert _run(folders, program).stdout.split() == [str(errno.ENOSYS)] * 5


# --- the filter as a program: also for the architecture that this machine is not ----------------------------


def test_a_guest_may_send_itself_all_signals_but_those_that_nothing_can_catch() -> None:
    for name, numbers, before in (
        ("kill", (62, 129), (ME,)),
        ("tkill", (200, 130), (ME,)),
        ("tgkill", (234, 131), (ME, ME)),
        ("rt_sigqueueinfo", (129, 138), (ME,)),
        ("rt_tgsigqueueinfo", (297, 240), (ME, ME)),
    ):
        for machine, number in zip(MACHINES, numbers, strict=True):
            found = {
                signal: _verdict(machine, number, *before, signal, is_judged=True) for signal in range(65)
            }
            assert [key for key, verdict in found.items() if verdict != "allow"] == [9, 19], name


@pytest.mark.parametrize(
    ("numbers", "arguments", "others", "guests"),
    [
        ((203, 122), (0, 8, 99), "allow", "EPERM"),  # sched_setaffinity
        ((203, 122), (4242, 8, 99), "allow", "EPERM"),
        ((24, 124), (), "allow", "done"),  # sched_yield
        ((204, 123), (0, 8, 99), "allow", "allow"),  # sched_getaffinity
        ((140, 141), (0, 0), "EPERM", "EPERM"),  # getpriority; setpriority and sched_setscheduler:
        ((141, 140), (0, 0, 19), "EPERM", "EPERM"),
        ((144, 119), (0, 5, 99), "EPERM", "EPERM"),
    ],
)
def test_a_guest_cannot_make_itself_wait_for_a_processor(
    numbers: tuple[int, int], arguments: tuple[int, ...], others: str, guests: str
) -> None:
    for machine, number in zip(MACHINES, numbers, strict=True):
        assert _verdict(machine, number, *arguments) == others
        assert _verdict(machine, number, *arguments, is_judged=True) == guests


MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
ME = 4242
BIG = 1 << 32


def _verdict(
    machine: str,
    number: int,
    *arguments: int,
    files: bool = False,
    is_judged: bool = False,
    architecture: int | None = None,
) -> str:
    """Run the filter as the kernel does (net/core/filter.c) on one call."""
    words = [number, MACHINES[machine][1] if architecture is None else architecture, 0, 0]
    for argument in (*arguments, *[0] * (6 - len(arguments))):
        words += [argument & 0xFFFFFFFF, argument >> 32]
    program, at, accumulator = confine._filter(machine, ME, files, is_judged), 0, 0
    while True:
        code, if_true, if_false, operand = program[at]
        at += 1
        match code:
            case 0x20:
                accumulator = words[operand // 4]
            case 0x54:
                accumulator &= operand
            case 0x15:
                at += if_true if accumulator == operand else if_false
            case 0x25:
                at += if_true if accumulator > operand else if_false
            case 0x06:
                named = {0x50000: "done", 0x50001: "EPERM", 0x50026: "ENOSYS"}
                return {0x7FFF0000: "allow", 0x80000000: "kill", **named}[operand]
            case _:
                raise AssertionError(f"instruction {code:#x}")


# (x86-64, aarch64), arguments, verdict with and without `files`
DECISIONS = [
    ("read", (0, 63), (), "allow", "allow"),
    ("exit_group", (231, 94), (), "allow", "allow"),
    ("socket", (41, 198), (2, 1), "EPERM", "EPERM"),
    ("execve", (59, 221), (), "EPERM", "EPERM"),
    ("sendto no address", (44, 206), (3, 99, 1, 0, 0, 0), "allow", "allow"),
    ("sendto an address", (44, 206), (3, 99, 1, 0, 5, 16), "EPERM", "EPERM"),
    ("sendto an address high up", (44, 206), (3, 99, 1, 0, 5 * BIG, 16), "EPERM", "EPERM"),
    ("kill itself", (62, 129), (ME, 9), "allow", "allow"),
    ("kill itself, with bits that the kernel drops", (62, 129), (ME + 7 * BIG, 9), "allow", "allow"),
    ("kill 0", (62, 129), (0, 9), "EPERM", "EPERM"),
    ("kill its group", (62, 129), (BIG - ME, 9), "EPERM", "EPERM"),
    ("kill another, hidden above", (62, 129), (ME * BIG + 1, 9), "EPERM", "EPERM"),
    ("a thread", (56, 220), (0x3D0F00,), "allow", "allow"),
    ("a process", (56, 220), (17,), "EPERM", "EPERM"),
    ("a process by vfork's flags", (56, 220), (0x4100 | 17,), "EPERM", "EPERM"),
    ("a thread in a new user namespace", (56, 220), (0x3D0F00 | 0x10000000,), "EPERM", "EPERM"),
    ("own limits to look at", (302, 261), (0, 7, 0, 99), "allow", "allow"),
    ("own limits to look at, by number", (302, 261), (ME, 7, 0, 99), "allow", "allow"),
    ("own limits to change", (302, 261), (0, 7, 99, 0), "EPERM", "EPERM"),
    ("own limits to change, high up", (302, 261), (0, 7, 99 * BIG, 0), "EPERM", "EPERM"),
    ("another's limits", (302, 261), (1, 7, 0, 99), "EPERM", "EPERM"),
    ("isatty", (16, 29), (1, 0x5401), "allow", "allow"),
    ("TIOCSTI", (16, 29), (1, 0x5412), "EPERM", "EPERM"),
    ("TIOCSTI, with bits that the kernel drops", (16, 29), (1, 0x5412 + BIG), "EPERM", "EPERM"),
    ("F_SETFL", (72, 25), (3, 4, 0x800), "allow", "allow"),
    ("F_SETOWN", (72, 25), (3, 8, 1), "EPERM", "EPERM"),
    ("open to read", (257, 56), (BIG - 100, 99, 0o2000000), "allow", "allow"),
    ("open to write", (257, 56), (BIG - 100, 99, 1), "EPERM", "allow"),
    ("open to read and write", (257, 56), (BIG - 100, 99, 2), "EPERM", "allow"),
    ("open to create", (257, 56), (BIG - 100, 99, 0o100), "EPERM", "allow"),
    ("open a file without a name", (257, 56), (BIG - 100, 99, 0o20000000), "EPERM", "allow"),
    ("open to write from the start", (257, 56), (BIG - 100, 99, 0o1101), "EPERM", "allow"),
    ("open to read, and truncate", (257, 56), (BIG - 100, 99, 0o1000), "EPERM", "EPERM"),
    ("unlinkat", (263, 35), (BIG - 100, 99), "EPERM", "allow"),
    ("fchmodat", (268, 53), (BIG - 100, 99), "EPERM", "EPERM"),
    ("clone3", (435, 435), (99, 64), "ENOSYS", "ENOSYS"),
    ("openat2", (437, 437), (99, 64), "ENOSYS", "ENOSYS"),
    ("ftruncate", (77, 46), (3, 0), "EPERM", "allow"),
    ("wait4", (61, 260), (), "EPERM", "EPERM"),
    ("mseal", (462, 462), (), "EPERM", "EPERM"),
    ("PR_SET_NAME", (157, 167), (15, 99), "allow", "allow"),
    ("PR_SET_DUMPABLE", (157, 167), (4, 1), "EPERM", "EPERM"),
    ("F_SETLEASE", (72, 25), (3, 1024, 0), "EPERM", "EPERM"),
    ("setxattrat", (463, 463), (), "ENOSYS", "ENOSYS"),
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("numbers", "arguments", "with_files", "without"),
    [row[1:] for row in DECISIONS],
    ids=[row[0] for row in DECISIONS],
)
def test_the_filter_decides_by_call_and_arguments(
    machine: str, numbers: tuple[int, int], arguments: tuple[int, ...], with_files: str, without: str
) -> None:
    number = numbers[MACHINES[machine][0]]
    assert _verdict(machine, number, *arguments, files=True) == with_files
    assert _verdict(machine, number, *arguments, files=False) == without


@pytest.mark.parametrize(
    ("machine", "number", "architecture"),
    [
        ("x86_64", 39, 0x40000003),  # i386
        ("x86_64", 0x40000000 | 39, None),  # x32
        ("x86_64", 0x40000000 | 59, None),
        ("x86_64", 0xFFFFFFFF, None),
        ("aarch64", 172, 0x40000028),  # 32-bit ARM
        ("aarch64", 172, 0xC000003E),
    ],
)
def test_the_filter_kills_foreign_calls(machine: str, number: int, architecture: int | None) -> None:
    assert _verdict(machine, number, architecture=architecture) == "kill"


def test_the_filter_allows_what_its_tables_name_and_refuses_every_other_call() -> None:
    for machine, (column, _) in MACHINES.items():
        for files in (False, True):
            tables = {**confine._ALLOWED, **({} if files else confine._FILES)}
            allowed = {number for entry in tables.values() if (number := entry[column]) is not None}
            by_arguments = {entry[column] for entry in confine._BY_ARGUMENTS.values()}
            for number in set(range(600)) - by_arguments:
                expected = "ENOSYS" if number in (435, 437) or number > 462 else "EPERM"
                verdict = _verdict(machine, number, 99, 99, 99, 99, 99, 99, files=files)
                assert verdict == ("allow" if number in allowed else expected), number
        everything = {**confine._ALLOWED, **confine._FILES, **confine._ABSENT, **confine._BY_ARGUMENTS}
        numbers = [number for entry in everything.values() if (number := entry[column]) is not None]
        assert len(set(numbers)) == len(numbers)
        program = confine._filter(machine, ME, False)
        assert len(program) <= 4096 and max(max(i.if_true, i.if_false) for i in program) < 256


HEADERS = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")


@pytest.mark.parametrize(
    ("column", "header"), [each for each in enumerate(HEADERS) if Path(each[1]).exists()]
)
def test_the_numbers_of_the_tables_are_those_of_the_kernels_headers(column: int, header: str) -> None:
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
    found = {{"fstatat": "newfstatat"}.get(name, name): int(number) for name, number in found.items()}
    tables = {**confine._ALLOWED, **confine._FILES, **confine._ABSENT, **confine._BY_ARGUMENTS}
    newer = ("map_shadow_stack", "futex_wake", "futex_wait", "futex_requeue")  # than the headers of some
    assert {name: entry[column] for name, entry in tables.items() if name in found or name not in newer} == {
        name: found.get(name) for name in tables if name in found or name not in newer
    }


def test_another_machine_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(OSError, match="no seccomp filter for linux on riscv64"):
        confine.restrict_calls(files=False)


# --- files --------------------------------------------------------------------------------------------------

WRITES = {
    "create": "open(at + '/new', 'x')",
    "write": "open(at + '/there', 'w')",
    "append": "open(at + '/there', 'a')",
    "write and read": "open(at + '/there', 'r+')",
    "a file without a name": "os.open(at, os.O_TMPFILE | os.O_RDWR)",
    "folder": "os.mkdir(at + '/folder')",
    "remove a folder": "os.rmdir(at + '/folder')",
    "symbolic link": "os.symlink('there', at + '/symbolic')",
    "link": "os.link(at + '/there', at + '/link')",
    "rename": "os.rename(at + '/there', at + '/elsewhere')",
    "rename back": "os.rename(at + '/elsewhere', at + '/there')",
    "replace": "os.replace(at + '/new', at + '/there')",
    "pipe": "os.mkfifo(at + '/pipe')",
    "delete": "os.unlink(at + '/there')",
}
CONFINED = {
    "Landlock": "assert landlock.restrict_files(scratch, ['/'])",
    "Landlock and seccomp": "assert landlock.restrict_files(scratch, ['/'])\n"
    "confine.restrict_calls(files=False)",
    "seccomp": "confine.restrict_calls(files=True)",
}
"""Landlock is there on every kernel since 5.13 that was built with it; where it is not, the first two of
these fail and say so."""


@pytest.mark.parametrize("how", CONFINED)
def test_nothing_is_written_outside(folders: tuple[Path, Path], how: str) -> None:
    before = _state(folders[1])
    assert _outcomes(folders, f"at = outside\n{CONFINED[how]}", WRITES) == {
        **dict.fromkeys(WRITES, "PermissionError"),
        # There is nothing of the name: Landlock is asked only about what exists.
        **(
            {}
            if how == "seccomp"
            else {name: "FileNotFoundError" for name in ("remove a folder", "rename back", "replace")}
        ),
    }
    assert _state(folders[1]) == before


def test_without_confinement_all_of_it_is_possible(folders: tuple[Path, Path]) -> None:
    assert _outcomes(folders, "at = outside", WRITES) == dict.fromkeys(WRITES, "done")


@pytest.mark.parametrize("how", ["Landlock", "Landlock and seccomp"])
def test_the_scratch_folder_is_for_writing(folders: tuple[Path, Path], how: str) -> None:
    more = {
        "between folders": "os.mkdir(at + '/a'); os.rename(at + '/link', at + '/a/link')",
        "a temporary file": "import tempfile; tempfile.tempdir = at; "
        "tempfile.NamedTemporaryFile().write(b'x')",
        "to nowhere": "open('/dev/null', 'w').write('x')",
        "truncate": "file = open(at + '/file', 'w'); file.write('abc'); file.flush(); file.truncate(1)",
    }
    assert _outcomes(folders, f"at = scratch\n{CONFINED[how]}", WRITES | more) == dict.fromkeys(
        WRITES | more, "done"
    )
    assert (folders[0] / "file").read_text() == "a"


def test_there_is_no_way_round_the_scratch_folder(folders: tuple[Path, Path]) -> None:
    ways = {
        "a symbolic link": "os.symlink(outside, scratch + '/way'); open(scratch + '/way/there', 'w')",
        "a link to what is outside": "os.link(outside + '/there', scratch + '/link')",
        "moving it in": "os.rename(outside + '/there', scratch + '/in')",
        "moving it out": "os.rename(scratch + '/there', outside + '/out')",
        "two dots": "open(scratch + '/../outside/there', 'w')",
        "a folder that is open": "os.open('there', os.O_WRONLY, dir_fd=folder)",
        "a file that is open to read": "open(f'/proc/self/fd/{file}', 'w')",
        "another process's memory": "open(f'/proc/{os.getppid()}/mem', 'r+b')",
        "being chosen when memory is short": "open('/proc/self/oom_score_adj', 'w').write('0')",
        "shared memory": "open('/dev/shm/of-a-test', 'x')",
        "a device of its own": "os.mknod(scratch + '/disk', 0o60600, os.makedev(7, 0))",
        "the scratch folder itself": "os.rename(scratch, outside + '/scratch')",
        "once more, more widely": "landlock.restrict_files(outside, ['/']); open(outside + '/there', 'w')",
    }
    before = _state(folders[1])
    before_ways = (
        "folder, file = os.open(outside, os.O_RDONLY), os.open(outside + '/there', os.O_RDONLY)\n"
        + CONFINED["Landlock and seccomp"]
    )
    outcomes = _outcomes(folders, before_ways, ways)
    # Landlock says of a link or a move out of reach that it would be to another device (EXDEV).
    assert set(outcomes) == set(ways) and set(outcomes.values()) <= {"PermissionError", "OSError"}
    assert _state(folders[1]) == before and not Path("/dev/shm/of-a-test").exists()


def test_what_it_starts_is_confined_as_well(folders: tuple[Path, Path]) -> None:
    program = (
        CONFINED["Landlock"]
        + "\nprint(os.system(f'echo changed > {scratch}/there'), os.system(f'echo changed > "
        "{outside}/there') != 0)"
    )
    assert _run(folders, program).stdout == "0 True\n"
    assert [(folder / "there").read_text() for folder in folders] == ["changed\n", "as it was"]


def test_a_scratch_folder_that_is_not_there_is_an_error(folders: tuple[Path, Path]) -> None:
    assert _outcomes(folders, "", {"it": "landlock.restrict_files(scratch + '/no', [])"}) == {
        "it": "FileNotFoundError"
    }


def test_a_kernel_without_landlock_is_told_by_false_and_nothing_is_restricted(
    folders: tuple[Path, Path],
) -> None:
    # The kernel's answer comes from a filter: the program that answers the first of Landlock's calls with
    # ENOSYS.
    program = """
confine._install([
    confine._load(0), confine._skip_unless_equal(444, 1),
    confine._return(confine._ENOSYS), confine._return(confine._ALLOW)])
print(landlock.restrict_files(scratch, ["/"]))
open(outside + "/there", "w").close()
confine.restrict_calls(files=True)
""" + _try({"then": "open(outside + '/there', 'w')"})
    ran = _run(folders, program)
    assert (ran.stdout, ran.stderr) == ("False\nthen PermissionError\n", "")


def test_an_old_landlock_is_asked_only_for_what_it_knows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    handled = {}
    for version in (1, 2, 3, 4, 5, 6, 7):
        rights: list[int] = []

        def call(number: int, *arguments: object, version: int = version, rights: list[int] = rights) -> int:
            if number == 444 and arguments[0] is None:
                return version
            if number == 444:
                rights.append(int.from_bytes(arguments[0], sys.byteorder))  # type: ignore[arg-type]
                return os.open(os.devnull, os.O_RDONLY)
            if number == 445:
                rights.append(int.from_bytes(arguments[2][:8], sys.byteorder))  # type: ignore[index]
            return 0

        monkeypatch.setattr(landlock, "syscall", call)
        monkeypatch.setattr(landlock, "give_up_privileges", lambda: None)
        assert landlock.restrict_files(str(tmp_path), ["/usr"])
        ruleset, *rules = rights
        assert not any(rule & ~ruleset for rule in rules)  # else the kernel answers EINVAL
        handled[version] = ruleset
    # LANDLOCK_ACCESS_FS_*: 1 write, 2 and 3 read, 4 and 5 remove, 6 to 12 make; then 13 refer, 14 truncate,
    # 15 ioctl
    first = 0b111 << 1 | 0b11 << 4 | 0b1111111 << 6
    second, third, fifth = first | 1 << 13, first | 0b11 << 13, first | 0b111 << 13
    assert handled == {1: first, 2: second, 3: third, 4: third, 5: fifth, 6: fifth, 7: fifth}


READS = {
    "a file": "open(outside + '/there').read()",
    "a folder": "os.listdir(outside)",
    "by a link": "os.symlink(outside + '/there', scratch + '/link'); open(scratch + '/link').read()",
    "by two dots": "open(scratch + '/../outside/there').read()",
    "the parent's environment": "open(f'/proc/{os.getppid()}/environ').read()",
    "the parent's memory": "open(f'/proc/{os.getppid()}/maps').read()",
    "the parent's files": "os.listdir(f'/proc/{os.getppid()}/fd')",
    "the parent's folder": "os.readlink(f'/proc/{os.getppid()}/cwd')",
    "another's environment": "open('/proc/1/environ').read()",
    "the kernel's log": "os.open('/dev/kmsg', os.O_RDONLY | os.O_NONBLOCK)",
    "passwords": "open('/etc/shadow').read()",
    "shared memory": "os.listdir('/dev/shm')",
    "the home": "os.listdir(os.path.expanduser('~'))",
    "what others run": "os.listdir('/proc')",
    "the system's folders": "os.listdir('/usr')",
    "programs": "open('/usr/bin/env', 'rb').read(1)",
    "what people install": "os.listdir('/usr/local')",
    "what is shared": "os.listdir('/usr/share')",
}
CONFINED_TO_PYTHON = "confine.drop_capabilities()\nassert landlock.restrict_files(scratch, *files)\n"


def test_only_what_python_needs_and_the_scratch_folder_is_read(folders: tuple[Path, Path]) -> None:
    before = f"files = landlock.files_of_python()\n{CONFINED_TO_PYTHON}confine.restrict_calls(files=False)\n"
    assert _outcomes(folders, before, READS) == dict.fromkeys(READS, "PermissionError")
    needed = {
        "the scratch folder": "assert open(scratch + '/there').read() == 'as it was'; os.listdir(scratch)",
        "itself": "open('/proc/self/status').read(); open('/proc/self/environ').read()",
        "a module of the library": "import wave, sqlite3, email.mime.text, zoneinfo",
        "a module of a package": "import pyarrow.csv",
        "a module of ours": "import gvpo_ray.data.tasks",
        "the source of a module": "import inspect, json; assert inspect.getsource(json.dumps)",
        "chance": "open('/dev/urandom', 'rb').read(1); __import__('secrets').token_bytes(3)",
        "local time": "__import__('time').localtime(0)",
        "time zones": "__import__('zoneinfo').ZoneInfo('Europe/Berlin')",
        "types of files": "assert __import__('mimetypes').guess_type('a.png')[0] == 'image/png'",
        "a shared library": "ctypes.CDLL('libz.so.1')",
        "the number of CPUs": "assert os.cpu_count()",
    }
    assert _outcomes(folders, before, needed) == dict.fromkeys(needed, "done")


def test_of_the_users_folders_the_modules_are_read_and_not_the_data(folders: tuple[Path, Path]) -> None:
    (folders[1] / "helper_of_mine.py").write_text("import package_of_mine.inner\n")
    (folders[1] / "package_of_mine").mkdir()
    for name in ("__init__.py", "inner.py", "answers.jsonl"):
        (folders[1] / "package_of_mine" / name).write_text("")
    before = f"sys.path.append(outside); files = landlock.files_of_python()\n{CONFINED_TO_PYTHON}"
    attempts = {
        "the module": "import helper_of_mine",
        "data beside it": "open(outside + '/there')",
        "data in the package": "open(outside + '/package_of_mine/answers.jsonl')",
    }
    assert _outcomes(folders, before, attempts) == {
        "the module": "done",
        "data beside it": "PermissionError",
        "data in the package": "PermissionError",
    }


def test_the_linkers_folders_are_those_of_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "cuda.conf").write_text("# libraries\n/opt/cuda/lib64\n\nrelative\n/opt/more \n")
    (tmp_path / "other").write_text("/opt/other\n")
    assert list(landlock._folders_of_the_linker(str(tmp_path))) == ["/opt/cuda/lib64", "/opt/more"]


def test_what_is_read_above_can_be_read_without_the_restriction(folders: tuple[Path, Path]) -> None:
    readable = [
        "a file",
        "a folder",
        "by a link",
        "by two dots",
        "the parent's environment",
        "what others run",
        "the system's folders",
        "programs",
        "what people install",
        "what is shared",
    ]
    assert _outcomes(folders, "", {name: READS[name] for name in readable}) == dict.fromkeys(readable, "done")


def test_all_capabilities_are_gone_and_do_not_come_back(folders: tuple[Path, Path]) -> None:
    program = """
confine.drop_capabilities()
sets = ("CapInh", "CapPrm", "CapEff", "CapAmb")
print([line.split()[1] for line in open("/proc/self/status") if line.startswith(sets)])
print(libc.capset(__import__("struct").pack("Ii", 0x20080522, 0), b"\\xff" * 24))
"""
    none = "0" * 16
    assert _run(folders, program).stdout == f"{[none] * 4}\n-1\n"


def test_a_kernel_that_offers_less_says_what_is_not_protected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert confine.unprotected() == []
    monkeypatch.setattr(confine, "landlock_version", lambda: -1)
    (sentence,) = confine.unprotected()
    assert "no Landlock" in sentence and "read every file" in sentence
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert "can use the network" in confine.unprotected()[1]


# --- limits -------------------------------------------------------------------------------------------------


def test_limits_hold_and_cannot_be_raised(folders: tuple[Path, Path]) -> None:
    before = f"""
import mmap
confine.limit_resources(memory_bytes=2**30, file_bytes=2**20, num_files=20)
{CONFINED["Landlock and seccomp"]}
kinds = [resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE]
print([resource.getrlimit(kind) for kind in kinds] == [(2**30,) * 2, (2**20,) * 2, (20,) * 2, (0, 0)], "True")
"""
    attempts = {
        "memory": "bytearray(2**30)",
        "memory by mmap": "mmap.mmap(-1, 2**30)",
        "a large file": "file = open(scratch + '/large', 'wb', 0); file.write(bytes(2**20)); "
        "file.write(b'x')",
        "a file with a hole": "open(scratch + '/hole', 'wb').truncate(2**20 + 1)",
        "many files": "files = [open('/dev/null') for _ in range(20)]",
        "raise the soft limit": "files = []; resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))",
        "raise the hard limit": "resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, "
        "resource.RLIM_INFINITY))",
        "by prlimit": "resource.prlimit(0, resource.RLIMIT_AS, (2**40, 2**40))",
        "by prlimit with its number": "resource.prlimit(os.getpid(), resource.RLIMIT_CPU, (2**40, 2**40))",
        "what fits": "bytearray(2**28); open(scratch + '/small', 'wb').write(bytes(2**20))",
    }
    assert _outcomes(folders, before, attempts) == {
        "True": "True",
        "memory": "MemoryError",
        "memory by mmap": "OSError",
        "a large file": "OSError",
        "a file with a hole": "OSError",
        "many files": "OSError",
        "raise the soft limit": "ValueError",  # what Python makes of EPERM here
        "raise the hard limit": "ValueError",
        "by prlimit": "PermissionError",
        "by prlimit with its number": "PermissionError",
        "what fits": "done",
    }
    assert (folders[0] / "large").stat().st_size <= 2**20 and (folders[0] / "hole").stat().st_size == 0


def test_a_limit_that_is_lower_already_stays(folders: tuple[Path, Path]) -> None:
    program = """
resource.setrlimit(resource.RLIMIT_NOFILE, (30, 40))
confine.limit_resources(memory_bytes=2**40, file_bytes=2**40, num_files=50)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    assert _run(folders, program).stdout == "(40, 40)\n"
