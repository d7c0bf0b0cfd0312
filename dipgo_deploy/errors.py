"""The errors a user can cause, each one line that says what, where and what to do."""

from __future__ import annotations

_LONGEST = 1000  # characters of a message
_GAP = " ... "


class OneLineError(Exception):
    """An error whose message is one line of at most 1000 printable characters, whatever was put into it."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message, _LONGEST))


class UserError(OneLineError):
    """Bad input or a missing package: shown as one line, exit status 2, never a traceback.

    The message names the file, field or block, what is wrong with it, and what to do.
    """


class ToleranceError(OneLineError):
    """A comparison went beyond its tolerance: shown as one line, exit status 1."""


class NotFiniteError(OneLineError):
    """A run gave values that are not finite (NaN or infinity): shown as one line, exit status 1, nothing written.

    The message names the first launch or component whose output is not finite.
    """


def one_line(text: object, limit: int = 400) -> str:
    """A text of anybody's on one line of at most ``limit`` characters.

    White space becomes single spaces, what does not print (control characters, bytes that were no UTF-8) is escaped,
    and what is too long loses its middle: a message begins with where and ends with what to do.
    """
    whole = str(text)
    # A text of many megabytes is cut before it is looked at.
    parts = [whole] if len(whole) <= 8 * limit else [whole[: 4 * limit], whole[-4 * limit :]]
    clean = [" ".join("".join(map(_printable, part)).split()) for part in parts]
    if len(clean) == 1 and len(clean[0]) <= limit:
        return clean[0]
    head = (limit - len(_GAP)) * 2 // 3
    return clean[0][:head] + _GAP + clean[-1][-(limit - len(_GAP) - head) :]


def _printable(character: str) -> str:
    if character.isprintable() or character.isspace():
        return character
    return character.encode("unicode_escape").decode("ascii")
