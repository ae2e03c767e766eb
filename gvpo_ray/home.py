"""An account without a name or a home gets both, because Ray, vLLM, torch and Hugging Face write below them.

Containers often run under a number alone (OpenShift, `runAsUser: 12345`). This module imports nothing that is
slow, so that it can run before any of these libraries is imported.
"""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from pathlib import Path


def ensure_home() -> None:
    """Set USER where this account has no name, and HOME where its home cannot be written to.

    The new home is a folder in TMPDIR that belongs to this account alone, the same one each time. The models
    and data sets of Hugging Face are still read from the old home, where it has them.
    """
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:  # torch asks for the name when it is imported (getpass.getuser)
            os.environ["USER"] = os.environ["LOGNAME"] = f"user-{os.getuid()}"
    old = Path(os.path.expanduser("~"))
    if old.is_dir() and os.access(old, os.W_OK | os.X_OK):
        return
    if (old / ".cache" / "huggingface").is_dir():
        os.environ.setdefault("HF_HOME", str(old / ".cache" / "huggingface"))
    os.environ["HOME"] = str(_own_folder(Path(tempfile.gettempdir()) / f"gvpo_ray-home-{os.getuid()}"))


def _own_folder(path: Path) -> Path:
    """Make a folder that nobody else may read; where another account has it, make one of another name."""
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
        return path
    return Path(tempfile.mkdtemp(prefix=path.name))
