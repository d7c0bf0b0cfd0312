"""The application for Ray Serve, with a stand-in for Ray's own module."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from toy_engine import Toy, build

import dipgo_deploy.serve
from dipgo_deploy.errors import UserError


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Ray is told."""
    told: dict[str, Any] = {}
    ray = ModuleType("ray")

    def ingress(build: Any) -> Any:
        told["build"] = build
        return lambda cls: cls

    def deployment(**options: Any) -> Any:
        told["options"] = options
        return lambda cls: SimpleNamespace(bind=lambda: ("bound", cls))

    vars(ray)["serve"] = SimpleNamespace(ingress=ingress, deployment=deployment)
    monkeypatch.setitem(sys.modules, "ray", ray)
    return told


def test_a_replica_serves_what_the_environment_says(
    built: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi", reason="needs the extra serve")
    pytest.importorskip("prometheus_client", reason="needs the extra serve")
    from starlette.testclient import TestClient

    monkeypatch.setenv("DIPGO_SERVE_DIRECTORIES", f"clothes={build(tmp_path / 'toy', Toy(kind='class'))}")
    monkeypatch.setenv("DIPGO_SERVE_BACKEND", "cpu")
    monkeypatch.setenv("DIPGO_SERVE_MAX_QUEUE", "7")
    assert dipgo_deploy.serve.app[0] == "bound"
    assert built["options"]["max_ongoing_requests"] == 7 + 64, "more come in than may wait, so that some are refused"
    monkeypatch.delenv("DIPGO_SERVE_DIRECTORIES")  # a replica may be on a machine without it
    with TestClient(built["build"]()) as client:
        answer = client.post("/v1/images/generations", json={"class_label": "boot"})
        assert answer.status_code == 200 and answer.json()["model"] == "clothes"


def test_without_directories_it_is_said(built: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIPGO_SERVE_DIRECTORIES", raising=False)
    with pytest.raises(UserError, match=r"environment, DIPGO_SERVE_\*: directories"):
        dipgo_deploy.serve.app  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        dipgo_deploy.serve.other  # noqa: B018
