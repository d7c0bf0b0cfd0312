"""A graph's computation as a digest: nodes, types, wiring and weights by content, without any name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LENGTH = 16


def digest(*parts: object) -> str:
    """Hex digest of parts that print the same for the same content."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:LENGTH]


def graph_digest(path: Path) -> str:
    """Digest of what an ONNX file with its external weights computes.

    A value is the digest of its node's operator, attributes and inputs, so neither names nor the order of independent
    nodes count; a graph input is its place, type and shape. The number of nodes counts: dead ones show.
    """
    import onnx_ir as ir

    graph = ir.load(path).graph
    known: dict[Any, str] = {}
    for place, value in enumerate(graph.inputs):
        known[value] = digest("input", place, value.dtype, _shape(value))
    for value in graph.initializers.values():
        known[value] = _tensor(value.const_value)
    nodes = 0
    for node in graph:  # in topological order
        nodes += 1
        inputs = ["none" if value is None else known[value] for value in node.inputs]
        attributes = [f"{name}={_attribute(node.attributes[name])}" for name in sorted(node.attributes)]
        base = digest(node.domain, node.op_type, *attributes, *inputs)
        for place, value in enumerate(node.outputs):
            known[value] = digest(base, place)
    outputs = [digest(known[value], value.dtype, _shape(value)) for value in graph.outputs]
    inputs = [known[value] for value in graph.inputs]
    return digest(nodes, *inputs, "->", *outputs)


def _shape(value: Any) -> str:
    return "x".join(str(extent) for extent in value.shape or ())


def _attribute(attribute: Any) -> str:
    value = attribute.value
    if hasattr(value, "numpy"):
        return _tensor(value)
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return ",".join(map(str, value))
    return str(value)


def _tensor(tensor: Any) -> str:
    array = tensor.numpy()
    return digest("tensor", tensor.dtype, array.shape, hashlib.sha256(array.tobytes()).hexdigest())
