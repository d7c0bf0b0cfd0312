"""The parts of ``tools/gpu_check`` that need no GPU: its schedules, inputs and reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend
from dipgo_deploy.backends.tensorrt_cuda import NoDeviceError, find_device
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.runtime.loop import DenoisingLoop
from tools import gpu_check

TINY = gpu_check.Model(
    "tiny-dit",
    "DiTTransformer2DModel",
    {**gpu_check.DIT_XL2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8},
    gpu_check.DDIM,
    {"half": gpu_check.every(0.5)},
)


def no_gpu() -> bool:
    try:
        find_device()
    except NoDeviceError:
        return True
    return False


@pytest.mark.skipif(not no_gpu(), reason="a GPU is there")
def test_without_a_gpu_it_says_so_and_writes_nothing(capfd, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    assert gpu_check.main() == 2
    assert capfd.readouterr().err.startswith("error: no NVIDIA GPU")


def test_the_loop_that_is_timed_is_the_reference_s(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    from dipgo_deploy.export.exporter import ExportOptions, export_bundle

    monkeypatch.setattr(gpu_check, "STEPS", 6)
    weights = gpu_check.make_model(TINY, tmp_path / "model")
    target = schedule_target(str(weights), "ddim", gpu_check.STEPS)
    gates = gpu_check.every(0.5)(target)
    assert [row[0] for row in gates] == [True, False, True, False, True, False]
    schedule = target.schedule(gates, "half", {})
    bundle = export_bundle(str(weights), schedule, tmp_path / "bundle", ExportOptions(dtype="fp16", check=False))
    inputs = gpu_check.make_inputs(bundle)
    want = gpu_check.torch_loop(weights, schedule, inputs, torch.float32, device="cpu")()
    loop = DenoisingLoop(bundle, OnnxRuntimeBackend("cpu", threads=1), poison=True)
    got = loop.run(inputs.latents, inputs.conditions, guidance_scale=gpu_check.GUIDANCE_SCALE)
    assert np.abs(got - want).max() / np.abs(want).max() < gpu_check.TOLERANCE
    assert gpu_check.floor(bundle, {"flops": 1e12, "bytes_per_second": 1e9}) > 0


@pytest.mark.parametrize(("share", "rows"), [(1.0, 50), (0.4, 20), (0.25, 13)])
def test_shares_of_steps(share, rows):
    class Fifty:
        steps = 50
        blocks = (None,) * 3

    gates = gpu_check.every(share)(Fifty())
    assert gates[0] == (True,) * 3
    assert sum(map(any, gates)) == rows and all(all(row) or not any(row) for row in gates)


def test_the_table_shows_every_run_and_every_failure():
    run = {"what": "torch eager", "ms_median": 10.0, "difference": 1e-3, "device_bytes": 2**30}
    run["gaps"] = {"span_ms": 9.0, "busy_ms": 8.5, "gap_ms": 0.5}
    case = {"model": "sd15", "mac_ratio": 1.0, "floor_ms": 2.0, "runs": [run]}
    report = {
        "gpu": {"name": "NVIDIA L4", "compute_capability": "8.9", "driver": None},
        "tests": {"summary": "20 passed"},
        "cases": [
            {**case, "case": "full"},
            {
                **case,
                "case": "pruned",
                "mac_ratio": 5.0,
                "runs": [{**run, "ms_median": 2.5, "gaps": None}, {"what": "x", "error": "no"}],
            },
        ],
        "failures": ["pruned x: no"],
    }
    lines = gpu_check.table(json.loads(json.dumps(report))).splitlines()
    assert "| sd15 | full | torch eager | 10.00 | 1.00 | 1.00 | 1.0e-03 | 1024 | 2.00 | 0.50 |" in lines
    assert "| sd15 | pruned | torch eager | 2.50 | 4.00 | 5.00 | 1.0e-03 | 1024 | 2.00 |  |" in lines
    assert "| sd15 | pruned | x | no |  |  |  |  |  |  |" in lines
    assert "- pruned x: no" in lines


def test_gaps_are_the_time_in_which_nothing_runs():
    overlapping = [(500.0, 1500.0), (0.0, 1000.0), (200.0, 300.0), (2000.0, 4000.0)]
    assert gpu_check.gaps_between(overlapping) == {"span_ms": 4.0, "busy_ms": 3.5, "gap_ms": 0.5}
    assert gpu_check.gaps_between([]) is None


def test_results_go_under_the_gpu_s_name(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    device = gpu_check.Device("NVIDIA H100 80GB HBM3", "9.0", 1)
    report = {
        "gpu": {"name": device.name, "compute_capability": "9.0", "driver": "1"},
        "tests": None,
        "cases": [],
        "failures": [],
    }
    gpu_check.save(report, device)
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "nvidia-h100-80gb-hbm3.json",
        "nvidia-h100-80gb-hbm3.md",
    ]
