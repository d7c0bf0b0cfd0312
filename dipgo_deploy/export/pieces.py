"""A traced model node by node, for the plan of the layout ``segments``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dipgo_deploy.export.macs import node_macs
from dipgo_deploy.export.tensors import PASSABLE
from dipgo_deploy.plan.pieces import Node, NodeGraph, Tensor

if TYPE_CHECKING:
    import onnx_ir as ir


def node_graph(model: ir.Model) -> NodeGraph:
    """A traced model node by node, for the plan."""
    tensors: dict[str, Tensor] = {}
    weights: dict[str, int] = {}
    nodes = []
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        owned = [value for value in inputs if value.is_initializer()]
        for value in owned:
            weights[str(value.name)] = 0 if value.const_value is None else int(value.const_value.nbytes)
        for value in node.outputs:
            tensors[str(value.name)] = tensor_of(value)
        nodes.append(
            Node(
                inputs=tuple(str(value.name) for value in inputs if not value.is_initializer()),
                outputs=tuple(str(value.name) for value in node.outputs),
                macs=node_macs(node),
                weights=frozenset(str(value.name) for value in owned),
            )
        )
    return NodeGraph(tuple(nodes), tensors, weights)


def tensor_of(value: ir.Value) -> Tensor:
    """Kind and bytes of a value; not passable where a graph cannot have it as an input."""
    known = value.shape is not None and all(isinstance(extent, int) for extent in value.shape)
    if value.dtype is None or not known:
        return Tensor(f"unknown {value.name}", 0, passable=False)
    assert value.shape is not None
    shape = tuple(int(extent) for extent in value.shape)
    nbytes = value.dtype.itemsize
    for extent in shape:
        nbytes *= extent
    return Tensor(f"{value.dtype.name.lower()} {shape}", int(nbytes), passable=value.dtype.name in PASSABLE)
