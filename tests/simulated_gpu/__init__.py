"""A GPU in software: the calls of the CUDA runtime and of TensorRT that a backend makes, with their worst timing.

What the real ones may do later happens as late as it can: work runs at the next synchronisation, with the addresses of
the call that enqueued it. What the real ones leave undefined fails: freed memory, reading what is being written, a
captured graph whose context was used since. ONNX Runtime's CPU provider does the arithmetic. It shows nothing about
kernels, drivers or speed.
"""

from __future__ import annotations

import pytest

from simulated_gpu.cuda import NAME, Cudart
from simulated_gpu.onnxruntime import Module as OnnxRuntime
from simulated_gpu.tensorrt import Module, build_plan

__all__ = ["NAME", "install", "install_onnxruntime"]


def install(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    """Put the simulation in the place of cuda-python and of both TensorRT modules; its CUDA runtime."""
    cudart = Cudart()
    module = Module(cudart)
    monkeypatch.setattr("dipgo_deploy.backends.tensorrt_cuda._cudart", lambda: cudart)
    for user in ("dipgo_deploy.backends.tensorrt", "dipgo_deploy.engine.build"):
        monkeypatch.setattr(f"{user}.import_flavour", lambda flavour: module)
    monkeypatch.setattr("dipgo_deploy.engine.build.build_plan", build_plan)
    return cudart


def install_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put ONNX Runtime with a simulated CUDA provider in the place of the one that is there; it has no other device."""
    monkeypatch.setattr("dipgo_deploy.backends.onnxruntime._import_onnxruntime", OnnxRuntime)
    monkeypatch.setattr("dipgo_deploy.backends.onnxruntime.require_cuda", lambda ort: None)
