"""Multiply-accumulates of ONNX nodes, from their static shapes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def node_macs(node: ir.Node) -> int:
    """Multiply-accumulates of one node; 0 for everything but matrix products and convolutions.

    Convention: a product of (m, k) and (k, n) counts m*k*n; bias, normalisation and activations count nothing.

    Raises:
        ValueError: a product whose shapes are not static.
    """
    if node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
        return 0
    output = _extents(node.outputs[0])
    if node.op_type == "MatMul":
        return math.prod(output) * _extents(node.inputs[0])[-1]
    if node.op_type == "Gemm":
        transposed = node.attributes.get("transA")
        return math.prod(output) * _extents(node.inputs[0])[0 if transposed and transposed.as_int() else 1]
    weight = _extents(node.inputs[1])
    per_output = math.prod(weight[1:])  # (out, in / group, *kernel); ConvTranspose: (in, out / group, *kernel)
    if node.op_type == "Conv":
        return math.prod(output) * per_output
    return math.prod(_extents(node.inputs[0])) * per_output


def _extents(value: ir.Value | None) -> list[int]:
    shape = value.shape if value is not None else None
    if value is None or shape is None or not all(isinstance(extent, int) for extent in shape):
        raise ValueError(f"the shape of {value.name if value else 'a missing input'} is not static: {shape}")
    return [int(extent) for extent in shape]
