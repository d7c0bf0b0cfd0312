from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from resident import resident_kib
from safetensors.torch import load_file, save_file
from shared_traces import shared_traces
from tiny_engines import corrupted, plan_variants, save_dit_pipeline, save_in_half, schedule_for, stored_weights

from dipgo_deploy.compare.metrics import Agreement
from dipgo_deploy.compare.processes import verify_in_processes
from dipgo_deploy.errors import ToleranceError
from dipgo_deploy.export import low_memory
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, publish
from dipgo_deploy.export.passes.layouts import NoteLayouts
from dipgo_deploy.export.passes.names import note_parameter
from dipgo_deploy.export.stored import StoredParameter, stored_parameter
from dipgo_deploy.export.weights import write_weights
from dipgo_deploy.supernet.load import load_denoiser

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit_pipeline(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def plan(model: Path) -> Callable[..., PlannedExport]:
    return partial(plan_variants, model)


@pytest.fixture(scope="module")
def half(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_in_half(model, tmp_path_factory.mktemp("half") / "model")


def _content(path: Path) -> tuple[list[str], list[bytes]]:
    """Operators in order, and the values of all weights; torch numbers intermediate names anew in each trace."""
    graph = onnx.load(path).graph
    return [node.op_type for node in graph.node], sorted(tensor.raw_data for tensor in graph.initializer)


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "fp16"])
def test_the_files_are_the_same(plan: Callable[..., PlannedExport], tmp_path: Path, dtype: str) -> None:
    """Weights converted one at a time, and released before the comparison, are those of a usual export."""
    with shared_traces():
        usual = publish(plan(dtype=dtype), tmp_path / "usual")
    planned = plan(dtype=dtype, low_memory=True)
    frugal = publish(planned, tmp_path / "frugal")
    assert frugal.manifest.plan.launches == usual.manifest.plan.launches
    for entry, other in zip(frugal.manifest.plan.variants, usual.manifest.plan.variants, strict=True):
        assert _content(frugal.path / entry.graph.file) == _content(usual.path / other.graph.file)
    assert all(parameter.device.type == "meta" for parameter in planned.source.denoiser.parameters())


def test_weights_are_converted_in_place_and_stay_readable(model: Path) -> None:
    denoiser = load_denoiser(model)[0]
    before = {name: parameter.detach().clone() for name, parameter in denoiser.named_parameters()}
    assert low_memory.convert_in_place(denoiser, torch.float16)
    for name, parameter in denoiser.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), before[name].half().numpy(), err_msg=name)
    again = load_denoiser(model)[0]  # the file itself was not touched
    assert all(torch.equal(parameter, before[name]) for name, parameter in again.named_parameters())


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "fp16"])
def test_segments_are_the_same_too(plan: Callable[..., PlannedExport], model: Path, tmp_path: Path, dtype: str) -> None:
    found: list[Agreement] = []
    with shared_traces():
        usual = publish(plan(layout="segments", dtype=dtype), tmp_path / "usual", agreed=found.append)
    frugal = publish(plan(layout="segments", dtype=dtype, low_memory=True), tmp_path / "frugal", agreed=found.append)
    assert frugal.manifest.plan.launches == usual.manifest.plan.launches
    for entry, other in zip(frugal.manifest.plan.variants, usual.manifest.plan.variants, strict=True):
        assert _content(frugal.path / entry.graph.file) == _content(usual.path / other.graph.file)
    # The usual check has the loop besides; the same graphs get other optimizations.
    assert 0 < found[1].relative <= 1.5 * found[0].relative
    owner = {weight: entry for entry in frugal.manifest.plan.variants for weight in stored_weights(frugal.path, entry)}
    weight = next(name for name in owner if name.startswith("transformer_blocks.0.ff"))
    wrong = corrupted(frugal.path, tmp_path / "wrong", Path(owner[weight].graph.file).name, weight)
    with pytest.raises(
        ToleranceError, match=r"variant \S+ by itself, evaluation \d+, .*: error .* against the supernet"
    ):
        verify_in_processes(wrong, str(model))


def test_models_that_keep_some_float32_are_left_alone(model: Path) -> None:
    denoiser = load_denoiser(model)[0]
    denoiser._keep_in_fp32_modules = ["norm"]  # type: ignore[assignment]
    assert not low_memory.convert_in_place(denoiser, torch.float16)
    assert all(parameter.dtype == torch.float32 for parameter in denoiser.parameters())


def test_large_weights_are_held_once_by_default(
    plan: Callable[..., PlannedExport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shared_traces():
        assert plan().options.low_memory is False
        monkeypatch.setattr(low_memory, "LARGE_BYTES", 1000)
        assert plan(low_memory=False).options.low_memory is False
        assert plan(layout="segments").options.low_memory is True
    planned = plan(check=False)
    assert planned.options.low_memory is True
    publish(planned, tmp_path / "engine")
    with pytest.raises(ValueError, match="is written once"):
        publish(planned, tmp_path / "again")


def test_large_means_bytes_of_the_export(model: Path, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = sum(parameter.numel() for parameter in load_denoiser(model)[0].parameters())
    monkeypatch.setattr(low_memory, "LARGE_BYTES", 3 * count)
    for folder in (model, half):
        assert low_memory.is_large(str(folder), torch.float32)
        assert not low_memory.is_large(str(folder), torch.float16)


@pytest.mark.parametrize(
    "dtype", [*(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("fp32", "fp16")), "bf16"]
)
def test_half_precision_files_give_the_same_graphs(half: Path, tmp_path: Path, dtype: str) -> None:
    written = []
    for frugal in (False, True):
        options = ExportOptions(layout="variants", components=False, dtype=dtype, low_memory=frugal)
        written.append(publish(plan_export(str(half), schedule_for(half), options), tmp_path / f"{frugal}"))
    usual, held_once = written
    for entry in usual.manifest.plan.variants:
        assert _content(held_once.path / entry.graph.file) == _content(usual.path / entry.graph.file)


def test_reading_all_weights_once_leaves_few_pages(tmp_path: Path) -> None:
    """Which parameter a tensor is, and writing it: both go through all weights."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(4)))
    for number, layer in enumerate(layers):
        layer.weight.data.fill_(number)
    save_file(layers.state_dict(), tmp_path / "layers.safetensors")
    layers.load_state_dict(load_file(tmp_path / "layers.safetensors"), assign=True)
    values = {
        name: ir.Value(name=name, const_value=ir.tensor(weight.data, name=name))
        for name, weight in layers.named_parameters()
    }
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=list(values.values())), ir_version=10)
    for name, value in values.items():
        note_parameter(value, name)
    NoteLayouts(layers, "")(model)
    assert stored_parameter(values["2.weight"].const_value) == StoredParameter("2.weight", transposed=False)
    assert resident_kib("layers.safetensors") < 100
    size = write_weights([model], tmp_path)
    assert size >= 4 * 2**20
    assert resident_kib("layers.safetensors") <= 1024 + 100  # the last one
