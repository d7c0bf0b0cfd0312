"""Reading a user's file with a size limit, and writing one whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile

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
