"""The part of a traced graph that is known before the first launch, read off the graph, and taken out of it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.bundle.shapes import BATCH
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.dynamic import concrete
from dipgo_deploy.export.latent import LATENT, constant, prepend
from dipgo_deploy.export.macs import node_macs
from dipgo_deploy.export.stored import stored_parameter
from dipgo_deploy.export.tensors import PASSABLE

if TYPE_CHECKING:
    import onnx_ir as ir

    from dipgo_deploy.bundle.shapes import SizeRanges


class Source(enum.Flag):
    """What a value depends on, of what is known before the first launch."""

    TIMESTEP = enum.auto()
    TOKENS = enum.auto()
    """A condition with a row for each token, or a picture: too large to be had once for each timestep."""
    CONDITION = enum.auto()


NOTHING = Source(0)
# Whether a node can be computed for all timesteps at once; given the places of its inputs that depend on them.
ForAll = Callable[["ir.Node", Collection[int]], bool]


@dataclass(frozen=True)
class KnownPart:
    """A part of a traced model that was taken out of it.

    Attributes:
        model: computes the values, each named as the input of the traced model that takes its place. ``dtype`` and
            shape of an output are those of one row.
        timed: outputs that depend on the timestep.
        parameters: the parameters that are in the traced model no more.
        nbytes: of these weights.
        share: of the bytes of all weights.
    """

    model: ir.Model
    timed: frozenset[str]
    parameters: tuple[str, ...]
    nbytes: int
    share: float

    @property
    def names(self) -> tuple[str, ...]:
        """Of the values."""
        return tuple(str(value.name) for value in self.model.graph.outputs)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of a row, by name, where all are static."""
        return {str(value.name): extents_of(value) for value in self.model.graph.outputs}

    def row_bytes(self, timesteps: int, sizes: SizeRanges | None = None) -> int:
        """Of the rows of all values for so many timesteps, at the largest of ``sizes``."""
        outputs = self.model.graph.outputs
        return sum(nbytes_of(value, sizes) * (timesteps if value.name in self.timed else 1) for value in outputs)

    def rows(self, points: Mapping[str, Sequence[np.ndarray]], option: str) -> dict[str, np.ndarray]:
        """The values at each of some points: float32 (points, *row) by name.

        Computed in float32 whatever the type of the weights, one node after the other, so that only one weight at a
        time is held in float32.

        Args:
            points: the inputs of ``model`` at each point, by name.
            option: what leaves these rows out, for the message.

        Raises:
            UserError: images of one batch would get different rows.
        """
        shapes, rows = self.shapes, {}
        values = {name: list(arrays) for name, arrays in points.items()}
        (count,) = {len(arrays) for arrays in values.values()}
        last = {str(value.name): node for node in self.model.graph for value in node.inputs if value is not None}
        for node in self.model.graph:
            made = _computed(node, values, count)
            for name in made.keys() & shapes.keys():
                rows[name] = _one_row(name, np.stack(made[name]), shapes[name], option)
            values.update({name: arrays for name, arrays in made.items() if name in last})
            for name in [name for name in values if last.get(name) is node]:
                del values[name]
        return {name: rows[name] for name in shapes}

    def release(self) -> None:
        """Drop the weights."""
        for value in self.model.graph.initializers.values():
            value.const_value = None


@dataclass(frozen=True)
class Found:
    """What ``find_known`` found: the nodes, and the values that others take of them.

    nbytes: of the weights that no other node has. total: of all weights. rows: bytes of a row of each value of the
    frontier, at the largest sizes.
    """

    inside: frozenset[ir.Node]
    frontier: tuple[ir.Value, ...]
    timed: frozenset[ir.Value]
    weights: frozenset[ir.Value]
    freed: frozenset[ir.Value]
    nbytes: int
    total: int
    rows: Mapping[ir.Value, int]

    def row_bytes(self, timesteps: int) -> int:
        """Of the rows for so many timesteps."""
        return sum(self.rows[value] * (timesteps if value in self.timed else 1) for value in self.frontier)

    def saves(self, share: float, timesteps: int) -> bool:
        """Whether the weights, less the rows, are at least this share of all."""
        return bool(self.frontier) and self.nbytes - self.row_bytes(timesteps) >= share * self.total


def find_known(
    graph: ir.Graph, sources: Mapping[str, Source], for_all: ForAll | None = None, *, sizes: SizeRanges | None = None
) -> Found:
    """What depends on ``sources`` (inputs of the graph) alone, up to the last products on the way.

    What follows them (a reshape, an activation) is cheaper computed again than stored. No part of it is what would
    have to be known of every token for every timestep. for_all: leave out what cannot be computed so. sizes: where
    these are open (``NameDimensions`` went before), also what has a row for each image of an open batch.
    """
    open_batch = sizes is not None and not sizes.batch.is_static
    inside, behind = _inside(graph, sources, for_all, open_batch)
    frontier = tuple(value for node in graph if node in inside for value in node.outputs if _leaves(value, inside))
    weights = {value for node in inside for value in node.inputs if value is not None and value.is_initializer()}
    freed = {value for value in weights if all(user in inside for user, _ in value.uses())}
    timed = {value for value in frontier for node in [value.producer()] if node and Source.TIMESTEP in behind[node]}
    return Found(
        frozenset(inside),
        frontier,
        frozenset(timed),
        frozenset(weights),
        frozenset(freed),
        sum(nbytes_of(value) for value in freed),
        sum(nbytes_of(value) for value in graph.initializers.values()),
        {value: nbytes_of(value, sizes) for value in frontier},
    )


def take_out(
    model: ir.Model,
    found: Found,
    name_of: Callable[[str], str],
    images: int | None,
    *,
    half: int | None = None,
    expanded: bool = True,
) -> KnownPart:
    """Take what was found out of ``model``, which gets an input for each value.

    name_of: the input of the value that has this label. images: a value that has a row for each of so many images of a
    launch, all alike, becomes one row; None leaves all as they are; half: of a conditional-only launch, the same.
    expanded: its input in ``model`` is one row, too.
    """
    graph = model.graph
    made = _part(model, found, name_of, None if images is None else {images, half or images} - {1})
    rows = dict(zip(found.frontier, made.graph.outputs, strict=True))
    part = KnownPart(
        made,
        frozenset(str(rows[value].name) for value in found.timed),
        _parameters(found.freed),
        found.nbytes,
        found.nbytes / max(found.total, 1),
    )
    for value, row in rows.items():
        _replace(graph, value, str(row.name), row if expanded else value, found.inside)
    for node in reversed(list(graph)):
        if node in found.inside:
            graph.remove(node, safe=True)
    for value in found.weights:
        if not value.uses():
            graph.initializers.pop(str(value.name))
    graph.sort()
    return part


def _inside(
    graph: ir.Graph, sources: Mapping[str, Source], for_all: ForAll | None, open_batch: bool
) -> tuple[set[ir.Node], Mapping[ir.Node, Source]]:
    """Known nodes that a product at or behind them needs, and what every known node depends on."""
    outside: set[ir.Node] = set()
    while True:
        behind = _behind(graph, sources, for_all, open_batch, outside)
        needed: set[ir.Node] = set()
        for node in reversed(list(graph)):
            if node not in behind:
                continue
            users = {user for value in node.outputs for user, _ in value.uses()}
            if users & needed or (behind[node] and _multiplies(node, open_batch)):
                needed.add(node)
        needed = {node for node in needed if behind[node]}
        # What cannot be an input of a graph is made inside: its maker then takes a row.
        left = [(node, value) for node in needed for value in node.outputs if _leaves(value, needed)]
        stuck = {node for node, value in left if not _passable(value, open_batch)}
        if not stuck:
            return needed, behind
        outside |= stuck


def _behind(
    graph: ir.Graph,
    sources: Mapping[str, Source],
    for_all: ForAll | None,
    open_batch: bool,
    outside: set[ir.Node],
) -> dict[ir.Node, Source]:
    """What known nodes depend on; nothing: constants only."""
    behind: dict[ir.Node, Source] = {}
    for node in graph:
        if open_batch and _reads_batch(node):
            behind[node] = NOTHING
            continue
        read: list[Source | None] = []
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if value is None or value.is_initializer():
                read.append(NOTHING)
            else:
                read.append(sources.get(str(value.name)) if producer is None else behind.get(producer))
        if open_batch and any(_is_shape_of_latent(value) for value in node.inputs):
            continue  # another size
        known = [source for source in read if source is not None]
        if len(known) < len(read) or node in outside or any(value.is_graph_output() for value in node.outputs):
            continue
        together = NOTHING
        for source in known:
            together |= source
        timed = [place for place, source in enumerate(known) if Source.TIMESTEP in source]
        if timed and (Source.TOKENS in together or (for_all is not None and not for_all(node, timed))):
            continue
        behind[node] = together
    return behind


def _reads_batch(node: ir.Node) -> bool:
    """Whether a node reads the batch, and nothing else, off the shape of the latent, as ``ShapesFromSizes`` writes it.

    That is the entry of a shape; the shape itself is taken along.
    """
    first = node.inputs[0] if node.inputs else None
    if first is None:
        return False
    if _is_shape_of_latent(node.outputs[0]):
        return any(_reads_batch(user) for user, _ in node.outputs[0].uses())
    index = node.inputs[1] if node.op_type == "Gather" else None
    first_entry = index is not None and index.const_value is not None and index.const_value.numpy().tolist() == [0]
    return _is_shape_of_latent(first) and first_entry


def _is_shape_of_latent(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    return (
        node is not None and node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].is_graph_input()
    )


def _multiplies(node: ir.Node, open_batch: bool = True) -> bool:
    try:
        return node_macs(node) > 0
    except ValueError:  # open sizes
        return open_batch


def _leaves(value: ir.Value, inside: Collection[ir.Node]) -> bool:
    return any(user not in inside for user, _ in value.uses())


def _passable(value: ir.Value, open_batch: bool) -> bool:
    if value.shape is None or value.dtype is None or value.dtype.name not in PASSABLE:
        return False
    static = all(isinstance(extent, int) for extent in value.shape)
    return static or (open_batch and of_open_batch(value))


def of_open_batch(value: ir.Value) -> bool:
    """Whether the first extent of a value is an open batch, times a number, and the others are static."""
    from dipgo_deploy.export.passes import dimensions

    extents = dimensions.extents_of(value)
    if not extents or value.shape is None or len(extents) != len(value.shape):
        return False
    names = [name for term in extents[0] for name, _ in term.factors]
    others = all(isinstance(extent, int) for extent in list(value.shape)[1:])
    return len(extents[0]) == 1 and names == [BATCH] and others


def _part(model: ir.Model, found: Found, name_of: Callable[[str], str], images: Collection[int] | None) -> ir.Model:
    """The graph that computes the values; its outputs have the names and shapes of the rows. images: how many images
    values have rows of that become one; None: all stay as they are."""
    import onnx_ir as ir

    part = ir.convenience.extract(model.graph, list(model.graph.inputs), list(found.frontier))
    for value in [value for value in part.inputs if not value.uses()]:
        part.inputs.remove(value)
    names: set[str] = set()
    for value, output in zip(found.frontier, list(part.outputs), strict=True):
        name = name_of(_label(value))
        while name in names:
            name += "'"
        names.add(name)
        output.name = name
        assert value.shape is not None
        if images is not None and (of_open_batch(value) or value.shape[0] in images):
            output.shape = ir.Shape([1, *list(value.shape)[1:]])
    return ir.Model(part, ir_version=model.ir_version, producer_name="dipgo_deploy")


def _label(value: ir.Value) -> str:
    """What a table is called: the layer whose product it is, where one can be told, else the traced value."""
    node = value.producer()
    while node is not None and not _multiplies(node):
        sources = [source for source in node.inputs if source is not None and not source.is_initializer()]
        node = sources[0].producer() if len(sources) == 1 else None
    for source in () if node is None else node.inputs:
        stored = None if source is None or source.const_value is None else stored_parameter(source.const_value)
        if stored is not None:
            return stored.parameter.rpartition(".")[0] or stored.parameter
    return str(value.name)


def _parameters(values: Collection[ir.Value]) -> tuple[str, ...]:
    names: set[str] = set()
    for value in values:
        stored = None if value.const_value is None else stored_parameter(value.const_value)
        names.update(() if stored is None else (stored.parameter, *stored.equal))
    return tuple(sorted(names))


def _replace(graph: ir.Graph, value: ir.Value, name: str, row: ir.Value, inside: Collection[ir.Node]) -> None:
    """A new input in the place of ``value``, for all users that stay."""
    import onnx_ir as ir

    from dipgo_deploy.export.passes import dimensions
    from dipgo_deploy.export.passes.shapes import shape_vector

    made = ir.val(name, dtype=value.dtype, shape=row.shape)
    made.meta.update(value.meta)  # of open sizes
    graph.inputs.append(made)
    if row is not value and list(row.shape or ()) != list(value.shape or ()):
        if of_open_batch(value):
            latent = next(source for source in graph.inputs if source.name == LATENT)
            shape = shape_vector(graph, latent, dimensions.extents_of(value) or (), f"{name}/")
        else:
            shape = constant(graph, f"{name}/shape", np.array(extents_of(value), np.int64))
        node = ir.node("Expand", [made, shape], name=f"{name}/ForEachImage")
        prepend(graph, node)
        made = node.outputs[0]
        made.name, made.dtype, made.shape = f"{name}/images", value.dtype, value.shape
    for user, place in list(value.uses()):
        if user not in inside:
            user.replace_input_with(place, made)


def _computed(node: ir.Node, values: Mapping[str, list[np.ndarray]], count: int) -> dict[str, list[np.ndarray]]:
    """The outputs of a node at each point, in float32 where they are of a floating type."""
    from onnx.reference import ReferenceEvaluator

    steady = {
        str(value.name): _float32(value.const_value.numpy())
        for value in node.inputs
        if value is not None and value.const_value is not None
    }
    given = [str(value.name) for value in node.inputs if value is not None and str(value.name) not in steady]
    evaluator = ReferenceEvaluator(_in_float32(node))
    names = [str(value.name) for value in node.outputs]
    if not given:  # depends on nothing: the same at every point
        made = evaluator.run(None, steady)
        return {name: [array] * count for name, array in zip(names, made, strict=True)}
    if _is_linear(node, given) and all(values[given[0]][0].ndim >= 2 for _ in given):
        # All points at once: the weight is read once.
        rows = values[given[0]]
        (product,) = evaluator.run(None, {**steady, given[0]: np.concatenate(rows)})
        return {names[0]: np.split(product, count)}
    results: list[Any] = [
        evaluator.run(None, {**steady, **{name: values[name][at] for name in given}}) for at in range(count)
    ]
    return {name: [result[place] for result in results] for place, name in enumerate(names)}


def _is_linear(node: ir.Node, given: Sequence[str]) -> bool:
    """Whether each row of a node's first input is multiplied by a weight (K, N) for itself."""
    weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
    if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    plain = bias is None or (bias.const_value is not None and len(bias.const_value.shape) <= 1)
    first = node.inputs[0]
    alone = first is not None and given == [str(first.name)]
    return plain and alone and not node.attributes.get_int("transA", 0)


def _in_float32(node: ir.Node) -> Any:
    """A node as protobuf, with casts to half precision made casts to float32."""
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(node)
    half = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    for attribute in proto.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i in half:
            attribute.i = onnx.TensorProto.FLOAT
    return proto


def _float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array


def _one_row(name: str, values: np.ndarray, row: tuple[int, ...], option: str) -> np.ndarray:
    """``values`` (points, *value) with the shape of the row of the table."""
    if values.shape[1:] == row:
        return values
    first = values[:, :1]
    if not np.array_equal(np.broadcast_to(first, values.shape), values):
        raise UserError(f"{name}: has other values for each image, so that it is no table; {option}")
    return np.ascontiguousarray(first)  # no view: what it is of would stay


def extents_of(value: ir.Value) -> tuple[int, ...]:
    """The shape of a value, which is static."""
    assert value.shape is not None
    return tuple(int(extent) for extent in value.shape)


def nbytes_of(value: ir.Value, sizes: SizeRanges | None = None) -> int:
    """Bytes of a weight, or of a value, at the largest of ``sizes`` where its shape is not static."""
    if value.const_value is not None:
        return int(value.const_value.nbytes)
    assert value.dtype is not None
    shape = extents_of(value) if sizes is None else concrete(value, sizes.max)
    return int(np.prod(shape)) * int(value.dtype.itemsize)
