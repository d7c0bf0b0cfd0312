from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_engines import corrupted, save_dit_pipeline, schedule_for

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.errors import ToleranceError, UserError
from dipgo_deploy.export import low_memory
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, publish
from dipgo_deploy.supernet.load import load_denoiser

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit_pipeline(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def plan(model: Path) -> Callable[..., PlannedExport]:
    def make(**options: Any) -> PlannedExport:
        return plan_export(str(model), schedule_for(model), ExportOptions(components=False, **options))

    return make


def _content(path: Path) -> tuple[list[str], list[bytes]]:
    """Operators in order, and the values of all weights; torch numbers intermediate names anew in each trace."""
    graph = onnx.load(path).graph
    return [node.op_type for node in graph.node], sorted(tensor.raw_data for tensor in graph.initializer)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_files_are_the_same(plan: Callable[..., PlannedExport], tmp_path: Path, dtype: str) -> None:
    """Weights converted one at a time, and released before the comparison, are those of a usual export."""
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


def test_a_wrong_graph_is_found_by_the_process(plan: Callable[..., PlannedExport], model: Path, tmp_path: Path) -> None:
    engine = publish(plan(low_memory=True, check=False), tmp_path / "engine").path
    low_memory.check_in_process(engine, str(model))
    variant = Bundle.open(engine).manifest.plan.variants[0]
    graph = onnx.load(engine / variant.graph.file, load_external_data=False)
    inside = [t for t in graph.graph.initializer if t.name.startswith("transformer_blocks.0.ff") and t.external_data]
    weight = inside[0].name
    wrong = corrupted(engine, tmp_path / "wrong", Path(variant.graph.file).name, weight)
    with pytest.raises(ToleranceError, match=r"variant v\d+, step \d+, .*: relative error .* against the supernet"):
        low_memory.check_in_process(wrong, str(model))
    with pytest.raises(UserError, match=r"status 2: .*no manifest\.json there"):
        low_memory.check_in_process(tmp_path / "nowhere", str(model))


def test_segments_are_refused(plan: Callable[..., PlannedExport]) -> None:
    with pytest.raises(UserError, match=re.escape("--low-memory: not with --layout segments")):
        plan(low_memory=True, layout="segments")


def test_models_that_keep_some_float32_are_left_alone(model: Path) -> None:
    denoiser = load_denoiser(model)[0]
    denoiser._keep_in_fp32_modules = ["norm"]  # type: ignore[assignment]
    assert not low_memory.convert_in_place(denoiser, torch.float16)
    assert all(parameter.dtype == torch.float32 for parameter in denoiser.parameters())
