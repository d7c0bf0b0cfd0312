"""What the README and its companions say can be typed, and what they link to is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "engines" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)\)")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def command_lines() -> list[list[str]]:
    lines = "".join(blocks("bash")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("dipgo-")]


def click_command(name: str) -> click.Command:
    return import_module(f"dipgo_deploy.cli.{name.removeprefix('dipgo-')}").command


def leaf(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """The subcommand that a line calls, and the arguments left for it."""
    found, rest = click_command(arguments[0]), arguments[1:]
    while isinstance(found, click.Group):
        child = found.get_command(click.Context(found), rest[0])
        assert child is not None, f"{shlex.join(arguments)}: no subcommand {rest[0]}"
        found, rest = child, rest[1:]
    return found, rest


def test_there_are_commands_to_check() -> None:
    assert {line[0] for line in command_lines()} == {
        f"dipgo-{verb}" for verb in ("schedule", "export", "run", "compare", "build")
    }


@pytest.mark.parametrize("line", command_lines(), ids=shlex.join)
def test_every_option_exists(line: list[str]) -> None:
    command, rest = leaf(line)
    # Only parses: files that a line names need not be there, the commands check that themselves.
    context = command.make_context(line[0], list(rest))
    assert not context.args


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_scripts_and_schedules_named_are_there() -> None:
    named = re.findall(r"(?:tools|dipgo_deploy/assets)/[\w./-]+\.(?:sh|json)", README)
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name


def schedule_lines() -> Iterator[list[str]]:
    """The schedule commands that need no file of the reader's."""
    for line in command_lines():
        if line[0] == "dipgo-schedule" and line[1] != "import":
            yield line


def test_the_schedule_commands_do_what_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dipgo_deploy.cli.schedule import main

    (tmp_path / "dipgo_deploy").symlink_to(ROOT / "dipgo_deploy")
    monkeypatch.chdir(tmp_path)
    for line in schedule_lines():
        # `diff` says with its status that the two differ.
        assert main(line[1:]) == (1 if line[1] == "diff" else 0), shlex.join(line)
    shown = next(text for text in blocks("text") if "down_blocks.0" in text)
    printed = capsys.readouterr().out
    for row in shown.splitlines():
        assert row.strip() in printed, row


@pytest.mark.slow
def test_the_tutorial_runs_from_export_to_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dipgo_deploy").symlink_to(ROOT / "dipgo_deploy")
    monkeypatch.chdir(tmp_path)
    for line in command_lines():
        if line[0] == "dipgo-build" or line[1] in ("import", "diff", "show"):
            continue
        main = import_module(f"dipgo_deploy.cli.{line[0].removeprefix('dipgo-')}").main
        assert main(line[1:]) == 0, shlex.join(line)
    for name in ("sneaker.png", "grid.png", "classes.png"):
        assert (tmp_path / name).stat().st_size > 0
    (tmp_path / "sneaker.png").unlink()
    for snippet in blocks("python"):
        exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "sneaker.png").is_file()
