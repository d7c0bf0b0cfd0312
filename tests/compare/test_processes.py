from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_engines import corrupted, plan_variants, save_dit_pipeline, stored_weights

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.self_test import SELF_TEST_NAME, read_self_test
from dipgo_deploy.compare import processes
from dipgo_deploy.compare.metrics import Agreement
from dipgo_deploy.errors import ToleranceError, UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.reference.load import load_reference
from dipgo_deploy.reference.recorded import read_recordings, read_steps
from dipgo_deploy.reference.recording import run_until_complete
from dipgo_deploy.reference.steps import recorder_for
from dipgo_deploy.runtime.pipeline import Pipeline

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit_pipeline(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def plan(model: Path) -> Callable[..., PlannedExport]:
    return partial(plan_variants, model)


def test_a_wrong_graph_is_found_by_the_process(plan: Callable[..., PlannedExport], model: Path, tmp_path: Path) -> None:
    agreed: list[Agreement] = []
    notes: list[str] = []
    options = {"agreed": agreed.append, "note": notes.append}
    engine = publish(plan(low_memory=True), tmp_path / "engine", **options).path
    (found,) = agreed
    assert not [line for line in notes if "self-test" in line]
    assert 0 < found.relative < 1e-4 and found.psnr > 80 and found.cosine > 0.999999
    variant = Bundle.open(engine).manifest.plan.variants[0]
    weight = next(name for name in stored_weights(engine, variant) if name.startswith("transformer_blocks.0.ff"))
    wrong = corrupted(engine, tmp_path / "wrong", Path(variant.graph.file).name, weight)
    with pytest.raises(
        ToleranceError, match=r"variant v\d+ by itself, evaluation \d+, .*: error .* against the supernet"
    ):
        processes.verify_in_processes(wrong, str(model))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        processes.verify_in_processes(tmp_path / "nowhere", str(model))
    assert not list(tmp_path.rglob(".*"))

    # What the first process ran of the model's loop is in the directory: its beginning, and each variant by itself.
    recorded = read_self_test(Bundle.open(engine, verify=True)).recorded
    plan_entry = Bundle.open(engine).manifest.plan
    assert not recorded.whole and len(recorded.predictions) == 1 and recorded.left_out == ()
    assert len(recorded.alone) == len(plan_entry.variants)
    report = Pipeline.from_engine_dir(engine, "cpu", threads=1).self_test()
    assert report.passed and report.parts[-1].name == "beginning of the loop"
    assert [tensor.name for tensor in report.parts[-1].tensors] == ["prediction of evaluation 0"]
    assert not Pipeline.from_engine_dir(wrong, "cpu", threads=1).self_test().passed


def test_graphs_run_where_torch_was_never_loaded(
    plan: Callable[..., PlannedExport], model: Path, tmp_path: Path
) -> None:
    """The supernet's libraries take some hundred MB, which the comparison's own process does without."""
    engine = publish(plan(low_memory=True, check=False), tmp_path / "engine").path
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    processes._record(engine, str(model), recorded)
    code = (
        "import sys; from pathlib import Path; from dipgo_deploy.compare import processes; "
        "processes._compare(Path(sys.argv[1]), Path(sys.argv[2])); "
        "print({'torch', 'diffusers', 'onnx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, engine, recorded], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("layout", ["variants", "segments"])
def test_recordings_are_those_of_a_loop_that_keeps_all_caches_in_memory(
    plan: Callable[..., PlannedExport], model: Path, tmp_path: Path, layout: str
) -> None:
    bundle = publish(plan(layout=layout, low_memory=True, check=False), tmp_path / "engine")
    folder = tmp_path / "recorded"
    folder.mkdir()
    processes._record(bundle.path, str(model), folder, 2**20)
    assert {part.name for part in folder.iterdir()} == {"0", SELF_TEST_NAME}  # the caches' files are gone

    reference = load_reference(bundle)
    given = reference.inputs(bundle.manifest)
    recorder = recorder_for(bundle, reference.schedule, again=False)
    found = list((read_recordings if layout == "variants" else read_steps)(folder / "0"))
    run_until_complete(recorder, reference, given)
    assert len(found) == len(recorder.recordings) > 1
    for mine, kept in zip(found, recorder.recordings, strict=True):
        assert mine.step == kept.step
        for side in ("inputs", "outputs"):
            one, other = getattr(mine, side), getattr(kept, side)
            assert one.keys() == other.keys()
            for name in one:
                np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize(("status", "kind"), [(3, ToleranceError), (1, UserError), (2, UserError), (-9, UserError)])
def test_only_a_comparison_beyond_tolerance_is_one(
    status: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends in a traceback (a full disk) has status 1."""
    done = subprocess.CompletedProcess([], status, stdout="", stderr="OSError: no space left on device")
    monkeypatch.setattr(processes.subprocess, "run", lambda *arguments, **options: done)
    with pytest.raises(kind, match="no space left on device"):
        processes._run("record")


@pytest.mark.slow
def test_a_test_is_recorded_where_nothing_is_compared(plan: Callable[..., PlannedExport], tmp_path: Path) -> None:
    """bf16 graphs do not run on a CPU; whoever asks gets the model's values all the same."""
    bundle = publish(plan(low_memory=True, dtype="bf16", self_test=True), tmp_path / "engine")
    test = read_self_test(bundle)
    assert not test.recorded.whole and test.recorded.predictions and test.recorded.alone
    assert "8 bits" in test.recorded.reason


def test_the_process_of_a_killed_export_ends_with_it() -> None:
    child = (
        "import time; from dipgo_deploy.compare.processes import end_with_parent; end_with_parent();"
        "print('ready', flush=True); time.sleep(100)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate(timeout=30)  # until the last process that has this pipe is gone
