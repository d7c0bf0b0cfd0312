"""Segments cut from one trace: that each weight is in one of them, and that together they are the supernet."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_engines import changed, corrupted, schedule_for

from dipgo_deploy.backends import create_backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.weights import weights_of
from dipgo_deploy.compare.engine import Options, compare_engine
from dipgo_deploy.compare.report import Report
from dipgo_deploy.compare.written import verify_written
from dipgo_deploy.errors import ToleranceError, UserError
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export
from dipgo_deploy.export.pieces import node_graph
from dipgo_deploy.export.planning import in_layout
from dipgo_deploy.export.writing import write_bundle
from dipgo_deploy.plan.layouts import compare_layouts
from dipgo_deploy.plan.pieces import TRIVIAL_BYTES
from dipgo_deploy.reference.load import load_reference

WithGates = Callable[[PlannedExport, list[list[bool]]], PlannedExport]
MODELS = ("planned_unet", "planned_unet_layers", "planned_dit", "planned_dit_output")


def in_segments(planned: PlannedExport) -> PlannedExport:
    options = replace(planned.options, components=False, check=False)
    return in_layout(replace(planned, options=options), "segments")


def random_schedule(planned: PlannedExport, ratio: float, seed: int) -> list[list[bool]]:
    source = random.Random(seed)
    blocks = len(planned.schedule.blocks)
    rows = [[source.random() >= ratio for _ in range(blocks)] for _ in range(planned.schedule.steps)]
    return [[True] * blocks, *rows[1:]]


def compared(engine_dir: Path, options: Options | None = None) -> Report:
    bundle = Bundle.open(engine_dir)
    reference = load_reference(bundle)
    return compare_engine(
        bundle, reference, reference.inputs(bundle.manifest), create_backend("cpu", threads=1), options
    )


@pytest.fixture(scope="module")
def written(request: pytest.FixtureRequest, with_gates: WithGates, tmp_path_factory) -> Callable[..., tuple]:
    """A model with a random schedule in segments, written once: (planned, engine directory)."""
    made: dict[tuple, tuple[PlannedExport, Path]] = {}

    def write(model: str, ratio: float = 0.5, seed: int = 3) -> tuple[PlannedExport, Path]:
        key = (model, ratio, seed)
        if key not in made:
            full: PlannedExport = request.getfixturevalue(model)
            planned = in_segments(with_gates(full, random_schedule(full, ratio, seed)))
            folder = tmp_path_factory.mktemp("segments")
            write_bundle(planned, folder)
            made[key] = planned, folder
        return made[key]

    return write


@pytest.mark.parametrize("ratio", [pytest.param(0.3, marks=pytest.mark.slow), 0.6])
@pytest.mark.parametrize("model", MODELS)
def test_the_loop_and_each_segment_equal_the_supernet(model: str, ratio: float, written) -> None:
    planned, folder = written(model, ratio)
    manifest = Bundle.open(folder, verify=True).manifest
    assert manifest.plan.layout == "segments"
    assert len(manifest.plan.launches) > len(planned.plan.launches)
    report = compared(folder)
    assert report.tolerance.relative == 1e-4
    assert report.passed, report.first_failure()
    names = [variant.name for variant in manifest.plan.variants]
    assert [name for name in names if name in {checked.variant for checked in report.variants}]
    assert {checked.step for checked in report.loop} == set(range(manifest.plan.evaluations))
    assert all("noise_pred" in {tensor.name for tensor in checked.tensors} for checked in report.loop)
    assert any(tensor.relative > 0 for checked in report.variants for tensor in checked.tensors)
    verify_written(Bundle.open(folder), planned.source)


@pytest.mark.parametrize("model", MODELS)
def test_each_weight_is_in_one_graph(model: str, written) -> None:
    planned, folder = written(model)
    owners: dict[tuple[int, int], set[str]] = {}
    summed = 0
    for variant in Bundle.open(folder).manifest.plan.variants:
        for tensor in weights_of(folder / variant.graph.file).values():
            if tensor.length > TRIVIAL_BYTES:
                owners.setdefault((tensor.offset, tensor.length), set()).add(variant.name)
                summed += tensor.length
    assert owners and all(len(names) == 1 for names in owners.values()), owners
    assert planned.segments is not None
    weights = node_graph(planned.traced.model).weights
    small = sum(nbytes for nbytes in weights.values() if nbytes <= TRIVIAL_BYTES) * len(planned.segments.segments)
    assert summed <= planned.segments.weight_bytes <= summed + small
    needs, one_copy = compare_layouts(planned.plan, planned.segments, planned.traced.pieces, 0)
    assert needs[1].weight_bytes <= one_copy + small < needs[0].weight_bytes + small
    assert needs[0].weight_bytes == sum(_inline_and_external(folder, planned))


def _inline_and_external(folder: Path, planned: PlannedExport) -> list[int]:
    """Bytes of the weights of each variant's own graph, were it cut."""
    from dipgo_deploy.export.cut import cut_variant

    sizes = []
    weights = node_graph(planned.traced.model).weights
    for variant in planned.plan.variants:
        graph = cut_variant(planned.traced, variant, planned.history).graph
        sizes.append(sum(weights[name] for name in graph.initializers if name in weights))
    return sizes


@pytest.mark.parametrize("model", MODELS)
def test_pieces_are_passed_not_copied(model: str, request: pytest.FixtureRequest) -> None:
    """No node that multiplies is in two pieces, so all pieces together cost one evaluation."""
    planned: PlannedExport = request.getfixturevalue(model)
    pieces = planned.traced.pieces
    assert sum(piece.macs for piece in pieces.pieces) == planned.plan.macs_full
    assert set(planned.traced.graph.values) <= {name for piece in pieces.pieces for name in piece.makes}


def test_removed_blocks_cost_sums_without_weights(written) -> None:
    planned, folder = written("planned_dit", 0.6)
    sums = [v for v in Bundle.open(folder).manifest.plan.variants if v.name.startswith("sum")]
    assert sums
    for entry in sums:
        graph = onnx.load(folder / entry.graph.file).graph
        assert not graph.initializer
        assert {node.op_type for node in graph.node} == {"Add"}
        assert len(graph.node) == len(entry.reads) - 1
    assert planned.segments is not None
    assert planned.segments.macs_run == planned.plan.macs_run


def test_a_full_schedule_needs_no_cut(planned_dit: PlannedExport) -> None:
    planned = in_segments(planned_dit)
    assert planned.segments is not None and planned.segments.arena_bytes == 0
    assert [segment.name for segment in planned.segments.segments] == ["s00"]
    assert len(planned.segments.launches) == len(planned.plan.launches)


def test_keys_and_values_of_a_text_are_computed_once(planned_unet: PlannedExport) -> None:
    planned = in_segments(planned_unet)
    assert planned.segments is not None
    once, rest = planned.segments.segments
    assert [launch.variant for launch in planned.segments.launches] == [0] + [1] * planned.plan.launches[-1].step + [1]
    assert {cache.value for cache in once.writes} == set(rest.reads)
    steps = len(planned.plan.launches)
    assert once.macs + rest.macs == planned.plan.macs_full
    assert planned.segments.macs_run == planned.plan.macs_run - (steps - 1) * once.macs
    text = planned.traced.conditions[0].shape
    width = planned.source.config["cross_attention_dim"]
    projected = {name for name in _weights(planned, once.pieces) if "attn2.to_k" in name or "attn2.to_v" in name}
    outputs = sum(node_graph(planned.traced.model).weights[name] // 4 // width for name in projected)
    assert once.macs == text[0] * text[1] * width * outputs > 0


def _weights(planned: PlannedExport, places: tuple[int, ...]) -> frozenset[str]:
    pieces = planned.traced.pieces
    return frozenset().union(*(pieces.pieces[place].weights for place in places))


def test_a_wrong_weight_is_found_and_its_segment_named(written, tmp_path: Path) -> None:
    planned, folder = written("planned_dit")
    weight = "transformer_blocks.2.ff.net.0.proj.weight"
    variants = Bundle.open(folder).manifest.plan.variants
    (owner,) = [v for v in variants if weight in weights_of(folder / v.graph.file)]
    bad = corrupted(folder, tmp_path / "bad", owner.graph.file.removeprefix("graphs/"), weight)
    with pytest.raises(ToleranceError, match=rf"weights, graphs, {weight}, values: .*nothing was written"):
        verify_written(Bundle.open(bad), planned.source)
    report = compared(bad, Options(loop=False, components=False))
    failed = report.first_failure()
    assert failed is not None and failed.startswith(f"variant {owner.name} by itself, evaluation 0, ")


@pytest.mark.parametrize("model", ["planned_unet", "planned_dit"])
def test_every_read_at_another_place_shows(model: str, written, tmp_path: Path) -> None:
    """A tensor taken from memory that was never written, from the first to the last launch that reads."""
    _, folder = written(model)
    count = len(Bundle.open(folder).manifest.plan.launches)
    plan = Bundle.open(folder).manifest.plan
    reading = [index for index in range(count) if plan.launches[index].reads]
    for index in (reading[0], reading[len(reading) // 2], reading[-1]):

        def edit(manifest, index=index):
            launch = manifest["plan"]["launches"][index]
            launch["reads"][-1] = manifest["plan"]["arena_bytes"]
            manifest["plan"]["arena_bytes"] += 2**20

        with pytest.raises(UserError, match=rf"launch {index} .*where nothing was written"):
            compared(changed(folder, tmp_path / f"bad{index}", edit), Options(variants=False, tolerance=1e9))


def test_inputs_of_every_segment_are_saved(written, tmp_path: Path) -> None:
    _, folder = written("planned_dit")
    report = compared(folder, Options(loop=False, save_inputs=tmp_path / "inputs", save_outputs=tmp_path / "outputs"))
    names = {variant.name for variant in Bundle.open(folder).manifest.plan.variants}
    assert {path.stem for path in (tmp_path / "inputs").iterdir()} == names
    # What a segment writes may have no name in the model.
    expected = {path.stem for path in (tmp_path / "outputs").iterdir()}
    lines = {f"--save-outputs: the model has no outputs of {name}" for name in names - expected}
    assert 0 < len(expected) < len(names) and lines <= set(report.skipped)


def test_half_precision(dit_folder: Path, tmp_path: Path) -> None:
    options = ExportOptions(dtype="fp16", layout="segments")
    planned = plan_export(str(dit_folder), schedule_for(dit_folder), options)
    (tmp_path / "fp16").mkdir()
    write_bundle(planned, tmp_path / "fp16")
    types = {
        spec.dtype
        for variant in Bundle.open(tmp_path / "fp16").manifest.plan.variants
        for spec in variant.graph.inputs
        if spec.name in variant.reads
    }
    assert types == {"float16"}
    report = compared(tmp_path / "fp16")
    assert report.passed, report.first_failure()
    worst = max(tensor.relative for checked in report.loop for tensor in checked.tensors)
    assert np.isfinite(worst) and worst > 1e-5


def test_a_limit_on_variants_is_refused(dit_folder: Path) -> None:
    with pytest.raises(UserError, match="--max-variants: not with --layout segments"):
        plan_export(str(dit_folder), schedule_for(dit_folder), ExportOptions(layout="segments", max_variants=2))
