"""Reading a user's file with a size limit, and writing one whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from typing import Any

from dipgo_deploy import arguments
from dipgo_deploy.errors import UserError

MAX_BYTES = 16 * 2**20


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_BYTES, what: str = "schedule") -> bytes:
    """The content of a regular file of at most ``limit`` bytes; otherwise a UserError that names the file.

    what: it should hold, for the message.
    """
    path = arguments.path("path", path)
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file")
        if not path.is_file():
            raise UserError(f"{path}: not a regular file")
        with path.open("rb") as file:
            data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)  # takes memory for all that it may read
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > limit:
        raise UserError(f"{path}: larger than {limit / 2**20:g} MiB, which no {what} is: give another file")
    return data


def strict_json(text: str | bytes, *, infinite: bool = False) -> Any:
    """The document of a JSON text, without what Python's reader takes beside JSON: NaN, infinity (as a word, or as a
    number that is too large for one) and repeated keys.

    infinite: take ``Infinity`` and ``-Infinity``, which Python's libraries write into the configurations of models.

    Raises:
        ValueError: it is none (``json.JSONDecodeError`` where the place is known).
        RecursionError: it is too deep.
    """
    constant = _infinity if infinite else _refuse_constant
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=constant, parse_float=_finite)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for name, value in pairs:
        if name in document:
            raise ValueError(f"the key {name[:60]!r} stands twice in one object")
        document[name] = value
    return document


def _finite(token: str) -> float:
    value = float(token)
    if math.isinf(value):
        raise ValueError(f"{token[:60]} is too large a number")
    return value


def _refuse_constant(token: str) -> Any:
    raise ValueError(f"{token} is no JSON number")


def _infinity(token: str) -> Any:
    return float(token) if token != "NaN" else _refuse_constant(token)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file under its final name only once it is complete (written aside, synced, renamed)."""
    path = arguments.path("path", path)
    try:
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(aside, 0o666 & ~umask)  # mkstemp's files are private; this one is an ordinary document
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
