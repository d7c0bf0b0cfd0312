"""Defects of single nodes to plant in exported graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from dipgo_deploy.bundle.manifest import Manifest

Edit = Callable[[Any, Path], list[str]]
"""Changes a graph (whose weights lie in the folder) at one node; the names of the nodes that are wrong then."""


@dataclass(frozen=True)
class NodeDefect:
    """name: what is wrong. engine: ``dit``, ``unet``, ``segments`` or ``half`` (the DiT in fp16). quick: run always."""

    name: str
    engine: str
    edit: Edit
    quick: bool = False
    graph: str | None = None

    def file(self, manifest: Manifest) -> str:
        """The graph that is changed: the first that is launched, or the one with this operator first in its name."""
        variants = manifest.plan.variants
        if self.graph is None:
            return variants[manifest.plan.launches[0].variant].graph.file
        return next(entry.graph.file for entry in variants if self.graph in entry.name)


def _node(graph: Any, kind: str, place: int) -> Any:
    found = [node for node in graph.node if node.op_type == kind]
    assert found, f"no {kind} in {graph.name}: {sorted({node.op_type for node in graph.node})}"
    return found[place]


def operator(kind: str, other: str, place: int = 0) -> Edit:
    """Another operator; the first input alone where it takes one."""

    def edit(graph: Any, folder: Path) -> list[str]:
        node = _node(graph, kind, place)
        node.op_type = other
        del node.attribute[:]
        if other in ("Identity", "Relu", "Neg", "Tanh", "Sqrt"):
            del node.input[1:]
        return [node.name]

    return edit


def attribute(kind: str, name: str, value: Any, place: int = 0) -> Edit:
    """Another value of an attribute."""

    def edit(graph: Any, folder: Path) -> list[str]:
        node = _node(graph, kind, place)
        kept = [entry for entry in node.attribute if entry.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])
        return [node.name]

    return edit


def turned(kind: str, place: int = 0) -> Edit:
    """The first two inputs exchanged."""

    def edit(graph: Any, folder: Path) -> list[str]:
        node = _node(graph, kind, place)
        node.input[0], node.input[1] = node.input[1], node.input[0]
        return [node.name]

    return edit


def constant(kind: str, at: int, change: Callable[[np.ndarray], np.ndarray], place: int = 0) -> Edit:
    """Another value of a weight or constant, for this node alone; place: among the nodes that have one there."""

    def edit(graph: Any, folder: Path) -> list[str]:
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        node = [node for node in graph.node if node.op_type == kind and node.input[at] in tensors][place]
        tensor = tensors[node.input[at]]
        values = change(_values(tensor, folder))
        graph.initializer.append(numpy_helper.from_array(values, f"{tensor.name}/seeded"))
        node.input[at] = f"{tensor.name}/seeded"
        return [node.name]

    return edit


def read_from(kind: str, at: int, other: int, place: int = 0) -> Edit:
    """An input taken from another node of the kind, of the same shape."""

    def edit(graph: Any, folder: Path) -> list[str]:
        node = _node(graph, kind, place)
        node.input[at] = _node(graph, kind, other).output[0]
        return [node.name]

    return edit


def behind(kind: str, steps: list[tuple[str, list[float], dict[str, Any]]], place: int = 0) -> Edit:
    """Nodes put behind one: (operator, its second input where it has one, attributes) in turn."""

    def edit(graph: Any, folder: Path) -> list[str]:
        nodes = list(graph.node)
        node = _node(graph, kind, place)
        at, name = nodes.index(node), node.output[0]
        inner, names, added = f"{name}/seeded", [node.name], []
        node.output[0] = inner
        for number, (step, values, attributes) in enumerate(steps):
            inputs = [inner]
            if values:
                inputs.append(f"{name}/seeded/{number}")
                graph.initializer.append(numpy_helper.from_array(np.array(values[0], np.float32), inputs[1]))
            inner = name if number == len(steps) - 1 else f"{name}/seeded/out{number}"
            names.append(f"seeded{number}")
            added.append(helper.make_node(step, inputs, [inner], name=names[-1], **attributes))
        nodes[at + 1 : at + 1] = added
        del graph.node[:]
        graph.node.extend(nodes)
        return names

    return edit


def _values(tensor: Any, folder: Path) -> np.ndarray:
    if not tensor.external_data:
        return np.array(numpy_helper.to_array(tensor))
    fields = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / fields["location"]).open("rb") as file:
        file.seek(int(fields["offset"]))
        data = file.read(int(fields["length"]))
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.frombuffer(data, dtype).reshape(tensor.dims).copy()


def _one(values: np.ndarray) -> np.ndarray:
    """A single value off, by the largest there is."""
    values.flat[values.size // 2] += np.abs(values).max()
    return values


HALF = [("Mul", [3e5], {}), ("Cast", [], {"to": 10}), ("Cast", [], {"to": 1}), ("Div", [3e5], {})]

DEFECTS = (
    NodeDefect("a sum becomes a difference", "dit", operator("Add", "Sub", 6), quick=True),
    NodeDefect("a modulation lost", "dit", operator("Mul", "Identity", 10)),
    NodeDefect("an activation becomes another", "dit", operator("Sigmoid", "Tanh")),
    NodeDefect("the activation of a feed-forward", "dit", operator("Gelu", "Relu")),
    NodeDefect("a product turned round", "dit", turned("MatMul", 0)),
    NodeDefect("guidance turned", "dit", turned("Sub", -2)),
    NodeDefect("a residual turned", "dit", turned("Sub", -1)),
    NodeDefect("an epsilon", "dit", attribute("LayerNormalization", "epsilon", 0.1)),
    NodeDefect("attention over the wrong axis", "dit", attribute("Softmax", "axis", 1), quick=True),
    NodeDefect("axes in another order", "dit", attribute("Transpose", "perm", [0, 2, 3, 1], 1)),
    NodeDefect("a factor of a product", "dit", attribute("Gemm", "alpha", 1.01)),
    NodeDefect("one value of a weight", "dit", constant("MatMul", 1, _one, 3), quick=True),
    NodeDefect("a bias shifted", "dit", constant("Add", 1, lambda values: values + 0.01, 4)),
    NodeDefect("the scale of an attention", "dit", constant("Mul", 1, lambda values: values * 1.01, 2)),
    NodeDefect("frequencies of the timestep", "dit", constant("Mul", 1, lambda values: values * 1.001, 0)),
    NodeDefect("rows of a class", "dit", constant("Gather", 0, lambda values: values[::-1].copy())),
    NodeDefect("overflow in half precision", "dit", behind("MatMul", HALF, 2)),
    NodeDefect("a shape", "dit", constant("Reshape", 1, lambda values: values[::-1].copy(), 2)),
    NodeDefect("the epsilon of a group norm", "unet", attribute("InstanceNormalization", "epsilon", 0.1)),
    NodeDefect("a padding", "unet", attribute("Conv", "pads", [0, 0, 2, 2], 1)),
    NodeDefect("skips joined in the other order", "unet", turned("Concat", -1)),
    NodeDefect("a kernel mirrored", "unet", constant("Conv", 1, lambda values: values[..., ::-1].copy(), 1)),
    NodeDefect("how an upsampling rounds", "unet", attribute("Resize", "mode", "linear")),
    NodeDefect("an input from elsewhere", "unet", read_from("Sigmoid", 0, 0, 1)),
    NodeDefect("a sum in a segment", "segments", operator("Add", "Sub", 0)),
    NodeDefect("a weight in a segment", "segments", constant("MatMul", 1, lambda values: -values, 0), graph="1"),
    NodeDefect("a weight in fp16", "half", constant("MatMul", 1, lambda values: -values, 1)),
)
