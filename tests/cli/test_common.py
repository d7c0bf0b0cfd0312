from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from rich.console import Console

import dipgo_deploy
from dipgo_deploy import __version__
from dipgo_deploy.cli import common
from dipgo_deploy.cli.main import command as dipgo_group
from dipgo_deploy.cli.main import main as dipgo
from dipgo_deploy.errors import NotFiniteError, ToleranceError, UserError, one_line
from dipgo_deploy.extras import install

ASSETS = Path(dipgo_deploy.__file__).parent / "assets"


def run_raising(error: BaseException) -> int:
    @click.command()
    def command() -> None:
        raise error

    return common.entry_point(command)([])


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("s.json: keep: evaluation 3\nis wrong"), 2, "error: s.json: keep: evaluation 3 is wrong\n"),
        (ToleranceError("evaluation 3 is off"), 1, "error: evaluation 3 is off\n"),
        (NotFiniteError("launch 3 is off"), 1, "error: launch 3 is off\n"),
        (UserError("a\x1b[2Jb\udce9\u202e"), 2, "error: a\\x1b[2Jb\\udce9\\u202e\n"),
        (PermissionError(13, "Permission denied", "x.json"), 2, "error: x.json: Permission denied\n"),
        (IsADirectoryError(21, "Is a directory", b"x"), 2, "error: x: Is a directory\n"),
        (OSError(28, "No space left on device"), 1, "error: output cannot be written: No space left on device\n"),
        (MemoryError(), 1, "error: not enough memory; use a machine with more, or ask for less at once\n"),
        (click.UsageError("no such option"), 2, "error: no such option\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            2,
            f"error: this needs the package torch, which is not installed; {install('export')}\n",
        ),
        (
            ModuleNotFoundError("No module named 'onnxruntime.capi'", name="onnxruntime.capi"),
            2,
            f"error: this needs the package onnxruntime, which is not installed; {install('cpu', 'gpu')}\n",
        ),
    ],
)
def test_a_mistake_is_one_line_and_a_status(
    capsys: pytest.CaptureFixture[str], error: Exception, status: int, line: str
) -> None:
    assert run_raising(error) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == line


def test_a_long_message_keeps_its_ends():
    message = str(UserError("file: " + "x" * 10_000_000 + ": do this"))
    assert len(message) == 1000
    assert message.startswith("file: xxx") and message.endswith("xxx: do this") and "xx ... xx" in message
    assert one_line("a\n\tb " * 10, 20) == "a b a b a  ... b a b"
    assert one_line("\x00" * 10_000_000, 100).startswith("\\x00\\x00")


def run_process(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    code = "import sys; from dipgo_deploy.cli.main import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, **options)


SHOW = ("schedule", "show", str(ASSETS / "schedules/fashion-sd-ddim50.json"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [SHOW, (*SHOW, "--json"), ("--version",), ("--help",)])
def test_output_that_cannot_be_written_is_said(arguments):
    with open("/dev/full", "wb") as full:
        process = run_process(*arguments, stdout=full)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    lines = said.decode().splitlines()
    # With --json what is for people goes to stderr, too.
    assert [line for line in lines if "error" in line] == lines[-1:]
    assert "cannot be written: No space left on device" in lines[-1]
    with open("/dev/full", "wb") as full:
        options: dict[str, Any] = {"stdout": subprocess.DEVNULL}
        code = "import sys; from dipgo_deploy.cli.main import main; sys.exit(main(['schedule', 'show', 'none.json']))"
        assert subprocess.run([sys.executable, "-c", code], stderr=full, timeout=60, **options).returncode == 2


def test_a_reader_that_goes_away_ends_it_quietly():
    read, write = os.pipe()
    os.close(read)
    process = run_process(*SHOW, stdout=write)
    os.close(write)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, b"")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_that_is_not_utf8_gets_what_it_can_show(encoding):
    process = run_process(*SHOW, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": encoding})
    shown, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, b"")
    assert "down_blocks.0  #......#" in shown.decode(encoding)


def test_a_name_that_is_not_utf8_is_escaped():
    process = run_process("schedule", "show", os.fsdecode(b"caf\xe9.json"), stdout=subprocess.PIPE)
    shown, said = process.communicate(timeout=60)
    assert (process.returncode, shown, said) == (2, b"", said) and said.startswith(
        b"error: caf\\udce9.json: no such file"
    )


def test_an_interruption_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip() == "error: interrupted"


@pytest.mark.parametrize(
    "error", [RuntimeError("bug"), OSError("bug"), ModuleNotFoundError("No module named 'x'", name="x")]
)
def test_our_own_bugs_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_raising(error)


def test_a_command_can_ask_for_a_status() -> None:
    @click.command()
    @click.pass_context
    def command(ctx: click.Context) -> None:
        ctx.exit(1)

    assert common.entry_point(command)([]) == 1


def test_json_goes_to_stdout_and_the_rest_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    @common.json_option
    def command(as_json: bool) -> None:
        common.human_console(as_json).print("hello")
        common.emit({"answer": 42}, as_json)

    main = common.entry_point(command)
    assert main(["--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"answer": 42}
    assert captured.err == "hello\n"
    assert main([]) == 0
    assert capsys.readouterr().out == "hello\n"


def test_dipgo_lists_its_verbs_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert dipgo(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in ("schedule", "export", "run", "compare"):
        assert f"\n  {verb} " in text
    assert "Examples:\n" in text
    assert dipgo(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f" {__version__}\n")
    assert dipgo(["nonsense"]) == 2
    assert capsys.readouterr().err == "error: No such command 'nonsense'.\n"


def test_dipgo_runs_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert dipgo(["schedule", "--help"]) == 0
    assert "deepcache" in capsys.readouterr().out


@pytest.mark.parametrize("quiet", [(), ("-q",)])
def test_progress_has_its_time_and_quiet_has_none(capsys: pytest.CaptureFixture[str], quiet: tuple[str, ...]) -> None:
    @click.command()
    @common.quiet_option
    def command() -> None:
        console = common.human_console(False)
        with common.stages(console, "starting", lines=True) as stage:
            stage("tracing")
            stage("tracing")
        with common.stages(console, "starting") as stage:
            stage("not shown where there is no terminal")
        console.print("the result")

    assert common.entry_point(command)(list(quiet)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "the result" and len(lines) == (1 if quiet else 2)
    assert quiet or re.fullmatch(r"\[ +\d+\.\d s\] tracing", lines[0])


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_a_terminal_sees_how_long_a_stage_takes(quiet: tuple[str, ...]) -> None:
    shown = io.StringIO()

    @click.command()
    @common.quiet_option
    def command() -> None:
        with common.stages(Console(file=shown, force_terminal=True, width=120), "starting") as stage:
            stage("tracing")

    assert common.entry_point(command)(list(quiet)) == 0
    assert bool(re.search(r"tracing.*0:00:00", shown.getvalue())) is not bool(quiet)
    assert bool(shown.getvalue()) is not bool(quiet)


def test_every_command_that_takes_long_can_be_quiet() -> None:
    for verb in ("optimize", "export", "build", "calibrate", "search", "run", "compare", "report"):
        command = dipgo_group.get_command(click.Context(dipgo_group), verb)
        assert any("--quiet" in param.opts for param in command.params), verb
