"""Variants cut from one trace: what is in them, and that they compute what the supernet computes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import VariantEntry
from dipgo_deploy.compare.written import verify_written
from dipgo_deploy.errors import ToleranceError
from dipgo_deploy.export.cut import weighted_sum
from dipgo_deploy.export.exporter import PlannedExport
from dipgo_deploy.export.writing import write_bundle, write_entries

WithGates = Callable[[PlannedExport, list[list[bool]]], PlannedExport]
MODELS = ("planned_unet", "planned_unet_layers", "planned_dit", "planned_dit_output", "planned_dit_layers")


def _random_gates(planned: PlannedExport, ratio: float, seed: int) -> list[list[bool]]:
    source = random.Random(seed)
    blocks = len(planned.schedule.blocks)
    rows = [[source.random() >= ratio for _ in range(blocks)] for _ in range(planned.schedule.steps)]
    return [[True] * blocks, *rows[1:]]


def _write(planned: PlannedExport, folder: Path) -> tuple[VariantEntry, ...]:
    (entries,) = write_entries([planned], folder).entries
    return entries


def _written(planned: PlannedExport, folder: Path) -> Bundle:
    folder.mkdir()
    return Bundle(folder, write_bundle(replace(planned, options=replace(planned.options, check=False)), folder))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ratio", [0.5, *(pytest.param(ratio, marks=pytest.mark.slow) for ratio in (0.3, 0.8))])
def test_each_variant_and_the_loop_equal_the_supernet(
    model: str, ratio: float, request: pytest.FixtureRequest, with_gates: WithGates, tmp_path: Path
) -> None:
    full: PlannedExport = request.getfixturevalue(model)
    planned = with_gates(full, _random_gates(full, ratio, seed=int(10 * ratio)))
    bundle = _written(planned, tmp_path / "x")
    assert verify_written(bundle, planned.source).relative < 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_removed_blocks_leave_neither_weights_nor_nodes(
    model: str, request: pytest.FixtureRequest, with_gates: WithGates, tmp_path: Path
) -> None:
    full: PlannedExport = request.getfixturevalue(model)
    planned = with_gates(full, _random_gates(full, 0.5, seed=3))
    _write(planned, tmp_path / "graphs")
    modules = {spec.name: spec.modules for spec in planned.source.specs(planned.schedule)}
    removed_somewhere = set()
    for variant in planned.plan.variants:
        graph = onnx.load(tmp_path / "graphs" / f"{variant.name}.onnx", load_external_data=False).graph
        names = [initializer.name for initializer in graph.initializer]
        # The activation of the time embedding is one node for all blocks, under the name of the first.
        nodes = [node.name for node in graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
        for block in planned.traced.graph.blocks:
            owned = tuple(f"{module}." for module in modules[block.name])
            has_weights = any(name.startswith(owned) for name in names)
            if variant.computed & set(block.outputs):
                assert has_weights
            else:
                removed_somewhere.add(block.name)
                assert not has_weights
                assert not [name for name in nodes if f"{name.split('/')[0]}.".startswith(owned)]
    assert removed_somewhere


def test_variants_share_one_weights_file(planned_dit: PlannedExport, with_gates: WithGates, tmp_path: Path) -> None:
    planned = with_gates(planned_dit, _random_gates(planned_dit, 0.5, seed=1))
    _write(planned, tmp_path / "graphs")
    assert len(planned.plan.variants) > 2
    assert {path.name for path in (tmp_path / "graphs").iterdir()} == {
        "weights.bin",
        "weights.json",
        *(f"{variant.name}.onnx" for variant in planned.plan.variants),
    }
    places: dict[str, set[str]] = {}
    for variant in planned.plan.variants:
        graph = onnx.load(tmp_path / "graphs" / f"{variant.name}.onnx", load_external_data=False).graph
        for tensor in graph.initializer:
            if tensor.external_data:
                fields = {entry.key: entry.value for entry in tensor.external_data}
                assert fields["location"] == "weights.bin"
                places.setdefault(tensor.name, set()).add(fields["offset"])
                size = 8 if tensor.data_type == onnx.TensorProto.INT64 else 4
                assert int(fields["offset"]) % size == 0
    assert places and all(len(offsets) == 1 for offsets in places.values())
    parameters = sum(p.numel() * 4 for p in planned.source.denoiser.parameters())
    slack = 4096 * len(places)
    assert (tmp_path / "graphs" / "weights.bin").stat().st_size < parameters + slack


def test_a_wrong_weight_is_found(planned_dit: PlannedExport, with_gates: WithGates, tmp_path: Path) -> None:
    planned = with_gates(planned_dit, _random_gates(planned_dit, 0.3, seed=2))
    bundle = _written(planned, tmp_path / "x")
    verify_written(bundle, planned.source)
    weights = tmp_path / "x/graphs/weights.bin"
    data = bytearray(weights.read_bytes())
    data[: 4096 // 2] = b"\x00\x00\x80\x3f" * 512
    weights.write_bytes(data)
    with pytest.raises(ToleranceError, match=r"weights, graphs, .*, values: error .* against the model.*nothing was"):
        verify_written(bundle, planned.source)


@pytest.mark.parametrize("half", [False, True])
def test_weighted_sums_are_made_in_float32(half: bool) -> None:
    """Weights that nearly cancel, on values that fill half precision's digits."""
    import onnx_ir as ir
    import onnxruntime

    dtype = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
    terms = [ir.val(f"term{place}", dtype=dtype, shape=ir.Shape([2, 64])) for place in range(3)]
    weights = ir.val("forecast", dtype=ir.DataType.FLOAT, shape=ir.Shape([3]))
    graph = ir.Graph([weights, *terms], [], nodes=[], opset_imports={"": 20}, name="sum")
    nodes, total = weighted_sum(graph, [(term, place) for place, term in enumerate(terms)], weights, "sum")
    graph.extend(nodes)
    graph.outputs.append(total)
    session = onnxruntime.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
    row = np.array([36.5, -63.25, 27.5], np.float32)
    base = np.random.default_rng(0).standard_normal((2, 64))
    values = [(base + 0.01 * place).astype(np.float16 if half else np.float32) for place in range(3)]
    made = session.run(None, {"forecast": row, **{f"term{place}": value for place, value in enumerate(values)}})[0]
    expected = sum(float(weight) * value.astype(np.float64) for weight, value in zip(row, values, strict=True))
    assert made.dtype == values[0].dtype
    # In half precision each product of 100 would be off by 0.05.
    assert np.abs(made - expected).max() < (2e-3 if half else 3e-5)
