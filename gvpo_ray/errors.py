"""The one family of the package's errors: all that a user can see, or that one module raises for another.

tests/test_errors.py lists the few exceptions that stay outside, each with its reason.
"""

from __future__ import annotations


class GvpoError(Exception):
    """An error whose message is one line that a user can read alone; the command line shows no traceback."""

    status = 1
    """Exit status of the command line."""
