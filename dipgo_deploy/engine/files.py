"""Files that appear complete or not at all, and one build at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dipgo_deploy.errors import UserError


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file aside, flush it to disk and rename it.

    Raises:
        UserError: it cannot be written (a full disk, no permission); nothing is left behind.
    """
    try:
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(aside, 0o666 & ~umask)  # mkstemp's files are private
            os.replace(aside, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); it needs {memoryview(data).nbytes / 2**20:.0f} MiB"
        ) from None


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other builds out of it for as long as the block runs.

    Raises:
        UserError: another build runs there, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); copy the engine directory") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another dipgo-build is writing there; wait for it to finish") from None
        for left in folder.glob(".*.partial"):  # of a build that was killed
            left.unlink(missing_ok=True)
        yield
