"""One trace of a denoiser: an onnx-ir graph whose outputs are all named values, and the block graph read off it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.export.macs import node_macs
from dipgo_deploy.export.program import to_onnx, torch_dtype
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily
from dipgo_deploy.plan.graph import Block, BlockGraph, CacheKind, InputRole, Value

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

LATENT, TIMESTEP, GUIDANCE = "latent", "timestep", "guidance_scale"


@dataclass(frozen=True)
class TraceShape:
    """Static extents of a trace: images per launch, latent height and width, text tokens, and whether guidance
    doubles the batch inside the graph."""

    batch: int = 1
    height: int = 64
    width: int = 64
    text_length: int = 77
    guidance: bool = True

    @property
    def model_batch(self) -> int:
        """Batch that the denoiser itself sees."""
        return 2 * self.batch if self.guidance else self.batch


@dataclass(frozen=True)
class TracedModel:
    """The full model traced once.

    model: onnx-ir model with inputs ``latent``, ``timestep``, [``guidance_scale``], conditions, and outputs
    ``noise_pred`` and every named value. graph: its block graph. conditions: the condition inputs. dtype: the export's
    dtype name.
    """

    model: ir.Model
    graph: BlockGraph
    conditions: tuple[InputSpec, ...]
    shape: TraceShape
    dtype: str


def trace(
    denoiser: torch.nn.Module,
    family: ModelFamily,
    config: Mapping[str, Any],
    specs: Sequence[BlockSpec],
    cache_kinds: Mapping[str, CacheKind],
    shape: TraceShape,
    dtype: str,
) -> TracedModel:
    """Trace ``denoiser`` (already in the torch dtype of ``dtype``) once, with every cut point as an output.

    Raises:
        UserError: the exporter refuses the model, or its graph holds control flow.
    """
    import torch

    from dipgo_deploy.export.denoiser import PREDICTION, Layout, TracedDenoiser

    inputs = family.inputs(
        config, batch=shape.model_batch, height=shape.height, width=shape.width, text_length=shape.text_length
    )
    conditions = tuple(spec for spec in inputs if spec.role == "condition")
    channels = family.latent_channels(config)
    layout = Layout()
    wrapper = TracedDenoiser(
        denoiser, specs, cache_kinds, inputs, channels=channels, guidance=shape.guidance, layout=layout
    ).eval()
    arguments = [torch.randn(shape.batch, channels, shape.height, shape.width), torch.tensor([500.0])]
    names = [LATENT, TIMESTEP]
    if shape.guidance:
        arguments.append(torch.tensor([5.0]))
        names.append(GUIDANCE)
    for spec in conditions:
        arguments.append(_example(spec, dtype))
        names.append(spec.name)
    model = to_onnx(
        wrapper,
        arguments,
        names,
        lambda: [PREDICTION, *layout.names],
        dtype=dtype,
        prefix="denoiser.",
        label=family.class_name,
    )
    roles: dict[str, InputRole] = {LATENT: "step", TIMESTEP: "step"}
    roles.update({name: "constant" for name in names[2:]})
    graph = read_block_graph(model, layout.blocks, roles, PREDICTION)
    return TracedModel(model=model, graph=graph, conditions=conditions, shape=shape, dtype=dtype)


def read_block_graph(
    model: ir.Model, blocks: Sequence[Block], roles: Mapping[str, InputRole], prediction: str
) -> BlockGraph:
    """Condense a traced graph to its named values: walk back from each until the next named values or inputs.

    Raises:
        UserError: a node with a subgraph (control flow), which cannot be cut.
    """
    position = {}
    for index, node in enumerate(model.graph):
        if any(attribute.type.name in ("GRAPH", "GRAPHS") for attribute in node.attributes.values()):
            raise UserError(f"{node.name}: control flow ({node.op_type}) in the traced model cannot be cut")
        position[node] = index
    named = {output.name: output for output in model.graph.outputs}
    values = {}
    for name, output in named.items():
        reads, work = _walk_back(output, stop={value for key, value in named.items() if key != name})
        values[name] = Value(
            name=name, nbytes=_nbytes(output), reads=reads, work=frozenset(position[node] for node in work)
        )
    costs = tuple(node_macs(node) for node in model.graph)
    costly = {index for index, cost in enumerate(costs) if cost}
    values = {name: replace(value, work=value.work & costly) for name, value in values.items()}
    return BlockGraph(inputs=dict(roles), values=values, blocks=tuple(blocks), prediction=prediction, costs=costs)


def trace_blocks(
    model: str, granularity: Granularity, cache_kinds: Mapping[str, CacheKind] | None = None
) -> BlockGraph:
    """Block graph of a model folder or hub id at its native size, batch 1 with guidance: for MACs and cache sizes.

    ``cache_kinds``: cache kind by block name; the family's default where it says nothing.
    """
    from dipgo_deploy.supernet.load import load_denoiser

    denoiser, family, config = load_denoiser(model)
    specs = family.blocks(config, granularity)
    kinds = {spec.name: (cache_kinds or {}).get(spec.name, spec.caches[0]) for spec in specs}
    extent = config["sample_size"]
    height, width = (extent, extent) if isinstance(extent, int) else extent
    shape = TraceShape(height=height, width=width)
    return trace(denoiser, family, config, specs, kinds, shape, "fp32").graph


def _walk_back(output: ir.Value, stop: set[ir.Value]) -> tuple[frozenset[str], set[ir.Node]]:
    reads: set[str] = set()
    work: set[ir.Node] = set()
    pending = [output.producer()]
    while pending:
        node = pending.pop()
        if node is None or node in work:
            continue
        work.add(node)
        for value in node.inputs:
            if value is None or value.is_initializer():
                continue
            if value in stop or value.is_graph_input():
                reads.add(str(value.name))
            else:
                pending.append(value.producer())
    return frozenset(reads), work


def _nbytes(value: ir.Value) -> int:
    assert value.shape is not None and value.dtype is not None
    return int(math.prod(int(extent) for extent in value.shape) * value.dtype.itemsize)


def _example(spec: InputSpec, dtype: str) -> torch.Tensor:
    import torch

    if spec.dtype == "int64":
        return torch.zeros(spec.shape, dtype=torch.int64)
    return torch.randn(spec.shape).to(torch.float32 if spec.dtype == "float32" else torch_dtype(dtype))
