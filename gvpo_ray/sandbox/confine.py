"""A process that is to run untrusted code is confined: it has no secrets, no network and no other processes.

All of it works without privileges, without namespaces and inside containers, and holds for root as well. The
process itself cannot undo it. It needs Linux on x86-64 or aarch64, and nothing but the standard library. The
order of the calls is:

    limit_resources(...)                memory, size and number of files
    drop_capabilities()                 root is then a user like any other
    restrict_files(scratch, readable)   Landlock (landlock.py); it holds for the calling thread and those that
                                        it starts, so it must come before there are others
    restrict_calls(files=not ...)       seccomp; it also holds for threads that run already

Not covered are the existence, the sizes and the times of files (a path that is not readable can still be
looked at), the number and size of all files in the scratch folder and the number of threads, CPU time (the
caller limits it), side channels, and bugs of the kernel in the calls that are allowed. `unprotected` says
what else is not covered on this kernel.

Programs are watched from outside instead, for threads and for what they write (watch.py), because the kernel
has no limit here that needs no privileges: RLIMIT_NPROC counts all threads of the user on the machine (Ray's
and vLLM's too, so that theirs would decide whether a program may start one), and does not hold for root;
quotas of disks belong to the administrator; cgroups must be delegated; and a filter cannot count.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gvpo_ray.sandbox.landlock import checked, give_up_privileges, landlock_version, libc, syscall


def limit_resources(memory_bytes: int, file_bytes: int, num_files: int) -> None:
    """Limit the address space, the size of written files and the number of open files; allow no core dumps.

    Soft and hard limits are set. A hard limit that is lower already stays.

    Args:
        memory_bytes: largest address space, in bytes.
        file_bytes: largest size of a file that is written, in bytes.
        num_files: largest number of open files.
    """
    wanted = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: num_files,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def drop_capabilities() -> None:
    """Give up all capabilities of the calling thread for good.

    Root is then an ordinary user to the kernel: it may neither look into processes that have capabilities nor
    pass over the modes of files.

    Raises:
        OSError: the kernel refuses.
    """
    version_3 = 0x20080522  # two words of flags in each set, for up to 64 capabilities
    header, no_sets = struct.pack("Ii", version_3, 0), bytes(24)
    checked("capset", libc.capset(header, no_sets))
    give_up_privileges()


def unprotected() -> list[str]:
    """Return a sentence for each protection that this machine's kernel does not offer."""
    missing = []
    if landlock_version() < 1:
        missing.append(
            "this kernel has no Landlock: a reward function in the sandbox can read every file that the user "
            "can, secrets in the environment of other processes included; it can write none"
        )
    if not has_seccomp():
        missing.append(
            "this machine has no seccomp filter for us (Linux on x86-64 or aarch64): a reward function in "
            "the sandbox can use the network and start and signal processes"
        )
    return missing


# --- seccomp ------------------------------------------------------------------------------------------------

_ARCHITECTURES = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}
"""Machine -> (its column in the tables below, AUDIT_ARCH_*, the number of the call seccomp)."""

_Numbers = dict[str, tuple[int | None, int | None]]
"""System call -> its number on x86-64 and on aarch64; None: the architecture does not have it."""

_LAST = 462
"""Number of mseal, the newest system call that was looked at (Linux 6.10). From 424 on all architectures have
the same numbers."""

# fmt: off
_ALLOWED: _Numbers = dict(
    # descriptors that are open
    read=(0, 63), write=(1, 64), readv=(19, 65), writev=(20, 66), pread64=(17, 67), pwrite64=(18, 68),
    preadv=(295, 69), pwritev=(296, 70), lseek=(8, 62), close=(3, 57), close_range=(436, 436), dup=(32, 23),
    dup2=(33, None), dup3=(292, 24), fsync=(74, 82), fdatasync=(75, 83), flock=(73, 32), sendfile=(40, 71),
    copy_file_range=(326, 285), fadvise64=(221, 223),
    # pipes, connected sockets, waiting for them
    pipe=(22, None), pipe2=(293, 59), recvfrom=(45, 207), shutdown=(48, 210), getsockname=(51, 204),
    getpeername=(52, 205), getsockopt=(55, 209), poll=(7, None), ppoll=(271, 73), select=(23, None),
    pselect6=(270, 72), epoll_create=(213, None), epoll_create1=(291, 20), epoll_ctl=(233, 21),
    epoll_wait=(232, None), epoll_pwait=(281, 22), epoll_pwait2=(441, 441), eventfd=(284, None),
    eventfd2=(290, 19),
    # looking at files and folders
    stat=(4, None), fstat=(5, 80), lstat=(6, None), newfstatat=(262, 79), statx=(332, 291),
    access=(21, None), faccessat=(269, 48), faccessat2=(439, 439), readlink=(89, None), readlinkat=(267, 78),
    getdents=(78, None), getdents64=(217, 61), getcwd=(79, 17), chdir=(80, 49), fchdir=(81, 50),
    statfs=(137, 43), fstatfs=(138, 44), umask=(95, 166),
    # memory
    brk=(12, 214), mmap=(9, 222), munmap=(11, 215), mprotect=(10, 226), mremap=(25, 216), madvise=(28, 233),
    msync=(26, 227), membarrier=(324, 283), map_shadow_stack=(453, 453),
    # threads and their end
    futex=(202, 98), futex_waitv=(449, 449), futex_wake=(454, 454), futex_wait=(455, 455),
    futex_requeue=(456, 456), set_robust_list=(273, 99), set_tid_address=(218, 96), rseq=(334, 293),
    gettid=(186, 178), sched_yield=(24, 124), getcpu=(309, 168), sched_getaffinity=(204, 123),
    sched_getscheduler=(145, 120), sched_getparam=(143, 121), sched_get_priority_max=(146, 125),
    sched_get_priority_min=(147, 126), exit=(60, 93), exit_group=(231, 94),
    # signals that the process handles or waits for
    rt_sigaction=(13, 134), rt_sigprocmask=(14, 135), rt_sigpending=(127, 136), rt_sigtimedwait=(128, 137),
    rt_sigsuspend=(130, 133), rt_sigreturn=(15, 139), sigaltstack=(131, 132), pause=(34, None),
    alarm=(37, None), setitimer=(38, 103), getitimer=(36, 102), restart_syscall=(219, 128),
    # time, chance, and what the process is
    clock_gettime=(228, 113), clock_getres=(229, 114), clock_nanosleep=(230, 115), nanosleep=(35, 101),
    gettimeofday=(96, 169), time=(201, None), times=(100, 153), getrandom=(318, 278), getpid=(39, 172),
    getppid=(110, 173), getpgrp=(111, None), getpgid=(121, 155), getsid=(124, 156), getuid=(102, 174),
    geteuid=(107, 175), getgid=(104, 176), getegid=(108, 177), getgroups=(115, 158), getresuid=(118, 148),
    getresgid=(120, 150), capget=(125, 90), uname=(63, 160), sysinfo=(99, 179), getrlimit=(97, 163),
    getrusage=(98, 165),
)
"""System calls that are allowed with any arguments. All that are named nowhere here fail with EPERM."""

_FILES: _Numbers = dict(
    creat=(85, None), rename=(82, None), renameat=(264, 38), renameat2=(316, 276), unlink=(87, None),
    unlinkat=(263, 35), link=(86, None), linkat=(265, 37), symlink=(88, None), symlinkat=(266, 36),
    mkdir=(83, None), mkdirat=(258, 34), rmdir=(84, None), mknod=(133, None), mknodat=(259, 33),
    ftruncate=(77, 46),
)
"""System calls that are allowed as well where Landlock says which files they may change."""

_ABSENT: _Numbers = dict(clone3=(435, 435), openat2=(437, 437))
"""System calls that fail with ENOSYS, so that libc uses older ones. Their flags are in memory, where a filter
cannot look."""

_BY_ARGUMENTS: _Numbers = dict(
    kill=(62, 129), tgkill=(234, 131), tkill=(200, 130), rt_sigqueueinfo=(129, 138),
    rt_tgsigqueueinfo=(297, 240),
    clone=(56, 220), socketpair=(53, 199), sendto=(44, 206), ioctl=(16, 29), fcntl=(72, 25), prctl=(157, 167),
    prlimit64=(302, 261),
    sched_setaffinity=(203, 122), open=(2, None), openat=(257, 56),
)
"""System calls whose arguments decide; see _tests."""
# fmt: on

_EPERM, _ENOSYS = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_DONE = 0x00050000
"""The call is not made, and says that it was."""

_X32_BIT = 0x40000000
_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET (NEWTIME is for clone3 and unshare
only)."""
_O_ACCMODE, _O_CREAT, _O_TRUNC, _O_TMPFILE = 0o3, 0o100, 0o1000, 0o20000000
"""Flags of open; O_TMPFILE is given without the O_DIRECTORY that it includes."""
_AF_UNIX = 1
_IOCTLS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Requests of ioctl that are allowed: TCGETS and TCGETS2 (isatty), TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX,
FIOCLEX. Others push keys into terminals (TIOCSTI), have the kernel send signals (FIOSETOWN) or change a
file's flags (FS_IOC_SETFLAGS)."""
_FCNTLS = (*range(8), 36, 37, 38, 1030, 1032)
"""Commands of fcntl that are allowed: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK,
F_SETLKW, F_OFD_*, F_DUPFD_CLOEXEC, F_GETPIPE_SZ. Others have the kernel send signals (F_SETOWN) or make other
processes' open wait (F_SETLEASE)."""
_PR_GET_SECCOMP = 21
_PRCTLS = (2, 3, 15, 16, _PR_GET_SECCOMP, 23, 39, 0x53564D41)
"""Options of prctl that are allowed: PR_GET_PDEATHSIG, GET_DUMPABLE, SET_NAME, GET_NAME, GET_SECCOMP,
CAPBSET_READ, GET_NO_NEW_PRIVS and SET_VMA (names of memory)."""


class _Test(NamedTuple):
    """A _Test looks at a 32-bit word of a system call's arguments.

    The test holds if `word & mask` is among `values`.
    """

    word: int
    """Number of the word. Argument n has the words 2n (low) and 2n + 1 (high); the kernel takes an int from
    the low word alone."""
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF


def _is_null(argument: int) -> list[_Test]:
    """Return the tests that hold if a pointer argument is NULL."""
    return [_Test(2 * argument, (0,)), _Test(2 * argument + 1, (0,))]


_NEVER = _Test(0, ())

_NO_KILL = tuple(sorted({*range(65)} - {signal.SIGKILL, signal.SIGSTOP}))
"""Signals but those that no process can catch."""


def _tests(pid: int, files: bool, is_judged: bool) -> dict[str, list[_Test]]:
    """Return the tests of the system calls that are allowed if all their tests hold, and else get EPERM."""

    def signals(argument: int) -> list[_Test]:
        return [*own, _Test(2 * argument, _NO_KILL)] if is_judged else own

    def opens(argument: int) -> list[_Test]:
        if files:
            return [_Test(2 * argument, (0,), _O_ACCMODE | _O_CREAT | _O_TRUNC | _O_TMPFILE)]
        # Landlock 1 and 2 do not notice the truncation of a file that is opened for reading.
        return [_Test(2 * argument, (0, 1, 2, _O_TRUNC | 1, _O_TRUNC | 2), _O_ACCMODE | _O_TRUNC)]

    # 0 means the own process group to kill, and the own process to the other calls
    own, own_or_0 = [_Test(0, (pid,))], [_Test(0, (0, pid))]
    return {
        **dict.fromkeys(("kill", "tkill", "rt_sigqueueinfo"), signals(1)),
        **dict.fromkeys(("tgkill", "rt_tgsigqueueinfo"), signals(2)),
        "clone": [_Test(0, (_CLONE_THREAD,), _CLONE_THREAD | _CLONE_NEW)],
        "socketpair": [_Test(0, (_AF_UNIX,))],  # asyncio wakes its event loop through a socket pair
        "sendto": _is_null(4),
        "ioctl": [_Test(2, _IOCTLS)],
        "fcntl": [_Test(2, _FCNTLS)],
        "prctl": [_Test(0, _PRCTLS)],
        "prlimit64": own_or_0 + _is_null(2),
        "sched_setaffinity": [_NEVER] if is_judged else own_or_0,
        "open": opens(1),
        "openat": opens(2),
    }


class _Instruction(NamedTuple):
    """An _Instruction is an instruction of the filter program, a struct sock_filter."""

    code: int
    if_true: int
    """Number of instructions to skip when a jump's comparison holds."""
    if_false: int
    """Number of instructions to skip when it does not hold."""
    operand: int


def _load(offset: int) -> _Instruction:
    """Load a word of struct seccomp_data.

    The number of the call is at offset 0, the architecture at 4, word n of the arguments at 16 + 4 n.
    """
    return _Instruction(0x20, 0, 0, offset)


def _and(mask: int) -> _Instruction:
    return _Instruction(0x54, 0, 0, mask)


def _skip_unless_equal(value: int, skip: int) -> _Instruction:
    return _Instruction(0x15, 0, skip, value)


def _skip_if_equal(value: int, skip: int) -> _Instruction:
    return _Instruction(0x15, skip, 0, value)


def _skip_unless_greater(value: int, skip: int) -> _Instruction:
    return _Instruction(0x25, 0, skip, value)


def _return(verdict: int) -> _Instruction:
    return _Instruction(0x06, 0, 0, verdict)


def _filter(machine: str, pid: int, files: bool, is_judged: bool = False) -> list[_Instruction]:
    """Build the program that the kernel runs before each system call.

    The program is a chain of blocks, one per system call. A block is skipped for other calls, and else ends
    in a verdict. So the number of the call stays loaded all along the chain, and a call that reaches its end
    is refused. A call that is newer than the tables gets ENOSYS, as on an older kernel, because libc tries
    the older call then.
    """
    column, architecture, _ = _ARCHITECTURES[machine]
    program = [_load(4), _skip_if_equal(architecture, 1), _return(_KILL), _load(0)]
    if machine == "x86_64":
        program += [_skip_unless_greater(_X32_BIT - 1, 1), _return(_KILL)]
    program += [_skip_unless_greater(_LAST, 1), _return(_ENOSYS)]
    blocks: dict[str, Sequence[_Instruction]] = {
        **{name: [_return(_ALLOW)] for name in (*_ALLOWED, *(() if files else _FILES))},
        **{name: [_return(_ENOSYS)] for name in _ABSENT},
        **({"sched_yield": [_return(_DONE)]} if is_judged else {}),
        **{name: list(_decide(tests)) for name, tests in _tests(pid, files, is_judged).items()},
    }
    numbers = _ALLOWED | _FILES | _ABSENT | _BY_ARGUMENTS
    for name, block in blocks.items():
        if (number := numbers[name][column]) is not None:
            program += [_skip_unless_equal(number, len(block)), *block]
    return [*program, _return(_EPERM)]


def _decide(tests: list[_Test]) -> Iterable[_Instruction]:
    """Build the block that allows a system call if all tests hold, and refuses it otherwise."""
    for test in tests:
        yield from (_load(16 + 4 * test.word), _and(test.mask))
        for left, value in zip(range(len(test.values), 0, -1), test.values, strict=True):
            yield _skip_if_equal(value, left)
        yield _return(_EPERM)
    yield _return(_ALLOW)


def restrict_calls(files: bool, is_judged: bool = False) -> None:
    """Restrict the system calls of all threads of this process for good, by seccomp.

    The process can compute, look at and read files, use its descriptors, start threads, and make pipes,
    socket pairs (AF_UNIX) and, where Landlock says which, files. All else fails with EPERM (PermissionError):
    sockets, new processes and programs, signals to others, changed limits, modes and owners of files, and any
    call that nobody thought of. A system call by another architecture's number (i386, x32) kills the process.

    Args:
        files: whether to refuse opening for writing, creating, renaming and removing of files everywhere, for
            a kernel without Landlock.
        is_judged: whether the process's end and its waiting are judged. Then it may not send SIGKILL and
            SIGSTOP to itself, so that a SIGKILL that ends it comes from outside; and it may neither choose a
            processor that others use nor give one up, so that it waits only where the machine is busy.

    Raises:
        OSError: the kernel refuses, or this is not Linux on x86-64 or aarch64.
    """
    machine = _machine()
    if machine not in _ARCHITECTURES:
        raise OSError(
            errno.ENOSYS,
            f"no seccomp filter for {sys.platform} on {platform.machine()}, only for Linux on "
            f"{' and '.join(_ARCHITECTURES)}",
        )
    _install(_filter(machine, os.getpid(), files, is_judged))


def has_seccomp() -> bool:
    """Return whether restrict_calls works on this machine."""
    return _machine() in _ARCHITECTURES and libc.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) >= 0


def _machine() -> str:
    """Return the name of this machine's architecture; "" where there is no seccomp, or not in 64 bits."""
    return platform.machine() if sys.platform == "linux" and sys.maxsize > 2**32 else ""


def _install(program: list[_Instruction], all_threads: bool = True) -> None:
    """Give the filter program to the kernel, for all threads or the calling one."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    header = struct.pack("HP", len(program), ctypes.addressof(code))  # struct sock_fprog
    give_up_privileges()
    number, set_mode_filter = _ARCHITECTURES[platform.machine()][2], 1
    status = checked("seccomp", syscall(number, set_mode_filter, ctypes.c_ulong(all_threads), header))
    if status:  # id of a thread that could not take the filter
        raise OSError(errno.EBUSY, f"seccomp: thread {status} has a filter of its own")
