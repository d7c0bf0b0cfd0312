"""What depends on the timestep alone, taken out of a traced graph and computed at export.

An engine directory fixes the timesteps of its launches. So everything that reads nothing but the timestep (its
embedding, and the scales, shifts and gates that are made of it) is known before the first launch: a table holds a row
of each such value for each timestep, and the weights that made it leave the graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.bundle.names import TIMESTEP, table_input
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.latent import constant, prepend
from dipgo_deploy.export.macs import node_macs
from dipgo_deploy.export.stored import stored_parameter
from dipgo_deploy.export.tensors import PASSABLE

if TYPE_CHECKING:
    import onnx_ir as ir

# Below this share of the weights tables are not the default: a LoRA can no longer change what they are made of.
WORTH_SHARE = 0.05


@dataclass(frozen=True)
class TimestepTables:
    """The part of a traced model that became tables.

    Attributes:
        model: timestep float32 (1,) -> the values, each named as the graphs' input that takes its place.
        parameters: the parameters that are in no graph any more.
        nbytes: of these weights.
        share: of the bytes of all weights.
    """

    model: ir.Model
    parameters: tuple[str, ...]
    nbytes: int
    share: float

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of a row, by name."""
        return {str(value.name): _extents(value) for value in self.model.graph.outputs}

    @property
    def row_bytes(self) -> int:
        """Of one row of all tables."""
        return sum(_nbytes(value) for value in self.model.graph.outputs)

    def rows(self, timesteps: Sequence[float]) -> dict[str, np.ndarray]:
        """The tables: float32 (timesteps, *row) by name.

        Computed in float32 whatever the type of the weights, one node after the other, so that only one weight at a
        time is held in float32.

        Raises:
            UserError: images of one batch would get different rows.
        """
        outputs = {str(value.name) for value in self.model.graph.outputs}
        values = {TIMESTEP: [np.array([timestep], np.float32) for timestep in timesteps]}
        last = {str(value.name): node for node in self.model.graph for value in node.inputs if value is not None}
        for node in self.model.graph:
            made = _computed(node, values, len(timesteps))
            values.update(made)
            for name in [name for name in values if last.get(name) is node and name not in outputs]:
                del values[name]
        return {name: _one_row(name, np.stack(values[name]), shape) for name, shape in self.shapes.items()}


def take_out_tables(model: ir.Model, images: int, *, always: bool) -> TimestepTables | None:
    """Take what depends on the timestep alone out of ``model``, which gets an input for each value; None, and nothing
    is changed, where there is nothing or (unless ``always``) where it is not worth it.

    Which part that is, is read off the graph: all that has no other input behind it, up to the last products on the
    way. What follows them (a reshape, an activation) is cheaper computed again than stored. A value that has a row for
    each of the ``images`` of a launch, all alike, becomes one row.
    """
    graph = model.graph
    inside = _inside(graph)
    frontier = [value for node in graph if node in inside for value in node.outputs if _leaves(value, inside)]
    if not frontier:
        return None
    weights = {value for node in inside for value in node.inputs if value is not None and value.is_initializer()}
    freed = {value for value in weights if all(user in inside for user, _ in value.uses())}
    total = sum(_nbytes(value) for value in graph.initializers.values())
    nbytes = sum(_nbytes(value) for value in freed)
    if not always and nbytes < WORTH_SHARE * total:
        return None
    tables = TimestepTables(_part(model, frontier, images), _parameters(freed), nbytes, nbytes / max(total, 1))
    for value, row in zip(frontier, list(tables.model.graph.outputs), strict=True):
        _replace(graph, value, str(row.name), _extents(row), inside)
    for node in reversed(list(graph)):
        if node in inside:
            graph.remove(node, safe=True)
    for value in weights:
        if not value.uses():
            graph.initializers.pop(str(value.name))
    graph.sort()
    return tables


def _inside(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that depend on the timestep alone and that a product at or behind them needs."""
    outside: set[ir.Node] = set()
    while True:
        steady, inside = _split(graph, outside)
        needed: set[ir.Node] = set()
        for node in reversed(list(graph)):
            users = {user for value in node.outputs for user, _ in value.uses()}
            if (node in inside and (_multiplies(node) or users & needed)) or (node in steady and users & needed):
                needed.add(node)
        needed &= inside
        # What cannot be an input of a graph is made inside: its maker then takes a table.
        stuck = {node for node in needed for value in node.outputs if _leaves(value, needed) and not _passable(value)}
        if not stuck:
            return needed
        outside |= stuck


def _split(graph: ir.Graph, outside: set[ir.Node]) -> tuple[set[ir.Node], set[ir.Node]]:
    """Nodes that depend on no input, and those that depend on the timestep alone."""
    steady: set[ir.Node] = set()
    inside: set[ir.Node] = set()
    for node in graph:
        sources = [value for value in node.inputs if value is not None and not value.is_initializer()]
        known = all(value.producer() in steady | inside or value.name == TIMESTEP for value in sources)
        if not known or node in outside or any(value.is_graph_output() for value in node.outputs):
            continue
        timed = any(value.name == TIMESTEP or value.producer() in inside for value in sources)
        (inside if timed else steady).add(node)
    return steady, inside


def _multiplies(node: ir.Node) -> bool:
    try:
        return node_macs(node) > 0
    except ValueError:  # open sizes: its result depends on them
        return False


def _leaves(value: ir.Value, inside: set[ir.Node]) -> bool:
    return any(user not in inside for user, _ in value.uses())


def _passable(value: ir.Value) -> bool:
    static = value.shape is not None and all(isinstance(extent, int) for extent in value.shape)
    return static and value.dtype is not None and value.dtype.name in PASSABLE


def _part(model: ir.Model, frontier: Sequence[ir.Value], images: int) -> ir.Model:
    """The graph that computes the tables; its outputs have the names and shapes of the rows."""
    import onnx_ir as ir

    timestep = next(value for value in model.graph.inputs if value.name == TIMESTEP)
    part = ir.convenience.extract(model.graph, [timestep], list(frontier))
    taken: set[str] = set()
    for value, output in zip(frontier, list(part.outputs), strict=True):
        name = table_input(_label(value))
        while name in taken:
            name += "'"
        taken.add(name)
        output.name = name
        extents = _extents(value)
        if images > 1 and extents[:1] == (images,):
            output.shape = ir.Shape([1, *extents[1:]])
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


def _parameters(values: set[ir.Value]) -> tuple[str, ...]:
    names: set[str] = set()
    for value in values:
        stored = None if value.const_value is None else stored_parameter(value.const_value)
        names.update(() if stored is None else (stored.parameter, *stored.equal))
    return tuple(sorted(names))


def _replace(graph: ir.Graph, value: ir.Value, name: str, row: tuple[int, ...], inside: set[ir.Node]) -> None:
    """A new input in the place of ``value``, for all users that stay."""
    import onnx_ir as ir

    made = ir.val(name, dtype=value.dtype, shape=ir.Shape(row))
    graph.inputs.append(made)
    extents = _extents(value)
    if row != extents:
        shape = constant(graph, f"{name}/shape", np.array(extents, np.int64))
        node = ir.node("Expand", [made, shape], name=f"{name}/ForEachImage")
        prepend(graph, node)
        made = node.outputs[0]
        made.name, made.dtype, made.shape = f"{name}/images", value.dtype, value.shape
    for user, place in list(value.uses()):
        if user not in inside:
            user.replace_input_with(place, made)


def _computed(node: ir.Node, values: Mapping[str, list[np.ndarray]], count: int) -> dict[str, list[np.ndarray]]:
    """The outputs of a node for each timestep, in float32 where they are of a floating type."""
    from onnx.reference import ReferenceEvaluator

    steady = {
        str(value.name): _float32(value.const_value.numpy())
        for value in node.inputs
        if value is not None and value.const_value is not None
    }
    given = [str(value.name) for value in node.inputs if value is not None and str(value.name) not in steady]
    evaluator = ReferenceEvaluator(_in_float32(node))
    names = [str(value.name) for value in node.outputs]
    if not given:  # depends on nothing: the same at every timestep
        made = evaluator.run(None, steady)
        return {name: [array] * count for name, array in zip(names, made, strict=True)}
    if _is_linear(node, given) and all(values[given[0]][0].ndim >= 2 for _ in given):
        # All timesteps at once: the weight is read once.
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


def _one_row(name: str, values: np.ndarray, row: tuple[int, ...]) -> np.ndarray:
    """``values`` (timesteps, *value) with the shape of the row of the table."""
    if values.shape[1:] == row:
        return values
    first = values[:, :1]
    if not np.array_equal(np.broadcast_to(first, values.shape), values):
        raise UserError(f"{name}: has other values for each image, so that it is no table; give --no-timestep-tables")
    return first


def _extents(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(extent) for extent in value.shape)


def _nbytes(value: ir.Value) -> int:
    if value.const_value is not None:
        return int(value.const_value.nbytes)
    assert value.dtype is not None
    return int(np.prod(_extents(value))) * int(value.dtype.itemsize)
