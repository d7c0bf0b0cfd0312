"""The test that an engine directory carries: recorded at export, run on ONNX Runtime and on a simulated TensorRT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from family_checks import plan_for, random_weights
from safetensors.numpy import load_file, save_file
from tiny_engines import schedule_for

from dipgo_deploy.backends.tensorrt_flavour import FLAVOURS
from dipgo_deploy.bundle import self_test
from dipgo_deploy.bundle.directory import Bundle, reseal
from dipgo_deploy.bundle.safetensors_file import TensorFile
from dipgo_deploy.cli.run import main
from dipgo_deploy.engine.build import BuildOptions, build_engines
from dipgo_deploy.errors import UserError
from dipgo_deploy.export import writing
from dipgo_deploy.export.exporter import PlannedExport, in_layout
from dipgo_deploy.runtime.pipeline import Pipeline

torch.set_num_threads(1)

OLD = Path(__file__).parents[1] / "bundle/format-4/engine"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(1)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    folder = tmp_path_factory.mktemp("model")
    random_weights(transformer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def planned(model: Path) -> PlannedExport:
    return plan_for(model, schedule_for(model, sampler="euler-a"), components=False, timestep_tables=False)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Variants, residual caches, guidance, a sampler that draws noise; as an export is by default."""
    folder = tmp_path_factory.mktemp("engines") / "engine"
    writing.publish(planned, folder)
    return folder


@pytest.fixture
def copy(engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine, tmp_path / "copy"))


def one_weight_changed(engine: Path) -> None:
    """Add one to one number of a projection of the last block, and seal the directory again."""
    graph = onnx.load(engine / "graphs/v00.onnx", load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.external_data and ".1.ff.net.2" in tensor.name)
    fields = {entry.key: entry.value for entry in tensor.external_data}
    weights = np.memmap(engine / "graphs" / fields["location"], np.float32, "r+", int(fields["offset"]), (1,))
    weights[0] += 1
    weights.flush()
    reseal(engine)


def rewritten(engine: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], object]) -> None:
    """Change what was recorded, and its tensors, and seal the directory again."""
    path = engine / self_test.SELF_TEST_NAME
    document = json.loads(TensorFile(path).metadata["self_test"])
    tensors = load_file(path)
    change(document, tensors)
    save_file(tensors, path, {"self_test": json.dumps(document)})
    reseal(engine)


def run(engine: Path, *more: str, backend: str = "cpu") -> int:
    return main(["--engine-dir", str(engine), "--backend", backend, "--self-test", *more])


def test_an_export_is_tested_by_itself_without_being_asked(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Bundle.open(engine, verify=True).manifest
    assert self_test.SELF_TEST_NAME in manifest.files
    assert (engine / self_test.SELF_TEST_NAME).stat().st_size < self_test.SMALL_BYTES
    assert run(engine, "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["passed"] and found["failures"] == [] and found["left_out"] == []
    assert found["tolerance"] == 1e-4 and "another order" in found["reason"]
    names = [part["name"] for part in found["parts"]]
    assert [name.split()[1] for name in names[:-1]] == [variant.name for variant in manifest.plan.variants]
    assert len(names) > 2 and names[-1] == "loop"
    *predictions, final = [tensor["name"] for tensor in found["parts"][-1]["tensors"]]
    assert len(predictions) == 3 and predictions[0] == "prediction of evaluation 0" and final == "final latents"
    assert all(0 < tensor["relative"] < 1e-5 for part in found["parts"] for tensor in part["tensors"])
    lines = printed.err.splitlines()
    assert len(lines) == len(names) + 1 and all(line.endswith(", ok") for line in lines[:-1])
    assert "tolerance 0.0001 (graphs sum" in lines[-1]


def test_a_changed_weight_is_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_weight_changed(copy)
    assert run(copy, "--json") == 1
    printed = capsys.readouterr()
    assert "error: variant v00 by itself, evaluation 0, " in printed.err.splitlines()[-1].lower()
    found = json.loads(printed.out)
    assert not found["passed"] and found["failures"] and found["parts"][-1]["passed"] is False


def test_on_tensorrt(copy: Path, tensorrt_backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    current = ("current",) if FLAVOURS[tensorrt_backend].compute_capabilities else ()

    def build() -> None:
        build_engines(copy, tensorrt_backend, BuildOptions(compute_capabilities=current))

    build()
    assert run(copy, "--cuda-graph", "loop", backend=tensorrt_backend) == 0
    assert capsys.readouterr().out.count(", ok") > 2
    one_weight_changed(copy)
    build()
    assert run(copy, backend=tensorrt_backend) == 1
    assert "more than 0.0001" in capsys.readouterr().err


def test_what_is_recorded_by_itself_is_what_a_comparison_records(
    planned: PlannedExport, engine: Path, tmp_path: Path
) -> None:
    alone = self_test.read_self_test(writing.publish(_with(planned, check=False, self_test=True), tmp_path / "alone"))
    both = self_test.read_self_test(Bundle.open(engine))
    assert alone.recorded.alone == both.recorded.alone != ()
    assert alone.recorded.predictions == both.recorded.predictions[:1]  # nobody saw that others can be expected
    for name, values in alone.tensors.items():
        np.testing.assert_array_equal(values, both.tensors[name], err_msg=name)


def test_segments_are_tested_in_the_loop(planned: PlannedExport, tmp_path: Path) -> None:
    writing.publish(in_layout(planned, "segments"), tmp_path / "segments")
    report = Pipeline.from_engine_dir(tmp_path / "segments", "cpu", threads=1).self_test()
    assert report.passed and [part.name for part in report.parts] == ["loop"] and report.left_out


def test_half_precision_with_open_sizes(model: Path, tmp_path: Path) -> None:
    from dipgo_deploy.bundle.shapes import Range

    options = {"batch": Range(min=1, opt=2, max=3), "dtype": "fp16", "components": False}
    planned = plan_for(model, schedule_for(model), **options)
    bundle = writing.publish(planned, tmp_path / "half")
    # Others may read it where they may read the manifest.
    assert (bundle.path / self_test.SELF_TEST_NAME).stat().st_mode == (bundle.path / "manifest.json").stat().st_mode
    assert self_test.read_self_test(bundle).recorded.sizes == (2, 4, 4)
    pipeline = Pipeline(bundle, Pipeline.from_engine_dir(bundle.path, "cpu", threads=1, load="lazy").backend)
    report = pipeline.self_test()
    assert report.passed and report.tolerance == 2e-2 and "11 bits" in report.reason
    assert max(part.worst.relative for part in report.parts) > 1e-5


def test_what_has_no_room_is_left_out_with_a_line(
    planned: PlannedExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []

    def publish(name: str, **options: Any) -> Bundle:
        notes.clear()
        return writing.publish(_with(planned, **options), tmp_path / name, note=notes.append)

    publish("unchecked", check=False)
    assert notes == ["no self-test: it is recorded with the comparison; --self-test records it without"]
    bundle = publish("refused", check=False, self_test=False)
    assert notes == [] and not self_test.has_self_test(bundle.manifest)
    monkeypatch.setattr(writing, "SMALL_BYTES", 100)
    publish("large")
    assert notes[0].startswith("no self-test: a loop's conditions and latents take 0.0 MiB, more than")
    monkeypatch.setattr(writing, "MOST_BYTES", 100)
    with pytest.raises(UserError, match="--self-test: a loop's conditions"):
        publish("larger", self_test=True)
    monkeypatch.setattr(writing, "MOST_BYTES", 4000)
    report = Pipeline(publish("some", self_test=True, check=False), _cpu()).self_test()
    assert report.passed and report.left_out
    publish("bf16", low_memory=True, dtype="bf16")
    assert "no self-test: bf16 graphs are not compared here, and the model would run for it alone" in notes[0]


def test_a_directory_without_a_test_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(OLD) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "carries no self-test" in line and "dipgo-export" not in line and "dipgo-compare" in line


def test_nothing_is_drawn_with_it(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(engine, "--class-labels", "1") == 2
    assert "--class-labels: nothing is drawn with --self-test" in capsys.readouterr().err


WRONG: dict[str, tuple[Callable[[dict[str, Any], dict[str, np.ndarray]], object], str]] = {
    "no document": (lambda document, tensors: document.clear(), "version|seed"),
    "another version": (lambda document, tensors: document.update(version=2), "version"),
    "no tolerance": (lambda document, tensors: document.update(tolerance=0), "tolerance"),
    "no such launch": (lambda document, tensors: document["alone"].append(99), "there is no launch 99"),
    "other sizes": (lambda document, tensors: document.update(sizes=[2, 4, 4]), "was exported for"),
    "nothing of the loop": (
        lambda document, tensors: document.update(whole=False, predictions=[]),
        "nothing is recorded of the loop",
    ),
    "a tensor lost": (lambda document, tensors: tensors.pop("final"), "has no tensor final"),
    "another shape": (
        lambda document, tensors: tensors.update(final=np.zeros((1, 4, 4, 5), np.float32)),
        "final is F32",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_test_that_does_not_fit_is_refused(copy: Path, name: str) -> None:
    change, message = WRONG[name]
    rewritten(copy, change)
    with pytest.raises(UserError, match=message):
        self_test.read_self_test(Bundle.open(copy))


def _with(planned: PlannedExport, **changes: Any) -> PlannedExport:
    from dataclasses import replace

    return replace(planned, options=replace(planned.options, **changes))


def _cpu() -> Any:
    from dipgo_deploy.backends import create_backend

    return create_backend("cpu", threads=1)
