"""A part of a traced graph made to compute all timesteps at once: a leading axis through its nodes.

A weight is then read once, and its product is one for all timesteps. A node of a kind that has no rule here stays
where it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.export.latent import constant

if TYPE_CHECKING:
    import onnx_ir as ir

_ELEMENTWISE = frozenset(
    """
    Abs Add And Cast Ceil Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish
    Identity LeakyRelu Less LessOrEqual Log Max Min Mish Mod Mul Neg Not Or Pow Reciprocal Relu Round Sigmoid Sign Sin
    Softplus Sqrt Sub Tanh Where
    """.split()  # noqa: SIM905 - a word each is easier to read
)
# Inputs that hold axes, and the input or output whose rank they count in.
_AXES = {"Unsqueeze": (1, "output"), "Squeeze": (1, "input"), "Slice": (3, "input")}
_AXES |= dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2"), (1, "input"))
# Attributes that hold an axis, with its default.
_AXIS = {"Softmax": -1, "LogSoftmax": -1, "LayerNormalization": -1, "Split": 0, "Concat": None, "Gather": 0}


def for_all(node: ir.Node, timed: Collection[int]) -> bool:
    """Whether a node can be computed for all timesteps at once; timed: the places of its inputs that depend on them."""
    kind, first_alone = node.op_type, list(timed) == [0]
    if node.domain not in ("", "ai.onnx") or any(_rank(node.inputs[place]) is None for place in timed):
        return False
    if _rank(node.outputs[0]) is None:
        return False
    if kind in _ELEMENTWISE:
        return True
    if kind == "MatMul":
        return all((_rank(value) or 0) >= 2 for value in node.inputs)
    if kind == "Gemm":
        return first_alone and not node.attributes.get_int("transA", 0)
    if kind in ("Reshape", "Expand"):
        return first_alone
    if kind in _AXES:
        axes = _constant(node, _AXES[kind][0])
        return first_alone and axes is not None and axes.size > 0
    if kind == "Gather":
        axis = node.attributes.get_int("axis", 0)
        return first_alone or (list(timed) == [1] and axis == 0)
    if kind in ("Transpose", "Concat"):
        return True
    return kind in _AXIS and first_alone


def vectorise(graph: ir.Graph, rows: Mapping[str, np.ndarray]) -> None:
    """Give the values of a graph that depend on the inputs ``rows`` a leading axis, in place; these inputs become
    constants, each of its rows (timesteps, *input).

    Raises:
        ValueError: a node that ``for_all`` refuses.
    """
    (count,) = {len(values) for values in rows.values()} or {0}
    work = _Vectorised(graph, count)
    for value in list(graph.inputs):
        if str(value.name) in rows:
            work.fix(value, rows[str(value.name)])
    for node in list(graph):
        work.visit(node)
    for value in list(graph.initializers.values()):
        if not value.uses():
            graph.initializers.pop(str(value.name))
    graph.sort()


class _Vectorised:
    def __init__(self, graph: ir.Graph, count: int) -> None:
        self._graph = graph
        self._count = count
        self._ranks: dict[ir.Value, int] = {}  # of values with the leading axis, without it
        self._made = 0

    def fix(self, value: ir.Value, rows: np.ndarray) -> None:
        """An input becomes a constant with a row for each timestep."""
        assert value.dtype is not None and value.shape is not None
        self._graph.inputs.remove(value)
        made = constant(self._graph, f"prologue/{value.name}", rows.astype(value.dtype.numpy()))
        value.replace_all_uses_with(made)
        self._ranks[made] = len(value.shape)

    def visit(self, node: ir.Node) -> None:
        timed = [place for place, value in enumerate(node.inputs) if value in self._ranks]
        if not timed:
            return
        if not for_all(node, timed):
            raise ValueError(f"{node.name}: {node.op_type} cannot be computed for all timesteps at once")
        kind = node.op_type
        rank = _rank(node.outputs[0]) or 0
        if kind in _ELEMENTWISE or kind in ("MatMul", "Expand"):
            wide = max(rank, *map(self._rank_of, node.inputs)) if kind == "MatMul" else rank
            for place in timed:
                self._align(node, place, wide)
        if kind in ("Reshape", "Expand"):
            shape = _constant(node, 1)
            if shape is None:  # of open sizes
                self._before(node, 1, "Concat", [self._integers(node, [self._count]), node.inputs[1]], axis=0)
            else:
                node.replace_input_with(1, self._integers(node, [self._count, *shape.tolist()]))
        elif kind in _AXES:
            place, of = _AXES[kind]
            axes, within = _constant(node, place), rank
            assert axes is not None
            if of == "input":
                within = self._rank_of(node.inputs[0])
            node.replace_input_with(place, self._integers(node, [int(axis) % within + 1 for axis in axes]))
        elif kind == "Transpose":
            within = self._rank_of(node.inputs[0])
            order = node.attributes.get_ints("perm", list(reversed(range(within))))
            self._attribute(node, "perm", [0, *(axis + 1 for axis in order)])
        elif kind == "Concat":
            for place, value in enumerate(node.inputs):
                if place not in timed:
                    self._repeat(node, place, value)
            self._attribute(node, "axis", node.attributes.get_int("axis") % rank + 1)
        elif kind == "Gather" and timed == [1]:
            pass  # rows of a table for the indices of every timestep
        elif kind in _AXIS:
            axis = node.attributes.get_int("axis", _AXIS[kind])
            self._attribute(node, "axis", axis % self._rank_of(node.inputs[0]) + 1)
        elif kind == "Gemm":
            self._rows_alone(node)
            return
        for value in node.outputs:
            self._with_axis(value)

    def _with_axis(self, value: ir.Value) -> None:
        import onnx_ir as ir

        if value.shape is not None:
            self._ranks[value] = len(value.shape)
            value.shape = ir.Shape([self._count, *value.shape])

    def _rank_of(self, value: ir.Value | None) -> int:
        """Without the leading axis."""
        known = None if value is None else self._ranks.get(value)
        return (_rank(value) or 0) if known is None else known

    def _align(self, node: ir.Node, place: int, rank: int) -> None:
        """An input with fewer axes than another broadcasts from the right, so that the leading one has to stay."""
        value = node.inputs[place]
        missing = rank - self._rank_of(value)
        if missing > 0:
            axes = self._integers(node, list(range(1, missing + 1)))
            self._before(node, place, "Unsqueeze", [value, axes])

    def _repeat(self, node: ir.Node, place: int, value: ir.Value | None) -> None:
        """An input that is the same for all timesteps, once for each."""
        shape = self._integers(node, [self._count, *[1] * (_rank(value) or 0)])
        self._before(node, place, "Expand", [value, shape])

    def _rows_alone(self, node: ir.Node) -> None:
        """Gemm takes matrices: all rows of all timesteps are those of one."""
        import onnx_ir as ir

        first, out = node.inputs[0], node.outputs[0]
        assert first is not None and first.shape is not None and out.shape is not None
        flat = self._integers(node, [-1, int(first.shape[-1])])
        self._before(node, 0, "Reshape", [first, flat])
        back = self._integers(node, [self._count, -1, int(out.shape[-1])])
        uses = list(out.uses())
        shaped = ir.node("Reshape", [out, back], name=f"{node.name}/ForEachTimestep")
        made = shaped.outputs[0]
        made.dtype, made.shape = out.dtype, out.shape
        name, out.name = out.name, f"{out.name}/all"
        made.name = name
        self._graph.insert_after(node, shaped)
        for user, at in uses:
            user.replace_input_with(at, made)
        for at, value in enumerate(self._graph.outputs):
            if value is out:
                self._graph.outputs[at] = made
        out.shape = None
        self._with_axis(made)

    def _before(self, node: ir.Node, place: int, kind: str, inputs: Sequence[Any], **attributes: int) -> None:
        import onnx_ir as ir

        self._made += 1
        added = ir.node(kind, inputs, attributes=attributes or None, name=f"{node.name}/{kind}{self._made}")
        made = added.outputs[0]
        made.name, made.dtype = str(added.name), inputs[0].dtype
        self._graph.insert_before(node, added)
        node.replace_input_with(place, made)

    def _attribute(self, node: ir.Node, name: str, value: int | Sequence[int]) -> None:
        import onnx_ir as ir

        node.attributes[name] = ir.convenience.convert_attribute(name, value)

    def _integers(self, node: ir.Node, values: Sequence[int]) -> ir.Value:
        self._made += 1
        return constant(self._graph, f"prologue/{node.name}/{self._made}", np.array(values, np.int64))


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _constant(node: ir.Node, place: int) -> np.ndarray | None:
    """An input that is a constant of whole numbers; None for any other."""
    value = node.inputs[place] if place < len(node.inputs) else None
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy()).reshape(-1)
