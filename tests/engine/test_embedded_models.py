"""Every variant and component of the embedded models through NVIDIA's own parser and builder; no GPU needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dipgo_deploy.backends.tensorrt_plans import plan_name
from dipgo_deploy.bundle.directory import Bundle, reseal
from dipgo_deploy.bundle.weights import weights_of
from dipgo_deploy.engine.build import build_engines, graphs_of

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: engines cannot be built here")

MODELS = ("fashion-sd", "fashion-dit")
DTYPES = ("fp32", "fp16", "bf16")
# fp16 and the graphs of text models are built in the tests of their families.
USUAL = ("fashion-dit", "fp32")


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        pytest.param(model, dtype, marks=[] if (model, dtype) == USUAL else pytest.mark.slow)
        for model in MODELS
        for dtype in DTYPES
    ],
)
def test_every_graph_builds_and_the_second_build_does_nothing(exported, model, dtype):
    engine_dir = exported(model, dtype)
    manifest = Bundle.open(engine_dir).manifest
    components = {"fashion-sd": {"text_encoder", "vae_decoder"}, "fashion-dit": {"vae_decoder"}}[model]
    assert len(manifest.plan.variants) >= 3
    first = build_engines(engine_dir, "tensorrt-rtx")
    assert [engine.name for engine in first.engines] == [plan_name(graph) for graph in graphs_of(manifest)]
    assert {engine.name for engine in first.built} == {plan_name(graph) for graph in manifest.plan.graphs} | components
    for engine in first.engines:
        assert engine.path.stat().st_size == engine.record.plan_bytes > engine.record.weights_bytes // 2
    document = json.loads(first.engines[0].path.with_suffix(".json").read_text())
    assert document["key"] == first.engines[0].record.key
    assert document["inputs"]["target"] == {"gpu": None, "capabilities": []}
    before = files(first.folder)
    second = build_engines(engine_dir, "tensorrt-rtx")
    assert second.built == ()
    assert [e.record for e in second.engines] == [e.record for e in first.engines]
    assert files(first.folder) == before


def test_one_changed_weight_byte_rebuilds_exactly_the_engines_that_use_it(exported, tmp_path):
    engine_dir = tmp_path / "copy"
    build_engines(exported(*USUAL), "tensorrt-rtx")  # which the test above did already
    shutil.copytree(exported(*USUAL), engine_dir)
    assert build_engines(engine_dir, "tensorrt-rtx").built == ()
    variants = Bundle.open(engine_dir).manifest.plan.variants
    used = {v.name: weights_of(engine_dir / v.graph.file) for v in variants}
    partly = [n for n in used["v00"] if 0 < sum(n in names for names in used.values()) < len(variants)]
    tensor = used["v00"][partly[0]]
    with (engine_dir / "graphs/weights.bin").open("r+b") as file:
        file.seek(tensor.offset + tensor.length // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    reseal(engine_dir)
    report = build_engines(engine_dir, "tensorrt-rtx")
    assert {e.name: e.reason for e in report.built} == {
        name: "changed: weights" for name, tensors in used.items() if partly[0] in tensors
    }
    assert report.built and len(report.built) < len(variants)
