"""Expressions over the sizes, and shapes computed from the sizes alone, run on ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from dipgo_deploy.bundle.shapes import Range, SizeRanges, Sizes, evaluate_shape
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.passes import apply
from dipgo_deploy.export.passes.dimensions import NameDimensions, Term, extents_of, render
from dipgo_deploy.export.passes.shapes import ShapesFromSizes

# An open height counts in eights: torch's symbol of it is h // 8.
RANGES = SizeRanges(
    batch=Range(min=1, opt=2, max=4), height=Range(min=8, opt=16, max=64, multiple=8), width=Range(min=1, opt=3, max=9)
)


def model_of(shape: list[Any], reads: str = "") -> ir.Model:
    """``y`` has ``shape`` in torch's symbols b, u (of height) and w, and ``s`` is the shape of it, or a part."""
    latent = ir.val("latent", ir.DataType.FLOAT, ir.Shape(["b", 4, "8*u", "w"]))
    other = ir.val("other", ir.DataType.FLOAT, ir.Shape(shape))
    middle = ir.node("Neg", [other], name="middle")
    middle.outputs[0].name, middle.outputs[0].dtype = "middle:0", ir.DataType.FLOAT
    middle.outputs[0].shape = ir.Shape(shape)
    attributes = {"": {}, "head": {"end": 1}, "tail": {"start": 1}}[reads]
    read = ir.node("Shape", middle.outputs, attributes=attributes, name="read")
    read.outputs[0].name, read.outputs[0].dtype, read.outputs[0].shape = "read:0", ir.DataType.INT64, ir.Shape([None])
    total = ir.node("Identity", read.outputs, name="total")
    total.outputs[0].name, total.outputs[0].dtype = "s", ir.DataType.INT64
    total.outputs[0].shape = ir.Shape([len(shape)])
    keep = ir.node("Identity", [latent], name="keep")
    keep.outputs[0].name, keep.outputs[0].dtype, keep.outputs[0].shape = "x", ir.DataType.FLOAT, latent.shape
    graph = ir.Graph(
        [latent, other],
        [total.outputs[0], keep.outputs[0]],
        nodes=[middle, read, total, keep],
        opset_imports={"": 20},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        (["b", 4, "8*u", "w"], ("batch", 4, "height", "width")),
        (["2*b", "u*w"], ("2*batch", "(height//8)*width")),
        (["4*u", 7], ("(height//2)", 7)),
        (["16*u + w", "w - 1"], ("2*height + width", "width - 1")),
        (["b*(u + 3)"], ("batch*(height//8) + 3*batch",)),
        ([3, 5], (3, 5)),
    ],
)
def test_symbols_become_sizes_and_shapes_come_from_the_latent(shape: list[Any], dims: tuple[Any, ...]) -> None:
    model = model_of(shape)
    apply(model, NameDimensions("latent", RANGES), ShapesFromSizes("latent"))
    other = model.graph.inputs[1]
    assert tuple(d if isinstance(d, int) else d.value for d in other.shape) == dims
    extents = extents_of(other)
    assert extents is not None and tuple(map(render, extents)) == dims
    # Nothing but the latent's shape is left to read, and the numbers are those of the expressions.
    assert [node.inputs[0].name for node in model.graph if node.op_type == "Shape"] in ([], ["latent"])
    model.graph.inputs.pop()
    for node in list(model.graph):
        if node.name == "middle":
            model.graph.remove(node, safe=True)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for sizes in (Sizes(1, 8, 2), Sizes(3, 24, 9)):
        (found,) = session.run(["s"], {"latent": np.zeros((sizes.batch, 4, sizes.height, sizes.width), np.float32)})
        assert tuple(found) == evaluate_shape(dims, sizes)


@pytest.mark.parametrize(("reads", "expected"), [("head", [6]), ("tail", [4, 24])])
def test_a_part_of_a_shape(reads: str, expected: list[int]) -> None:
    model = model_of(["2*b", 4, "8*u"], reads)
    apply(model, NameDimensions("latent", RANGES), ShapesFromSizes("latent"))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"latent": np.zeros((3, 4, 24, 9), np.float32), "other": np.zeros((6, 4, 24), np.float32)}
    assert session.run(["s"], feeds)[0].tolist() == expected


def test_sizes_are_read_off_images() -> None:
    """Of 8 pixels to one of the latent, (B, H, W, 3)."""
    model = model_of(["2*b", 4, "4*u", "w"])
    images = model.graph.inputs[0]
    images.name, images.shape = "images", ir.Shape(["b", "64*u", "8*w", 3])
    apply(model, NameDimensions("images", RANGES, 8), ShapesFromSizes("images", 8))
    assert [dim if isinstance(dim, int) else dim.value for dim in images.shape] == ["batch", "8*height", "8*width", 3]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"images": np.zeros((3, 192, 72, 3), np.float32), "other": np.zeros((6, 4, 12, 9), np.float32)}
    assert session.run(["s"], feeds)[0].tolist() == [6, 4, 12, 9]


def test_an_expression_is_computed_once() -> None:
    model = model_of(["2*b", "2*b*u", "2*b"])
    apply(model, NameDimensions("latent", RANGES), ShapesFromSizes("latent"))
    operators = [node.op_type for node in model.graph]
    assert (operators.count("Shape"), operators.count("Gather"), operators.count("Mul")) == (1, 2, 2)


def test_what_torch_does_not_know_stays_and_an_output_of_it_is_refused() -> None:
    model = model_of(["u0", 4])
    with pytest.raises(UserError, match="^other: its shape is no expression of batch, height and width"):
        apply(model, NameDimensions("latent", RANGES))
    fixed = model_of(["b"])
    fixed.graph.inputs[0].shape = ir.Shape(["b", 4, 8, "w"])
    with pytest.raises(UserError, match="height: the exporter made it 8, which cannot vary"):
        apply(fixed, NameDimensions("latent", RANGES))


def test_shapes_need_the_dimensions_first() -> None:
    with pytest.raises(ir.passes.PassError) as error:
        apply(model_of(["b"]), ShapesFromSizes("latent"))
    assert "run NameDimensions first" in str(error.value.__cause__)


def test_a_term_is_written_as_it_is_read() -> None:
    assert str(Term(1, (("batch", 1), ("height", 8)))) == "batch*(height//8)"
    assert (str(Term(-1, (("width", 1),))), str(Term(5, ()))) == ("-1*width", "5")
