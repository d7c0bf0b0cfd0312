"""Files that appear whole or not at all, and folders that one process at a time writes in."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dipgo_deploy.errors import UserError

# Of a name: what is written beside it has a longer one, and names end at 255 bytes.
_SHORT = 40


def short_name(path: Path) -> str:
    """The beginning of a file's name, for what is written beside it."""
    return os.fsencode(path.name)[:_SHORT].decode("utf-8", "ignore")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that is open for writing beside ``path`` and takes its name when the block ends without an error.

    Raises:
        OSError: it cannot be written; nothing is left behind then, nor after any other exception.
    """
    aside = path.with_name(f".{short_name(path)}.{secrets.token_hex(4)}.partial")
    # Opened with the usual mode, so that the process's umask decides.
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(aside)


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all.

    Raises:
        UserError: it cannot be written (a full disk, no permission); nothing is left behind.
    """
    try:
        with written_whole(path) as file:
            file.write(data)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); it needs {memoryview(data).nbytes / 2**20:.0f} MiB"
        ) from None


def hold(folder: Path) -> int | None:
    """A lock on a folder for as long as the descriptor that is returned stays open; None if another process has it.

    Raises:
        OSError: the folder cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def sole_user(folder: Path, option: str) -> Iterator[None]:
    """Make a work folder, and keep other processes out of it for as long as the block runs.

    option: what the folder is given by, for messages.

    Raises:
        UserError: another process works there, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = hold(folder)
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be used ({error.strerror or error}); give another folder") from None
    if lock is None:
        raise UserError(f"{option} {folder}: another process works there; wait for it, or give another folder")
    try:
        yield
    finally:
        os.close(lock)
