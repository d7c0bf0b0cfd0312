"""Tensor specifications of the manifest, read off an onnx-ir graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.manifest import Graph, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

_DTYPES: dict[str, Any] = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "INT64": "int64"}


def graph_entry(model: ir.Model, file: str) -> Graph:
    """Manifest entry of a graph saved as ``file`` (relative to the engine directory)."""
    return Graph(
        file=file,
        inputs=tuple(_spec(value) for value in model.graph.inputs),
        outputs=tuple(_spec(value) for value in model.graph.outputs),
    )


def _spec(value: ir.Value) -> TensorSpec:
    assert value.shape is not None and value.dtype is not None
    return TensorSpec(
        name=str(value.name),
        shape=tuple(int(extent) for extent in value.shape),
        dtype=_DTYPES[value.dtype.name],
    )
