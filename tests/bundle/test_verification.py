"""Files of large directories are hashed once, and again when their size, time or inode is another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dipgo_deploy.bundle import verification
from dipgo_deploy.bundle.files import sha256_file
from dipgo_deploy.bundle.verification import check_files
from dipgo_deploy.errors import UserError


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed; every directory counts as large."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verification, "SMALL_BYTES", -1)
    seen: list[str] = []

    def count(path: Path) -> str:
        seen.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(verification, "sha256_file", count)
    return seen


def directory(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    folder = tmp_path / "engine"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(name.encode() * 1000)
    return folder, {name: sha256_file(folder / name) for name in ("a", "b")}


def test_once_for_each_state_of_a_file(tmp_path: Path, hashed: list[str]) -> None:
    folder, digests = directory(tmp_path)
    check_files(folder, digests)
    check_files(folder, digests)
    assert hashed == ["a", "b"]
    os.utime(folder / "b", ns=(1, 1))
    check_files(folder, digests)
    assert hashed == ["a", "b", "b"]
    check_files(folder, digests, verify=True)
    assert hashed == ["a", "b", "b", "a", "b"]


def test_a_changed_file_is_found_and_never_remembered_as_right(tmp_path: Path, hashed: list[str]) -> None:
    folder, digests = directory(tmp_path)
    check_files(folder, digests)
    (folder / "a").write_bytes(b"x" * 1000)
    for _ in range(2):
        with pytest.raises(UserError, match="a: its sha256 differs"):
            check_files(folder, digests)


def test_what_is_remembered_may_be_lost_or_broken(tmp_path: Path, hashed: list[str]) -> None:
    folder, digests = directory(tmp_path)
    check_files(folder, digests)
    (memory,) = (tmp_path / "cache").rglob("*.json")
    for broken in (b"", b"[]", b'{"a": [1]}', b"\xff", b"[" * 10_000):
        memory.write_bytes(broken)
        hashed.clear()
        check_files(folder, digests)
        assert hashed == ["a", "b"]


def test_nowhere_to_remember_is_no_error(tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, digests = directory(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    check_files(folder, digests)
    check_files(folder, digests)
    assert hashed == ["a", "b"] * 2
