"""Graph surgery: one static variant cut out of the traced model, with caches as inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dipgo_deploy.bundle.history import History
from dipgo_deploy.bundle.names import FORECAST, PREDICTION, cache_input, cache_output
from dipgo_deploy.export.latent import LATENT, constant, latent_from_history, prepend
from dipgo_deploy.export.trace import TracedModel
from dipgo_deploy.plan.graph import BlockGraph, CacheKind
from dipgo_deploy.plan.model import Cache, Variant

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class _Sources:
    """Where the values of a variant come from: computed by their nodes, a cache, or a sum of stored values.

    read: value -> the cache that is read as it is. sums: value, the stored values, and for residuals its block's input
    value, else None; in order of execution.
    """

    read: dict[str, Cache]
    sums: tuple[tuple[str, tuple[Cache, ...], str | None], ...]


def cut_variant(traced: TracedModel, variant: Variant, layout: History) -> ir.Model:
    """One variant as an onnx-ir model of its own.

    Removed blocks are gone with their weights; a removed block's value is a graph input (output cache) or the sum of
    the block's current input and a graph input (residual cache). Of a forecast it is several inputs, each times its
    entry of ``forecast`` (float32 (n,)). The latent is a weighted sum of the entries of ``stack`` (float32 (slots, B,
    C, h, w)) with ``coefficients`` (float32 (slots,)), which are ``graph_coefficients`` of the weights. What guides
    reads the predictions of both halves, which the traced graph has as inputs.
    """
    import onnx_ir as ir

    if variant.guides:
        variant = replace(variant, reads=(), guides=False)

    graph = traced.graph
    sources = _sources(graph, variant)
    full = {str(output.name): output for output in traced.model.graph.outputs}
    given = {*sources.read, *(value for value, _, _ in sources.sums)}
    wanted = _wanted(graph, variant, sources, given)
    part = ir.convenience.extract(
        traced.model.graph,
        [*traced.model.graph.inputs, *(full[name] for name in sorted(given))],
        [full[name] for name in wanted],
    )
    values: dict[str, ir.Value] = {str(value.name): value for value in [*part.inputs, *part.outputs]}
    inputs = [value for value in part.inputs if value.name not in given]
    part.outputs.clear()
    part.inputs.clear()

    cache_inputs: dict[Cache, ir.Value] = {}
    for name, cache in sources.read.items():
        values[name].name = cache_input(cache.kind, cache.value)
        cache_inputs[cache] = values[name]
    weighted = [cache for cache in variant.reads if cache.nth]
    weights = ir.val(FORECAST, dtype=ir.DataType.FLOAT, shape=ir.Shape([len(weighted)]))
    for name, caches, source in sources.sums:
        placeholder = values[name]
        stored = [
            ir.val(cache_input(*cache_key(cache)), dtype=placeholder.dtype, shape=placeholder.shape) for cache in caches
        ]
        cache_inputs.update(zip(caches, stored, strict=True))
        nodes: list[ir.Node] = []
        total = stored[0]
        if caches[0].nth:
            terms = [(value, weighted.index(cache)) for cache, value in cache_inputs.items() if cache in caches]
            nodes, total = weighted_sum(part, terms, weights, f"{name}/Forecast")
        if source is not None:
            nodes.append(ir.node("Add", [values[source], total], name=f"{name}/AddResidual"))
            total = nodes[-1].outputs[0]
        like(total, placeholder, f"{name}")
        placeholder.name = f"{name}/removed"
        placeholder.replace_all_uses_with(total)
        for node in reversed(nodes):
            prepend(part, node)
        values[name] = total

    outputs = []
    if variant.predicts:
        outputs.append(as_prediction(values[variant.prediction]))
    block_input = {
        output: block.inputs[index]
        for block in graph.blocks
        for index, output in enumerate(block.outputs)
        if block.cache == "residual"
    }
    for cache in variant.writes:
        value = values[cache.value]
        if cache.kind == "residual":
            node = ir.node("Sub", [value, values[block_input[cache.value]]], name=f"{cache.value}/Residual")
        else:
            # an Identity gives the output its own name while the value stays usable inside the graph
            node = ir.node("Identity", [value], name=f"{cache.value}/Store")
        like(node.outputs[0], value, cache_output(cache.kind, cache.value))
        part.append(node)
        outputs.append(node.outputs[0])

    caches_read = [cache_inputs[cache] for cache in variant.reads]
    return as_model(
        traced, part, variant.name, inputs, [*([weights] if weighted else []), *caches_read], outputs, layout
    )


def as_prediction(value: ir.Value) -> ir.Value:
    """A graph's prediction under the name that all graphs give it, whichever denoiser's it is."""
    value.name = PREDICTION
    return value


def cache_key(cache: Cache) -> tuple[CacheKind, str, int]:
    """What its name is made of."""
    return cache.kind, cache.value, cache.nth


def weighted_sum(
    part: ir.Graph, terms: Sequence[tuple[ir.Value, int]], weights: ir.Value, name: str
) -> tuple[list[ir.Node], ir.Value]:
    """Nodes that sum tensors, each times its entry of ``weights`` (float32), in order, and their sum.

    All in float32, whatever the tensors' type: the weights of an extrapolation nearly cancel.

    terms: tensor and place of its weight.
    """
    import onnx_ir as ir

    nodes: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value], shape: ir.Shape | None, **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=f"{name}/{op}{len(nodes)}")
        node.outputs[0].name = str(node.name)
        node.outputs[0].dtype = ir.DataType.FLOAT
        node.outputs[0].shape = shape
        nodes.append(node)
        return node.outputs[0]

    total: ir.Value | None = None
    half = terms[0][0].dtype != ir.DataType.FLOAT
    for tensor, place in terms:
        chosen = constant(part, f"{name}/place{place}", np.array(place, np.int64))
        weight = add("Gather", [weights, chosen], ir.Shape([]))
        wide = add("Cast", [tensor], tensor.shape, to=ir.DataType.FLOAT.value) if half else tensor
        term = add("Mul", [wide, weight], tensor.shape)
        total = term if total is None else add("Add", [total, term], tensor.shape)
    assert total is not None
    if half:
        dtype = terms[0][0].dtype
        assert dtype is not None
        total = add("Cast", [total], total.shape, to=dtype.value)
        total.dtype = dtype
    return nodes, total


def as_model(
    traced: TracedModel,
    part: ir.Graph,
    name: str,
    inputs: list[ir.Value],
    caches: list[ir.Value],
    outputs: list[ir.Value],
    layout: History,
) -> ir.Model:
    """A part of the traced graph, without inputs and outputs yet, as a model.

    inputs: copies of the traced graph's inputs, of which the used ones become inputs; in the place of the latent come
    ``stack`` and ``coefficients`` (see ``cut_variant``). caches: further inputs.
    """
    import onnx_ir as ir

    used = {value for node in part for value in node.inputs if value is not None}
    latent = next((value for value in inputs if value.name == LATENT), None)
    heads = [value for value in inputs if value in used and value is not latent]
    if latent is not None and latent in used:
        heads = [*latent_from_history(part, latent, layout), *heads]
    part.inputs.extend([*heads, *caches])
    part.outputs.extend(outputs)
    part.sort()
    part.name = name
    return ir.Model(part, ir_version=traced.model.ir_version, producer_name="dipgo_deploy")


def _sources(graph: BlockGraph, variant: Variant) -> _Sources:
    reads: dict[str, list[Cache]] = {}
    for cache in variant.reads:
        reads.setdefault(cache.value, []).append(cache)
    read = {name: caches[0] for name, caches in reads.items() if caches[0].kind == "output" and not caches[0].nth}
    sums = tuple(
        (output, tuple(reads[output]), block.inputs[index] if block.cache == "residual" else None)
        for block in graph.blocks
        for index, output in enumerate(block.outputs)
        if output in reads and output not in read
    )
    return _Sources(read, sums)


def _wanted(graph: BlockGraph, variant: Variant, sources: _Sources, bound: set[str]) -> list[str]:
    """Values that must be computed: the prediction, what is stored, and what residual sums and differences need."""
    wanted = {cache.value for cache in variant.writes}
    if variant.predicts:
        wanted.add(variant.prediction)
    stored = {cache.value for cache in variant.writes if cache.kind == "residual"}
    for block in graph.blocks:
        wanted.update(block.inputs[i] for i, output in enumerate(block.outputs) if output in stored and block.inputs)
    wanted.update(source for _, _, source in sources.sums if source is not None)
    return sorted(wanted - bound)


def like(value: ir.Value, other: ir.Value, name: str) -> None:
    """Give ``value`` a name, and type and shape of ``other``."""
    value.name = name
    value.dtype = other.dtype
    value.shape = other.shape
