"""Shapes that a traced graph computes, from the open sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dipgo_deploy.bundle.shapes import BATCH
from dipgo_deploy.export.dynamic import AXES, IMAGE_AXES, SIZES
from dipgo_deploy.export.passes.dimensions import Extent, Term, extents_of, render


@dataclass(frozen=True)
class ShapesFromSizes(ir.passes.InPlacePass):
    """What ``Shape`` nodes give is computed from the sizes of the input ``source``; needs ``NameDimensions`` before,
    with the same ``pixels``.

    A value that is reshaped to the shape of another one would otherwise depend on it: cutting the graph there would
    keep, or compute, that other one.
    """

    source: str
    pixels: int | None = None

    def requires(self, model: ir.Model) -> None:
        """The extents of the latent are known."""
        if extents_of(self._source(model.graph)) is None:
            raise ir.passes.PreconditionError(f"the extents of {self.source} are not known: run NameDimensions first")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "Shape" and extents_of(node.inputs[0]) is not None]
        if not nodes:
            return ir.passes.PassResult(model, False)
        build = _Builder(graph, self._source(graph), pixels=self.pixels)
        for node in nodes:
            extents = extents_of(node.inputs[0])
            assert extents is not None
            start, end = (node.attributes.get(name) for name in ("start", "end"))
            wanted = extents[slice(start.as_int() if start else 0, end.as_int() if end else None)]
            node.outputs[0].replace_all_uses_with(build.vector(wanted))
            graph.remove(node, safe=True)
        graph.sort()
        return ir.passes.PassResult(model, True)

    def _source(self, graph: ir.Graph) -> ir.Value:
        return next(value for value in graph.inputs if value.name == self.source)


def shape_vector(graph: ir.Graph, source: ir.Value, extents: Sequence[Extent], prefix: str) -> ir.Value:
    """int64 (len(extents),), computed from the shape of the graph input ``source``.

    prefix: of the names of the nodes, which ``Graph.sort`` has to put in their places.
    """
    return _Builder(graph, source, prefix).vector(extents)


class _Builder:
    """Nodes that compute shapes from the shape of one graph input; each expression once."""

    def __init__(self, graph: ir.Graph, source: ir.Value, prefix: str = "", pixels: int | None = None) -> None:
        self._graph, self._pixels = graph, pixels
        self._prefix = prefix
        self._made: dict[str, ir.Value] = {}
        self._sizes = self._node("Shape", [source], SIZES, 4)

    def vector(self, extents: Sequence[Extent]) -> ir.Value:
        """int64 (len(extents),)."""
        dims = [render(extent) for extent in extents]
        numbers = [dim for dim in dims if isinstance(dim, int)]
        if len(numbers) == len(dims):
            return self._constant(numbers)
        key = "shape/" + "x".join(map(str, dims))
        if key not in self._made:
            parts = [
                self._constant([dim]) if isinstance(dim, int) else self._sum(extent)
                for dim, extent in zip(dims, extents, strict=True)
            ]
            self._made[key] = parts[0] if len(parts) == 1 else self._node("Concat", parts, key, len(parts), axis=0)
        return self._made[key]

    def _sum(self, extent: Extent) -> ir.Value:
        return self._folded("Add", " + ", [(str(term), self._product(term)) for term in extent])

    def _product(self, term: Term) -> ir.Value:
        factors = [(str(Term(1, (factor,))), self._factor(*factor)) for factor in term.factors]
        if term.coefficient != 1 or not factors:
            factors.insert(0, (str(term.coefficient), self._constant([term.coefficient])))
        return self._folded("Mul", "*", factors)

    def _folded(self, operator: str, sign: str, parts: Sequence[tuple[str, ir.Value]]) -> ir.Value:
        """The parts from left to right under ``operator``; what several expressions begin with is one node."""
        text, total = parts[0]
        for part, value in parts[1:]:
            text = f"{text}{sign}{part}"
            key = f"size/{text}"
            if key not in self._made:
                self._made[key] = self._node(operator, [total, value], key, 1)
            total = self._made[key]
        return total

    def _factor(self, name: str, divisor: int) -> ir.Value:
        """``name // divisor``."""
        axes = AXES if self._pixels is None else IMAGE_AXES
        key = f"size/{name}"
        if key not in self._made:
            self._made[key] = self._node("Gather", [self._sizes, self._constant([axes[name]])], key, 1, axis=0)
        if self._pixels is not None and name != BATCH:
            divisor *= self._pixels
        if divisor == 1:
            return self._made[key]
        part = f"size/({name}//{divisor})"
        if part not in self._made:
            self._made[part] = self._node("Div", [self._made[key], self._constant([divisor])], part, 1)
        return self._made[part]

    def _constant(self, values: Sequence[int]) -> ir.Value:
        name = "const/" + "x".join(map(str, values))
        if name not in self._made:
            tensor = ir.tensor(np.array(values, np.int64), name=self._prefix + name)
            value = ir.Value(name=tensor.name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
            self._graph.register_initializer(value)
            self._made[name] = value
        return self._made[name]

    def _node(self, operator: str, inputs: Sequence[ir.Value], name: str, length: int, **attributes: int) -> ir.Value:
        node = ir.node(operator, inputs, attributes=attributes or None, name=self._prefix + name)
        node.outputs[0].name = node.name
        node.outputs[0].dtype = ir.DataType.INT64
        node.outputs[0].shape = ir.Shape([length])
        self._graph.append(node)
        return node.outputs[0]
