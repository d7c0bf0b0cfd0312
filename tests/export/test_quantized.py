"""Weights in fewer bits: once for all graphs, the nearest numbers, and graphs that compute with just these."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import DiTTransformer2DModel
from family_checks import random_weights
from lora_files import diffusers_keys, make_updates, save_lora
from tiny_engines import schedule_for

from dipgo_deploy.backends import create_backend
from dipgo_deploy.backends.tensorrt_plans import GpuTarget
from dipgo_deploy.bundle.directory import Bundle, reseal
from dipgo_deploy.bundle.manifest import QUANTIZED_VERSION
from dipgo_deploy.bundle.quantized import ACTIVATIONS, MATRIX_TYPES, METHODS, NUMBER_TYPES, Method, to_weight, unpacked
from dipgo_deploy.bundle.weights import WEIGHTS_NAME, WeightsIndex
from dipgo_deploy.compare.engine import Options, compare_engine
from dipgo_deploy.compare.report import LATENT
from dipgo_deploy.compare.weights import check_weights
from dipgo_deploy.engine.build import BuildOptions, Observer, _check_numbers, build_engines
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.again import options_of
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, in_layout, plan_export, publish
from dipgo_deploy.models.family import _QUANTIZED
from dipgo_deploy.reference.load import reference_of
from dipgo_deploy.runtime.pipeline import Pipeline

WIDTH = 64  # one block of 4-bit inputs
# Of methods that round activations; a model with random weights loses more than others.
BUDGETS: dict[Method, float] = {"int8": 0.05, "fp8": 0.5}
TOLERANCES = {"int8-weights": 1e-1, "int4-weights": 5e-1, "int8": 3e-1, "fp8": 5e-1}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> PlannedExport:
    """A transformer with timestep tables and a prologue."""
    torch.manual_seed(1)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    folder = tmp_path_factory.mktemp("dit")
    random_weights(model, 0.02).save_pretrained(folder)
    options = ExportOptions(layout="variants", components=False, timestep_tables=True, prologue=True)
    return plan_export(str(folder), schedule_for(folder), options)


@pytest.fixture(scope="module")
def written(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Bundle]:
    """Layouts and methods, each compared with the model when it was written."""
    folder = tmp_path_factory.mktemp("engines")
    found = {}
    for layout in ("variants", "segments"):
        export = in_layout(planned, layout)  # type: ignore[arg-type]
        for method in METHODS if layout == "variants" else ("int4-weights", "fp8"):
            budget = BUDGETS.get(method)
            quantized = replace(export, options=replace(export.options, quantize=method, quantize_budget=budget))
            found[layout, method] = publish(quantized, folder / layout / method)
    return found


CASES = [("variants", "int8-weights"), ("variants", "int4-weights"), ("segments", "int4-weights")]


def _values(bundle: Bundle) -> dict[str, np.ndarray]:
    """What the parameters in fewer bits are, float32 in the model's own layout."""
    folder = bundle.path / "graphs"
    data = np.fromfile(folder / WEIGHTS_NAME, np.uint8)
    scales = {
        tensor.name: onnx.numpy_helper.to_array(tensor, str(folder))
        for path in folder.glob("*.onnx")
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if tensor.name.endswith(".scale")
    }
    found: dict[str, np.ndarray] = {}
    for stored in WeightsIndex.load(folder).tensors.values():
        if stored.quantized is None:
            continue
        numbers = unpacked(data[stored.offset :][: stored.length], stored.dtype, stored.shape)
        values = to_weight(numbers, scales[stored.quantized.scale], stored.quantized.axis, stored.quantized.block)
        values = values.T if stored.transposed else values
        whole = found.setdefault(str(stored.parameter), np.zeros(stored.parameter_shape, np.float32))
        first, last, _ = stored.rows or (0, len(whole), 0)
        whole[first:last] = values
    return found


@pytest.mark.parametrize(("layout", "method"), CASES)
def test_graphs_compute_with_the_nearest_numbers(
    planned: PlannedExport, written: dict[tuple[str, str], Bundle], layout: str, method: Method
) -> None:
    """The model with the stored values in its weights agrees as closely as with its own."""
    bundle = written[layout, method]
    values = _values(bundle)
    source = planned.source
    before = {name: tensor.clone() for name, tensor in source.denoiser.state_dict().items()}
    assert len(values) >= bundle.manifest.quantization.weights - 4  # type: ignore[union-attr]
    try:
        for name, parameter in values.items():
            known = np.any(parameter != 0, axis=tuple(range(1, parameter.ndim)))  # rows that became tables are in none
            changed = torch.from_numpy(parameter)
            with torch.no_grad():
                own = source.denoiser.get_parameter(name)
                own[torch.from_numpy(known)] = changed[torch.from_numpy(known)]
        reference = reference_of(bundle, source)
        backend = create_backend("cpu", share_weights=True)  # the sums in float32
        options = Options(components=False, tolerance=1e-4)
        report = compare_engine(bundle, reference, reference.inputs(bundle.manifest), backend, options)
    finally:
        source.denoiser.load_state_dict(before)
    assert report.first_failure() is None
    assert report.variants and report.loop


@pytest.mark.parametrize("method", METHODS)
def test_each_weight_is_there_once(written: dict[tuple[str, str], Bundle], method: Method) -> None:
    for bundle in (bundle for (_, name), bundle in written.items() if name == method):
        manifest, entry = bundle.manifest, bundle.manifest.quantization
        assert entry is not None and manifest.format_version == QUANTIZED_VERSION
        index = WeightsIndex.load(bundle.path / "graphs").tensors
        numbers = {name: stored for name, stored in index.items() if stored.quantized is not None}
        assert {stored.dtype for stored in numbers.values()} == (
            {"int8", "int4"} if method == "int4-weights" else {MATRIX_TYPES[method]}
        )
        for stored in numbers.values():
            assert stored.length == np.prod(stored.shape) * NUMBER_TYPES[stored.dtype].bits // 8
            assert (stored.dtype == "int4") == (stored.quantized.block is not None)  # type: ignore[union-attr]
        parts = [(stored.parameter, stored.rows) for stored in numbers.values()]
        assert len(parts) == len(set(parts)) == entry.weights
        assert not {str(stored.parameter) for stored in index.values() if stored.quantized is None} & {
            str(name) for name, _ in parts
        }
        assert entry.bytes_after < entry.bytes_before * (0.2 if method == "int4-weights" else 0.3)
        assert (bundle.path / "graphs" / WEIGHTS_NAME).stat().st_size < entry.bytes_before * 0.4
        assert entry.kept == ()
        assert options_of(bundle).quantize == method


def test_a_directory_carries_a_test_with_a_tolerance_of_its_own(written: dict[tuple[str, str], Bundle]) -> None:
    for (_, method), bundle in written.items():
        report = Pipeline.from_engine_dir(bundle.path).self_test()
        assert report.passed and report.tolerance == TOLERANCES[method]
        assert "nearest number" in report.reason


@pytest.mark.parametrize("method", METHODS)
def test_a_number_off_by_one_is_found(
    planned: PlannedExport, written: dict[tuple[str, str], Bundle], method: Method, tmp_path: Path
) -> None:
    bundle = written["variants", method]
    assert all(part.passed for part in check_weights(bundle, planned.source))
    shutil.copytree(bundle.path, tmp_path / "off")
    stored = next(
        one
        for one in WeightsIndex.load(bundle.path / "graphs").tensors.values()
        if one.quantized is not None and one.dtype == MATRIX_TYPES[method]
    )
    with (tmp_path / "off" / "graphs" / WEIGHTS_NAME).open("r+b") as file:
        file.seek(stored.offset)
        (value,) = file.read(1)
        file.seek(stored.offset)
        file.write(bytes([value ^ 1]))
    reseal(tmp_path / "off")
    (wrong,) = [part for part in check_weights(Bundle.open(tmp_path / "off"), planned.source) if not part.passed]
    assert wrong.name == "weights" and str(stored.parameter) in wrong.place


def test_latents_of_a_loop_may_differ_as_far_as_its_results(
    planned: PlannedExport, written: dict[tuple[str, str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each launch makes is held to the tolerance of the graphs, on the latent that the launch had."""
    monkeypatch.setitem(_QUANTIZED, "int8-weights", 1e-6)
    bundle = written["variants", "int8-weights"]
    reference = reference_of(bundle, planned.source)
    options = Options(components=False, variants=False)
    report = compare_engine(bundle, reference, reference.inputs(bundle.manifest), create_backend("cpu"), options)
    every = [tensor for checked in report.loop for tensor in checked.tensors]
    latents = [tensor for tensor in every if tensor.name == LATENT]
    assert latents[-1].relative > report.tolerance.relative and all(tensor.passed for tensor in latents)
    assert not all(tensor.passed for tensor in every)


@pytest.mark.parametrize("method", ["int8-weights", "fp8"])
def test_a_lora_is_refused_by_name(
    planned: PlannedExport, written: dict[tuple[str, str], Bundle], method: Method, tmp_path: Path
) -> None:
    updates = make_updates(planned.source.denoiser, ["transformer_blocks.1.attn1.to_q"])
    lora = save_lora(tmp_path / "lora.safetensors", updates, diffusers_keys("transformer."))
    refused = rf"attn1.to_q: its weight is in {MATRIX_TYPES[method]}, which no LoRA .* without --quantize, or"
    with pytest.raises(UserError, match=refused):
        Pipeline.from_engine_dir(written["variants", method].path).load_lora(lora)


def test_other_methods_are_refused() -> None:
    from dipgo_deploy.export.options import check_options

    with pytest.raises(UserError, match="quantize 'int3': choose one of int8-weights, int4-weights, int8, fp8"):
        check_options(ExportOptions(quantize="int3"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "method", [pytest.param("int8-weights", marks=pytest.mark.slow), "int4-weights", "int8", "fp8"]
)
def test_tensorrt_builds_them(written: dict[tuple[str, str], Bundle], method: Method) -> None:
    """Every variant, and the prologue."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: engines cannot be built here")
    options = BuildOptions(compute_capabilities=("8.9",))
    report = build_engines(written["variants", method].path, "tensorrt-rtx", options)
    assert len(report.built) == len(report.engines) > 2


class _Heard(Observer):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warned(self, message: str) -> None:
        self.warnings.append(message)


def test_gpus_without_float8_are_refused_by_name(written: dict[tuple[str, str], Bundle]) -> None:
    heard = _Heard()
    for method in METHODS:
        bundle = written["variants", method]
        _check_numbers(bundle, GpuTarget(), heard)
        _check_numbers(bundle, GpuTarget(gpu="NVIDIA L4", capabilities=("8.9",)), heard)
    assert heard.warnings == ["products in fp8 need compute capability 8.9 or newer to run"]
    with pytest.raises(UserError, match=r"NVIDIA A10 \(8\.6\): has no products in fp8, .* --quantize int8"):
        _check_numbers(written["variants", "fp8"], GpuTarget(gpu="NVIDIA A10", capabilities=("8.6",)), heard)


@pytest.mark.parametrize("method", ACTIVATIONS)
def test_scales_of_activations_are_recorded_in_the_loop(written: dict[tuple[str, str], Bundle], method: Method) -> None:
    """Each graph rounds with the ranges of its own launches; blocks beyond the budget keep floats."""
    bundle = written["variants", method]
    entry = bundle.manifest.quantization
    assert entry is not None and entry.calibration is not None
    calibration = entry.calibration
    assert 0 < calibration.error <= calibration.budget == BUDGETS[method] and calibration.samples == 4
    assert set(calibration.sensitivity) == {"transformer_blocks.0", "transformer_blocks.1", "(beside the blocks)"}
    scales: dict[str, set[float]] = {}
    for variant in bundle.manifest.plan.variants:
        graph = onnx.load(bundle.path / variant.graph.file, load_external_data=False).graph
        known = {tensor.name: tensor for tensor in graph.initializer}
        rounded = [node for node in graph.node if node.op_type == "QuantizeLinear"]
        products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1].endswith(":dequantized")]
        assert len({node.input[0] for node in products}) <= len(rounded)
        for node in rounded:
            value = float(onnx.numpy_helper.to_array(known[node.input[1]]))
            assert value > 0
            assert not any(onnx.numpy_helper.to_array(known[zero]).any() for zero in node.input[2:])
            scales.setdefault(node.name, set()).add(value)
    assert any(len(found) > 1 for found in scales.values())
    assert not list((bundle.path / "graphs").glob(".*")) and not (bundle.path / "graphs" / "quantized.bin").exists()
    again = options_of(bundle)
    assert again.quantize_budget == BUDGETS[method] and again.calibration_prompts == ()
