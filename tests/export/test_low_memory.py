from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_engines import corrupted, save_dit_pipeline, schedule_for

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import VariantEntry
from dipgo_deploy.compare.conditions import reference_inputs
from dipgo_deploy.compare.metrics import Agreement
from dipgo_deploy.compare.recording import run_until_complete
from dipgo_deploy.compare.reference import load_reference
from dipgo_deploy.compare.steps import recorder_for
from dipgo_deploy.errors import ToleranceError, UserError
from dipgo_deploy.export import low_memory, mapped
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, publish
from dipgo_deploy.export.layout import Layout, layout_of, note_layouts
from dipgo_deploy.export.recorded import read_recordings, read_steps
from dipgo_deploy.export.weights import write_weights
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
    weight = next(name for name in _stored(engine, variant) if name.startswith("transformer_blocks.0.ff"))
    wrong = corrupted(engine, tmp_path / "wrong", Path(variant.graph.file).name, weight)
    with pytest.raises(ToleranceError, match=r"variant v\d+ by itself, step \d+, .*: error .* against the supernet"):
        low_memory.check_in_process(wrong, str(model))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        low_memory.check_in_process(tmp_path / "nowhere", str(model))
    assert not list(tmp_path.rglob(".*"))


def test_graphs_run_where_torch_was_never_loaded(
    plan: Callable[..., PlannedExport], model: Path, tmp_path: Path
) -> None:
    """The supernet's libraries take some hundred MB, which the comparison's own process does without."""
    engine = publish(plan(low_memory=True, check=False), tmp_path / "engine").path
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    low_memory._record(engine, str(model), recorded)
    code = (
        "import sys; from pathlib import Path; from dipgo_deploy.export import low_memory; "
        "low_memory._compare(Path(sys.argv[1]), Path(sys.argv[2])); "
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
    low_memory._record(bundle.path, str(model), folder)
    assert [part.name for part in folder.iterdir()] == ["0"]  # the caches' files are gone

    reference, manifest, entries = load_reference(bundle), bundle.manifest, bundle.manifest.plan
    shape = (manifest.batch, manifest.latent.channels, manifest.latent.height, manifest.latent.width)
    given = reference_inputs(
        reference.source, reference.conditions, shape, noises=entries.noises, guidance=manifest.guidance
    )
    recorder = recorder_for(entries, reference.schedule, given.guidance_scale, again=False)
    found = list((read_recordings if layout == "variants" else read_steps)(folder / "0"))
    steps = reference.schedule.sampler.num_inference_steps
    run_until_complete(recorder, reference.supernet, reference.scheduler, steps, reference.schedule.gates, given)
    assert len(found) == len(recorder.recordings) > 1
    for mine, kept in zip(found, recorder.recordings, strict=True):
        assert mine.step == kept.step
        for side in ("inputs", "outputs"):
            one, other = getattr(mine, side), getattr(kept, side)
            assert one.keys() == other.keys()
            for name in one:
                np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_segments_are_the_same_too(plan: Callable[..., PlannedExport], model: Path, tmp_path: Path, dtype: str) -> None:
    found: list[Agreement] = []
    usual = publish(plan(layout="segments", dtype=dtype), tmp_path / "usual", agreed=found.append)
    frugal = publish(plan(layout="segments", dtype=dtype, low_memory=True), tmp_path / "frugal", agreed=found.append)
    assert frugal.manifest.plan.launches == usual.manifest.plan.launches
    for entry, other in zip(frugal.manifest.plan.variants, usual.manifest.plan.variants, strict=True):
        assert _content(frugal.path / entry.graph.file) == _content(usual.path / other.graph.file)
    # The usual check has the loop besides; the same graphs get other optimizations.
    assert 0 < found[1].relative <= 1.5 * found[0].relative
    owner = {weight: entry for entry in frugal.manifest.plan.variants for weight in _stored(frugal.path, entry)}
    weight = next(name for name in owner if name.startswith("transformer_blocks.0.ff"))
    wrong = corrupted(frugal.path, tmp_path / "wrong", Path(owner[weight].graph.file).name, weight)
    with pytest.raises(ToleranceError, match=r"variant \S+ by itself, step \d+, .*: error .* against the supernet"):
        low_memory.check_in_process(wrong, str(model))


def _stored(engine: Path, entry: VariantEntry) -> list[str]:
    """Names of a graph's tensors in the weights file."""
    graph = onnx.load(engine / entry.graph.file, load_external_data=False).graph
    return [tensor.name for tensor in graph.initializer if tensor.external_data]


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


def test_caches_lie_in_files_without_names(tmp_path: Path) -> None:
    caches = mapped.MappedCaches(tmp_path)
    large = torch.randn(512, 1024).T  # not in C order
    held = caches.put(large)
    assert _resident_kib(str(tmp_path)) < 100
    for _ in range(2):
        assert torch.equal(caches.get(held), large)
        assert _resident_kib(str(tmp_path)) < 100
    assert torch.equal(held, large)
    assert _resident_kib(str(tmp_path)) > 1000
    caches.give_back(held)
    assert _resident_kib(str(tmp_path)) < 100
    assert torch.equal(caches.get(caches.put(torch.tensor(3.5))), torch.tensor(3.5))
    assert list(tmp_path.iterdir()) == []


def test_pages_that_were_written_to_are_kept(tmp_path: Path) -> None:
    """They are not in the file: given back, a merged weight would be the file's again."""
    save_file({"weight": torch.zeros(1024, 1024)}, tmp_path / "changed.safetensors")
    weight = load_file(tmp_path / "changed.safetensors")["weight"]
    assert _is_mapped(weight)
    weight[3] = 1.0
    assert not _is_mapped(weight)
    mapped.give_back(weight, mapped.mapped_files())
    assert weight.sum() == 1024


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
    note_layouts(model, layers, {name: name for name in values}, "")
    assert layout_of(values["2.weight"].const_value) == Layout("2.weight", transposed=False)
    assert _resident_kib("layers.safetensors") < 100
    size = write_weights([model], tmp_path)
    assert size >= 4 * 2**20
    assert _resident_kib("layers.safetensors") <= 1024 + 100  # the last one


def _is_mapped(tensor: torch.Tensor) -> bool:
    return any(first <= tensor.data_ptr() < last for first, last in mapped.mapped_files())


def _resident_kib(name: str) -> int:
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    inside = False
    total = 0
    for line in lines:
        if "-" in line.split()[0]:
            inside = name in line  # of a file without a name only the folder is known
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.parametrize(("status", "kind"), [(3, ToleranceError), (1, UserError), (2, UserError), (-9, UserError)])
def test_only_a_comparison_beyond_tolerance_is_one(
    status: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends in a traceback (a full disk) has status 1."""
    done = subprocess.CompletedProcess([], status, stdout="", stderr="OSError: no space left on device")
    monkeypatch.setattr(low_memory.subprocess, "run", lambda *arguments, **options: done)
    with pytest.raises(kind, match="no space left on device"):
        low_memory._run("record")
