"""One trace of a denoiser: an onnx-ir graph whose outputs are all named values, and the block graph read off it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.names import GUIDANCE_SCALES, PREDICTION, TIMESTEP
from dipgo_deploy.bundle.shapes import SizeRanges
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.conditions import open_shapes
from dipgo_deploy.export.dynamic import Dimensions, concrete, example_sizes, macs_at
from dipgo_deploy.export.known import KnownPart
from dipgo_deploy.export.latent import LATENT
from dipgo_deploy.export.macs import node_macs
from dipgo_deploy.export.pieces import node_graph
from dipgo_deploy.export.program import to_onnx, torch_dtype
from dipgo_deploy.export.prologue import Prologue, find_prologue, is_worth, take_out_prologue
from dipgo_deploy.export.timestep_tables import ClassTables, TimestepTables, take_out_classes, take_out_tables
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily
from dipgo_deploy.models.shape import TraceShape, condition_specs
from dipgo_deploy.models.target import nominal_size
from dipgo_deploy.plan.graph import Block, BlockGraph, CacheKind, InputRole, Value
from dipgo_deploy.plan.pieces import PieceGraph, split
from dipgo_deploy.schedule.guidance import CONDITIONAL, HALVES

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch


@dataclass(frozen=True)
class Beforehand:
    """What is made before the launches, and leaves the graphs.

    Attributes:
        tables: what depends on the timestep alone, at export; None: where that is worth it.
        classes: what depends on the class too, at export, for these alone.
        prologue: what depends on the conditions, at the start of a run; None: where that is worth it.
        timesteps: how many have launches, of the block graph with nothing taken out.
    """

    tables: bool | None = False
    classes: tuple[int, ...] = ()
    prologue: bool | None = False
    timesteps: Callable[[BlockGraph], int] = lambda graph: 1


@dataclass(frozen=True)
class TracedModel:
    """The full model traced once.

    With open sizes the dimensions of ``model`` are expressions over them, the bytes in ``graph`` and the shapes of
    ``conditions`` are those of the largest, and the multiply-accumulates those of the usual ones.

    Attributes:
        model: onnx-ir model with inputs ``latent``, ``timestep``, [``guidance_scale``, ...], conditions, and outputs
            ``noise_pred``, ... and every named value; of both rows one for each denoiser. With conditional-only
            evaluations the predictions are followed by theirs, and the values by theirs. Of one half of guidance at a
            time the inputs have ``HALVES`` before the conditions, and the predictions are followed by ``guided``, ...
        graph: its block graph.
        conditions: the condition inputs.
        dtype: the export's dtype name.
        tables, classes, prologue: what was taken out of ``model``, which then has inputs for their rows.
    """

    model: ir.Model
    graph: BlockGraph
    conditions: tuple[InputSpec, ...]
    shape: TraceShape
    dtype: str
    tables: TimestepTables | None = None
    classes: ClassTables | None = None
    prologue: Prologue | None = None

    @property
    def parts(self) -> tuple[KnownPart, ...]:
        """Of all that was taken out."""
        return tuple(made.part for made in (self.tables, self.classes, self.prologue) if made is not None)

    @cached_property
    def pieces(self) -> PieceGraph:
        """What the boundary ``segments`` is put together of; static sizes only."""
        return split(node_graph(self.model), self.graph)


def trace(
    denoiser: torch.nn.Module,
    family: ModelFamily,
    config: Mapping[str, Any],
    specs: Sequence[BlockSpec],
    cache_kinds: Mapping[str, CacheKind],
    shape: TraceShape,
    dtype: str,
    *,
    beforehand: Beforehand = Beforehand(),
    conditional: bool = False,
) -> TracedModel:
    """Trace ``denoiser`` (already in the torch dtype of ``dtype``) once, with every boundary tensor as an output.

    beforehand: what is taken out of it. conditional: also as conditional-only evaluations run it, of static sizes and
    with guidance; of one half of guidance at a time that is no other graph.

    Raises:
        UserError: the exporter refuses the model, or its open sizes, or its graph holds control flow; or there is
            nothing of what is to be taken out; or a value has no conditional half.
    """
    import torch

    from dipgo_deploy.export.denoiser import BoundaryTensors, TracedDenoiser
    from dipgo_deploy.export.passes import apply
    from dipgo_deploy.export.passes.dimensions import NameDimensions
    from dipgo_deploy.export.passes.projections import SeparateProjections
    from dipgo_deploy.export.passes.shapes import ShapesFromSizes

    conditions = condition_specs(family, config, shape)
    example = shape if shape.sizes is None else shape.at(example_sizes(shape.sizes))
    channels = family.latent_channels(config)
    boundary = BoundaryTensors()
    wrapper = TracedDenoiser(
        denoiser,
        specs,
        cache_kinds,
        [spec.name for spec in conditions],
        family.call,
        channels=channels,
        guidance=family.guide.combine if shape.guidance else None,
        boundary=boundary,
        denoisers=family.denoisers,
        apart=shape.apart,
        conditional=conditional and not shape.apart,
    ).eval()
    arguments = [torch.randn(example.batch, channels, *example.extents), torch.tensor([500.0])]
    names = [LATENT, TIMESTEP]
    scales = GUIDANCE_SCALES[: len(family.denoisers)] if shape.guidance else ()
    arguments += [torch.tensor([5.0]) for _ in scales]
    names += scales
    if shape.apart:
        arguments += [torch.randn_like(arguments[0]) for _ in HALVES]
        names += HALVES
    suffixes = [f"_{place + 1}" if place else "" for place in range(len(family.denoisers))]
    guided = tuple(f"{PREDICTION}{suffix}" for suffix in suffixes)
    guides = {f"guided{suffix}": name for suffix, name in zip(suffixes, guided, strict=True)} if shape.apart else {}
    halves = {f"{name}{CONDITIONAL}": name for name in guided} if conditional and not shape.apart else {}
    predictions = (*guided, *halves)
    for spec in condition_specs(family, config, example):
        arguments.append(_example(spec, dtype))
        names.append(spec.name)
    model = to_onnx(
        wrapper,
        arguments,
        names,
        lambda: [*predictions, *guides, *boundary.names],
        dtype=dtype,
        prefix="denoiser.",
        label=family.class_name,
        dynamic_shapes=_dynamic_shapes(family, config, shape),
    )
    if shape.sizes is not None:
        apply(model, NameDimensions(LATENT, shape.sizes), ShapesFromSizes(LATENT))
    half = shape.batch if halves else None
    halves |= boundary.halves
    _check_halves(model, halves, guided)
    roles: dict[str, InputRole] = {LATENT: "step", TIMESTEP: "step"}
    roles.update({name: "step" if name in HALVES else "constant" for name in names[2:]})

    def read() -> BlockGraph:
        graph = read_block_graph(model, boundary.blocks, roles, predictions, shape.sizes)
        return replace(graph, halves=halves, guides=guides)

    tables, classes, prologue = _taken(
        model, shape, family, conditions, beforehand, half, cache(lambda: beforehand.timesteps(read()))
    )
    apply(model, SeparateProjections())
    for made in (tables, classes, prologue):
        for name in () if made is None else made.part.names:
            roles[name] = "step" if made is not None and name in made.part.timed else "constant"
    return TracedModel(model, read(), conditions, shape, dtype, tables, classes, prologue)


def _check_halves(model: ir.Model, halves: Mapping[str, str], predictions: Sequence[str]) -> None:
    """Refuse a value whose second half is not what a conditional-only evaluation has in its place."""
    values = {str(output.name): output for output in model.graph.outputs}
    for half, whole in halves.items():
        if whole in predictions:
            continue
        missing = whole not in values
        extents = None if missing else tuple(values[whole].shape or ())
        if not extents or extents != (2 * int((values[half].shape or (0,))[0]), *tuple(values[half].shape or ())[1:]):
            raise UserError(
                f"guidance: {whole} has no conditional half (shape {extents}); leave conditional-only evaluations out"
            )


def _taken(
    model: ir.Model,
    shape: TraceShape,
    family: ModelFamily,
    conditions: Sequence[InputSpec],
    wanted: Beforehand,
    half: int | None,
    timesteps: Callable[[], int],
) -> tuple[TimestepTables | None, ClassTables | None, Prologue | None]:
    """What is made beforehand, taken out of ``model``. half: images of a conditional-only launch. timesteps: how many
    have launches."""
    if wanted.tables is False:
        return None, None, None
    label = next((spec.name for spec in conditions if spec.source == "class"), None)
    others = [spec for spec in conditions if not wanted.classes or spec.name != label]
    for_run = wanted.prologue is not False and (
        wanted.prologue or is_worth(find_prologue(model.graph, None, others, shape.sizes), timesteps())
    )
    always = wanted.tables is True or for_run or bool(wanted.classes)
    tables = take_out_tables(model, shape.model_batch, always=always, sizes=shape.sizes, half=half)
    if wanted.tables and tables is None:
        raise UserError(
            f"--timestep-tables: no product of {family.class_name} depends on the timestep alone; leave it out"
        )
    classes = prologue = None
    if wanted.classes:
        assert label is not None  # checked with the options
        classes = take_out_classes(model, tables, label, wanted.classes, shape.model_batch, timesteps(), half)
    if for_run:
        found = find_prologue(model.graph, tables, others, shape.sizes)
        if found.frontier:
            prologue = take_out_prologue(model, found)
        elif wanted.prologue:
            raise UserError(f"--prologue: no product of {family.class_name} depends on conditions alone; leave it out")
    return tables, classes, prologue


def _dynamic_shapes(family: ModelFamily, config: Mapping[str, Any], shape: TraceShape) -> list[Any] | None:
    """Of latent, timestep, and the rest as ``TracedDenoiser.forward`` takes it."""
    if shape.sizes is None:
        return None
    dimensions = Dimensions(shape.sizes)
    conditions = [dimensions.of(dims) or None for dims in open_shapes(family, config, shape)]
    scales = [None] * (len(family.denoisers) if shape.guidance else 0)
    rest: list[Any] = [*scales, *[dimensions.latent] * (len(HALVES) if shape.apart else 0), *conditions]
    return [dimensions.latent, None, *([tuple(rest)] if rest else [])]


def read_block_graph(
    model: ir.Model,
    blocks: Sequence[Block],
    roles: Mapping[str, InputRole],
    predictions: tuple[str, ...],
    sizes: SizeRanges | None = None,
) -> BlockGraph:
    """Condense a traced graph to its named values: walk back from each until the next named values or inputs.

    Reading an input's shape is not reading the input. sizes: the open sizes; see ``TracedModel``.

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
            name=name, nbytes=_nbytes(output, sizes), reads=reads, work=frozenset(position[node] for node in work)
        )
    costs = tuple(node_macs(node) for node in model.graph) if sizes is None else macs_at(model, sizes.opt)
    costly = {index for index, cost in enumerate(costs) if cost}
    values = {name: replace(value, work=value.work & costly) for name, value in values.items()}
    return BlockGraph(inputs=dict(roles), values=values, blocks=tuple(blocks), predictions=predictions, costs=costs)


def trace_blocks(
    model: str, granularity: Granularity, cache_kinds: Mapping[str, CacheKind] | None = None
) -> BlockGraph:
    """Block graph of a model: for MACs and cache sizes; see ``trace_by_name``."""
    return trace_by_name(model, granularity, cache_kinds).graph


def trace_by_name(
    model: str,
    granularity: Granularity,
    cache_kinds: Mapping[str, CacheKind] | None = None,
    *,
    conditional: bool = False,
) -> TracedModel:
    """A model (built-in name, folder or hub id) traced at its native size, batch 1, guidance as its pipeline has it.

    ``cache_kinds``: cache kind by block name; the family's default where it says nothing. ``conditional``: also
    conditional-only evaluations.
    """
    from dipgo_deploy.models.location import pipeline_index
    from dipgo_deploy.models.stock import stock_configuration
    from dipgo_deploy.supernet.load import load_denoiser

    native = stock_configuration(model).native
    denoiser, family, config = load_denoiser(model)
    specs = family.blocks(config, granularity)
    kinds = {spec.name: (cache_kinds or {}).get(spec.name, spec.caches[0]) for spec in specs}
    *frames, height, width = native or nominal_size(family)
    scheme = family.text(config, None)
    length = 0 if scheme is None else scheme.length
    shape = TraceShape(
        height=height,
        width=width,
        text_length=length,
        guidance=family.is_guided(config, pipeline_index(model)),
        frames=frames[0] if frames else None,
    )
    return trace(denoiser, family, config, specs, kinds, shape, "fp32", conditional=conditional)


def _walk_back(output: ir.Value, stop: set[ir.Value]) -> tuple[frozenset[str], set[ir.Node]]:
    reads: set[str] = set()
    work: set[ir.Node] = set()
    pending = [output.producer()]
    while pending:
        node = pending.pop()
        if node is None or node in work:
            continue
        work.add(node)
        if node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].is_graph_input():
            continue
        for value in node.inputs:
            if value is None or value.is_initializer():
                continue
            if value in stop or value.is_graph_input():
                reads.add(str(value.name))
            else:
                pending.append(value.producer())
    return frozenset(reads), work


def _nbytes(value: ir.Value, sizes: SizeRanges | None) -> int:
    assert value.shape is not None and value.dtype is not None
    shape = concrete(value, sizes.max) if sizes is not None else [int(extent) for extent in value.shape]
    return int(math.prod(shape) * value.dtype.itemsize)


def _example(spec: InputSpec, dtype: str) -> torch.Tensor:
    import torch

    if spec.dtype == "int64":
        # Ones are a mask that hides nothing, and a class that every model has.
        return torch.ones(spec.shape, dtype=torch.int64)
    return torch.randn(spec.shape).to(torch.float32 if spec.dtype == "float32" else torch_dtype(dtype))
