"""Empty tensors that are filled by their even and odd elements, as the stack that they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_END = 2**63 - 1


def stack_interleaved(program: ExportedProgram) -> int:
    """``out = empty_like(x); out[..., 0::n] = a; out[..., 1::n] = b; ...`` becomes a stack and a reshape; how many did.

    Wan's rotary embeddings are written so. The exporter makes a ScatterND of each assignment, with a constant
    as large as the tensor and its transposes around it.
    """
    import torch

    aten = torch.ops.aten
    changed = 0
    for node in list(program.graph.nodes):
        if node.op != "call_function" or node.target not in (aten.empty_like.default, aten.empty.memory_format):
            continue
        found = _assignments(node)
        if found is None:
            continue
        dim, values, used = found
        shape = list(node.meta["val"].shape)
        if not used or not all(isinstance(extent, int) for extent in shape):
            continue
        first = min(used, key=list(program.graph.nodes).index)
        with program.graph.inserting_before(first):
            stacked = program.graph.call_function(aten.stack.default, (values, dim + 1))
            filled = program.graph.call_function(aten.reshape.default, (stacked, shape))
        stacked.meta["val"] = torch.stack([value.meta["val"] for value in values], dim + 1)
        filled.meta["val"] = stacked.meta["val"].reshape(shape)
        for user in used:
            user.replace_input_with(node, filled)
        for part in list(node.users):
            for copy in list(part.users):
                program.graph.erase_node(copy)
            program.graph.erase_node(part)
        program.graph.erase_node(node)
        changed += 1
    if changed:
        program.graph_module.recompile()
    return changed


def _assignments(node: Any) -> tuple[int, list[Any], list[Any]] | None:
    """The dimension that is filled, what it is filled with in turn, and what reads the whole; None where slices do not
    fill all of the tensor, or not with its own dtype and their own shape."""
    import torch

    aten = torch.ops.aten
    own = node.meta["val"]
    values: dict[int, Any] = {}
    used, places = [], set()
    for user in node.users:
        copies = list(user.users)
        written = user.target == aten.slice.Tensor and [copy.target for copy in copies] == [aten.copy_.default]
        if not written or copies[0].users:
            used.append(user)
            continue
        if len(user.args) < 5:  # the whole of it, or one piece
            return None
        _, dim, start, end, step = user.args
        value = copies[0].args[1]
        if end != _END or value.meta["val"].shape != user.meta["val"].shape or value.meta["val"].dtype != own.dtype:
            return None
        values[int(start)] = value
        places.add((dim % own.ndim, step))
    if len(places) != 1:
        return None
    dim, step = places.pop()
    if sorted(values) != list(range(step)) or own.shape[dim] % step:
        return None
    return dim, [values[start] for start in range(step)], used
