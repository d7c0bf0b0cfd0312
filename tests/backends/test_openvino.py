"""OpenVINO on the CPU: what ONNX Runtime gives, in every layout."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from family_checks import with_gates
from lora_files import make_updates, save_lora
from onnx import TensorProto, helper, numpy_helper
from seeded_defects import replaced
from tiny_engines import save_dit_pipeline, schedule_for
from toy_engine import LENGTH, WIDTH, C, H, Toy, W, build, manifest_of, reference

from dipgo_deploy.backends import create_backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Graph, TensorSpec
from dipgo_deploy.cli.compare import command as compare
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, publish
from dipgo_deploy.runtime.component import Component
from dipgo_deploy.runtime.loop import DenoisingLoop
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.supernet.load import load_denoiser

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="the extra openvino is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit_pipeline(tmp_path_factory.mktemp("openvino") / "model", layers=2)


@pytest.fixture(scope="module")
def planned(model: Path) -> PlannedExport:
    options = ExportOptions(layout="variants", check=False, prologue=True)
    return plan_export(str(model), schedule_for(model), options)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return publish(planned, tmp_path_factory.mktemp("variants") / "engine")


def draw(bundle: Bundle, backend: str, **options: Any) -> np.ndarray:
    pipeline = Pipeline.from_engine_dir(bundle.path, backend, threads=1, **options)
    images = pipeline(class_labels=1, seed=1, guidance_scale=3.0, output_type="np").images
    return np.asarray(images)


@needs_openvino
@pytest.mark.parametrize("toy", [Toy(), Toy(kind="class", batch=3), Toy(kind="none", guidance=False, noises=0)])
def test_equals_the_numpy_loop(tmp_path: Path, toy: Toy) -> None:
    loop = DenoisingLoop(Bundle.open(build(tmp_path / "toy", toy)), create_backend("openvino", threads=1), poison=True)
    rows = toy.halves * toy.batch
    for seed, scale in ((1, 3.0), (2, 1.5)):
        random = np.random.default_rng(seed)
        noise = random.normal(size=(toy.batch, C, H, W)).astype(np.float32)
        noises = random.normal(size=(toy.noises, toy.batch, C, H, W)).astype(np.float32)
        conditions = {
            "text": {"encoder_hidden_states": random.normal(size=(rows, LENGTH, WIDTH)).astype(np.float32)},
            "class": {"class_labels": random.integers(0, 4, rows)},
            "none": {},
        }[toy.kind]
        got = loop.run(noise, conditions, noises=noises, guidance_scale=scale)
        want = reference(toy, noise, noises, next(iter(conditions.values()), None), scale)
        np.testing.assert_allclose(got, want, atol=2e-5)


@needs_openvino
@pytest.mark.parametrize("layout", ["variants", "segments"])
def test_both_layouts_with_tables_prologue_and_vae(
    planned: PlannedExport, engine: Bundle, tmp_path: Path, layout: str
) -> None:
    bundle = engine
    if layout == "segments":
        bundle = with_gates(planned, planned.schedule, tmp_path / "engine", layout=layout)
    assert bundle.manifest.plan.prologue is not None and bundle.manifest.plan.table_timesteps
    np.testing.assert_allclose(draw(bundle, "openvino"), draw(bundle, "cpu"), atol=2e-5)


@needs_openvino
def test_a_lora_changes_what_onnx_runtime_would_change(engine: Bundle, model: Path, tmp_path: Path) -> None:
    updates = make_updates(load_denoiser(str(model))[0], ["transformer_blocks.1.attn1.to_q"])
    choice = ((save_lora(tmp_path / "lora.safetensors", updates), 1.0),)
    plain, merged, wanted = (
        draw(engine, "openvino"),
        draw(engine, "openvino", lora=choice),
        draw(engine, "cpu", lora=choice),
    )
    assert np.abs(merged - plain).max() > 1e-3
    np.testing.assert_allclose(merged, wanted, atol=2e-5)


@needs_openvino
def test_an_output_of_one_pixel_that_is_read_inside_too(tmp_path: Path) -> None:
    """As the deepest level of a small UNet has it: OpenVINO 2026.4 refuses it as it is."""
    random = np.random.default_rng(0)
    weights = {
        name: random.normal(size=shape).astype(np.float32)
        for name, shape in {"a": (32, 16, 3, 3), "b": (32,), "c": (32, 16, 1, 1), "d": (32,), "e": (8,)}.items()
    }
    weights |= {"groups": np.array([1, 8, -1]), "whole": np.array([1, 32, 1, 1])}
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("Conv", ["s", "a", "b"], ["main"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "c", "d"], ["shortcut"]),
        helper.make_node("Add", ["shortcut", "main"], ["cache"]),
        helper.make_node("Reshape", ["cache", "groups"], ["grouped"]),
        helper.make_node("InstanceNormalization", ["grouped", "e", "e"], ["normed"]),
        helper.make_node("Reshape", ["normed", "whole"], ["added"]),
        helper.make_node("Add", ["added", "cache"], ["y"]),
    ]
    shapes = {"x": (1, 16, 1, 1), "cache": (1, 32, 1, 1), "y": (1, 32, 1, 1)}
    made = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    held = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "one", [made["x"]], [made["cache"], made["y"]], held)
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(whole, tmp_path / "one.onnx")
    specs = {name: TensorSpec(name=name, shape=shape, dtype="float32") for name, shape in shapes.items()}
    entry = Graph(file="one.onnx", inputs=(specs["x"],), outputs=(specs["cache"], specs["y"]))
    given = {"x": random.normal(size=shapes["x"]).astype(np.float32)}
    ours, theirs = (Component(tmp_path, entry, create_backend(name, threads=1))(given) for name in ("openvino", "cpu"))
    for name in ("cache", "y"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4)


@needs_openvino
def test_graphs_that_are_not_the_manifests_are_refused(tmp_path: Path) -> None:
    folder = build(tmp_path / "toy", Toy())
    backend = create_backend("openvino", threads=1)
    entry = manifest_of(Toy()).plan.variants[0].graph
    for change, message in (
        ({"inputs": (entry.inputs[0].model_copy(update={"shape": (9, 9)}), *entry.inputs[1:])}, "in the manifest"),
        ({"file": "graphs/none.onnx"}, "missing; export"),
    ):
        with pytest.raises(UserError, match=message):
            backend.load(folder, entry.model_copy(update=change))
    damaged = replaced(tmp_path / "damaged", folder)
    (damaged / entry.file).unlink()
    (damaged / entry.file).write_bytes(b"no graph")
    with pytest.raises(UserError, match="OpenVINO cannot load it"):
        backend.load(damaged, entry)
    with pytest.raises(UserError, match="runs fp32 only, and this directory is fp16"):
        backend.check(manifest_of(Toy(dtype="fp16")))


@needs_openvino
def test_a_run_writes_nothing_below_the_home_folder(tmp_path: Path) -> None:
    engine = build(tmp_path / "engine", Toy(batch=1))
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys; from dipgo_deploy import Pipeline; Pipeline.from_engine_dir(sys.argv[1], 'openvino')('a red boot')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(home)}
    subprocess.run([sys.executable, "-c", code, str(engine)], env=environment, cwd=home, check=True, timeout=60)
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_what_it_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"share_weights": True}, "--share-weights: only with --backend cpu or cuda"),
        ({"cuda_graph": "step"}, "--cuda-graph step: only with --backend tensorrt"),
        ({"threads": 0}, "threads"),
    ):
        with pytest.raises(UserError, match=message):
            create_backend("openvino", **options)  # type: ignore[arg-type]
    from click.testing import CliRunner

    line = ["--engine-dir", str(tmp_path), "--backend", "openvino", "--bisect", str(tmp_path / "new")]
    result = CliRunner().invoke(compare, line)
    assert isinstance(result.exception, UserError) and "--bisect: not with --backend openvino" in str(result.exception)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"OpenVINO is not installed; pip install .*openvino"):
        create_backend("openvino")
