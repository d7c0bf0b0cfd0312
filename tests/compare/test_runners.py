from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from dipgo_deploy.compare.runners import BackendRunner, engine_runner


@pytest.mark.parametrize(
    ("backend", "wanted"),
    [
        ("cpu", ["CPUExecutionProvider"]),
        ("cuda", [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]),
    ],
)
def test_a_variant_runs_as_in_the_loop_in_full_float32(dit_output, opened, monkeypatch, backend, wanted):
    bundle, _ = opened(dit_output)
    asked: list[Any] = []

    def session(path: str, options: Any, *, providers: list[Any]) -> Any:
        asked.append(providers)
        return made(path, options, providers=["CPUExecutionProvider"])

    made = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with engine_runner(bundle, bundle.manifest.plan.variants[0], SimpleNamespace(name=backend)):
        assert asked == [wanted]


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_engines_run_on_their_backend(dit_output, opened, backend):
    bundle, _ = opened(dit_output)
    runner = engine_runner(bundle, bundle.manifest.plan.variants[0], SimpleNamespace(name=backend))
    assert isinstance(runner, BackendRunner) and runner.name == backend
