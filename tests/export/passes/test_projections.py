"""Modulation layers taken apart: the same values, and of the weight only the rows that somebody needs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from tiny_engines import save_dit_pipeline, schedule_for, write  # noqa: E402

from dipgo_deploy.bundle.directory import Bundle  # noqa: E402
from dipgo_deploy.export.exporter import ExportOptions, plan_export  # noqa: E402
from dipgo_deploy.export.passes.projections import SeparateProjections  # noqa: E402
from dipgo_deploy.export.stored import StoredParameter, note_parameter, note_rows, stored_parameter  # noqa: E402

torch.set_num_threads(1)
RANDOM = np.random.default_rng(0)
PARTS = 4


def value(name: str, shape: list[int]) -> ir.Value:
    return ir.val(name, ir.DataType.FLOAT, ir.Shape(shape))


def weight(name: str, shape: list[int]) -> ir.Value:
    made = value(name, shape)
    made.const_value = ir.tensor(RANDOM.normal(size=shape).astype(np.float32), name=name)
    note_parameter(made.const_value, StoredParameter(name, False))
    return made


def model_of(needs: list[list[int]], *, trans: int = 1, more: str = "") -> ir.Model:
    """``y<i>`` is the sum of some parts of Split(Gemm(x, w, b)), four of two columns. more: ``product`` or ``split``
    make the product or a part an output too."""
    x = value("x", [3, 5])
    w, b = weight("w", [2 * PARTS, 5] if trans else [5, 2 * PARTS]), weight("b", [2 * PARTS])
    product = ir.node("Gemm", [x, w, b], attributes={"transB": trans}, name="linear")
    whole = product.outputs[0]
    whole.name, whole.dtype, whole.shape = "linear:0", ir.DataType.FLOAT, ir.Shape([3, 2 * PARTS])
    split = ir.node("Split", [whole], attributes={"axis": 1, "num_outputs": PARTS}, num_outputs=PARTS, name="chunk")
    nodes = [product, split]
    for index, output in enumerate(split.outputs):
        output.name, output.dtype, output.shape = f"chunk:{index}", ir.DataType.FLOAT, ir.Shape([3, 2])
    outputs = []
    for index, places in enumerate(needs):
        total = ir.node("Sum", [split.outputs[place] for place in places], name=f"sum{index}")
        nodes.append(total)
        outputs.append(total.outputs[0])
        outputs[-1].name, outputs[-1].dtype, outputs[-1].shape = f"y{index}", ir.DataType.FLOAT, ir.Shape([3, 2])
    outputs += {"": [], "product": [whole], "split": [split.outputs[0]]}[more]
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=[w, b], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def results(model: ir.Model) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5)})


@pytest.mark.parametrize(
    ("needs", "rows"),
    [
        ([[0, 1, 2], [3]], ["0-6", "6-8"]),
        ([[0, 1], [2], [3]], ["0-4", "4-6", "6-8"]),
        ([[0], [2, 3]], ["0-2", "4-8"]),  # nobody needs the second
        ([[0, 2], [1, 3]], ["0-2", "2-4", "4-6", "6-8"]),
        ([[0, 1, 2], [2, 3]], ["0-4", "4-6", "6-8"]),
    ],
)
def test_parts_go_to_those_who_need_them(needs, rows):
    model = model_of(needs)
    want = results(model)
    assert SeparateProjections()(model).modified
    for got, expected in zip(results(model), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    held = {name: made for name, made in model.graph.initializers.items() if name.startswith("w")}
    assert sorted(held) == sorted(f"w.rows{part}" for part in rows)
    for name, made in held.items():
        layout = stored_parameter(made.const_value)
        assert layout is not None and layout.parameter == "w" and layout.rows is not None
        first, last, count = layout.rows
        assert name == f"w.rows{first}-{last}" and count == 2 * PARTS


@pytest.mark.parametrize(
    "model",
    [
        model_of([[0, 1, 2, 3]]),
        model_of([[0, 1], [2, 3]], trans=0),
        model_of([[0, 1], [2, 3]], more="product"),
        model_of([[0, 1], [2, 3]], more="split"),
    ],
    ids=["one output", "not transposed", "the product is an output", "a part is an output"],
)
def test_others_stay(model):
    before = [node.name for node in model.graph]
    assert not SeparateProjections()(model).modified
    assert [node.name for node in model.graph] == before and set(model.graph.initializers) == {"w", "b"}


def test_a_removed_layer_keeps_only_its_gate(tmp_path: Path):
    model = save_dit_pipeline(tmp_path / "model", layers=2)
    schedule = schedule_for(model, granularity="layer")
    planned = plan_export(str(model), schedule, ExportOptions(layout="variants", prologue=False))
    parts = [v.const_value.raw for n, v in planned.traced.model.graph.initializers.items() if ".weight.rows" in n]
    held = {p.data.untyped_storage().data_ptr() for p in planned.source.denoiser.parameters()}
    assert parts and {part.untyped_storage().data_ptr() for part in parts} <= held  # views: no copies of weights
    bundle = Bundle.open(write(planned, tmp_path / "engine"))
    index = json.loads((bundle.path / "graphs" / "weights.json").read_text())["tensors"]
    linear = "transformer_blocks.0.norm1.linear.weight"
    stored = {name: entry for name, entry in index.items() if entry["parameter"] == linear}
    width = next(iter(stored.values()))["shape"][1]
    assert sorted(entry["rows"] for entry in stored.values()) == [
        [first * width, last * width, 6 * width] for first, last in ((0, 2), (2, 3), (3, 5), (5, 6))
    ]
    held = [set(ir.load(bundle.path / entry.graph.file).graph.initializers) for entry in bundle.manifest.plan.variants]
    gate = f"{linear}.rows{2 * width}-{3 * width}"
    shift = f"{linear}.rows0-{2 * width}"
    assert any(gate in names and shift not in names for names in held)


def test_rows_of_rows_are_counted_from_the_parameters_first() -> None:
    """Qwen-Image takes its modulation apart twice: by attention and MLP, then by shift, scale and gate."""
    whole, half, part = (ir.tensor(np.zeros((rows, 2), np.float32)) for rows in (12, 6, 2))
    note_parameter(whole, StoredParameter("w", False))
    note_rows(half, whole, 6, 12)
    note_rows(part, half, 2, 4)
    assert stored_parameter(part) == StoredParameter("w", False, rows=(8, 10, 12))
