"""Landlock confines a process to the files that it needs, by the system calls that are made here.

`files_of_python` says which files a Python program needs that imports modules while it is confined.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import mimetypes
import os
import stat
import struct
import sys
import sysconfig
import zoneinfo
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

libc = ctypes.CDLL(None, use_errno=True)

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_GET_VERSION = 1
_PATH_BENEATH = 1

# LANDLOCK_ACCESS_FS_*; executing is not named: restrict_calls refuses it.
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
_MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK, _MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM = (
    1 << bit for bit in range(6, 13)
)
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_READS = _READ_FILE | _READ_DIR
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


def restrict_files(scratch: str, readable: Iterable[str], listable: Iterable[str] = ()) -> bool:
    """Let this thread, and what it starts, read only what is named and change only a scratch folder.

    Opening of files and listing of folders are restricted, and so are creating, writing, truncating, linking,
    renaming and deleting. /dev/null can be written as well, and the process may read what /proc says of
    itself. Versions 1 and 2 of Landlock (before Linux 6.2) do not cover truncation by path, and no version
    covers modes, owners, times and attributes; confine.restrict_calls refuses those.

    Args:
        scratch: folder in which everything is allowed but sockets and device files.
        readable: files, and folders with all that is below them, that may be read; those that are not there
            are left out.
        listable: folders of which the names below them may be listed.

    Returns:
        False if the kernel, or the container's own filter, has no Landlock; then nothing is restricted.

    Raises:
        OSError: there is no scratch folder, or the kernel refuses.
    """
    version = landlock_version()
    if version < 1:
        return False
    known = ~sum(right for right, since in _SINCE_VERSION.items() if since > version)
    handled = struct.pack("Q", (_READS | _WRITES | _NOWHERE) & known)
    rules = checked(
        "landlock_create_ruleset", syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    )
    try:
        _allow(rules, scratch, (_READS | _WRITES) & known)
        _allow(rules, os.devnull, (_READ_FILE | _WRITE_FILE | _TRUNCATE) & known)
        for paths, rights in (((*readable, "/proc/self"), _READS), (listable, _READ_DIR)):
            for path in paths:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                    _allow(rules, path, rights)
        give_up_privileges()
        checked("landlock_restrict_self", syscall(_RESTRICT_SELF, rules, 0))
    finally:
        os.close(rules)
    return True


def landlock_version() -> int:
    """Return the version of the kernel's Landlock; less than 1: it has none."""
    return syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION) if sys.platform == "linux" else -1


def _allow(ruleset: int, path: str, rights: int) -> None:
    """Add a rule for a file, or for a folder and what is below it."""
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= ~_READ_DIR  # the kernel refuses rights of folders for a file
        checked(
            "landlock_add_rule",
            syscall(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, place), 0),
        )
    finally:
        os.close(place)


class Files(NamedTuple):
    """Files holds the files that a program reads."""

    readable: list[str]
    """Files, and folders with all that is below them."""
    listable: list[str]
    """Folders in which names are looked up."""


_SYSTEM = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64", "/usr/share/locale"),
    *("/etc/ld.so.cache", "/etc/localtime", "/etc/timezone", "/etc/passwd", "/etc/group"),
    *("/etc/nsswitch.conf", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"),
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/sys/vm/overcommit_memory", "/sys/devices/system/cpu"),
)
"""What any program may need. The rest of /usr is left out: programs cannot be started, and /usr/local and
/usr/src hold what people put there."""


def files_of_python() -> Files:
    """Return what this process, with what it has imported by now, may need for further imports.

    That is the system's and Python's libraries whole. Of other folders that modules come from (the user's
    own, which may hold data sets as well) it is the modules alone, and those of packages in them.
    """
    paths = sysconfig.get_paths()
    libraries = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    libraries |= {
        f"{prefix}/{name}" for prefix in prefixes for name in ("lib", "lib64", "share/locale", "pyvenv.cfg")
    }
    libraries |= {*map(str, zoneinfo.TZPATH), *map(str, mimetypes.knownfiles), *_folders_of_the_linker()}
    libraries.add(str(Path(__file__).parents[1]))
    libraries |= set(filter(os.path.isabs, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)))
    folders = {os.path.abspath(path) for path in sys.path}
    readable = set()
    for name, module in list(sys.modules.items()):
        if "." not in name and (places := getattr(module, "__path__", None)) is not None:
            folders |= {os.path.abspath(place) for place in places}
        elif isinstance(file := getattr(module, "__file__", None), str):
            readable.add(os.path.abspath(file))
    whole = {path for each in (*_SYSTEM, *libraries) for path in (each, os.path.realpath(each))}
    folders = {path for path in folders if not _is_below(path, whole)}
    readable = {path for path in readable if not _is_below(path, whole)}
    modules = {module for folder in folders for module in _modules(folder, whole)}
    return Files(
        [*_SYSTEM, *sorted(libraries), *sorted(readable | modules | set(filter(os.path.isfile, folders)))],
        sorted(filter(os.path.isdir, folders)),
    )


def _folders_of_the_linker(configuration: str = "/etc/ld.so.conf.d") -> Iterator[str]:
    """Yield the folders of shared libraries that this machine's linker knows beside the usual ones."""
    for file in Path(configuration).glob("*.conf"):
        with contextlib.suppress(OSError):
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            yield from filter(os.path.isabs, map(str.strip, lines))


def _is_below(path: str, folders: set[str]) -> bool:
    return any(
        folder in folders
        for real in (str, os.path.realpath)  # the second is slow, and rarely needed
        for folder in (real(path), *map(str, Path(real(path)).parents))
    )


def _modules(folder: str, whole: set[str]) -> Iterator[str]:
    """Yield the files of a folder that Python can import, and of packages in it that are not `whole`."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(tuple(importlib.machinery.all_suffixes())):
                yield entry.path
            elif (
                entry.is_dir(follow_symlinks=False)
                and entry.path not in whole
                and os.path.isfile(os.path.join(entry.path, "__init__.py"))
            ):
                yield from _modules(entry.path, whole)


def give_up_privileges() -> None:
    """Set no_new_privs, without which the kernel lets only root restrict itself.

    Programs that are started later can then gain no rights.
    """
    pr_set_no_new_privs = 38
    checked("prctl(PR_SET_NO_NEW_PRIVS)", libc.prctl(pr_set_no_new_privs, *map(ctypes.c_ulong, (1, 0, 0, 0))))


def syscall(number: int, *arguments: Any) -> int:
    """Make a system call; return its result, which is negative if it failed."""
    result: int = libc.syscall(ctypes.c_long(number), *arguments)
    return result


def checked(name: str, result: int) -> int:
    """Return the result of a system call; raise OSError with its errno if it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
