"""The engines of a node share one copy of the newest weights, in shared memory.

A folder in /dev/shm, or in the temporary folder where that is missing, not writable or full, holds the
safetensors files of one publisher, the version that they are (STATE), and three files to lock:

    LIFE   shared by every engine that uses the folder; a folder that nobody has locked is removed
    TURN   held by the one engine that brings the copy up to date
    READ   shared by the engines whose vLLM reads the files, exclusive while they are written

Locks end with their process, so an engine that is killed leaves none. If it was writing, STATE is missing,
and the next engine fetches the whole.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from gvpo_ray.files import lock, room_in
from gvpo_ray.weights.deltas import Bytes, Delta, apply_delta

SHM = Path("/dev/shm")
"""Where shared memory is a file system."""

PREFIX = "gvpo_weights_"
"""How the names of the folders begin."""

LIFE, TURN, READ, STATE = "lock", "turn", "read", "state.json"

Fetch = Callable[[Sequence[Any]], list[Any]]
"""Returns the objects of some references, which it fetches from other nodes where necessary."""


class NodeCopy:
    """A NodeCopy is one engine's access to the copy of the weights that its node has."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._life: IO[str] | None = None
        self._is_full = False
        for parent in (SHM, Path(tempfile.gettempdir())):
            _remove_abandoned(parent)

    def take(self, weights: dict[str, Any], fetch: Fetch) -> tuple[list[str], IO[str]]:
        """Make the copy that of one version; fetch what is missing, which may be nothing.

        Args:
            weights: what ObjectPublisher.publish has returned.
            fetch: fetches shards and deltas.

        Returns:
            The paths of the safetensors files, and a lock; they stay as they are until it is closed.

        Raises:
            OSError: there is no room in the temporary folder either.
        """
        try:
            reading = self._bring(weights, fetch)
        except OSError as error:
            if self._is_full or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._is_full = True  # shared memory is: the temporary folder may have room
            self.close()
            reading = self._bring(weights, fetch)
        return [str(path) for path in self._files(len(weights["shards"]))], reading

    def _files(self, number: int) -> list[Path]:
        assert self._folder is not None
        return [self._folder / f"{i}.safetensors" for i in range(number)]

    def _bring(self, weights: dict[str, Any], fetch: Fetch) -> IO[str]:
        """Bring the copy up to date; return the lock of READ, which keeps it as it is."""
        folder = self._enter(weights["chain"].rpartition("-")[0], weights["size"])
        files = self._files(len(weights["shards"]))
        with lock(folder / TURN, wait_s=None):
            chain, num_applied = self._state()
            if chain != weights["chain"] or num_applied > len(weights["deltas"]):
                parts, num_applied = fetch(weights["shards"]), 0
                with self._writing(weights["chain"], 0):
                    for file, data in zip(files, parts, strict=True):
                        _write(file, data)
            if missing := weights["deltas"][num_applied:]:
                deltas = fetch(missing)
                with self._writing(weights["chain"], len(weights["deltas"])):
                    for i, file in enumerate(files):
                        _change(file, [Delta(*delta[i]) for delta in deltas])
            return lock(folder / READ, wait_s=None, shared=True)

    def _enter(self, name: str, num_bytes: int) -> Path:
        """Lock the folder of a publisher, and make it if there is none."""
        if self._folder is None or self._folder.name != PREFIX + name:
            self.close()
            parent = Path(tempfile.gettempdir())
            if not self._is_full and ((SHM / (PREFIX + name)).exists() or _has_room(SHM, num_bytes)):
                parent = SHM
            self._life = _enter(parent / (PREFIX + name))
            self._folder = parent / (PREFIX + name)
        return self._folder

    def _state(self) -> tuple[str, int]:
        """Return the chain that the files are of, and the number of its deltas that they include."""
        assert self._folder is not None
        try:
            chain, number = json.loads((self._folder / STATE).read_text(encoding="utf-8"))
            return chain, number
        except (FileNotFoundError, ValueError):  # none, or of an engine that was killed as it wrote it
            return "", 0

    @contextlib.contextmanager
    def _writing(self, chain: str, num_applied: int) -> Iterator[None]:
        """Keep readers away while the files are changed, and note what they are afterwards."""
        assert self._folder is not None
        with lock(self._folder / READ, wait_s=None):
            (self._folder / STATE).unlink(missing_ok=True)
            try:
                yield
            except OSError:
                for path in self._folder.glob("*.safetensors"):
                    path.unlink()
                raise
            (self._folder / STATE).write_text(json.dumps([chain, num_applied]), encoding="utf-8")

    def close(self) -> None:
        """Leave the copy; the last engine of the node removes it."""
        if self._life is not None and self._folder is not None:
            self._life.close()
            _remove_abandoned(self._folder.parent)
        self._folder = self._life = None


def _enter(folder: Path) -> IO[str]:
    """Make a folder, and return its shared lock; another engine may remove it at the same moment."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            life = lock(folder / LIFE, wait_s=None, shared=True)
            if os.path.samestat(os.fstat(life.fileno()), os.stat(folder / LIFE)):
                return life
            life.close()
        except FileNotFoundError:
            continue


def _has_room(parent: Path, num_bytes: int) -> bool:
    """Return whether a file system has room for the weights, and as much again for others such as vLLM."""
    return os.access(parent, os.W_OK) and room_in(parent) > 2 * num_bytes


def _write(file: Path, data: Bytes) -> None:
    """Write a file in place, so that its pages are used again."""
    with open(file, "r+b" if file.exists() else "w+b") as opened:
        opened.truncate(data.nbytes)
        if sys.platform == "linux":
            # room is reserved first: a page that is missing later would end a process with SIGBUS
            os.posix_fallocate(opened.fileno(), 0, data.nbytes)
        opened.write(data.data)


def _change(file: Path, deltas: Sequence[Delta]) -> None:
    # Mapped at once: a fault for each page would take as long again.
    at_once = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    with open(file, "r+b") as opened:
        data = np.frombuffer(mmap.mmap(opened.fileno(), 0, flags=at_once), np.uint8)
    for delta in deltas:
        apply_delta(data, delta)


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders in `parent` that no engine uses any more."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or another engine removes it at this moment
            if (folder / LIFE).exists():
                with lock(folder / LIFE):  # who enters the folder now, waits, and finds that it is gone
                    shutil.rmtree(folder)
