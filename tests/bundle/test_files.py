"""Files of an engine directory: hashes, and all or nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dipgo_deploy.bundle.files import hash_tree, sha256_file


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_hashes_are_by_relative_path(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.bin").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert sha256_file(tmp_path / "a" / "b.bin") == digest
    assert hash_tree(tmp_path) == {"a/b.bin": digest}
