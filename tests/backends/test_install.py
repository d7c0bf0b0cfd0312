from __future__ import annotations

from importlib import metadata

import pytest

from dipgo_deploy.backends import install
from dipgo_deploy.errors import UserError


@pytest.mark.parametrize(
    ("installed", "result"),
    [((), None), (("onnxruntime",), "onnxruntime"), (("onnxruntime-gpu",), "onnxruntime-gpu")],
)
def test_at_most_one_is_fine(monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], result: str | None) -> None:
    _pretend(monkeypatch, installed)
    assert install.check_onnxruntime_installation() == result


def test_two_are_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, ("onnxruntime", "onnxruntime-gpu"))
    with pytest.raises(UserError) as caught:
        install.check_onnxruntime_installation()
    assert "onnxruntime and onnxruntime-gpu are both installed" in str(caught.value)
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in str(caught.value)
    assert "[gpu]'" in str(caught.value)


def _pretend(monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...]) -> None:
    def distribution(name: str) -> object:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return object()

    monkeypatch.setattr(install.metadata, "distribution", distribution)
