"""TensorRT's timing cache in a file that several builds may share."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.files import write_atomic


def attach(config: Any, path: Path) -> bool:
    """Give a builder config the cache in ``path``, an empty one where there is none.

    Returns False when the file was made by another version or GPU, or is damaged: the build then starts empty.

    Raises:
        UserError: the file cannot be read.
    """
    with _locked(path):
        data = _read(path)
    fits = True
    try:
        cache = config.create_timing_cache(data)
        fits = cache is not None and bool(config.set_timing_cache(cache, False))
    except (RuntimeError, TypeError, ValueError):
        fits = False
    if not fits:
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return fits


def merge(config: Any, path: Path) -> None:
    """Add what a build has learnt to the file: what other builds wrote meanwhile stays.

    Raises:
        UserError: the file cannot be written.
    """
    learnt = config.get_timing_cache()
    if learnt is None:
        return
    with _locked(path):
        data = _read(path)
        if data:
            # A cache of another version or GPU cannot be combined; this build's takes its place.
            with contextlib.suppress(RuntimeError, TypeError, ValueError):
                others = config.create_timing_cache(data)
                if others is not None:
                    learnt.combine(others, False)
        write_atomic(path, memoryview(learnt.serialize()))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f"{path.name}.lock").open("a")
    except OSError as error:
        raise UserError(f"--timing-cache {path}: cannot be used ({error.strerror}); give another file") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> bytes:
    if not path.exists():
        return b""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--timing-cache {path}: cannot be read ({error.strerror}); give another file") from None
