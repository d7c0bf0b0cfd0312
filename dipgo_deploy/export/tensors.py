"""Tensor specifications of the manifest, read off an onnx-ir graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.manifest import Graph, TensorSpec
from dipgo_deploy.bundle.shapes import SizeRanges, Sizes, evaluate_shape

if TYPE_CHECKING:
    import onnx_ir as ir

_DTYPES: dict[str, Any] = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "INT64": "int64"}
# Types that a graph of an engine directory can have as an input or output.
PASSABLE = frozenset(_DTYPES)
_NO_SIZES = Sizes(1, 1, 1)


def graph_entry(model: ir.Model, file: str, sizes: SizeRanges | None = None) -> Graph:
    """Manifest entry of a graph saved as ``file`` (relative to the engine directory).

    sizes: ranges of the sizes that its dimensions are expressions of.
    """
    inputs = tuple(_spec(value, sizes) for value in model.graph.inputs)
    outputs = tuple(_spec(value, sizes) for value in model.graph.outputs)
    is_open = any(spec.dims is not None for spec in (*inputs, *outputs))
    return Graph(file=file, inputs=inputs, outputs=outputs, sizes=sizes if is_open else None)


def _spec(value: ir.Value, sizes: SizeRanges | None) -> TensorSpec:
    assert value.shape is not None and value.dtype is not None
    dims = tuple(extent if isinstance(extent, int) else str(extent.value) for extent in value.shape)
    is_open = any(isinstance(dim, str) for dim in dims)
    if is_open and sizes is None:
        raise ValueError(f"{value.name}: shape {dims} without ranges of sizes")
    return TensorSpec(
        name=str(value.name),
        shape=evaluate_shape(dims, sizes.max if sizes is not None else _NO_SIZES),
        dtype=_DTYPES[value.dtype.name],
        dims=dims if is_open else None,
    )
