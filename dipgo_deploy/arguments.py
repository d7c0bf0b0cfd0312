"""The types of what a caller of the Python interface gives: what is of another is refused by the argument's name."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from dipgo_deploy.errors import UserError

_SHOWN = 60  # characters of a wrong value


def wrong(name: str, value: object, needs: str) -> UserError:
    """The error for a value of the wrong type."""
    try:
        shown = repr(value)
    except Exception:  # whatever the caller's own class does
        shown = ""
    shown = shown if 0 < len(shown) <= _SHOWN else "a value"
    return UserError(f"{name}: {shown} of type {type(value).__name__}, needs {needs}")


def path(name: str, value: object) -> Path:
    """A path from ``str`` or ``os.PathLike``."""
    return Path(path_text(name, value))


def path_text(name: str, value: object) -> str:
    """The text of ``str`` or ``os.PathLike`` as it was given, with a ``./`` in front."""
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise wrong(name, value, "a path (str or os.PathLike)")
    if "\0" in text:
        raise UserError(f"{name}: {text!r} has a zero byte, which no path can have")
    return text


def whole(name: str, value: object, *, least: int | None = None) -> int:
    """An integer (also numpy's, but no bool), of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise wrong(name, value, "a whole number")
    number = int(value)
    if least is not None and number < least:
        raise UserError(f"{name} {number}: must be at least {least}")
    return number


def number(name: str, value: object) -> float:
    """A finite number (also numpy's, but no bool) that float32 can hold, as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong(name, value, "a number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not abs(found) <= 3.4e38:  # NaN, too
        raise UserError(f"{name}: {found}, must be a finite number that float32 can hold")
    return found


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise wrong(name, value, "True or False")
    return value


def text(name: str, value: object) -> str:
    """A ``str`` that UTF-8 can write: no half of a surrogate pair, which stands for a byte that was no UTF-8."""
    if not isinstance(value, str):
        raise wrong(name, value, "text (str)")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a surrogate pair, {code:#x}"
        raise UserError(f"{name}: not UTF-8 text ({what} at character {error.start}); give it in UTF-8") from None
    return value


def choice(name: str, value: object, choices: Sequence[str]) -> str:
    """One of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name} {_short(value)}: choose one of {', '.join(choices)}")
    return value


def mapping(name: str, value: object) -> Mapping[str, Any]:
    """A mapping whose keys are text."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise wrong(name, value, "a mapping from names to values")
    return value


def items(name: str, value: object, needs: str) -> list[Any]:
    """One value for a ``str`` or a single thing, or all of a sequence or one-dimensional numpy array, in order."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview)):
        return list(value)
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
        return list(value)  # type: ignore[call-overload]
    if isinstance(value, (bytes, bytearray, memoryview, Mapping, set, frozenset)) or getattr(value, "ndim", 0) > 1:
        raise wrong(name, value, needs)
    return [value]


def instance(name: str, value: object, of: type | tuple[type, ...], needs: str) -> None:
    """Refuse what is no instance of ``of``."""
    if not isinstance(value, of):
        raise wrong(name, value, needs)


def function(name: str, value: object) -> Callable[..., Any]:
    """Something that can be called."""
    if not callable(value):
        raise wrong(name, value, "a function")
    return value


def _short(value: object) -> str:
    return repr(value)[:_SHOWN] if isinstance(value, (str, int, float)) else f"of type {type(value).__name__}"
