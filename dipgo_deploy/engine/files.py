"""One build at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from dipgo_deploy.errors import UserError


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
