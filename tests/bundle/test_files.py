"""Files of an engine directory: hashes, and all or nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from dipgo_deploy.bundle.files import check_target, hash_tree, sha256_file, staged_directory
from dipgo_deploy.errors import UserError


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_hashes_are_by_relative_path(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.bin").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert sha256_file(tmp_path / "a" / "b.bin") == digest
    assert hash_tree(tmp_path) == {"a/b.bin": digest}


def test_a_finished_folder_takes_the_name(tmp_path: Path) -> None:
    target = tmp_path / "engines" / "x"
    with staged_directory(target) as stage:
        (stage / "manifest.json").write_text("{}")
        assert not target.exists()
    assert _names(target) == {"manifest.json"}
    assert _names(target.parent) == {"x"}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_folder_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), staged_directory(tmp_path / "x") as stage:
        (stage / "half").write_text("written")
        raise failure
    assert _names(tmp_path) == set()


def test_an_interrupted_overwrite_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.mkdir()
    (target / "manifest.json").write_text("old")
    with pytest.raises(RuntimeError), staged_directory(target, overwrite=True) as stage:
        (stage / "manifest.json").write_text("new")
        raise RuntimeError
    assert (target / "manifest.json").read_text() == "old"
    with staged_directory(target, overwrite=True) as stage:
        (stage / "manifest.json").write_text("new")
    assert (target / "manifest.json").read_text() == "new"
    assert _names(tmp_path) == {"x"}


def test_targets_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        check_target(tmp_path / "file", overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="exists; give another --engine-dir or --overwrite"):
        check_target(tmp_path / "home", overwrite=False)
    with pytest.raises(UserError, match="is not an engine directory"):
        check_target(tmp_path / "home", overwrite=True)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", overwrite=False)
    with pytest.raises(UserError, match="cannot be written"), staged_directory(tmp_path / "file" / "x"):
        pass
