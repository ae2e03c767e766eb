"""Confinement of a process that is to run untrusted code: no files, no network, no other processes.

All of it works without privileges, without namespaces and inside containers, and holds for root as well. The
process itself cannot undo it. It needs Linux on x86-64 or aarch64, and nothing but the standard library. The
order of the calls is:

    limit_resources(...)            memory, size and number of files
    restrict_writes(scratch)        Landlock; it holds for the calling thread and those that it starts, so it
                                    must come before there are others
    (import what is needed)
    restrict_calls(files=not ...)   seccomp; it also holds for threads that run already

Not covered are reading (the process may read whatever the user may read, and tell it through its answer),
descriptors that are open already (the log on stderr can be filled), the number of files in the scratch folder
and of threads (memory and time bound them), CPU time (the caller limits it), side channels, and bugs of the
kernel in the calls that stay allowed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)


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


# --- Landlock -----------------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_GET_VERSION = 1
_PATH_BENEATH = 1

# LANDLOCK_ACCESS_FS_*; reading and executing are not named and stay as they are.
_WRITE_FILE, _REMOVE_DIR, _REMOVE_FILE = 1 << 1, 1 << 4, 1 << 5
_MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK, _MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM = (
    1 << bit for bit in range(6, 13)
)
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_WRITES = (
    _WRITE_FILE
    | _REMOVE_DIR
    | _REMOVE_FILE
    | _MAKE_DIR
    | _MAKE_REG
    | _MAKE_FIFO
    | _MAKE_SYM
    | _REFER
    | _TRUNCATE
)
_NOWHERE = _MAKE_CHAR | _MAKE_BLOCK | _MAKE_SOCK | _IOCTL_DEV
"""Rights that are refused in the scratch folder too: root could make a device file there and write to the
disk behind it."""
_SINCE_VERSION = {_REFER: 2, _TRUNCATE: 3, _IOCTL_DEV: 5}


def restrict_writes(scratch: str | os.PathLike[str]) -> bool:
    """Allow this thread, and what it starts, to change files below `scratch` only, by Landlock.

    Creating, writing, truncating, linking, renaming and deleting are restricted. Writing to /dev/null stays
    allowed, and so does all reading. Versions 1 and 2 of Landlock (before Linux 6.2) do not cover truncation
    by path, and no version covers modes, owners, times and attributes; restrict_calls refuses those.

    Returns:
        False if the kernel, or the container's own filter, has no Landlock; then nothing is restricted.

    Raises:
        OSError: no such folder, or the kernel refuses.
    """
    version = (
        _syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION) if sys.platform == "linux" else -1
    )
    if version < 1:
        return False
    known = ~sum(right for right, since in _SINCE_VERSION.items() if since > version)
    ruleset = _checked(
        "landlock_create_ruleset",
        _syscall(_CREATE_RULESET, struct.pack("Q", (_WRITES | _NOWHERE) & known), ctypes.c_size_t(8), 0),
    )
    try:
        for path, rights in ((scratch, _WRITES), (os.devnull, _WRITE_FILE | _TRUNCATE)):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                rule = struct.pack("=Qi", rights & known, place)
                _checked("landlock_add_rule", _syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
            finally:
                os.close(place)
        _give_up_privileges()
        _checked("landlock_restrict_self", _syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return True


# --- seccomp ------------------------------------------------------------------------------------------------

_ARCHITECTURES = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}
"""Machine -> (its column in the tables below, AUDIT_ARCH_*, the number of the call seccomp)."""

_Numbers = dict[str, tuple[int | None, int | None]]
"""System call -> its number on x86-64 and on aarch64; None: the architecture does not have it."""

_LAST = 462
"""Number of mseal, the newest system call that the tables below take into account (Linux 6.10). From 424 on
all architectures have the same numbers."""

# fmt: off
_REFUSED: _Numbers = dict(
    # sockets; sendmsg because it takes an address from memory, where a filter cannot look
    socket=(41, 198), connect=(42, 203), bind=(49, 200), listen=(50, 201), accept=(43, 202),
    accept4=(288, 242),
    sendmsg=(46, 211), sendmmsg=(307, 269),
    # new processes, and leaving the process group that is killed
    fork=(57, None), vfork=(58, None), execve=(59, 221), execveat=(322, 281), setsid=(112, 157),
    setpgid=(109, 154),
    # other processes
    ptrace=(101, 117), process_vm_readv=(310, 270), process_vm_writev=(311, 271), process_madvise=(440, 440),
    process_mrelease=(448, 448), pidfd_open=(434, 434), pidfd_getfd=(438, 438), pidfd_send_signal=(424, 424),
    kcmp=(312, 272),
    migrate_pages=(256, 238), move_pages=(279, 239), setpriority=(141, 140), ioprio_set=(251, 30),
    sched_setscheduler=(144, 119), sched_setparam=(142, 118), sched_setattr=(314, 274),
    # limits; memory that they do not count, or that outlives the process
    setrlimit=(160, 164), memfd_create=(319, 279), memfd_secret=(447, 447),
    shmget=(29, 194), shmat=(30, 196), shmctl=(31, 195), semget=(64, 190), semop=(65, 193),
    semtimedop=(220, 192), semctl=(66, 191),
    msgget=(68, 186), msgsnd=(69, 189), msgrcv=(70, 188), msgctl=(71, 187), mq_open=(240, 180),
    mq_unlink=(241, 181),
    # large attack surfaces of the kernel
    io_uring_setup=(425, 425), io_uring_enter=(426, 426), io_uring_register=(427, 427), io_setup=(206, 0),
    io_submit=(209, 2),
    bpf=(321, 280), userfaultfd=(323, 282), perf_event_open=(298, 241), add_key=(248, 217),
    request_key=(249, 218), keyctl=(250, 219),
    fanotify_init=(300, 262), fanotify_mark=(301, 263), name_to_handle_at=(303, 264),
    open_by_handle_at=(304, 265),
    modify_ldt=(154, None), iopl=(172, None), ioperm=(173, None), uselib=(134, None), personality=(135, 92),
    # privileges of root
    setuid=(105, 146), setgid=(106, 144), setreuid=(113, 145), setregid=(114, 143), setresuid=(117, 147),
    setresgid=(119, 149),
    setgroups=(116, 159), setfsuid=(122, 151), setfsgid=(123, 152), capset=(126, 91),
    mount=(165, 40), umount2=(166, 39), pivot_root=(155, 41), chroot=(161, 51), unshare=(272, 97),
    setns=(308, 268),
    open_tree=(428, 428), move_mount=(429, 429), fsopen=(430, 430), fsconfig=(431, 431), fsmount=(432, 432),
    fspick=(433, 433),
    mount_setattr=(442, 442), swapon=(167, 224), swapoff=(168, 225), acct=(163, 89), quotactl=(179, 60),
    quotactl_fd=(443, 443),
    init_module=(175, 105), finit_module=(313, 273), delete_module=(176, 106), kexec_load=(246, 104),
    kexec_file_load=(320, 294),
    reboot=(169, 142), syslog=(103, 116), vhangup=(153, 58), sethostname=(170, 161), setdomainname=(171, 162),
    settimeofday=(164, 170), clock_settime=(227, 112), adjtimex=(159, 171), clock_adjtime=(305, 266),
    lsm_set_self_attr=(460, 460),
    # modes, owners, times, attributes and sizes of files, also of those that are only open for reading:
    # Landlock leaves them alone
    chmod=(90, None), fchmod=(91, 52), fchmodat=(268, 53), fchmodat2=(452, 452),
    chown=(92, None), fchown=(93, 55), lchown=(94, None), fchownat=(260, 54),
    utime=(132, None), utimes=(235, None), futimesat=(261, None), utimensat=(280, 88),
    setxattr=(188, 5), lsetxattr=(189, 6), fsetxattr=(190, 7), removexattr=(197, 14), lremovexattr=(198, 15),
    fremovexattr=(199, 16),
    truncate=(76, 45), fallocate=(285, 47),  # reserves space beyond the limit of a file's size
)
"""System calls that fail with EPERM."""

_REFUSED_FILES: _Numbers = dict(
    creat=(85, None), rename=(82, None), renameat=(264, 38), renameat2=(316, 276), unlink=(87, None),
    unlinkat=(263, 35),
    link=(86, None), linkat=(265, 37), symlink=(88, None), symlinkat=(266, 36),
    mkdir=(83, None), mkdirat=(258, 34), rmdir=(84, None), mknod=(133, None), mknodat=(259, 33),
)
"""System calls that fail with EPERM if there is no Landlock to restrict them."""

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
_FCNTLS = (8, 10, 15, 1024, 1026)
"""Commands of fcntl that are refused: F_SETOWN, F_SETSIG and F_SETOWN_EX (the kernel sends the signal),
F_SETLEASE (makes other processes' open wait), F_NOTIFY."""
_PRCTLS = (1, 28, 35, 57, 62)
"""Options of prctl that are refused: PR_SET_PDEATHSIG (the child must die with its parent), SET_SECUREBITS,
SET_MM, SET_IO_FLUSHER, SCHED_CORE."""


class _Test(NamedTuple):
    """A test of one 32-bit word of a system call's arguments.

    The test holds if `word & mask` is among `values`, or, with `refuse`, if it is not.
    """

    word: int
    """Number of the word. Argument n has the words 2n (low) and 2n + 1 (high); the kernel takes an int from
    the low word alone."""
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    refuse: bool = False
    """Whether `values` are the refused ones and not the allowed ones."""


def _is_null(argument: int) -> list[_Test]:
    """Return the tests that hold if a pointer argument is NULL."""
    return [_Test(2 * argument, (0,)), _Test(2 * argument + 1, (0,))]


def _tests(pid: int, files: bool) -> dict[str, list[_Test]]:
    """Return the tests of the system calls that are allowed if all their tests hold, and else get EPERM."""

    def opens(argument: int) -> list[_Test]:
        if files:
            return [_Test(2 * argument, (0,), _O_ACCMODE | _O_CREAT | _O_TRUNC | _O_TMPFILE)]
        # Landlock 1 and 2 do not notice the truncation of a file that is opened for reading.
        return [_Test(2 * argument, (_O_TRUNC,), _O_ACCMODE | _O_TRUNC, refuse=True)]

    # 0 means the own process group to kill, and the own process to the other calls
    own, own_or_0 = [_Test(0, (pid,))], [_Test(0, (0, pid))]
    return {
        **dict.fromkeys(("kill", "tgkill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"), own),
        "clone": [_Test(0, (_CLONE_THREAD,), _CLONE_THREAD | _CLONE_NEW)],
        "socketpair": [_Test(0, (_AF_UNIX,))],  # asyncio wakes its event loop through a socket pair
        "sendto": _is_null(4),
        "ioctl": [_Test(2, _IOCTLS)],
        "fcntl": [_Test(2, _FCNTLS, refuse=True)],
        "prctl": [_Test(0, _PRCTLS, refuse=True)],
        "prlimit64": own_or_0 + _is_null(2),
        "sched_setaffinity": own_or_0,
        "open": opens(1),
        "openat": opens(2),
    }


class _Instruction(NamedTuple):
    """One instruction of the filter program, a struct sock_filter."""

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


def _filter(machine: str, pid: int, files: bool) -> list[_Instruction]:
    """Build the program that the kernel runs before each system call.

    The program is a chain of blocks, one per system call. A block is skipped for other calls, and else ends
    in a verdict. So the number of the call stays loaded all along the chain, and a call that reaches its end
    is allowed. A call that is newer than the tables gets ENOSYS, as on an older kernel.
    """
    column, architecture, _ = _ARCHITECTURES[machine]
    program = [_load(4), _skip_if_equal(architecture, 1), _return(_KILL), _load(0)]
    if machine == "x86_64":
        program += [_skip_unless_greater(_X32_BIT - 1, 1), _return(_KILL)]
    program += [_skip_unless_greater(_LAST, 1), _return(_ENOSYS)]
    blocks: dict[str, Iterable[_Instruction]] = {
        **{name: [_return(_ENOSYS)] for name in _ABSENT},
        **{name: [_return(_EPERM)] for name in (*_REFUSED, *(_REFUSED_FILES if files else ()))},
        **{name: _decide(tests) for name, tests in _tests(pid, files).items()},
    }
    numbers = _REFUSED | _REFUSED_FILES | _ABSENT | _BY_ARGUMENTS
    for name, block in blocks.items():
        if (number := numbers[name][column]) is not None:
            block = list(block)
            program += [_skip_unless_equal(number, len(block)), *block]
    return [*program, _return(_ALLOW)]


def _decide(tests: list[_Test]) -> Iterable[_Instruction]:
    """Build the block that allows a system call if all tests hold, and refuses it otherwise."""
    for test in tests:
        yield from (_load(16 + 4 * test.word), _and(test.mask))
        if test.refuse:
            for value in test.values:
                yield from (_skip_unless_equal(value, 1), _return(_EPERM))
        else:
            for left, value in zip(range(len(test.values), 0, -1), test.values, strict=True):
                yield _skip_if_equal(value, left)
            yield _return(_EPERM)
    yield _return(_ALLOW)


def restrict_calls(files: bool) -> None:
    """Restrict the system calls of all threads of this process for good, by seccomp.

    The process can still compute, read files and use its descriptors. Sockets, new processes and programs,
    signals to others, changed limits and all else in _REFUSED fail with EPERM (PermissionError). Threads,
    pipes, socket pairs (AF_UNIX) and send on a connected socket stay allowed. A system call by another
    architecture's number (i386, x32) kills the process.

    Args:
        files: whether to refuse opening for writing, creating, renaming and removing of files everywhere, for
            a kernel without Landlock.

    Raises:
        OSError: the kernel refuses, or this is not Linux on x86-64 or aarch64.
    """
    machine = platform.machine() if sys.platform == "linux" and sys.maxsize > 2**32 else ""
    if machine not in _ARCHITECTURES:
        raise OSError(
            errno.ENOSYS,
            f"no seccomp filter for {sys.platform} on {platform.machine()}, only for Linux on "
            f"{' and '.join(_ARCHITECTURES)}",
        )
    _install(_filter(machine, os.getpid(), files))


def _install(program: list[_Instruction], all_threads: bool = True) -> None:
    """Give the filter program to the kernel, for all threads or the calling one."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    header = struct.pack("HP", len(program), ctypes.addressof(code))  # struct sock_fprog
    _give_up_privileges()
    number, set_mode_filter = _ARCHITECTURES[platform.machine()][2], 1
    status = _checked("seccomp", _syscall(number, set_mode_filter, ctypes.c_ulong(all_threads), header))
    if status:  # id of a thread that could not take the filter
        raise OSError(errno.EBUSY, f"seccomp: thread {status} has a filter of its own")


def _give_up_privileges() -> None:
    """Set no_new_privs, without which the kernel lets only root restrict itself.

    Programs that are started later can then gain no rights.
    """
    pr_set_no_new_privs = 38
    _checked(
        "prctl(PR_SET_NO_NEW_PRIVS)", _libc.prctl(pr_set_no_new_privs, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    )


def _syscall(number: int, *arguments: Any) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    return result


def _checked(name: str, result: int) -> int:
    """Return the result of a system call; raise OSError with its errno if it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
