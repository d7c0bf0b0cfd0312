"""One matrix product that computes several values' scales, shifts and gates at once, taken apart by who needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import onnx_ir as ir

from dipgo_deploy.export.stored import note_rows


class _Projection(NamedTuple):
    """A Gemm whose result is split along its last axis and not used otherwise."""

    split: ir.Node
    product: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    widths: tuple[int, ...]


class SeparateProjections(ir.passes.InPlacePass):
    """Each ``Split(Gemm(x, W, b))`` whose parts are needed by different outputs of the graph becomes a Gemm for each.

    The modulation of a DiT block (adaLN) is one linear layer: shift, scale and gate of the attention, then of the MLP.
    A variant without the attention still applies its gate to the cached value, and would read all rows of the weight
    for it. Neighbouring parts with the same needs stay together, and a part that nothing needs goes. The new weights
    ``NAME.rows<first>-<last>`` are views of the old ones.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        graph, changed = model.graph, False
        needs = _needs(graph)
        for node in list(graph):
            projection = _projection(node)
            if projection is None:
                continue
            groups = _runs([needs[output] for output in node.outputs])
            if len(groups) == 1:
                continue
            for places in groups:
                if needs[node.outputs[places[0]]]:
                    _compute(graph, projection, places)
            graph.remove(node, safe=True)
            graph.remove(projection.product, safe=True)
            for value in (projection.weight, projection.bias):
                if value is not None and not value.uses():
                    graph.initializers.pop(str(value.name))
            changed = True
        return ir.passes.PassResult(model, changed)


def _runs(needs: Sequence[frozenset[ir.Value]]) -> list[list[int]]:
    """Places with equal needs, as far as they are neighbours."""
    return [[place for place, _ in run] for _, run in groupby(enumerate(needs), lambda item: item[1])]


def _needs(graph: ir.Graph) -> Mapping[ir.Value, frozenset[ir.Value]]:
    """For each value, the graph outputs that depend on it without another graph output in between."""
    reached: dict[ir.Value, set[ir.Value]] = {output: {output} for output in graph.outputs}
    for node in reversed(graph):
        wanted = set().union(*(reached.setdefault(output, set()) for output in node.outputs))
        for value in node.inputs:
            if value is not None and not value.is_graph_output():
                reached.setdefault(value, set()).update(wanted)
    return {value: frozenset(outputs) for value, outputs in reached.items()}


def _projection(node: ir.Node) -> _Projection | None:
    """What a node takes apart, if it is such a Split."""
    source = node.inputs[0] if node.op_type == "Split" and not node.domain else None
    product = None if source is None else source.producer()
    if source is None or product is None or product.op_type != "Gemm" or product.domain:
        return None
    if len(source.uses()) != 1 or any(value.is_graph_output() for value in (source, *node.outputs)):
        return None
    weight, bias = product.inputs[1], product.inputs[2] if len(product.inputs) > 2 else None
    if not product.attributes.get_int("transB", 0) or not _is_constant(weight):
        return None
    assert weight is not None and weight.const_value is not None
    rows = int(weight.const_value.shape[0])
    if bias is not None and (not _is_constant(bias) or bias.shape != (rows,)):
        return None
    last_axis = node.attributes.get_int("axis", 0) in (-1, 1)  # a Gemm's result has two
    widths = [None if output.shape is None else output.shape[-1] for output in node.outputs]
    known = tuple(width for width in widths if isinstance(width, int))
    return _Projection(node, product, weight, bias, known) if last_axis and sum(known) == rows else None


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None


def _compute(graph: ir.Graph, projection: _Projection, places: Sequence[int]) -> None:
    """Put a product before the Split that gives the parts ``places`` of it, and their users that product's."""
    first = sum(projection.widths[: places[0]])
    last = first + sum(projection.widths[place] for place in places)
    inputs = [projection.product.inputs[0], _rows(graph, projection.weight, first, last)]
    if projection.bias is not None:
        inputs.append(_rows(graph, projection.bias, first, last))
    name = f"{projection.product.name}.rows{first}-{last}"
    product = ir.node("Gemm", inputs, attributes=dict(projection.product.attributes), name=name)
    olds = [projection.split.outputs[place] for place in places]
    nodes = [product]
    whole = product.outputs[0]
    whole.name, whole.dtype = f"{name}:0", olds[0].dtype
    whole.shape = ir.Shape([*list(olds[0].shape or ())[:-1], last - first])
    news = [whole]
    if len(places) > 1:
        widths = ir.Value(
            name=f"{name}/widths",
            const_value=ir.tensor([projection.widths[place] for place in places], dtype=ir.DataType.INT64),
        )
        widths.dtype, widths.shape = ir.DataType.INT64, ir.Shape([len(places)])
        graph.register_initializer(widths)
        split = ir.node(
            "Split", [whole, widths], attributes={"axis": -1}, num_outputs=len(places), name=f"{name}/Split"
        )
        nodes.append(split)
        news = list(split.outputs)
        for index, (new, old) in enumerate(zip(news, olds, strict=True)):
            new.name, new.dtype, new.shape = f"{name}/Split:{index}", old.dtype, old.shape
    graph.insert_before(projection.split, nodes)
    ir.convenience.replace_all_uses_with(olds, news)


def _rows(graph: ir.Graph, value: ir.Value, first: int, last: int) -> ir.Value:
    """Rows of an initializer as one of their own, in the same memory."""
    whole = value.const_value
    assert whole is not None
    name = f"{value.name}.rows{first}-{last}"
    if name in graph.initializers:
        return graph.initializers[name]
    # A view of what the model holds, so that writing it gives back its pages as of any other weight.
    part = ir.tensor(whole.raw[first:last], name=name)
    note_rows(part, whole, first, last)
    made = ir.Value(name=name, const_value=part)
    made.dtype, made.shape = part.dtype, ir.Shape(part.shape)
    graph.register_initializer(made)
    return made
