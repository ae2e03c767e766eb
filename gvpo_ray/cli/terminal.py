"""Files are UTF-8 whatever the locale is, and what a terminal cannot show is printed in plain signs."""

from __future__ import annotations

import codecs
import io
import locale
import os
import sys

PLAIN = {"·": "|", "…": "...", "→": "->", "±": "+-", "×": "x", "≤": "<=", "–": "-", "—": "-"}
"""What stands for our own signs where the terminal lacks them."""


def use_utf8() -> None:
    """Start this process again in Python's UTF-8 mode, if its locale has another encoding.

    Otherwise names of files, and what libraries read and write without naming an encoding, would depend on
    the locale; processes that are started from here get the mode too. The terminal keeps its own encoding.
    """
    of_terminal = locale.getpreferredencoding(False)
    if {codecs.lookup(name).name for name in (of_terminal, sys.getfilesystemencoding())} == {"utf-8"}:
        return
    if os.environ.get("PYTHONUTF8") == "1":
        return  # it was tried, and Python ignores its environment (python -E)
    os.environ.setdefault("PYTHONIOENCODING", f"{of_terminal}:backslashreplace")
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def print_plainly() -> None:
    """Let stdout and stderr replace what their encoding lacks, where they would raise UnicodeEncodeError."""
    codecs.register_error("gvpo_ray.plain", plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "replace":
            stream.reconfigure(errors="gvpo_ray.plain")


def plain(error: UnicodeError) -> tuple[str, int]:
    """Replace the signs of PLAIN, and escape others (a handler for codecs.register_error)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start]
    return PLAIN.get(found, found.encode("ascii", "backslashreplace").decode()), error.start + 1
