"""Weights of written graphs in 8 or 4 bits: each once, in the file that all share, and made floats where it is used.

The form is ONNX's own, ``DequantizeLinear`` in front of the product: ONNX Runtime makes ``MatMulNBits`` of it where
numbers are whole, and TensorRT reads it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dipgo_deploy.bundle.manifest import QuantizationEntry
from dipgo_deploy.bundle.quantized import (
    MATRIX_TYPES,
    NUMBER_TYPES,
    Method,
    Quantized,
    largest,
    scale_shape,
    to_numbers,
)
from dipgo_deploy.export.stored import note_parameter, stored_parameter

if TYPE_CHECKING:
    import onnx_ir as ir

# Values in a weight; smaller ones save nothing worth an operation.
SMALLEST = 1024
# Inputs that share a scale in 4 bits: what both ONNX Runtime and TensorRT have kernels for.
BLOCK = 64
# Types that have a scale for each block of inputs -> the type of what does not divide into such blocks.
_FOR_ALL = {"int4": "int8"}
_PRODUCTS = {"MatMul": 2, "Gemm": 2, "Conv": None}  # axes of a weight


@dataclass(frozen=True)
class _Form:
    """How a weight is kept. transposed: its two axes are exchanged first. axis, block: as ``Quantized`` has them."""

    dtype: str
    axis: int
    block: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Source:
    """Makes the scales or the numbers of a weight when they are asked for; the weight stays where it is."""

    weight: ir.TensorProtocol
    form: _Form
    scales: bool

    def __call__(self) -> ir.TensorProtocol:
        """Read the weight, and make them."""
        import onnx_ir as ir

        given = self.weight.numpy()
        values = np.ascontiguousarray(given.astype(np.float32, copy=False))
        if self.form.transposed:
            values = np.ascontiguousarray(values.T)
        scale = _scale(values, given.dtype, self.form)
        if self.scales:
            return ir.tensor(scale, dtype=self.weight.dtype)
        numbers = to_numbers(values, scale.astype(np.float32), self.form.dtype, self.form.axis, self.form.block)
        return ir.tensor(numbers.astype(ir.DataType[self.form.dtype.upper()].numpy(), copy=False))


def _scale(values: np.ndarray, dtype: np.dtype, form: _Form) -> np.ndarray:
    """The scales in the graphs' type, rounded up, so that no value lies further from its number than half of one."""
    import ml_dtypes

    limits = ml_dtypes.finfo(dtype)
    exact = largest(values, form.axis, form.block) / np.float32(NUMBER_TYPES[form.dtype].largest)
    return np.maximum(exact * np.float32(1 + float(limits.eps)), np.float32(limits.tiny)).astype(dtype)


Made = dict[tuple[str, "_Form"], tuple["ir.TensorProtocol", "ir.TensorProtocol"]]


def quantize_weights(
    graphs: Sequence[ir.Model],
    method: Method,
    stays: Callable[[str], bool] = lambda parameter: False,
    made: Made | None = None,
) -> QuantizationEntry:
    """Replace the weights of products in ``graphs`` by numbers in fewer bits, and say what was done.

    int8, float8: a scale for each output channel. int4: a scale for ``BLOCK`` inputs of a channel, of matrix products
    whose inputs are that many or a multiple; the others, and convolutions, are in int8. The weight of a product that
    something else has too, or that is no parameter of the model, stays as it is, and is named; so do weights
    below ``SMALLEST`` values.

    graphs: cut from one model, so that equal names are equal tensors. stays: parameters that stay as they are. made:
    numbers and scales that are there already; gets those that are new.
    """
    made = {} if made is None else made
    used: set[tuple[str, _Form]] = set()
    kept: set[str] = set()
    before: dict[str, int] = {}
    for model in graphs:
        graph = model.graph
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or value.dtype is None or not value.dtype.is_floating_point() or tensor.size < SMALLEST:
                continue
            form = weight_form(value, method)
            stored = stored_parameter(tensor)
            if form is None or stored is None or stays(stored.parameter):
                if any(node.op_type in _PRODUCTS for node, _ in value.uses()):
                    kept.add(name)
                continue
            if (name, form) not in made:
                made[name, form] = _made(tensor, name, form)
            used.add((name, form))
            before[name] = int(tensor.nbytes)
            _replace(model, value, form, *made[name, form])
        _raise_opset(model)
    after = sum(int(tensor.nbytes) for key in used for tensor in made[key])
    return QuantizationEntry(
        method=method,
        block_size=BLOCK if MATRIX_TYPES[method] in _FOR_ALL else None,
        weights=len(before),
        bytes_before=sum(before.values()),
        bytes_after=after,
        kept=tuple(sorted(kept - before.keys())),
    )


def weight_form(value: ir.Value, method: Method) -> _Form | None:
    """How a weight is kept; None: as it is."""
    tensor = value.const_value
    if tensor is None or value.dtype is None or not value.dtype.is_floating_point() or tensor.size < SMALLEST:
        return None
    if value.is_graph_output() or stored_parameter(tensor) is None or value.shape is None:
        return None
    forms = {_form_in(node, place, tuple(map(int, value.shape)), method) for node, place in value.uses()}
    return forms.pop() if len(forms) == 1 else None


def _form_in(node: ir.Node, place: int, shape: tuple[int, ...], method: Method) -> _Form | None:
    """For one use of a weight."""
    axes = _PRODUCTS.get(node.op_type, 0) if node.domain == "" and place == 1 else 0
    dtype = MATRIX_TYPES[method]
    if axes is None:
        return _Form(_FOR_ALL.get(dtype, dtype), axis=0)
    if axes != len(shape):
        return None
    transposed = bool(node.attributes.get_int("transB", 0))
    inputs = shape[1] if transposed else shape[0]
    if dtype in _FOR_ALL and inputs % BLOCK == 0:
        return _Form(dtype, axis=0, block=BLOCK, transposed=transposed)
    return _Form(_FOR_ALL.get(dtype, dtype), axis=1, transposed=transposed)


def _made(tensor: ir.TensorProtocol, name: str, form: _Form) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
    """Numbers and scales of a weight, made when they are written."""
    import onnx_ir as ir

    shape = tuple(map(int, tensor.shape))
    shape = shape[::-1] if form.transposed else shape
    dtype = ir.DataType[form.dtype.upper()]
    suffix = f"{form.dtype}{'.T' if form.transposed else ''}"
    scales = ir.LazyTensor(
        Source(tensor, form, scales=True),
        dtype=tensor.dtype,
        shape=ir.Shape(scale_shape(shape, form.axis, form.block)),
        name=f"{name}.{suffix}.scale",
    )
    numbers = ir.LazyTensor(
        Source(tensor, form, scales=False), dtype=dtype, shape=ir.Shape(shape), name=f"{name}.{suffix}"
    )
    stored = stored_parameter(tensor)
    assert stored is not None  # no other is quantised
    quantized = Quantized(scale=str(scales.name), axis=form.axis, block=form.block)
    note_parameter(numbers, replace(stored, transposed=stored.transposed != form.transposed, quantized=quantized))
    return numbers, scales


def _replace(
    model: ir.Model, value: ir.Value, form: _Form, numbers: ir.TensorProtocol, scales: ir.TensorProtocol
) -> None:
    """Put a dequantized weight in the place of ``value``."""
    import onnx_ir as ir

    graph, users = model.graph, list(value.uses())
    inputs = []
    for tensor in (numbers, scales):
        made = ir.Value(name=str(tensor.name), const_value=tensor)
        made.dtype, made.shape = tensor.dtype, ir.Shape(tensor.shape)
        graph.register_initializer(made)
        inputs.append(made)
    attributes = {"axis": form.axis} | ({} if form.block is None else {"block_size": form.block})
    node = ir.node("DequantizeLinear", inputs, attributes=attributes, name=f"{numbers.name}/Dequantize")
    weight = node.outputs[0]
    weight.name, weight.dtype, weight.shape = f"{numbers.name}:dequantized", value.dtype, ir.Shape(numbers.shape)
    first = next(node for node in graph if any(node is user for user, _ in users))
    graph.insert_before(first, node)
    for user, place in users:
        user.replace_input_with(place, weight)
        if form.transposed:
            user.attributes["transB"] = ir.AttrInt64("transB", 0)
    del graph.initializers[str(value.name)]


def _raise_opset(model: ir.Model) -> None:
    """To the one that has all types of the graph. What changed with it of the graphs' operators is new types alone."""
    version = model.graph.opset_imports[""]
    kinds = (NUMBER_TYPES.get(value.dtype.name.lower()) for value in model.graph.initializers.values() if value.dtype)
    needed = max((kind.opset for kind in kinds if kind is not None and kind.opset is not None), default=version)
    if version < needed:
        changed = [node.name for node in model.graph if node.op_type == "GroupNormalization"]
        if changed:  # whose scales changed their shape
            raise ValueError(f"{changed[0]}: GroupNormalization of opset {version}")
        model.graph.opset_imports[""] = needed
