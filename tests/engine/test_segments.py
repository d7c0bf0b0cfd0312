"""Engines of the layout segments: NVIDIA's own parser and builder take every part, and the weights are there once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_engines import save_dit_pipeline, schedule_for, write

from dipgo_deploy.backends.tensorrt_plans import plan_name
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.engine.budget import MemoryNeed
from dipgo_deploy.engine.build import BuildOptions, Observer, build_engines, graphs_of
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, in_layout, plan_export

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: engines cannot be built here")

ONE_GPU = BuildOptions(compute_capabilities=("8.6",))


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> PlannedExport:
    folder = save_dit_pipeline(tmp_path_factory.mktemp("dit"))
    return plan_export(
        str(folder), schedule_for(folder), ExportOptions(layout="variants", dtype="fp16", components=False)
    )


@pytest.fixture(scope="module")
def both(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same schedule in both layouts."""
    folder = tmp_path_factory.mktemp("layouts")
    segments = in_layout(planned, "segments")
    return {"variants": write(planned, folder / "variants"), "segments": write(segments, folder / "segments")}


def test_every_segment_builds_and_the_second_build_does_nothing(both: dict[str, Path]) -> None:
    manifest = Bundle.open(both["segments"]).manifest
    report = build_engines(both["segments"], "tensorrt-rtx", ONE_GPU)
    assert {engine.name for engine in report.built} == {plan_name(graph) for graph in manifest.plan.graphs}
    assert len(report.engines) == len(graphs_of(manifest)) > 5
    sums = [engine for engine in report.engines if engine.name.startswith("sum")]
    assert sums and all(engine.record.weights_bytes == 0 for engine in sums)
    assert build_engines(both["segments"], "tensorrt-rtx", ONE_GPU).built == ()


class _Seen(Exception):
    pass


class _Reads(Observer):
    def needed(self, need: MemoryNeed) -> None:
        self.need = need
        raise _Seen


def _need(engine_dir: Path) -> MemoryNeed:
    """What a build reckons before it builds anything."""
    reads = _Reads()
    with pytest.raises(_Seen):
        build_engines(engine_dir, "tensorrt-rtx", ONE_GPU, reads)
    return reads.need


def test_a_budget_that_only_segments_meet(both: dict[str, Path]) -> None:
    stored = {layout: (path / "graphs" / "weights.bin").stat().st_size for layout, path in both.items()}
    assert stored["segments"] == stored["variants"]
    needs = {layout: _need(path) for layout, path in both.items()}
    assert sum(needs["segments"].weights.values()) < 1.2 * stored["segments"]
    assert sum(needs["variants"].weights.values()) > 2 * stored["variants"]
    budget = replace(ONE_GPU, memory_budget=needs["segments"].total)
    with pytest.raises(UserError, match="more than --memory-budget .*--layout segments"):
        build_engines(both["variants"], "tensorrt-rtx", budget)
    assert build_engines(both["segments"], "tensorrt-rtx", budget).need.total == needs["segments"].total


def test_bf16_segments_build(tmp_path: Path) -> None:
    """A chain of residual caches: sums over them, which hold no weight, are engines too."""
    folder = save_dit_pipeline(tmp_path / "model", layers=2)
    options = ExportOptions(dtype="bf16", layout="segments", components=False)
    engine = write(plan_export(str(folder), schedule_for(folder), options), tmp_path / "x")
    manifest = Bundle.open(engine).manifest
    assert manifest.dtype == "bf16" and manifest.plan.layout == "segments"
    caches = {spec.dtype for variant in manifest.plan.variants for spec in variant.graph.outputs}
    assert "bfloat16" in caches
    report = build_engines(engine, "tensorrt-rtx", ONE_GPU)
    assert {entry.name for entry in report.built} == {plan_name(graph) for graph in manifest.plan.graphs}
