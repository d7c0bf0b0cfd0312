"""Graph surgery: one static variant cut out of the traced model, with caches as inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dipgo_deploy.bundle.history import History
from dipgo_deploy.bundle.names import cache_input, cache_output
from dipgo_deploy.export.latent import latent_from_history, prepend
from dipgo_deploy.export.trace import LATENT, TracedModel
from dipgo_deploy.plan.graph import BlockGraph
from dipgo_deploy.plan.model import Cache, Variant

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class _Sources:
    """Where the values of a variant come from: computed by their nodes, a cache, or input + residual."""

    read: dict[str, Cache]
    sums: tuple[tuple[str, str, Cache], ...]  # value, its block's input value, residual; in order of execution


def cut_variant(traced: TracedModel, variant: Variant, layout: History) -> ir.Model:
    """One variant as an onnx-ir model of its own.

    Removed blocks are gone with their weights; a removed block's value is a graph input (output cache) or the sum of
    the block's current input and a graph input (residual cache). The latent is a weighted sum of the
    entries of ``stack`` (float32 (slots, B, C, h, w)) with ``coefficients`` (float32 (slots,)), which are
    ``graph_coefficients`` of the weights.
    """
    import onnx_ir as ir

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
    for name, source, cache in sources.sums:
        residual = ir.val(cache_input(cache.kind, cache.value), dtype=values[name].dtype, shape=values[name].shape)
        total = ir.node("Add", [values[source], residual], name=f"{name}/AddResidual")
        placeholder = values[name]
        like(total.outputs[0], placeholder, f"{name}")
        placeholder.name = f"{name}/removed"
        placeholder.replace_all_uses_with(total.outputs[0])
        prepend(part, total)
        values[name] = total.outputs[0]
        cache_inputs[cache] = residual

    outputs = []
    if variant.predicts:
        outputs.append(values[graph.prediction])
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

    return as_model(
        traced, part, variant.name, inputs, [cache_inputs[cache] for cache in variant.reads], outputs, layout
    )


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
    reads = {(cache.value, cache.kind): cache for cache in variant.reads}
    read = {cache.value: cache for cache in variant.reads if cache.kind == "output"}
    sums = tuple(
        (output, block.inputs[index], reads[output, "residual"])
        for block in graph.blocks
        for index, output in enumerate(block.outputs)
        if (output, "residual") in reads
    )
    return _Sources(read, sums)


def _wanted(graph: BlockGraph, variant: Variant, sources: _Sources, bound: set[str]) -> list[str]:
    """Values that must be computed: the prediction, what is stored, and what residual sums and differences need."""
    wanted = {cache.value for cache in variant.writes}
    if variant.predicts:
        wanted.add(graph.prediction)
    stored = {cache.value for cache in variant.writes if cache.kind == "residual"}
    for block in graph.blocks:
        wanted.update(block.inputs[i] for i, output in enumerate(block.outputs) if output in stored and block.inputs)
    wanted.update(source for _, source, _ in sources.sums)
    return sorted(wanted - bound)


def like(value: ir.Value, other: ir.Value, name: str) -> None:
    """Give ``value`` a name, and type and shape of ``other``."""
    value.name = name
    value.dtype = other.dtype
    value.shape = other.shape
