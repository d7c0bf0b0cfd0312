"""Traces with open sizes: what torch is told of them, and what a traced graph costs at some.

In the graph torch's symbols become expressions over batch, height and width (``passes.dimensions``), and shapes are
computed from those three alone, so that no value depends on another one only for its shape (``passes.shapes``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.shapes import BATCH, HEIGHT, WIDTH, Dim, SizeRanges, Sizes, evaluate_shape
from dipgo_deploy.export.macs import node_macs

if TYPE_CHECKING:
    import onnx_ir as ir

# Axes of the latent (B, C, h, w), and of images (B, H, W, 3).
AXES = {BATCH: 0, HEIGHT: 2, WIDTH: 3}
IMAGE_AXES = {BATCH: 0, HEIGHT: 1, WIDTH: 2}
SIZES = "latent/Sizes"
_SMALL = 256  # bytes; shapes and axes
_LEAST_MOST = 3


def example_sizes(ranges: SizeRanges) -> Sizes:
    """Small sizes inside the ranges for a trace: open ones differ from each other and are no single unit, because
    torch takes equal extents for one and an extent of 1 for a constant."""
    found: dict[str, int] = {}
    units: list[int] = []
    for name in (BATCH, HEIGHT, WIDTH):
        allowed = getattr(ranges, name)
        value = allowed.min
        while not allowed.is_static and value < allowed.max and (value == allowed.multiple or value in units):
            value += allowed.multiple
        units.append(value)
        found[name] = value
    return Sizes(**found)


class Dimensions:
    """torch's dimensions of the open sizes. Those of one instance are equal wherever they occur in one trace."""

    def __init__(self, ranges: SizeRanges) -> None:
        import torch

        self._dims: dict[str, Any] = {}
        for name in (BATCH, HEIGHT, WIDTH):
            allowed = getattr(ranges, name)
            if allowed.is_static:
                continue
            step = allowed.multiple
            # torch takes an extent of 1 for a constant, which leaves one value of 1 to 2: it would trace for 2 alone.
            most = max(allowed.max // step, _LEAST_MOST)
            unit = torch.export.Dim(name, min=allowed.min // step, max=most)
            self._dims[name] = step * unit if step > 1 else unit

    @property
    def latent(self) -> dict[int, Any]:
        """Of (B, C, h, w), by axis."""
        return {AXES[name]: dim for name, dim in self._dims.items()}

    def images(self, pixels: int) -> dict[int, Any]:
        """Of images (B, H, W, 3) of so many pixels to one of the latent, by axis."""
        return {IMAGE_AXES[name]: dim if name == BATCH else pixels * dim for name, dim in self._dims.items()}

    def of(self, dims: Sequence[Dim | float]) -> dict[int, Any]:
        """Of a shape of numbers and whole multiples of sizes, by axis."""
        found = {}
        for axis, dim in enumerate(dims):
            if isinstance(dim, str):
                factor, _, name = dim.rpartition("*")
                found[axis] = int(factor) * self._dims[name] if factor else self._dims[name]
        return found


def macs_at(model: ir.Model, sizes: Sizes) -> tuple[int, ...]:
    """Multiply-accumulates of each node at ``sizes``, in the order of the graph; see ``node_macs``."""
    import onnx
    import onnx_ir as ir
    from onnxscript import optimizer

    graph = onnx.GraphProto(name="costs")
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        tensor = value.const_value
        if tensor is not None and tensor.nbytes <= _SMALL:
            graph.initializer.append(ir.serde.serialize_tensor(tensor))
            graph.initializer[-1].name = str(value.name)
            continue
        graph.input.append(_fixed(value, sizes))  # only its shape counts, so weights stay where they are
    # The known ones are given: shape inference does not see through every node (bf16's GroupNormalization).
    known = [value for node in model.graph for value in node.outputs if _known(value) is not None]
    graph.value_info.extend(_fixed(value, sizes) for value in known)
    graph.node.extend(ir.serde.serialize_node(node) for node in model.graph)
    graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in model.graph.outputs)
    opsets = [onnx.OperatorSetIdProto(domain=d, version=v) for d, v in model.graph.opset_imports.items()]
    shaped = ir.serde.deserialize_model(onnx.ModelProto(ir_version=model.ir_version, graph=graph, opset_import=opsets))
    optimizer.fold_constants(shaped, onnx_shape_inference=True)
    costs = {node.name: node_macs(node) for node in shaped.graph}
    return tuple(costs.get(node.name, 0) for node in model.graph)


def _fixed(value: ir.Value, sizes: Sizes) -> Any:
    """The value's ``onnx.ValueInfoProto`` at ``sizes``."""
    import onnx_ir as ir

    return ir.serde.serialize_value(ir.Value(name=value.name, type=value.type, shape=ir.Shape(concrete(value, sizes))))


def concrete(value: ir.Value, sizes: Sizes) -> tuple[int, ...]:
    """The shape of a named value at ``sizes``."""
    dims = _known(value)
    if dims is None:
        raise ValueError(f"the shape of {value.name} is not known: {value.shape}")
    return evaluate_shape(dims, sizes)


def _known(value: ir.Value | None) -> tuple[Dim, ...] | None:
    if value is None or value.shape is None:
        return None
    dims = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
    return None if None in dims else dims
