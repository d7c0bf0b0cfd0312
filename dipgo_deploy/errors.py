"""The errors a user can cause, each one line that says what, where and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a missing package: shown as one line, exit status 2, never a traceback.

    The message names the file, field or block, what is wrong with it, and what to do.
    """


class ToleranceError(Exception):
    """A comparison went beyond its tolerance: shown as one line, exit status 1."""


def one_line(error: Exception) -> str:
    """The message of a library's error for a UserError's: on one line, at most 400 characters."""
    return " ".join(str(error).split())[:400]
