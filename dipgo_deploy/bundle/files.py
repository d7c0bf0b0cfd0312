"""Files of an engine directory: hashes, and writes that appear complete or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dipgo_deploy.errors import UserError


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tree(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder``, by POSIX path relative to it, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


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


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that exists, before any work is done.

    Raises:
        UserError: ``target`` exists and ``overwrite`` is off, or it is a file, or holds something that is not an
            engine directory.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise UserError(f"{target}: exists and is not a folder; give another --engine-dir")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target}: exists; give another --engine-dir or --overwrite")
    if not (target / "manifest.json").is_file():
        raise UserError(f"{target}: is not an engine directory, so it is not overwritten; give another --engine-dir")


@contextlib.contextmanager
def staged_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name when the block ends without an error.

    All files are flushed to disk before the rename; on an error or Ctrl-C nothing is left behind, and an older
    ``target`` stays as it was.

    Raises:
        UserError: see ``check_target``; or the parent folder cannot be written.
    """
    check_target(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be written ({error.strerror}); give another --engine-dir") from None
    try:
        yield stage
        _sync_tree(stage)
        stage.chmod(0o755)
        _swap(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _swap(stage: Path, target: Path) -> None:
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        target.replace(old)
        stage.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        stage.replace(target)
    _sync(target.parent)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
