"""The scratch folder of a sandbox is the one place where a check may write."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gvpo_ray.files import lock

PREFIX = "gvpo-verifier-"
"""Start of the scratch folders' names, and of their lock files'."""


class Scratch:
    """A Scratch is a new folder for temporary files, with a lock file that marks it as in use.

    Folders whose owner was killed, so that nobody holds their lock, are removed.
    """

    def __init__(self) -> None:
        for old in Path(tempfile.gettempdir()).glob(PREFIX + "*.lock"):
            with contextlib.suppress(OSError), lock(old):
                if _remove(old.with_suffix("")):
                    old.unlink()
        while True:
            descriptor, name = tempfile.mkstemp(prefix=PREFIX, suffix=".lock")
            os.close(descriptor)
            self._lock = lock(Path(name), wait_s=None)
            if os.path.exists(name):
                break
            self._lock.close()  # another process removed the file as an old one before it was locked
        self.folder = Path(name).with_suffix("")
        self.folder.mkdir(mode=0o700)
        self._is_empty = True

    def is_usable(self) -> bool:
        """Return whether the folder is there and empty; a cleaner of temporary files may have taken it.

        Whoever has made a folder of its name since then is not us.
        """
        return self._is_empty and self.folder.is_dir() and os.path.exists(self._lock.name)

    def wipe(self) -> None:
        """Remove what is in the folder."""
        try:
            _wipe(self.folder)
        except OSError:
            self._is_empty = False

    def remove(self) -> None:
        """Remove the folder and its lock, which stays with a folder that does: the next one removes both."""
        if _remove(self.folder):
            Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()


def _remove(folder: Path) -> bool:
    """Remove a folder with all that is in it; return whether it is gone."""
    with contextlib.suppress(OSError):
        _wipe(folder)
        folder.rmdir()
    return not folder.exists()


def _wipe(folder: Path) -> None:
    """Remove everything in a folder, however deep it lies and whatever its names and modes are.

    shutil.rmtree recurses, so that a tree that is deep enough is an error in the verifier. Another thread or
    process may remove the same things.

    Raises:
        OSError: there is no such folder, or something cannot be removed.
    """
    root, numbers = os.fsencode(folder), itertools.count()
    while names := os.listdir(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                _move_out(os.path.join(root, name), root, numbers)


def _move_out(path: bytes, root: bytes, numbers: Iterator[int]) -> None:
    """Remove a file, or a folder, whose contents are moved to the root."""
    if not _is_folder(path):
        os.unlink(path)
        return
    os.chmod(path, 0o700)
    for inner in os.listdir(path):
        inner_path = os.path.join(path, inner)
        if _is_folder(inner_path):
            os.chmod(inner_path, 0o700)  # a folder that cannot be written to cannot be moved either
        new_name = b"%d-%s" % (next(numbers), secrets.token_hex(8).encode())
        os.rename(inner_path, os.path.join(root, new_name))
    os.rmdir(path)


def _is_folder(path: bytes) -> bool:
    return stat.S_ISDIR(os.lstat(path).st_mode)
