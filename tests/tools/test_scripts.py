from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("tools/setup.sh", "tools/demo.sh", "tools/test.sh", ".ci/run")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_run_and_stops_at_the_first_error(name: str) -> None:
    script = ROOT / name
    assert os.access(script, os.X_OK)
    assert "\nset -euo pipefail\n" in script.read_text()
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def checkout(folder: Path) -> Path:
    """A folder with the script and what it reads."""
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup.sh", folder / "tools")
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def set_up(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(folder / "tools" / "setup.sh"), *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def fake(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    old = fake(tmp_path / "old-python", "exit 1")
    result = set_up(folder, "cpu", PYTHON=str(old))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "Python 3.11 or newer is needed" in result.stderr
    assert not (folder / ".venv").exists()


def test_an_environment_of_an_old_python_is_refused(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    fake(folder / ".venv" / "bin" / "python", "exit 1")
    result = set_up(folder, "cpu")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and ".venv" in result.stderr


def test_what_is_installed_is_not_installed_again(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    log = tmp_path / "log"
    fake(folder / ".venv" / "bin" / "python", f'case "$1" in -m) echo "$@" >> {log};; esac')
    assert set_up(folder, "cpu,export").returncode == 0
    assert set_up(folder, "export").returncode == 0
    assert log.read_text().count("\n") == 1 and ".[cpu,export]" in log.read_text()
    assert set_up(folder, "cpu,test").returncode == 0
    assert log.read_text().count("\n") == 2
    (folder / "constraints.txt").write_text("click==1\n")
    assert set_up(folder, "cpu").returncode == 0
    assert log.read_text().count("\n") == 3


def test_a_failed_installation_is_tried_again(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    python = fake(folder / ".venv" / "bin" / "python", 'case "$1" in -m) exit 1;; esac')
    assert set_up(folder, "cpu").returncode == 1
    fake(python, "exit 0")
    result = set_up(folder, "cpu")
    assert result.returncode == 0 and "installing" in result.stdout


def test_another_environment_takes_its_own_constraints(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    log = tmp_path / "log"
    (folder / "lowest.txt").write_text("click==1\n")
    fake(folder / ".venv" / "lowest" / "bin" / "python", f'case "$1" in -m) echo "$@" >> {log};; esac')
    for _ in range(2):
        assert set_up(folder, "cpu", ".venv/lowest", "lowest.txt").returncode == 0
    assert log.read_text().count("\n") == 1 and "-c lowest.txt -e .[cpu]" in log.read_text()


def test_the_lowest_versions_are_those_that_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {}
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["cpu"]):
        name, _, version = requirement.partition(",")[0].partition(">=")
        declared[name] = version
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: lowest.get(name) for name in declared} == declared
