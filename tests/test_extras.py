from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dipgo_deploy.extras import install

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'dipgo-deploy[cpu]'"),
        ({"url": "file:///a%20b/c", "dir_info": {"editable": True}}, "pip install -e '/a b/c[cpu]'"),
        ({"url": "file:///a/c", "dir_info": {}}, "pip install '/a/c[cpu]'"),
        (
            {"url": "file:///a/dipgo_deploy-1-py3-none-any.whl", "archive_info": {}},
            "pip install 'dipgo-deploy[cpu] @ file:///a/dipgo_deploy-1-py3-none-any.whl'",
        ),
        (
            {"url": "https://host/it.git", "vcs_info": {"vcs": "git"}},
            "pip install 'dipgo-deploy[cpu] @ git+https://host/it.git'",
        ),
    ],
)
def test_an_extra_comes_from_where_the_package_did(
    monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None, command: str
) -> None:
    record = SimpleNamespace(read_text=lambda name: None if origin is None else json.dumps(origin))
    monkeypatch.setattr(metadata, "distribution", lambda name: record)
    assert install("cpu") == command
    assert install("cpu", "gpu") == f"{command} or {command.replace('[cpu]', '[gpu]')}"


def test_of_a_clone_that_was_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert install("export") == f"pip install -e '{ROOT}[export]'"
