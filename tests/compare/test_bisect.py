"""Single nodes that are made wrong in exported graphs: each is found, at its node."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from node_defects import DEFECTS, NodeDefect, attribute, constant, operator
from polygraphy.json import load_json
from seeded_defects import replaced
from tiny_engines import save_dit_pipeline, save_unet, schedule_for, write

from dipgo_deploy.bundle.directory import Bundle, reseal
from dipgo_deploy.cli.compare import main
from dipgo_deploy.compare.bisect import Located, locate
from dipgo_deploy.compare.bisect_folder import write_folder
from dipgo_deploy.compare.graphs import frugal_session
from dipgo_deploy.compare.inner import InnerGraph, run_plainly
from dipgo_deploy.compare.metrics import Tolerance
from dipgo_deploy.compare.torch_modules import module_outputs
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.again import options_of
from dipgo_deploy.export.exporter import ExportOptions, plan_export
from dipgo_deploy.reference.load import load_reference
from dipgo_deploy.reference.recording import run_until_complete
from dipgo_deploy.reference.steps import recorder_for

TOLERANCE = Tolerance(1e-4)
assert len(DEFECTS) >= 20


@dataclass(frozen=True)
class Sound:
    """An engine directory without a defect, and what was recorded of the model's loop."""

    bundle: Bundle
    recordings: Any


def _recorded(engine_dir: Path) -> Sound:
    bundle = Bundle.open(engine_dir)
    reference = load_reference(bundle)
    inputs = reference.inputs(bundle.manifest)
    recorder = recorder_for(bundle, reference.schedule)
    run_until_complete(recorder, reference, inputs)
    return Sound(bundle, recorder.recordings)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sound]:
    """Each kind of engine directory, made when it is first asked for: of a bare UNet, or a bare DiT of two blocks."""
    made: dict[str, Sound] = {}
    folder = tmp_path_factory.mktemp("sound")
    dit = save_dit_pipeline(folder / "dit", layers=2) / "transformer"

    def get(name: str) -> Sound:
        if name not in made:
            model = save_unet(folder / name) if name == "unet" else dit
            options = ExportOptions(
                timestep_tables=False,
                components=False,
                layout="segments" if name == "segments" else "variants",
                dtype="fp16" if name == "half" else "fp32",
            )
            planned = plan_export(str(model), schedule_for(model, ratio=0.4, seed=3), options)
            made[name] = _recorded(write(planned, folder / f"{name}-engine"))
        return made[name]

    return get


def _found(
    sound: Sound,
    defect: NodeDefect,
    folder: Path,
    tolerance: Tolerance | None = None,
    reference: Bundle | None = None,
) -> tuple[Located | None, list[str]]:
    """What is found in a copy with the defect, and the nodes that it is in."""
    changed, nodes = _changed(sound, defect, folder)
    half = sound.bundle.manifest.dtype == "fp16"
    tolerance = tolerance or (Tolerance(2e-2) if half else TOLERANCE)
    against = reference or sound.bundle
    return locate(changed, sound.recordings, frugal_session, lambda dtype: against, tolerance), nodes


def _changed(sound: Sound, defect: NodeDefect, folder: Path) -> tuple[Bundle, list[str]]:
    """A copy with the defect, and the nodes that it is in."""
    path = sound.bundle.path / defect.file(sound.bundle.manifest)
    bad = replaced(folder, sound.bundle.path)
    model = onnx.load(path, load_external_data=False)
    nodes = defect.edit(model.graph, path.parent)
    changed = bad / path.relative_to(sound.bundle.path)
    changed.unlink()
    changed.write_bytes(model.SerializeToString())
    return Bundle(bad, sound.bundle.manifest), nodes


@pytest.mark.parametrize(
    "defect",
    [pytest.param(defect, id=defect.name, marks=() if defect.quick else pytest.mark.slow) for defect in DEFECTS],
)
def test_a_defect_is_found_at_its_node(defect: NodeDefect, sound: Callable[[str], Sound], tmp_path: Path) -> None:
    found, nodes = _found(sound(defect.engine), defect, tmp_path / "bad")
    assert found is not None, "not found"
    print(found.line)  # with -rP, what is said of each
    assert found.inside == "graph" and found.beyond and found.made > 0
    assert [name for name, _ in found.nodes] == nodes


def test_without_a_defect_nothing_is_found(sound: Callable[[str], Sound]) -> None:
    found = sound("dit")
    assert locate(found.bundle, found.recordings, frugal_session, lambda dtype: found.bundle, TOLERANCE) is None


def test_what_no_node_makes_by_itself_is_told_of_the_largest(sound: Callable[[str], Sound], tmp_path: Path) -> None:
    """Beyond tolerance at the end, within it at each node."""
    defect = NodeDefect("slight", "dit", constant("Mul", 1, lambda values: values * 1.001, 0))
    found, nodes = _found(sound("dit"), defect, tmp_path / "bad", Tolerance(2e-3))
    assert found is not None and not found.beyond
    assert [name for name, _ in found.nodes] == nodes and 5e-4 < found.made < 2e-3
    assert "the largest: none is beyond tolerance by itself" in found.line
    write_folder(found, tmp_path / "out", Tolerance(2e-3), "cpu")
    facts = json.loads((tmp_path / "out" / "bisect.json").read_text())
    (expected,) = found.expected.values()
    (actual,) = found.actual.values()
    limit = float(facts["command"].rpartition(" ")[2])
    assert np.abs(actual - expected).max() == pytest.approx(2 * limit, rel=1e-3)


def _wrong_sigmoid(model: Any) -> Any:
    """What a backend with a fault makes of a graph."""
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    for node in wrong.graph.node:
        if node.op_type == "Sigmoid":
            node.op_type = "Tanh"
    return wrong


def test_a_fault_of_the_backend_is_told_from_one_of_the_graph(sound: Callable[[str], Sound], tmp_path: Path) -> None:
    it = sound("dit")

    def open_graph(bundle: Bundle, entry: Any) -> Any:
        graph = InnerGraph(bundle.path / entry.graph.file)
        return contextlib.nullcontext(lambda inputs: graph.run(inputs, graph.outputs, on_backend))

    def on_backend(model: Any, folder: Path, feeds: Any) -> dict[str, np.ndarray]:
        return run_plainly(_wrong_sigmoid(model), folder, feeds)

    def never(dtype: str) -> Bundle:
        raise AssertionError("no reference is needed")

    found = locate(it.bundle, it.recordings, open_graph, never, TOLERANCE, on_backend=on_backend)
    assert found is not None and found.inside == "backend" and found.made > 0.1
    assert [kind for _, kind in found.nodes] == ["Sigmoid"]
    command = write_folder(found, tmp_path / "out", TOLERANCE, "cuda")
    assert "--onnxrt --providers cuda" in command
    # Engines that are built cannot be looked into: the whole graph is what reproduces it.
    found = locate(it.bundle, it.recordings, open_graph, never, TOLERANCE)
    assert found is not None and found.value is None and "cannot be looked into" in found.line
    assert "node.onnx --trt --load-inputs" in write_folder(found, tmp_path / "trt", TOLERANCE, "tensorrt-rtx")
    part = onnx.load(tmp_path / "trt" / "node.onnx")
    assert {value.name for value in part.graph.input} <= set(found.inputs)


def test_a_reference_of_another_schedule_is_refused(sound: Callable[[str], Sound], tmp_path: Path) -> None:
    defect = NodeDefect("x", "dit", attribute("Softmax", "axis", 1))
    other = sound("dit").bundle.manifest.model_copy(deep=True)
    plan = other.plan.model_copy(update={"variants": other.plan.variants[1:]})
    with pytest.raises(UserError, match=r"no graph of \S+ has the inputs and outputs of \S+v00.onnx; give"):
        _found(
            sound("dit"),
            defect,
            tmp_path / "bad",
            reference=Bundle(sound("dit").bundle.path, other.model_copy(update={"plan": plan})),
        )


def test_what_differs_from_the_model_as_the_reference_does_is_no_node_s(
    sound: Callable[[str], Sound], tmp_path: Path
) -> None:
    """Exporter and model disagree: both graphs are the same."""
    it = sound("dit")
    first = it.recordings[0]
    wrong = {name: array + 1 for name, array in first.outputs.items()}
    recordings = [dataclasses.replace(first, outputs=wrong)]
    with pytest.raises(
        UserError, match="both differ from the model in noise_pred: what is wrong is in the model's files"
    ):
        locate(it.bundle, recordings, frugal_session, lambda dtype: it.bundle, TOLERANCE)


@pytest.mark.parametrize("name", ["dit", pytest.param("segments", marks=pytest.mark.slow)])
def test_what_the_exporter_makes_wrong_is_found_beside_the_modules_in_torch(
    name: str, sound: Callable[[str], Sound], tmp_path: Path
) -> None:
    """Both graphs have the fault: the model in torch has not."""
    it = sound(name)
    reference = load_reference(it.bundle)
    inputs = reference.inputs(it.bundle.manifest)
    edit, graph = operator("Gelu", "Relu"), None
    if name == "segments":
        graph = next(
            variant.name
            for variant in it.bundle.manifest.plan.variants
            if "Gelu" in _operators(it.bundle.path / variant.graph.file)
        )
    both, _ = _changed(it, NodeDefect("x", name, edit, graph=graph), tmp_path / "bad")
    found = locate(
        both,
        it.recordings,
        frugal_session,
        lambda dtype: both,
        TOLERANCE,
        modules=lambda step: module_outputs(reference, inputs, step),
    )
    assert found is not None and found.inside == "exporter" and found.made > 1e-2
    # The activation is a module of its own, with one node here.
    assert found.note == "module transformer_blocks.0.ff.net.0" and [kind for _, kind in found.nodes] == ["Relu"]
    assert "exported otherwise than the model computes it, in node transformer_blocks.0.ff.net.0/Gelu" in found.line
    command = write_folder(found, tmp_path / "out", TOLERANCE, "cpu")
    assert "ORT_DISABLE_ALL" in command and not (tmp_path / "out" / "reference.onnx").exists()


def test_the_command_writes_a_folder_whose_command_shows_it(
    sound: Callable[[str], Sound], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    it = sound("dit")
    bad = tmp_path / "bad"
    _, nodes = _found(it, NodeDefect("x", "dit", constant("MatMul", 1, lambda values: -values, 5)), bad)
    reseal(bad)
    out = tmp_path / "found"
    assert main(["--engine-dir", str(bad), "--variants-only", "--bisect", str(out), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)["bisect"]
    assert [node["name"] for node in told["nodes"]] == nodes and told["inside"] == "graph"
    assert told["against"] == "the same graph exported again" and told["folder"] == str(out)
    names = {"node.onnx", "reference.onnx", "inputs.json", "outputs.json", "expected.json", "bisect.json"}
    assert {path.name for path in out.iterdir()} == names | {"reproduce.sh"}
    assert json.loads((out / "bisect.json").read_text()).items() <= {**told}.items()
    out.rename(tmp_path / "moved")  # it stands by itself
    moved = tmp_path / "moved"
    assert _status(["sh", "reproduce.sh"], moved) == 1
    # What the node should be gives what is expected.
    (feeds,) = load_json(str(moved / "inputs.json"))
    (made,) = run_plainly(onnx.load(moved / "reference.onnx"), moved, feeds).values()
    (wanted,) = load_json(str(moved / "expected.json"))["reference"][0].values()
    assert np.abs(made - wanted).max() < float(told["command"].rpartition(" ")[2])
    again = [
        "--engine-dir",
        str(bad),
        "--variants-only",
        "--bisect",
        str(out),
        "--against",
        str(it.bundle.path),
        "--json",
    ]
    assert main(again) == 1
    beside = json.loads(capsys.readouterr().out)["bisect"]
    assert beside["against"] == str(it.bundle.path) and beside["nodes"] == told["nodes"]
    assert main(["--engine-dir", str(bad), "--variants-only", "--bisect", str(moved)]) == 2
    assert f"--bisect {moved}: exists; give a folder that does not" in capsys.readouterr().err


def _operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


def _status(command: list[str], folder: Path) -> int:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False).returncode


def test_how_it_was_exported_is_told_by_the_directory(sound: Callable[[str], Sound]) -> None:
    options = options_of(sound("dit").bundle)
    assert (options.layout, options.dtype, options.guidance) == ("variants", "fp32", True)
    assert (options.height, options.width, options.batch) == (64, 64, 1)
    assert options.max_variants is None and not options.timestep_tables
