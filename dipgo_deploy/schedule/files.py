"""Reading a user's file with a size limit, and writing one whole or not at all."""

from __future__ import annotations

import os

from dipgo_deploy import arguments
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import written_whole

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
        with written_whole(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
