"""Layout ``segments`` in ONNX: the traced nodes for the plan, and the graph of each segment."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dipgo_deploy.bundle.history import History
from dipgo_deploy.bundle.names import FORECAST, PREDICTION, segment_input, segment_output
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.cut import as_model, as_prediction, like, weighted_sum
from dipgo_deploy.export.pieces import tensor_of
from dipgo_deploy.export.trace import TracedModel
from dipgo_deploy.plan.segments import Segment

if TYPE_CHECKING:
    import onnx_ir as ir


def reads_of(segment: Segment) -> tuple[str, ...]:
    """Graph input names that are bound to the arena, in the order of the plan."""
    return tuple(map(segment_input, segment.reads)) if segment.kind == "part" else segment.reads


def writes_of(segment: Segment) -> tuple[str, ...]:
    """Graph output names that are bound to the arena, in the order of the plan."""
    if segment.kind == "part":
        return tuple(segment_output(cache.kind, cache.value) for cache in segment.writes)
    return tuple(cache.value for cache in segment.writes)


def cut_segment(traced: TracedModel, segment: Segment, history: History) -> ir.Model:
    """One segment as an onnx-ir model of its own.

    A part takes its reads as inputs ``value.NAME`` and gives ``new_value.NAME``, ``new_residual.NAME`` and the
    prediction; the latent is the weighted sum of the history, as in a variant. A sum takes ``term0`` ... and gives
    ``sum``, or the prediction; a weighted one takes the weights of its terms, ``forecast``, too; a difference gives
    ``difference``, ``term0`` minus ``term1``. What guides takes the predictions of both halves.

    Raises:
        UserError: a tensor between two segments has a type that no graph can have as an input.
    """
    if segment.kind == "guide":
        return _cut_part(traced, replace(segment, reads=()), history)
    return _cut_part(traced, segment, history) if segment.kind == "part" else _arithmetic(traced, segment)


def _cut_part(traced: TracedModel, segment: Segment, history: History) -> ir.Model:
    import onnx_ir as ir

    graph = traced.graph
    values = ir.convenience.create_value_mapping(traced.model.graph)
    source = {
        output: block.inputs[index]
        for block in graph.blocks
        for index, output in enumerate(block.outputs)
        if block.cache == "residual"
    }
    wanted = {cache.value for cache in segment.writes}
    if segment.predicts:
        wanted.add(segment.prediction)
    wanted |= {source[cache.value] for cache in segment.writes if cache.kind == "residual"} - set(segment.reads)
    order = sorted(wanted)
    given = [values[name] for name in segment.reads]
    part = ir.convenience.extract(
        traced.model.graph, [*traced.model.graph.inputs, *given], [values[name] for name in order]
    )
    heads = list(part.inputs)[: len(traced.model.graph.inputs)]
    caches = list(part.inputs)[len(heads) :]
    inside = dict(zip(order, part.outputs, strict=True)) | dict(zip(segment.reads, caches, strict=True))
    part.inputs.clear()
    part.outputs.clear()
    for name, value in zip(segment.reads, caches, strict=True):
        _check_type(value, name)
        value.name = segment_input(name)
    outputs = [as_prediction(inside[segment.prediction])] if segment.predicts else []
    for cache in segment.writes:
        value = inside[cache.value]
        if cache.kind == "output":
            _check_type(value, cache.value)
            value.name = segment_output(cache.kind, cache.value)
            outputs.append(value)
            continue
        node = ir.node("Sub", [value, inside[source[cache.value]]], name=f"{cache.value}/Residual")
        like(node.outputs[0], value, segment_output(cache.kind, cache.value))
        part.append(node)
        outputs.append(node.outputs[0])
    return as_model(traced, part, segment.name, heads, caches, outputs, history)


def _arithmetic(traced: TracedModel, segment: Segment) -> ir.Model:
    """A graph that holds no weights: a sum, a difference, or a copy to the prediction's slot."""
    import onnx_ir as ir

    values = ir.convenience.create_value_mapping(traced.model.graph).values()
    sample = next(value for value in values if tensor_of(value).kind == segment.tensor)
    terms = [ir.val(name, dtype=sample.dtype, shape=sample.shape) for name in segment.reads]
    inputs = terms
    graph = ir.Graph([], [], nodes=[], opset_imports=traced.model.graph.opset_imports, name=segment.name)
    if segment.kind == "weighted":
        weights = ir.val(FORECAST, dtype=ir.DataType.FLOAT, shape=ir.Shape([len(terms)]))
        inputs = [weights, *terms]
        nodes, _ = weighted_sum(graph, [(term, place) for place, term in enumerate(terms)], weights, "forecast")
    elif len(terms) == 1:
        nodes = [ir.node("Identity", terms, name="copy")]
    else:
        nodes = []
        total = terms[0]
        for place, term in enumerate(terms[1:]):
            nodes.append(
                ir.node("Add" if segment.kind == "sum" else "Sub", [total, term], name=f"{segment.kind}/{place}")
            )
            total = nodes[-1].outputs[0]
            like(total, sample, f"{segment.kind}/{place}")
    name = PREDICTION if segment.predicts else segment.writes[0].value
    like(nodes[-1].outputs[0], sample, name)
    graph.extend(nodes)
    graph.inputs.extend(inputs)
    graph.outputs.append(nodes[-1].outputs[0])
    return ir.Model(graph, ir_version=traced.model.ir_version, producer_name="dipgo_deploy")


def _check_type(value: ir.Value, name: str) -> None:
    if not tensor_of(value).passable:
        raise UserError(
            f"{name}: a tensor of type {value.dtype} cannot be passed between segments; use --layout variants"
        )
