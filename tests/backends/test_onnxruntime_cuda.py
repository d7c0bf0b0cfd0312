from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from dipgo_deploy.backends import onnxruntime_cuda
from dipgo_deploy.backends.onnxruntime_cuda import require_cuda
from dipgo_deploy.errors import UserError


class FakeOrt:
    """An onnxruntime-gpu: ``fails`` is what the allocation raises."""

    def __init__(self, folder: Path, fails: Exception | None = None, providers: tuple[str, ...] = ("CUDA",)) -> None:
        self.__file__ = str(folder / "__init__.py")
        self.severities: list[int] = []
        self.asked: list[Any] = []
        self.OrtValue = self
        self._fails = fails
        self._providers = [f"{name}ExecutionProvider" for name in providers]

    def get_available_providers(self) -> list[str]:
        return self._providers

    def preload_dlls(self) -> None:
        assert not self.asked
        print("Failed to load libcudnn.so.9")

    def set_default_logger_severity(self, severity: int) -> None:
        self.severities.append(severity)

    def ortvalue_from_shape_and_type(self, *arguments: Any) -> None:
        self.asked.append(arguments)
        if self._fails is not None:
            raise self._fails


def test_libraries_are_loaded_first_and_nothing_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnxruntime_cuda.ctypes, "CDLL", lambda path: None)
    ort = FakeOrt(tmp_path)
    require_cuda(ort)
    assert len(ort.asked) == 1 and ort.severities == [4, 2]
    assert capsys.readouterr().out == ""


def test_a_package_without_cuda_is_said(tmp_path):
    ort = FakeOrt(tmp_path, providers=("CPU",))
    with pytest.raises(UserError, match=r"pip uninstall -y onnxruntime, then pip install .*\[gpu\]"):
        require_cuda(ort)
    assert not ort.asked


CUBLAS = "libcublasLt.so.13: cannot open shared object file: No such file or directory"


@pytest.mark.parametrize(
    ("loading", "message"),
    [
        (CUBLAS, r"a library of CUDA is missing \(libcublasLt\.so\.13: .*onnxruntime-gpu\[cuda,cudnn\]'; or use"),
        (
            "/x/libonnxruntime_providers_cuda.so: undefined symbol: Provider_GetHost",
            r"no usable CUDA device \(why not\)",
        ),
        (None, r"backend cuda: no usable CUDA device \(why not\); check the driver"),
    ],
)
def test_the_reason_is_the_library_that_is_missing(tmp_path, monkeypatch, loading, message):
    """The messages are those of Linux's loader; ONNX Runtime's own has no reason in it."""

    def load(path: str) -> None:
        if path != "libcuda.so.1" and loading is not None:
            assert path == str(tmp_path / "capi/libonnxruntime_providers_cuda.so")
            raise OSError(loading)

    monkeypatch.setattr(onnxruntime_cuda.ctypes, "CDLL", load)
    ort = FakeOrt(tmp_path, fails=RuntimeError("why\n not"))
    with pytest.raises(UserError, match=message):
        require_cuda(ort)
    assert ort.severities == [4, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="the driver's library has another name")
def test_without_a_driver_no_library_is_loaded(tmp_path, monkeypatch):
    def load(path: str) -> None:
        raise OSError(f"{path}: cannot open shared object file")

    monkeypatch.setattr(onnxruntime_cuda.ctypes, "CDLL", load)
    ort = FakeOrt(tmp_path)
    with pytest.raises(UserError, match=r"backend cuda: no NVIDIA driver \(libcuda\.so\.1: cannot"):
        require_cuda(ort)
    assert not ort.asked and not ort.severities
