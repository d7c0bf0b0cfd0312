"""The parts of ``tools/gpu_check`` that need no GPU: its schedules, inputs, reference, order and report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import simulated_gpu
from devices import no_gpu

from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend
from dipgo_deploy.backends.tensorrt_cuda import Device
from dipgo_deploy.backends.tensorrt_flavour import FLAVOURS
from dipgo_deploy.backends.tensorrt_queue import GRAPH_MODES
from dipgo_deploy.runtime.loop import DenoisingLoop
from tools import gpu_check
from tools.gpu import measure, models, peers, report

TINY = models.Model(
    "tiny-dit",
    "DiTTransformer2DModel",
    {**models.DIT_XL2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8},
    models.DDIM,
    {"full": models.every(1.0), "half": models.every(0.5)},
)


@pytest.mark.skipif(not no_gpu(), reason="a GPU is there")
def test_without_a_gpu_it_says_so_and_writes_nothing(capfd, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    assert gpu_check.main() == 2
    assert capfd.readouterr().err.startswith("error: no NVIDIA GPU")


def test_the_loop_that_is_timed_is_the_reference_s(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    monkeypatch.setattr(gpu_check, "STEPS", 6)
    document = {"cases": [], "roof": {"flops": 1e12, "bytes_per_second": 1e9}}
    weights, (full, half) = gpu_check.exported(TINY, tmp_path, document)
    assert [row[0] for row in half.schedule.gates] == [True, False, True, False, True, False]
    for case in (full, half):
        want = peers.torch_loop(weights, case.schedule, case.inputs, torch.float32, device="cpu")()
        loop = DenoisingLoop(case.bundle, OnnxRuntimeBackend("cpu", threads=1), poison=True)
        got = loop.run(case.inputs.latents, case.inputs.conditions, guidance_scale=models.GUIDANCE_SCALE)
        assert np.abs(got - want).max() / np.abs(want).max() < gpu_check.TOLERANCE
        assert case.entry["floor_ms"] > 0
    assert [case["case"] for case in document["cases"]] == ["full", "half"]
    # a launch without blocks still has the head, a visible part of so small a model
    assert 1.7 < document["cases"][1]["mac_ratio"] < 2.0 and document["cases"][0]["mac_ratio"] == 1.0


def test_what_is_timed_runs_on_a_simulated_gpu(tmp_path, monkeypatch):
    """All but the clock and torch's part: exporting, building, loading, and the loops in every graph mode."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    monkeypatch.setattr(gpu_check, "STEPS", 6)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current")
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream: stream)
    simulated_gpu.install(monkeypatch)
    simulated_gpu.install_onnxruntime(monkeypatch)
    document = {"cases": [], "roof": {"flops": 1e12, "bytes_per_second": 1e9}}
    weights, cases = gpu_check.exported(TINY, tmp_path, document)
    for case in cases:
        want = peers.torch_loop(weights, case.schedule, case.inputs, torch.float32, device="cpu")()
        for backend, mode in [("cuda", "off"), *((name, mode) for name in FLAVOURS for mode in GRAPH_MODES)]:
            runner = gpu_check.on_backend(backend, mode, None)(case)
            for _ in range(3):
                assert np.abs(runner.call() - want).max() / np.abs(want).max() < gpu_check.TOLERANCE
            assert (runner.stream == "current") == (backend == "cuda")
            assert backend == "cuda" or {"build_seconds", "plan_bytes", "memory"} == set(runner.facts)


def fake_cases(*names: str) -> list[gpu_check.Case]:
    def case(name: str) -> gpu_check.Case:
        entry = {"model": "m", "case": name, "runs": []}
        return gpu_check.Case(None, None, None, entry, reference=np.zeros(1))  # type: ignore[arg-type]

    return [case(name) for name in names]


def checked(cases, runners, seconds, monkeypatch):
    """The report after ``check_cases`` on a clock that runs 10 seconds a measurement."""
    now = [100.0]
    done = []

    def fake_measure(label, make, reference, repeats):
        make()
        now[0] += 10.0
        done.append(label)
        return (
            {"what": label, "error": "no"} if label == "bad" else {"what": label, "difference": 0.0, "ms_median": 1.0}
        )

    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu_check, "measure", fake_measure)
    document = {"failures": [], "not_run": []}
    kept = []
    budget = gpu_check.Budget(100.0 + seconds)
    gpu_check.check_cases(Path(), cases, runners, 3, document, budget, lambda: kept.append(1))
    assert len(kept) == len(done)
    return document, done


def test_each_runner_does_all_cases_before_the_next_one(monkeypatch):
    pytest.importorskip("torch")
    seen = []
    runners = [(label, lambda case, label=label: seen.append((label, case.entry["case"]))) for label in ("a", "bad")]
    document, done = checked(fake_cases("full", "pruned"), runners, 1000.0, monkeypatch)
    assert seen == [("a", "full"), ("a", "pruned"), ("bad", "full"), ("bad", "pruned")] and done[0] == "a"
    assert document == {"failures": ["m full bad: no", "m pruned bad: no"], "not_run": []}


def test_what_there_is_no_time_for_is_named(monkeypatch):
    pytest.importorskip("torch")
    runners = [(label, lambda case: None) for label in ("a", "b")]
    document, done = checked(fake_cases("full", "pruned"), runners, 25.0, monkeypatch)
    # b took nothing yet, so it is tried once: 20 of 25 seconds are gone then, and afterwards more than all.
    assert done == ["a", "a", "b"]
    assert document == {"failures": [], "not_run": ["m pruned b"]}


def test_a_budget_is_divided_evenly(monkeypatch):
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: 10.0)
    budget = gpu_check.Budget(110.0)
    assert (budget.part(2).left, budget.part(1).left) == (50.0, 100.0)
    assert gpu_check.Budget(5.0).part(2).left == 0.0


def test_gpu_tests_that_hang_are_left(monkeypatch):
    run = gpu_check.subprocess.run
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda line, **given: run(["sleep", "5"], **given))
    result = gpu_check.run_gpu_tests(0.2)
    assert result == {"status": None, "summary": "not run to their end in 0 s", "failed": []}


@pytest.mark.parametrize(("share", "rows"), [(1.0, 50), (0.4, 20), (0.25, 13)])
def test_shares_of_steps(share, rows):
    class Fifty:
        steps = 50
        blocks = (None,) * 3

    gates = models.every(share)(Fifty())
    assert gates[0] == (True,) * 3
    assert sum(map(any, gates)) == rows and all(all(row) or not any(row) for row in gates)


def test_the_table_shows_every_run_and_every_failure():
    run = {"what": "torch eager", "ms_median": 10.0, "difference": 1e-3, "device_bytes": 2**30}
    run["gaps"] = {"span_ms": 9.0, "busy_ms": 8.5, "gap_ms": 0.5}
    case = {"model": "sd15", "mac_ratio": 1.0, "floor_ms": 2.0, "runs": [run]}
    document = {
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
        "not_run": ["sd15 full y"],
    }
    lines = report.table(json.loads(json.dumps(document))).splitlines()
    assert "| sd15 | full | torch eager | 10.00 | 1.00 | 1.00 | 1.0e-03 | 1024 | 2.00 | 0.50 |" in lines
    assert "| sd15 | pruned | torch eager | 2.50 | 4.00 | 5.00 | 1.0e-03 | 1024 | 2.00 |  |" in lines
    assert "| sd15 | pruned | x | no |  |  |  |  |  |  |" in lines
    assert "- pruned x: no" in lines
    assert "Not run, no time left: sd15 full y." in lines


def test_gaps_are_the_time_in_which_nothing_runs():
    overlapping = [(500.0, 1500.0), (0.0, 1000.0), (200.0, 300.0), (2000.0, 4000.0)]
    assert measure.gaps_between(overlapping) == {"span_ms": 4.0, "busy_ms": 3.5, "gap_ms": 0.5}
    assert measure.gaps_between([]) is None


def test_results_go_under_the_gpu_s_name(tmp_path: Path):
    device = Device("NVIDIA H100 80GB HBM3", "9.0", 1)
    document = {
        "gpu": {"name": device.name, "compute_capability": "9.0", "driver": "1"},
        "tests": None,
        "cases": [],
        "failures": [],
    }
    report.save(document, device, tmp_path / "results")
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "nvidia-h100-80gb-hbm3.json",
        "nvidia-h100-80gb-hbm3.md",
    ]
