"""Open sizes: one export, every batch, height and width of the ranges."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_denoisers import two_level_unet
from tiny_engines import schedule_for

from dipgo_deploy.backends import create_backend
from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import seal_of
from dipgo_deploy.bundle.shapes import Range, SizeRanges, Sizes
from dipgo_deploy.compare.engine import Options, compare_engine
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.dynamic import Dimensions, macs_at
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, publish
from dipgo_deploy.export.program import to_onnx
from dipgo_deploy.export.trace import Beforehand, TracedModel, trace
from dipgo_deploy.reference.conditions import as_arrays
from dipgo_deploy.reference.load import Reference, load_reference
from dipgo_deploy.runtime.graphs import Graphs
from dipgo_deploy.runtime.loop import DenoisingLoop
from dipgo_deploy.runtime.pipeline import Pipeline

torch.set_num_threads(1)

OPTIONS = ExportOptions(
    layout="variants",
    batch=Range(min=1, opt=2, max=3),
    height=Range(min=32, opt=64, max=128),
    width=Range(min=32, opt=64, max=128),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet of two levels: an open side is a multiple of 2 latent pixels."""
    path = tmp_path_factory.mktemp("model")
    two_level_unet().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def planned(folder: Path) -> PlannedExport:
    return plan_export(str(folder), schedule_for(folder), OPTIONS)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written after the exporter's own comparison at the corners of the ranges."""
    path = tmp_path_factory.mktemp("engine") / "unet"
    publish(planned, path)
    return path


@pytest.fixture(scope="module")
def reference(engine: Path) -> Callable[[Sizes], tuple[Bundle, Reference]]:
    def at(sizes: Sizes) -> tuple[Bundle, Reference]:
        bundle = Bundle.open(engine).at(sizes)
        return bundle, load_reference(bundle)

    return at


def _static(planned: PlannedExport, sizes: Sizes) -> TracedModel:
    source, schedule = planned.source, planned.schedule
    return trace(
        source.denoiser,
        source.family,
        source.config,
        source.specs(schedule),
        schedule.cache_kinds,
        planned.traced.shape.at(sizes),
        "fp32",
        beforehand=Beforehand(tables=planned.options.timestep_tables, prologue=planned.options.prologue),
    )


def test_nothing_is_read_for_its_shape_alone(planned: PlannedExport) -> None:
    """Dependencies, costs and cache sizes are those of a static trace at the largest sizes; the costs that count are
    those at the usual ones, by the same rule."""
    ranges = planned.traced.shape.sizes
    assert ranges is not None
    largest = _static(planned, ranges.max).graph
    found = planned.traced.graph
    costs = macs_at(planned.traced.model, ranges.max)
    assert {name: value.reads for name, value in found.values.items()} == {
        name: value.reads for name, value in largest.values.items()
    }
    assert sum(costs) == sum(largest.costs) > sum(found.costs)
    assert found.costs == macs_at(planned.traced.model, ranges.opt)
    assert found.blocks == largest.blocks
    for name, value in found.values.items():
        assert value.nbytes == largest.values[name].nbytes
        macs = sum(costs[place] for place in value.work)
        assert macs == sum(largest.costs[place] for place in largest.values[name].work), name


def test_the_manifest_says_how_shapes_depend_on_the_sizes(engine: Path) -> None:
    manifest = Bundle.open(engine).manifest
    assert manifest.sizes is not None and manifest.sizes.max == Sizes(3, 16, 16)
    assert manifest.batch == 3 and manifest.latent.scale == 8
    by_name = {
        spec.name: spec
        for variant in manifest.plan.variants
        for spec in (*variant.graph.inputs, *variant.graph.outputs)
    }
    slots = manifest.plan.slots
    assert by_name["stack"].dims == (slots, "batch", 4, "height", "width")
    assert by_name["stack"].shape == (slots, 3, 4, 16, 16)
    assert by_name["noise_pred"].dims == ("batch", 4, "height", "width")
    assert by_name["encoder_hidden_states"].dims == ("2*batch", 77, 8)
    assert by_name["guidance_scale"].dims is None
    caches = [spec for name, spec in by_name.items() if name.startswith("cache.") or name.startswith("new_")]
    assert {spec.dims for spec in caches if spec.dims is not None} >= {("2*batch", 8, "height", "width")}
    assert all(spec.dims is not None for spec in caches)


@pytest.mark.parametrize("sizes", [Sizes(1, 8, 8), Sizes(2, 4, 14), Sizes(3, 16, 6), Sizes(1, 16, 16)])
def test_every_size_gives_the_supernets_result(sizes: Sizes, reference: Any) -> None:
    bundle, torch_side = reference(sizes)
    report = compare_engine(
        bundle,
        torch_side,
        torch_side.inputs(bundle.manifest, guidance_scale=3.0),
        create_backend("cpu", threads=1),
        Options(tolerance=1e-4),
    )
    assert report.first_failure() is None
    assert report.results is not None and report.results.tensors[0].relative < 1e-4


def test_one_loop_runs_all_sizes_in_turn(engine: Path, reference: Any) -> None:
    """Each run is what a loop of its own gives, whatever ran before: buffers are shared and were larger or smaller."""
    backend = create_backend("cpu", threads=1)
    graphs = Graphs(backend)
    whole = DenoisingLoop(Bundle.open(engine), backend, poison=True, graphs=graphs)
    order = [Sizes(3, 16, 16), Sizes(1, 4, 4), Sizes(2, 4, 14), Sizes(1, 4, 4), Sizes(3, 16, 16)]
    for sizes in order:
        bundle, torch_side = reference(sizes)
        inputs = torch_side.inputs(bundle.manifest, guidance_scale=3.0, seed=sum(sizes))
        alone = DenoisingLoop(bundle, create_backend("cpu", threads=1))
        arguments = (inputs.latents.numpy(), as_arrays(inputs.conditions))
        expected = alone.run(*arguments, guidance_scale=3.0)
        assert expected.shape == (sizes.batch, 4, sizes.height, sizes.width)
        np.testing.assert_array_equal(whole.run(*arguments, guidance_scale=3.0), expected)
    assert len(graphs.files) == len({launch.variant for launch in whole.launches})


@pytest.mark.skipif(find_spec("openvino") is None, reason="the extra openvino is not installed")
def test_openvino_runs_all_sizes_in_turn(engine: Path, reference: Any) -> None:
    loops = [DenoisingLoop(Bundle.open(engine), create_backend(name, threads=1)) for name in ("openvino", "cpu")]
    for sizes in (Sizes(3, 16, 16), Sizes(1, 4, 4), Sizes(2, 4, 14)):
        bundle, torch_side = reference(sizes)
        inputs = torch_side.inputs(bundle.manifest, guidance_scale=3.0, seed=sum(sizes))
        given = inputs.latents.numpy(), as_arrays(inputs.conditions)
        ours, theirs = (loop.run(*given, guidance_scale=3.0) for loop in loops)
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_bindings_are_kept_per_size(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dipgo_deploy.backends.onnxruntime import OnnxExecutable

    bound: list[str] = []
    bind = OnnxExecutable.bind

    def counting(self: OnnxExecutable, *arguments: Any) -> Any:
        bound.append(self.graph.file)
        return bind(self, *arguments)

    monkeypatch.setattr(OnnxExecutable, "bind", counting)
    loop = DenoisingLoop(Bundle.open(engine), OnnxRuntimeBackend("cpu", threads=1), lazy=True)
    counts = []
    for side in (4, 6, 4, 6, 8):
        loop.run(np.zeros((1, 4, side, 4), np.float32), {"encoder_hidden_states": np.zeros((2, 77, 8), np.float32)})
        counts.append(len(bound))
    assert counts == [len(loop.launches) * n for n in (1, 2, 2, 2, 3)]


def test_pipeline_takes_sizes_and_any_number_of_pictures(engine: Path) -> None:
    pipeline = Pipeline.from_engine_dir(engine, "cpu", threads=1, load="call")
    random = np.random.default_rng(1)
    embeds = random.normal(size=(1, 77, 8)).astype(np.float32)

    def draw(images: int, **size: Any) -> Any:
        return pipeline(
            prompt_embeds=embeds,
            negative_prompt_embeds=0 * embeds,
            num_images_per_prompt=images,
            guidance_scale=2.0,
            output_type="latent",
            **size,
        )

    steps = len(pipeline.bundle.manifest.plan.launches)
    assert draw(1).latents.shape == (1, 4, 8, 8)  # the usual size, and no padding to 3
    four = draw(4, height=32, width=112)
    assert four.latents.shape == (4, 4, 4, 14) and four.launches == 2 * steps
    given = random.normal(size=(2, 4, 16, 6)).astype(np.float32)
    both = draw(2, latents=given)
    one = pipeline(
        prompt_embeds=embeds,
        negative_prompt_embeds=0 * embeds,
        guidance_scale=2.0,
        latents=given[1:],
        output_type="latent",
        height=128,
        width=48,
    )
    np.testing.assert_allclose(both.latents[1:], one.latents, atol=2e-5)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 136}, "height 136: this engine directory takes 32 to 128 in steps of 16"),
        ({"width": 24}, "width 24: this engine directory takes 32 to 128 in steps of 16"),
        ({"height": 40}, "height 40: this engine directory takes 32 to 128 in steps of 16"),
        ({"height": 33}, "height 33: "),
        ({"latents": np.zeros((1, 4, 5, 8), np.float32)}, "latents: height 5, .* 4 to 16 in steps of 2"),
        ({"latents": np.zeros((1, 4, 8, 8), np.float32), "width": 128}, "width 128: the latents given are of 64"),
        ({"latents": np.zeros((1, 3, 8, 8), np.float32)}, "latents: shape"),
    ],
)
def test_other_sizes_are_refused_before_anything_runs(engine: Path, size: Any, message: str) -> None:
    pipeline = Pipeline.from_engine_dir(engine, "cpu", threads=1, load="call")
    embeds = np.zeros((1, 77, 8), np.float32)
    with pytest.raises(UserError, match=message) as caught:
        pipeline(prompt_embeds=embeds, negative_prompt_embeds=embeds, guidance_scale=2.0, output_type="latent", **size)
    assert "\n" not in str(caught.value)
    assert pipeline.memory()["graphs_loaded"] == 0


def test_the_loop_refuses_sizes_outside_its_ranges(engine: Path) -> None:
    loop = DenoisingLoop(Bundle.open(engine), create_backend("cpu", threads=1), lazy=True)
    with pytest.raises(UserError, match="batch 4"):
        loop.run(np.zeros((4, 4, 8, 8), np.float32), {})
    with pytest.raises(UserError, match="width 18"):
        loop.run(np.zeros((1, 4, 8, 18), np.float32), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": Range(min=24, opt=24, max=64)}, r"--height 24:24:64: .* needs multiples of 16 pixels"),
        ({"layout": "segments"}, "--layout segments: not with ranges"),
        ({"strength": 0.5}, "--strength: not with ranges"),
    ],
)
def test_ranges_that_cannot_be_exported(folder: Path, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_export(str(folder), schedule_for(folder), replace(OPTIONS, **changes))


def test_a_model_that_counts_its_pictures_is_refused_for_one_or_two() -> None:
    """torch takes 1 for a constant, so that of a range from 1 to 2 it would see the 2 alone."""

    class Counting(torch.nn.Module):
        def forward(self, latent: torch.Tensor) -> torch.Tensor:
            return latent + torch.tensor([0.5] * len(latent))[:, None, None, None]

    one = Range.static(4)
    shapes = [Dimensions(SizeRanges(batch=Range(min=1, opt=1, max=2), height=one, width=one)).latent]
    options: dict[str, Any] = {"dtype": "fp32", "prefix": "", "label": "counting", "dynamic_shapes": shapes}
    with pytest.raises(UserError, match="counting: the model does not work for every batch of the range"):
        to_onnx(Counting(), [torch.randn(2, 3, 4, 4)], ["x"], lambda: ["y"], **options)


def test_tensorrt_rtx_builds_it_and_a_changed_profile_rebuilds_what_depends_on_it(engine: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: engines cannot be built here")
    from dipgo_deploy.engine.build import build_engines

    copy = tmp_path / "copy"
    shutil.copytree(engine, copy)
    first = build_engines(copy, "tensorrt-rtx")
    assert len(first.built) == len(first.engines) > 1
    for result in first.engines:
        profile = result.record.inputs.profile["stack"]
        slots = Bundle.open(copy).manifest.plan.slots
        assert (profile.min, profile.opt, profile.max) == (
            (slots, 1, 4, 4, 4),
            (slots, 2, 4, 8, 8),
            (slots, 3, 4, 16, 16),
        )
    assert not build_engines(copy, "tensorrt-rtx").built

    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    changed = manifest["plan"]["variants"][1]["graph"]
    changed["sizes"]["height"]["opt"] = 10
    path.write_text(json.dumps({**manifest, "seal": seal_of(manifest)}))
    again = build_engines(copy, "tensorrt-rtx")
    assert [(result.name, result.reason) for result in again.built] == [
        (Path(changed["file"]).stem, "changed: profile")
    ]
