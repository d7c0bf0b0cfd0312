"""Engine directories appear whole, one writer at a time, and only ever replace what was exported."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dipgo_deploy.bundle import staging
from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.bundle.staging import check_target, replaced, staged_directory
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import write_atomic
from dipgo_deploy.page.shell import new_page, written

EXPORTED = Path(__file__).parent / "format-4" / "engine"


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


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


def test_folders_made_for_a_target_go_with_it_if_nothing_else_came_in(tmp_path: Path) -> None:
    for kept in (False, True):
        with pytest.raises(RuntimeError), staged_directory(tmp_path / "a" / "b" / "x"):
            if kept:
                (tmp_path / "a" / "theirs").write_text("")
            raise RuntimeError
        assert [path.name for path in sorted(tmp_path.rglob("*"))] == (["a", "theirs"] if kept else [])


def test_an_interrupted_overwrite_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "x"
    shutil.copytree(EXPORTED, target)
    old = (target / "manifest.json").read_text()
    with pytest.raises(RuntimeError), staged_directory(target, overwrite=True) as stage:
        (stage / "manifest.json").write_text("new")
        raise RuntimeError
    assert (target / "manifest.json").read_text() == old
    with staged_directory(target, overwrite=True) as stage:
        (stage / "manifest.json").write_text("new")
    assert (target / "manifest.json").read_text() == "new"
    assert _names(tmp_path) == {"x"}


def test_an_engine_directory_with_somebodys_files_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "x"
    shutil.copytree(EXPORTED, target)
    (target / "plans").mkdir()
    (target / "plans" / "v00.plan").write_text("")
    check_target(target, overwrite=True)
    (target / "graphs" / "notes.txt").write_text("mine")
    (target / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"did not write \(graphs/notes.txt, link\)"):
        check_target(target, overwrite=True)
    with pytest.raises(UserError, match="did not write"), staged_directory(target, overwrite=True):
        pass
    assert (target / "graphs" / "notes.txt").read_text() == "mine"


def _with_page(folder: Path) -> Path:
    target = Path(shutil.copytree(EXPORTED, folder / "x"))
    (target / "report.html").write_bytes(written(new_page("x")[0]))
    return target


def test_a_page_goes_with_the_directory_that_it_showed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = (
        f"{tmp_path / 'x' / 'report.html'}: showed what the directory was before; removed, dipgo-report makes one of "
    )
    target = _with_page(tmp_path)
    with pytest.raises(RuntimeError), staged_directory(target, overwrite=True):
        raise RuntimeError
    assert (target / "report.html").exists() and not caplog.messages
    files = _names(target)
    replaced(target, Manifest.load(target), {})
    assert _names(target) == files - {"report.html"} and caplog.messages == [f"{line}what it is"]
    shutil.rmtree(target)
    _with_page(tmp_path)
    with staged_directory(target, overwrite=True) as stage:
        (stage / "new").write_text("")
    assert _names(target) == {"new"} and caplog.messages[1:] == [f"{line}what it is"]


def test_somebody_elses_page_is_not_removed(tmp_path: Path) -> None:
    target = _with_page(tmp_path)
    (target / "notes.html").write_text("<title>report</title>")
    with pytest.raises(UserError, match=r"did not write \(notes.html\)"):
        check_target(target, overwrite=True)


@pytest.mark.parametrize("text", ["{}", "old", '{"format_version": 2}'])
def test_any_folder_with_a_manifest_is_not_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="is not an engine directory that can be overwritten"):
        check_target(tmp_path, overwrite=True)


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with pytest.raises(UserError, match="exists; give another"), staged_directory(target) as stage:
        (stage / "new").write_text("")
        target.mkdir()
        (target / "theirs").write_text("kept")
    assert (target / "theirs").read_text() == "kept" and _names(tmp_path) == {"x"}


def test_a_second_writer_of_one_target_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with staged_directory(target) as first:
        (first / "mine").write_text("")
        with pytest.raises(UserError, match="another process is writing it"), staged_directory(target):
            pass
        assert (first / "mine").exists()
    with staged_directory(tmp_path / "y") as other:
        (other / "a").write_text("")
    assert _names(tmp_path) == {"x", "y"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_what_a_killed_process_left_goes_with_the_next_export(
    tmp_path: Path, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    # A process under nohup hands on that it does not hear SIGHUP.
    code = f"""
import signal
import time
from pathlib import Path
import click
from dipgo_deploy.bundle.staging import staged_directory
from dipgo_deploy.cli.common import entry_point

signal.signal(signal.SIGHUP, signal.SIG_DFL)

@click.command()
def command():
    with staged_directory(Path({str(tmp_path / "x")!r})) as stage:
        (stage / "half").write_bytes(bytes(2**20))
        print("ready", flush=True)
        time.sleep(60)

raise SystemExit(entry_point(command)([]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    with pytest.raises(UserError, match="another process is writing it"), staged_directory(tmp_path / "x"):
        pass
    assert not caplog.messages
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert len(_names(tmp_path)) == 1
    else:
        assert process.returncode == 128 + number and said.count("\n") == 1
        assert _names(tmp_path) == set()
    left = _names(tmp_path)
    with staged_directory(tmp_path / "y") as other:  # another target: it is not for this one to remove
        assert _names(tmp_path) == {*left, other.name}
    with staged_directory(tmp_path / "x") as stage:
        (stage / "whole").write_text("")
    assert _names(tmp_path) == {"x", "y"} and _names(tmp_path / "x") == {"whole"}
    lines = [f"{tmp_path / name}: left by a process that was killed; removed (1.0 MiB)" for name in left]
    assert caplog.messages == lines


def test_a_folder_that_was_taken_for_a_leftover_before_it_was_held_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, tries = staging.hold, []

    def late(folder: Path) -> int | None:
        tries.append(folder)
        if len(tries) == 1:
            folder.rmdir()  # as another process does between the two
        return None if len(tries) == 2 else hold(folder)

    monkeypatch.setattr(staging, "hold", late)
    with staging.scratch_directory(tmp_path / "x") as scratch:
        assert _names(tmp_path) == {scratch.name} and len(tries) == 3
    assert _names(tmp_path) == set()


def test_a_kill_between_two_renames_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "x"
    shutil.copytree(EXPORTED, target)
    monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    with staged_directory(target, overwrite=True) as stage:
        (stage / "new").write_text("")
    assert _names(target) == {"new"} and _names(tmp_path) == {"x"}
    shutil.rmtree(target)
    shutil.copytree(EXPORTED, tmp_path / ".x.old-abc")  # as a kill between them leaves it
    with pytest.raises(UserError, match="exists; give another"), staged_directory(target):
        pass
    assert (target / "manifest.json").is_file() and _names(tmp_path) == {"x"}
    assert caplog.messages == [f"{target}: a process was killed while it replaced it; it is back as it was"]


def test_the_longest_names_work(tmp_path: Path) -> None:
    target = tmp_path / ("\u00e9" * 127)
    with staged_directory(target) as stage:
        (stage / "a").write_text("")
    assert target.is_dir()
    write_atomic(tmp_path / ("b" * 255), b"1")
    assert len(_names(tmp_path)) == 2


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written .No space left"), staged_directory(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert _names(tmp_path) == set()


def test_targets_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        check_target(tmp_path / "file", overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="exists; give another --engine-dir or --overwrite"):
        check_target(tmp_path / "home", overwrite=False)
    with pytest.raises(UserError, match="is not an engine directory that can be overwritten"):
        check_target(tmp_path / "home", overwrite=True)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", overwrite=False)
    with pytest.raises(UserError, match="cannot be written"), staged_directory(tmp_path / "file" / "x"):
        pass
