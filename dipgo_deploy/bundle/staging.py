"""An engine directory appears under its name when it is complete, and takes the place only of what was exported."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from dipgo_deploy.bundle.manifest import MANIFEST_NAME, Manifest
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import hold, short_name
from dipgo_deploy.page.maker import is_own_page

# What ``dipgo-build`` adds to a directory.
PLANS = "plans"

_log = logging.getLogger(__name__)

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that exists, before any work is done.

    Raises:
        UserError: ``target`` exists and ``overwrite`` is off, or it is a file, or holds anything that dipgo-export and
            dipgo-build did not write, but for pages that show it.
    """
    try:
        if not target.exists() and not target.is_symlink():
            return
        if not target.is_dir() or target.is_symlink():
            raise UserError(f"{target}: exists and is not a folder; give another --engine-dir")
        if not any(target.iterdir()):
            return
        if not overwrite:
            raise UserError(f"{target}: exists; give another --engine-dir or --overwrite")
        _check_own(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be read ({error.strerror or error}); give another --engine-dir") from None


def _check_own(target: Path) -> None:
    try:
        manifest = Manifest.load(target)
    except UserError as error:
        raise UserError(
            f"{target}: is not an engine directory that can be overwritten, remove it yourself or give another "
            f"--engine-dir ({error})"
        ) from None
    own = {MANIFEST_NAME, *manifest.files, *(page.name for page in _pages(target))}
    paths = (path.relative_to(target) for path in target.rglob("*") if path.is_symlink() or not path.is_dir())
    others = sorted(path.as_posix() for path in paths if path.as_posix() not in own and path.parts[0] != PLANS)
    if others:
        names = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise UserError(
            f"{target}: holds what dipgo-export did not write ({names}), which would go with it; move it away or give "
            "another --engine-dir"
        )


@contextlib.contextmanager
def staged_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name when the block ends without an error.

    All files are flushed to disk before the rename. On an error, Ctrl-C or a signal that ends the process nothing is
    left behind, also no folder that was made for ``target`` to lie in, and an older ``target`` stays as it was. What a
    killed process left is removed by the next one that writes the same target, see ``remove_leftovers``. Pages that
    showed the older ``target`` go with it, which is said.

    Raises:
        UserError: see ``check_target``; another process is writing the target; or it cannot be written.
    """
    remove_leftovers(target)
    check_target(target, overwrite=overwrite)
    with _parents_made(target), scratch_directory(target) as stage:
        if any(_is_held(other) for other in _beside(target, "partial") if other != stage):
            raise UserError(f"{target}: another process is writing it; wait for it, or give another --engine-dir")
        try:
            yield stage
            _sync_tree(stage)
            stage.chmod(0o755)
            check_target(target, overwrite=overwrite)
            pages = _pages(target)
            _swap(stage, target)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES):
                raise
            raise UserError(f"{target}: cannot be written ({error.strerror}); give another --engine-dir") from None
    for page in pages:
        _log.warning("%s: showed what the directory was before; removed, dipgo-report makes one of what it is", page)


def _pages(target: Path) -> list[Path]:
    """The pages of this package that stand beside a manifest, such as ``dipgo-optimize`` writes one."""
    return sorted(path for path in target.glob("*.html") if is_own_page(path))


@contextlib.contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that is gone when the block ends; what a killed process left goes with the next one
    that writes the same target. Raises UserError where none can be made."""
    try:
        scratch, lock = _held_folder(target)
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be written ({error.strerror}); give another --engine-dir") from None
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def _held_folder(target: Path) -> tuple[Path, int]:
    """A new folder beside ``target``, and the lock that says that this process lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(target, "partial"), dir=target.parent))
        with contextlib.suppress(FileNotFoundError):
            lock = hold(folder)
            if lock is not None and folder.exists():
                return folder, lock
            if lock is not None:
                os.close(lock)
        # Another process took it for a leftover before it was held.
        with contextlib.suppress(OSError):
            folder.rmdir()


def replaced(engine_dir: Path, manifest: Manifest, files: Mapping[str, bytes], gone: Collection[str] = ()) -> None:
    """Give an engine directory another manifest and other contents of some of its files, all at once.

    All other files stay what they are, without being copied where the file system has links; pages go.

    manifest: with the digests of the files as they will be. gone: files that it has no more. All names are of files
    beside the manifest.

    Raises:
        UserError: see ``staged_directory``.
    """
    changed = {MANIFEST_NAME, *files, *gone, *(page.name for page in _pages(engine_dir))}
    with staged_directory(engine_dir, overwrite=True) as stage:
        shutil.copytree(
            engine_dir,
            stage,
            symlinks=True,
            dirs_exist_ok=True,
            copy_function=_link,
            ignore=lambda folder, names: changed & set(names) if Path(folder) == engine_dir else set(),
        )
        for name, content in {**files, MANIFEST_NAME: manifest.dumps().encode()}.items():
            (stage / name).write_bytes(content)


def keep_plans(engine_dir: Path, stage: Path) -> None:
    """Put the engines of a directory into its successor, without copying them where the file system has links."""
    if (engine_dir / PLANS).is_dir():
        shutil.copytree(engine_dir / PLANS, stage / PLANS, symlinks=True, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links, or a file that others may not be linked to
        shutil.copy2(source, target, follow_symlinks=False)


@contextlib.contextmanager
def _parents_made(target: Path) -> Iterator[None]:
    """The folders that ``target`` lies in exist; those made for it go again on an error, as far as they are empty."""
    made: list[Path] = []
    try:
        made += [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be written ({error.strerror}); give another --engine-dir") from None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def _is_held(folder: Path) -> bool:
    """Whether another process holds a folder; one that nobody holds is not kept."""
    try:
        lock = hold(folder)
    except OSError:
        return False  # gone meanwhile
    if lock is None:
        return True
    os.close(lock)
    return False


def _prefix(target: Path, kind: str) -> str:
    return f".{short_name(target)}.{kind}-"


def _beside(target: Path, kind: str) -> list[Path]:
    """Folders that exports to this target made."""
    try:
        with os.scandir(target.parent) as found:
            return [Path(entry.path) for entry in found if entry.name.startswith(_prefix(target, kind))]
    except OSError:
        return []


def remove_leftovers(target: Path) -> None:
    """Finish what killed processes left beside ``target``, and say so: an old directory without a new one goes back,
    all else is removed. What a living process holds stays."""
    for kind in ("partial", "old"):  # whoever writes the target holds a partial one also while it makes an old one
        for folder in _beside(target, kind):
            try:
                lock = hold(folder)
            except OSError:
                continue  # gone meanwhile
            if lock is None:
                return
            try:
                _finish(folder, target, back=kind == "old" and (folder / MANIFEST_NAME).is_file())
            finally:
                os.close(lock)


def _finish(folder: Path, target: Path, *, back: bool) -> None:
    if back and not target.exists():
        with contextlib.suppress(OSError):
            folder.rename(target)
            _log.warning("%s: a process was killed while it replaced it; it is back as it was", target)
            return
    nbytes = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and path.lstat().st_nlink == 1)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        _log.warning("%s: left by a process that was killed, and cannot be removed; remove it yourself", folder)
    else:
        _log.warning("%s: left by a process that was killed; removed (%.1f MiB)", folder, nbytes / 2**20)


def _swap(stage: Path, target: Path) -> None:
    if not target.exists():
        stage.rename(target)
    elif not _exchange(stage, target):
        # Where the file system cannot exchange two names there is none between the two renames (``remove_leftovers``).
        old = Path(tempfile.mkdtemp(prefix=_prefix(target, "old"), dir=target.parent))
        target.replace(old)
        try:
            stage.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; False where that cannot be done here."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


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
