"""All errors that a user can see, or that one module raises for another, are of one family.

tests/test_errors.py lists the few exceptions that stay outside, each with its reason.
"""

from __future__ import annotations


class GvpoError(Exception):
    """A GvpoError says in one line what a user can read alone; the command line shows no traceback."""

    status = 1
    """Exit status of the command line."""
