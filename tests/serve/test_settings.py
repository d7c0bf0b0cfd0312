"""What a server is told by the environment, and tokens."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from dipgo_deploy.cli.serve import command as serve
from dipgo_deploy.cli.triton import command as triton
from dipgo_deploy.errors import UserError
from dipgo_deploy.serve.settings import Settings, from_environment, read_key


def test_the_environment_says_what_options_do(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(" token\n")
    given = {"DIRECTORIES": "a:b=c", "THREADS": "2", "VERIFY": "1", "MAX_QUEUE": "7", "WINDOW": "0.5"}
    environment = {f"DIPGO_SERVE_{name}": value for name, value in given.items()} | {"HOME": "x"}
    known = Settings(directories=("a", "b=c"), threads=2, verify=True, max_queue=7, window=0.5)
    assert from_environment(environment) == known
    keyed = {"DIPGO_SERVE_DIRECTORIES": "a", "DIPGO_SERVE_API_KEY_FILE": str(tmp_path / "key")}
    assert from_environment(keyed).api_key == "token"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "directories"),
        ({"DIRECTORIES": "a", "THREADS": "none"}, "threads"),
        ({"DIRECTORIES": "a", "TREADS": "1"}, "treads"),
        ({"DIRECTORIES": "a", "MAX_QUEUE": "0"}, "max_queue"),
        ({"DIRECTORIES": "a", "WINDOW": "nan"}, "window"),
        ({"DIRECTORIES": "a", "API_KEY": "a", "API_KEY_FILE": "b"}, "give one of the two"),
    ],
)
def test_what_the_environment_says_wrong(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_environment({f"DIPGO_SERVE_{name}": value for name, value in environment.items()})


@pytest.mark.parametrize(
    ("command", "needed"), [(serve, ["engine"]), (triton, ["--engine-dir", "engine", "-o", "repository"])]
)
def test_options_have_the_settings_defaults(command: click.Command, needed: list[str]) -> None:
    given = command.make_context("command", needed).params
    options = {("window" if name == "batch_window" else name): value for name, value in given.items()}
    defaults = {name: field.default for name, field in Settings.model_fields.items() if not field.is_required()}
    both = options.keys() & defaults.keys()
    assert both >= {"backend", "threads", "window", "max_queue"}
    assert {name: options[name] for name in both} == {name: defaults[name] for name in both}


@pytest.mark.parametrize("content", ["", " \n", "a b", "é", "a\0b"])
def test_no_tokens(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)
    with pytest.raises(UserError, match="--api-key-file .*is no token"):
        read_key(tmp_path / "key", None)
    with pytest.raises(UserError, match="DIPGO_SERVE_API_KEY: is no token"):
        read_key(None, content)
    with pytest.raises(UserError, match="no such file"):
        read_key(tmp_path / "none", None)
    assert read_key(None, None) is None
