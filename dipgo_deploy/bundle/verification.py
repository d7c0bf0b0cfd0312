"""Are the files of an engine directory those that were exported? Small directories are hashed at every load.

Large ones are hashed once: what was found of a file is remembered, with its size, time of change and inode, in
``$XDG_CACHE_HOME/dipgo_deploy/verified`` (``~/.cache`` by default). Where nothing can be remembered, they are hashed at
every load.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from dipgo_deploy.bundle.files import sha256_file
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import write_atomic

# Bytes of a whole directory; hashing that many takes some 40 ms.
SMALL_BYTES = 64 * 2**20
_MOST_REMEMBERED = 4 * 2**20


def check_files(engine_dir: Path, digests: Mapping[str, str], *, verify: bool = False) -> None:
    """Refuse an engine directory in which a file is missing or was changed.

    Args:
        engine_dir: the directory; its files may be links.
        digests: sha256 of every file, by path relative to the directory.
        verify: hash every file, whatever is remembered.

    Raises:
        UserError: names the file.
    """
    states = {name: _state(engine_dir / name) for name in digests}
    small = sum(state[0] for state in states.values()) <= SMALL_BYTES
    memory = None if small else _memory_of(engine_dir)
    known = {} if verify or memory is None else _read(memory)
    found = {}
    for name, digest in digests.items():
        path = engine_dir / name
        remembered = known.get(name)
        actual = remembered[1] if remembered is not None and remembered[0] == states[name] else _hash(path)
        if actual != digest:
            raise UserError(f"{path}: its sha256 differs from the manifest's; export the engine directory again")
        found[name] = (states[name], actual)
    if memory is not None and found != known:
        _write(memory, found)


def _state(path: Path) -> tuple[int, int, int]:
    """Size, time of change in nanoseconds, and inode."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: missing; copy the engine directory again or export it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); look at its permissions") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: is not a regular file; copy the engine directory again or export it again")
    return found.st_size, found.st_mtime_ns, found.st_ino


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); look at its permissions") from None


_Known = dict[str, tuple[tuple[int, int, int], str]]


def _memory_of(engine_dir: Path) -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        return None
    key = hashlib.sha256(str(engine_dir.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return Path(base) / "dipgo_deploy" / "verified" / f"{key}.json"


def _read(memory: Path) -> _Known:
    try:
        if memory.stat().st_size > _MOST_REMEMBERED:
            return {}
        rows = json.loads(memory.read_text(encoding="utf-8"))
        return {name: ((int(size), int(time), int(inode)), str(sha)) for name, (size, time, inode, sha) in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}  # only a saving of time is lost


def _write(memory: Path, known: _Known) -> None:
    rows = {name: [*state, sha] for name, (state, sha) in known.items()}
    with contextlib.suppress(OSError, UserError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(memory, json.dumps(rows).encode())
