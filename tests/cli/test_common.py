from __future__ import annotations

import json

import click
import pytest

from dipgo_deploy import __version__
from dipgo_deploy.cli import common
from dipgo_deploy.cli.main import main as dipgo
from dipgo_deploy.errors import ToleranceError, UserError


def run_raising(error: BaseException) -> int:
    @click.command()
    def command() -> None:
        raise error

    return common.entry_point(command)([])


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("s.json: keep: step 3\nis wrong"), 2, "error: s.json: keep: step 3 is wrong\n"),
        (ToleranceError("step 3 is off"), 1, "error: step 3 is off\n"),
        (click.UsageError("no such option"), 2, "error: no such option\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            2,
            "error: this needs the package torch, which is not installed: pip install 'dipgo-deploy[export]'\n",
        ),
        (
            ModuleNotFoundError("No module named 'onnxruntime.capi'", name="onnxruntime.capi"),
            2,
            "error: this needs the package onnxruntime, which is not installed: "
            "pip install 'dipgo-deploy[cpu]' or pip install 'dipgo-deploy[gpu]'\n",
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


def test_an_interruption_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip() == "error: interrupted"


@pytest.mark.parametrize("error", [RuntimeError("bug"), ModuleNotFoundError("No module named 'x'", name="x")])
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
