"""Where products round what they are given, and to which numbers: pairs of QuantizeLinear and DequantizeLinear.

For ``float8e4m3fn`` the form is that of NVIDIA's Model-Optimizer 0.47 (``modelopt/onnx/quantization/fp8.py`` and
``graph_utils.py``): what ``MatMul``, ``Gemm`` and ``Conv`` take is rounded, with one scale, the largest value over
448, and what they give is not; opset 21, for scales in fp16; products of fewer than 16 channels and convolutions with
filters of more than 32 places keep floats, because TensorRT has no kernels for them. It rounds sums and the products
within attention too, which stay here, and writes zeros. TensorRT has taken a scale for each channel of such a weight
since 10.6. TensorRT-RTX documents float8 for matrix products alone, of compute capability 8.9 or newer; it builds
convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dipgo_deploy.bundle.quantized import MATRIX_TYPES, NUMBER_TYPES, Method
from dipgo_deploy.export.quantized import weight_form

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Rounding:
    """What a type of numbers is good for.

    products: operators whose input is rounded. fused: arranged so that ONNX Runtime has kernels for it: each product
    has a rounding of its own (of one that several share its fast kernels, which are for uint8, cannot be made, and
    those for int8 are 70 times slower), what convolutions give is rounded too, of those that one node reads, and a
    bias has the axes of its product. least: channels in and out that a product needs. places: most of a convolution's
    filter; None: any.
    """

    products: tuple[str, ...]
    fused: bool
    least: int = 1
    places: int | None = None


ROUNDINGS: Mapping[str, Rounding] = {
    "int8": Rounding(("MatMul", "Conv"), fused=True),
    "float8e4m3fn": Rounding(("MatMul", "Gemm", "Conv"), fused=False, least=16, places=32),
}
"""By type of numbers."""


def activations(model: ir.Model, method: Method) -> tuple[str, ...]:
    """Names of the values that ``method`` rounds, in a graph whose weights are floats yet."""
    names: list[str] = []
    rounding = ROUNDINGS[MATRIX_TYPES[method]]
    for node in _products(model, rounding, method):
        names += [str(value.name) for value in _of_product(node, rounding)]
    return tuple(dict.fromkeys(names))


def _products(model: ir.Model, rounding: Rounding, in_floats: Method | None) -> list[ir.Node]:
    """Products with weights that are to be quantized (``in_floats``: how), or that are."""
    found = []
    for node in model.graph:
        if node.op_type not in rounding.products or node.domain or node.inputs[1] is None:
            continue
        weight = node.inputs[1]
        maker = weight.producer()
        if in_floats is not None:
            wanted = weight.is_initializer() and weight_form(weight, in_floats) is not None
        else:
            wanted = maker is not None and maker.op_type == "DequantizeLinear"
        if wanted and _suits(node, weight, rounding):
            found.append(node)
    return found


def _suits(node: ir.Node, weight: ir.Value, rounding: Rounding) -> bool:
    """Whether there are kernels of this type for a product."""
    assert weight.shape is not None
    shape = tuple(map(int, weight.shape))
    if min(shape[:2]) < rounding.least:
        return False
    if node.op_type != "Conv":
        return True
    few = rounding.places is None or math.prod(shape[2:]) <= rounding.places
    return few and (not rounding.fused or _has_one_reader(node.outputs[0]))


def _has_one_reader(value: ir.Value) -> bool:
    """ONNX Runtime 1.31 makes 8-bit convolutions only of those whose rounded output has one."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def _of_product(node: ir.Node, rounding: Rounding) -> list[ir.Value]:
    given = node.inputs[0]
    assert given is not None
    return [given, *(node.outputs if rounding.fused and node.op_type == "Conv" else ())]


def quantize_activations(model: ir.Model, peaks: Mapping[str, float], method: Method) -> None:
    """Put a QuantizeLinear and a DequantizeLinear where products with quantized weights read, and where convolutions
    give, if the method's ``Rounding`` says so.

    peaks: the largest absolute value of each. A product of which one is missing, never seen above 0 or not finite keeps
    floats. Scales are symmetrical, as TensorRT wants them.
    """
    graph, dtype = model.graph, MATRIX_TYPES[method]
    rounding = ROUNDINGS[dtype]
    shared: dict[ir.Value, ir.Value] = {}
    for node in _products(model, rounding, None):
        values = _of_product(node, rounding)
        if not all(0 < peaks.get(str(value.name), 0.0) < math.inf for value in values):
            continue
        given = values[0]
        if rounding.fused or given not in shared:
            shared[given] = _rounded(graph, given, peaks[str(given.name)], dtype, f"{node.name}/in", before=node)
        node.replace_input_with(0, shared[given])
        for made in values[1:]:
            users = list(made.uses())
            after = _rounded(graph, made, peaks[str(made.name)], dtype, f"{node.name}/out")
            for user, place in users:
                user.replace_input_with(place, after)
        if rounding.fused and node.op_type == "MatMul":
            _spread_bias(graph, node)


def _rounded(
    graph: ir.Graph, value: ir.Value, peak: float, dtype: str, name: str, before: ir.Node | None = None
) -> ir.Value:
    """A value after it was rounded to ``dtype``. peak: its largest. before: where the nodes go; None: behind what makes
    it."""
    import onnx_ir as ir

    assert value.dtype is not None
    kind = value.dtype.numpy()
    fused = ROUNDINGS[dtype].fused
    exact = np.float32(peak / NUMBER_TYPES[dtype].largest)
    scale = np.maximum(np.array(exact).astype(kind), np.finfo(kind).tiny)
    numbers = ir.DataType[dtype.upper()]
    # Without a zero the type is an attribute. A zero in float8 makes ONNX Runtime 1.31 drop a Relu in front.
    zeros = {"zero": np.array(0, numbers.numpy())} if fused else {}
    attributes = {} if fused else {"output_dtype": numbers.value}
    given = []
    for suffix, array in {"scale": scale, **zeros}.items():
        made = ir.Value(name=f"{name}_{suffix}", const_value=ir.tensor(array, name=f"{name}_{suffix}"))
        made.dtype, made.shape = made.const_value.dtype, ir.Shape([])
        graph.register_initializer(made)
        given.append(made)
    down = ir.node("QuantizeLinear", [value, *given], attributes=attributes, name=f"{name}/Quantize")
    up = ir.node("DequantizeLinear", [down.outputs[0], *given], name=f"{name}/Dequantize")
    for node, kind_after in ((down, numbers), (up, value.dtype)):
        made = node.outputs[0]
        made.name, made.dtype, made.shape = f"{node.name}:0", kind_after, value.shape
    maker = value.producer()
    if before is not None:
        graph.insert_before(before, [down, up])
    else:
        assert maker is not None
        graph.insert_after(maker, [down, up])
    return up.outputs[0]


def _spread_bias(graph: ir.Graph, product: ir.Node) -> None:
    """Give the bias behind a product as many axes as the product has: with one axis ONNX Runtime 1.31 makes a Gemm of
    both, and has no 8-bit kernel for that."""
    import onnx_ir as ir

    made = product.outputs[0]
    users = list(made.uses())
    if len(users) != 1 or users[0][0].op_type != "Add" or made.shape is None:
        return
    add, place = users[0]
    bias = add.inputs[1 - place]
    if bias is None or not bias.is_initializer() or bias.shape is None or len(bias.shape) != 1:
        return
    axes = ir.Value(
        name=f"{product.name}/bias_axes", const_value=ir.tensor(np.arange(len(made.shape) - 1, dtype=np.int64))
    )
    axes.dtype, axes.shape = ir.DataType.INT64, ir.Shape([len(made.shape) - 1])
    graph.register_initializer(axes)
    node = ir.node("Unsqueeze", [bias, axes], name=f"{product.name}/SpreadBias")
    node.outputs[0].name, node.outputs[0].dtype = f"{product.name}/bias", bias.dtype
    node.outputs[0].shape = ir.Shape([1] * (len(made.shape) - 1) + [bias.shape[0]])
    graph.insert_before(add, node)
    add.replace_input_with(1 - place, node.outputs[0])
