"""Files read with a limit, files that appear whole or not at all, folders that one process at a time writes in."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from dipgo_deploy import arguments
from dipgo_deploy.errors import UserError

MAX_BYTES = 16 * 2**20
"""Of a document, where nothing else is said."""
# Of a name: what is written beside it has a longer one, and names end at 255 bytes.
_SHORT = 40
# What is written beside a file; `mkdtemp` has such names, too.
_ASIDE = re.compile(r"\.(.+)\.[0-9a-z_]{8}\.partial", re.DOTALL)
_LFS = b"version https://git-lfs"


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
        raise UserError(f"{path}: larger than {limit / 2**20:g} MiB, which no {what} is; give another file")
    return data


def unfit_file(path: Path) -> str | None:
    """What is in a file's place where it was not fetched, None for any other; raises OSError."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return "is a pipe or device, not a file"  # whose reading might never end
    with path.open("rb") as file:
        start = file.read(len(_LFS))
    if not start:
        return "is empty; fetch it again"
    return "is a pointer of Git LFS, not the file itself: run `git lfs pull`" if start == _LFS else None


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


def remove_unfinished(folder: Path, names: Collection[str]) -> None:
    """Remove what is beside files (or folders of frames) of these names because whoever wrote it was killed.

    Nobody may be writing them. Those whose name is too long to be told from another's stay.
    """
    for entry in folder.iterdir():
        found = _ASIDE.fullmatch(entry.name)
        if found is None or found[1] not in names or len(os.fsencode(found[1])) >= _SHORT:
            continue
        with contextlib.suppress(OSError):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all.

    Raises:
        UserError: it cannot be written (a full disk, no permission); nothing is left behind.
    """
    try:
        with written_whole(path) as file:
            file.write(data)
    except OSError as error:
        mebibytes = -(-memoryview(data).nbytes // 2**20)
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); it needs {mebibytes} MiB") from None


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
