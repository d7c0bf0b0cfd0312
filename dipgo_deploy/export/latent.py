"""The denoiser's latent input, made inside the graph from the history."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dipgo_deploy.bundle.history import History
from dipgo_deploy.bundle.names import COEFFICIENTS, HISTORY, HISTORY_BEFORE
from dipgo_deploy.export.dynamic import SIZES

if TYPE_CHECKING:
    import onnx_ir as ir

LATENT = "latent"


def latent_from_history(part: ir.Graph, latent: ir.Value, layout: History) -> list[ir.Value]:
    """Put the sum of the history in the place of ``latent``, an input of ``part``; the inputs that it takes then.

    ``stack`` float32 (slots, B, C, h, w) and ``coefficients`` float32 (slots,), see ``bundle.history``; the first alone
    where only the sizes of the latent are used. Where all slots are of the chain ``stack_before``, too: the slot before
    each, the same memory one slot earlier, so that one node makes the differences. All in float32, whatever the dtype
    of the model.
    """
    import onnx_ir as ir

    assert latent.shape is not None
    slots = layout.slots
    extents = [extent if isinstance(extent, int) else str(extent.value) for extent in latent.shape]
    static = [extent for extent in extents if isinstance(extent, int)]
    history = ir.val(HISTORY, dtype=ir.DataType.FLOAT, shape=ir.Shape([slots, *extents]))
    coefficients = ir.val(COEFFICIENTS, dtype=ir.DataType.FLOAT, shape=ir.Shape([slots]))
    if len(static) == len(extents):
        size: int | None = int(np.prod(static))
        latent_shape = constant(part, "latent_shape", _integers(static))
    else:
        size = None
        latent_shape = _sizes_from_history(part, latent, history, len(extents))
        if not latent.uses():
            return [history]
    before = ir.val(HISTORY_BEFORE, dtype=ir.DataType.FLOAT, shape=history.shape)
    nodes: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value], name: str, shape: list[int | str | None], **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=f"latent/{name}")
        node.outputs[0].dtype = ir.DataType.FLOAT
        node.outputs[0].shape = ir.Shape(shape)
        node.outputs[0].name = str(node.name)
        nodes.append(node)
        return node.outputs[0]

    chained = slots == layout.chain > 1
    rows = add("Sub", [history, before], "Differences", [slots, *extents]) if chained else history
    flat = add("Reshape", [rows, constant(part, "stack_shape", _integers([slots, -1]))], "Flatten", [slots, size])
    terms = flat if chained else _terms(part, flat, layout, size, add)
    total = add("MatMul", [coefficients, terms], "WeightedSum", [size])
    shaped = add("Reshape", [total, latent_shape], "Shape", list(extents))
    latent.name = "latent/input"
    latent.replace_all_uses_with(shaped)
    for node in reversed(nodes):
        prepend(part, node)
    return [history, before, coefficients] if chained else [history, coefficients]


def _terms(part: ir.Graph, flat: ir.Value, layout: History, size: int | None, add: Callable[..., ir.Value]) -> ir.Value:
    """What the coefficients belong to, (slots, size): the first slot, differences along the chain, what is behind."""
    slots, chain = layout.slots, layout.chain
    if chain == 1:
        return flat
    axis = constant(part, "slots_axis", _integers([0]))
    places = sorted({0, 1, chain - 1, chain, slots})
    bounds = {place: constant(part, f"slot_{place}", _integers([place])) for place in places}

    def rows(first: int, end: int) -> ir.Value:
        return add("Slice", [flat, bounds[first], bounds[end], axis], f"Slots{first}To{end}", [end - first, size])

    first = rows(0, 1)
    earlier = first if chain == 2 else rows(0, chain - 1)
    differences = add("Sub", [rows(1, chain), earlier], "Differences", [chain - 1, size])
    return add("Concat", [first, differences, rows(chain, slots)], "Terms", [slots, size], axis=0)


def constant(part: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    """A constant of a graph."""
    import onnx_ir as ir

    tensor = ir.tensor(values, name=name)
    made = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    part.register_initializer(made)
    return made


def _integers(values: list[int]) -> np.ndarray:
    return np.array(values, np.int64)


def _sizes_from_history(part: ir.Graph, latent: ir.Value, history: ir.Value, rank: int) -> ir.Value:
    """The latent's shape, where it is open, read off the history, for all who read it off the latent."""
    import onnx_ir as ir

    read = ir.node("Shape", [history], attributes={"start": 1}, name=SIZES)
    for node in [user for user, _ in latent.uses() if user.op_type == "Shape"]:
        node.outputs[0].replace_all_uses_with(read.outputs[0])
        part.remove(node, safe=True)
    read.outputs[0].name = SIZES
    read.outputs[0].dtype = ir.DataType.INT64
    read.outputs[0].shape = ir.Shape([rank])
    prepend(part, read)
    return read.outputs[0]


def prepend(part: ir.Graph, node: ir.Node) -> None:
    """Put a node in front; ``Graph.sort`` moves it to where its inputs are known."""
    first = next(iter(part), None)
    if first is None:
        part.append(node)
    else:
        part.insert_before(first, node)
