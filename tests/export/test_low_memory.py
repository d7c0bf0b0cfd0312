from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_engines import corrupted, save_dit_pipeline, schedule_for

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.errors import ToleranceError, UserError
from dipgo_deploy.export import low_memory, mapped
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, publish
from dipgo_deploy.supernet.load import load_denoiser, stored_dtype

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit_pipeline(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def plan(model: Path) -> Callable[..., PlannedExport]:
    def make(**options: Any) -> PlannedExport:
        return plan_export(str(model), schedule_for(model), ExportOptions(components=False, **options))

    return make


@pytest.fixture(scope="module")
def half(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its denoiser stored in float16, in several files."""
    folder = tmp_path_factory.mktemp("half") / "model"
    shutil.copytree(model, folder)
    shutil.rmtree(folder / "transformer")
    load_denoiser(model)[0].half().save_pretrained(folder / "transformer", max_shard_size="20KB")
    return folder


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
    found = low_memory.check_in_process(engine, str(model))
    assert 0 < found.relative < 1e-4 and found.psnr > 80 and found.cosine > 0.999999
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


def test_large_weights_are_held_once_by_default(
    plan: Callable[..., PlannedExport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan().options.low_memory is False
    monkeypatch.setattr(low_memory, "LARGE_BYTES", 1000)
    assert plan(low_memory=False).options.low_memory is False
    assert plan(layout="segments").options.low_memory is False
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


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_half_precision_files_give_the_same_graphs(half: Path, tmp_path: Path, dtype: str) -> None:
    written = []
    for frugal in (False, True):
        options = ExportOptions(components=False, dtype=dtype, low_memory=frugal)
        written.append(publish(plan_export(str(half), schedule_for(half), options), tmp_path / f"{frugal}"))
    usual, held_once = written
    for entry in usual.manifest.plan.variants:
        assert _content(held_once.path / entry.graph.file) == _content(usual.path / entry.graph.file)


def test_a_float32_copy_loads_mapped_and_is_gone_afterwards(model: Path, half: Path, tmp_path: Path) -> None:
    assert (stored_dtype(model), stored_dtype(half)) == (torch.float32, torch.float16)
    with mapped.float32_files(str(model), tmp_path) as folder:
        assert folder == str(model)
    expected = dict(load_denoiser(half)[0].state_dict())
    with mapped.float32_files(str(half), tmp_path) as folder:
        copy = load_denoiser(folder)[0]
        files = mapped.mapped_files()
        for name, parameter in copy.named_parameters():
            assert any(first <= parameter.data_ptr() < last for first, last in files), name
        found = copy.state_dict()
    assert list(tmp_path.iterdir()) == []
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pages_that_were_given_back_are_read_again(model: Path) -> None:
    denoiser = load_denoiser(model)[0]
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([9, 9]), torch.tensor([1, 2])
    with torch.no_grad():
        expected = denoiser(*inputs).sample
        mapped.give_back_after_use(denoiser)
        for _ in range(2):
            assert torch.equal(denoiser(*inputs).sample, expected)


def test_pages_are_given_back(tmp_path: Path) -> None:
    """The kernel's own count of the pages in memory."""
    linear = torch.nn.Linear(512, 512)
    save_file(linear.state_dict(), tmp_path / "linear.safetensors")
    linear.load_state_dict(load_file(tmp_path / "linear.safetensors"), assign=True)
    linear(torch.ones(1, 512))
    before = _resident_kib("linear.safetensors")
    mapped.give_back_after_use(linear)
    linear(torch.ones(1, 512))
    assert before > 1000
    assert _resident_kib("linear.safetensors") < 100


def _resident_kib(name: str) -> int:
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    inside = False
    total = 0
    for line in lines:
        if "-" in line.split()[0]:
            inside = line.endswith(name)
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total
