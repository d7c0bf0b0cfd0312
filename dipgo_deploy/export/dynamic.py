"""Traces with open sizes: torch's symbols become expressions over batch, height and width, and shape computations start
from those three alone, so that no value depends on another one only for its shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.bundle.shapes import BATCH, HEIGHT, WIDTH, Dim, SizeRanges, Sizes, evaluate_shape
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.macs import node_macs

if TYPE_CHECKING:
    import onnx_ir as ir

# Axes of the latent (B, C, h, w).
AXES = {BATCH: 0, HEIGHT: 2, WIDTH: 3}
SIZES = "latent/Sizes"
_SMALL = 256  # bytes; shapes and axes


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
            unit = torch.export.Dim(name, min=allowed.min // step, max=allowed.max // step)
            self._dims[name] = step * unit if step > 1 else unit

    @property
    def latent(self) -> dict[int, Any]:
        """Of (B, C, h, w), by axis."""
        return {AXES[name]: dim for name, dim in self._dims.items()}

    def rows(self, per_image: int) -> dict[int, Any]:
        """Of (per_image * B, ...), by axis."""
        return {0: per_image * self._dims[BATCH] if per_image > 1 else self._dims[BATCH]} if self.open_batch else {}

    @property
    def open_batch(self) -> bool:
        """Whether the batch is open."""
        return BATCH in self._dims


@dataclass(frozen=True)
class _Term:
    """``coefficient`` times the product of ``name // divisor``."""

    coefficient: int
    factors: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        parts = [name if divisor == 1 else f"({name}//{divisor})" for name, divisor in self.factors]
        if self.coefficient != 1 or not parts:
            parts.insert(0, str(self.coefficient))
        return "*".join(parts)


_Extent = tuple[_Term, ...]


def name_dimensions(model: ir.Model, latent: str, ranges: SizeRanges) -> None:
    """Give every dimension that torch named after its own symbols its expression over the sizes, in place.

    What cannot be told (a dimension that the exporter does not know) stays unnamed.

    Raises:
        UserError: an input or output whose shape is no such expression.
    """
    import onnx_ir as ir

    reader = _reader(model, latent, ranges)
    for value in ir.convenience.create_value_mapping(model.graph).values():
        if value.shape is None:
            continue
        dims = [d if isinstance(d, int) else _render(reader.read(d.value)) for d in value.shape]
        value.shape = ir.Shape(dims)
        if (value.is_graph_input() or value.is_graph_output()) and None in dims:
            raise UserError(f"{value.name}: its shape is no expression of batch, height and width; give plain numbers")


def shapes_from_sizes(model: ir.Model, latent: str) -> None:
    """Compute what ``Shape`` nodes give from the sizes of the input ``latent``, in place (after ``name_dimensions``).

    A value that is reshaped to the shape of another one would otherwise depend on it: cutting the graph there would
    keep, or compute, that other one.
    """
    graph = model.graph
    nodes = [node for node in graph if node.op_type == "Shape" and _known(node.inputs[0]) is not None]
    if not nodes:
        return
    source = next(value for value in graph.inputs if value.name == latent)
    build = _Builder(graph, source)
    for node in nodes:
        dims = _known(node.inputs[0])
        assert dims is not None
        start, end = (node.attributes.get(name) for name in ("start", "end"))
        wanted = dims[slice(start.as_int() if start else 0, end.as_int() if end else None)]
        old = node.outputs[0]
        old.replace_all_uses_with(build.vector(wanted))
        graph.remove(node, safe=True)
    graph.sort()


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


class _Reader:
    """torch's expressions over its symbols -> terms over the sizes.

    symbols: size and multiple by torch's symbol, which counts in those multiples.
    """

    def __init__(self, symbols: Mapping[str, tuple[str, int]]) -> None:
        self._symbols = symbols

    def read(self, text: str | None) -> _Extent | None:
        """The terms; None for what is not known or no polynomial with whole coefficients."""
        import sympy  # type: ignore[import-untyped]

        if text is None:
            return None
        names = {name: sympy.Symbol(name, integer=True, positive=True) for name in self._symbols}
        try:
            polynomial = sympy.Poly(sympy.sympify(text, locals=names), *names.values())
        except (sympy.PolynomialError, sympy.SympifyError, TypeError):
            return None
        terms = []
        for powers, coefficient in polynomial.terms():
            if not coefficient.is_Integer:
                return None
            units = [unit for unit, power in zip(self._symbols.values(), powers, strict=True) for _ in range(power)]
            terms.append(_term(int(coefficient), units))
        return tuple(terms)


def _reader(model: ir.Model, latent: str, ranges: SizeRanges) -> _Reader:
    source = next(value for value in model.graph.inputs if value.name == latent)
    assert source.shape is not None
    symbols: dict[str, tuple[str, int]] = {}
    for name, axis in AXES.items():
        allowed = getattr(ranges, name)
        if allowed.is_static:
            continue
        dim = source.shape[axis]
        text = "" if isinstance(dim, int) else str(dim.value)
        symbol = text.removeprefix(f"{allowed.multiple}*")
        if not symbol.isidentifier():
            raise UserError(f"{name}: the exporter made it {dim}, which cannot vary; give a plain number")
        symbols[symbol] = (name, allowed.multiple)
    return _Reader(symbols)


def _term(coefficient: int, units: Sequence[tuple[str, int]]) -> _Term:
    """``coefficient`` times the product of ``name // multiple``, with as much of it as goes put into the divisors."""
    divisors = [multiple for _, multiple in units]
    left = coefficient
    while left:
        # The largest divisor first, by its smallest prime: 4 * (h//8) * (w//8) is (h//4) * (w//4).
        place = max(range(len(divisors)), key=divisors.__getitem__, default=None)
        if place is None or divisors[place] == 1:
            break
        prime = next(p for p in range(2, divisors[place] + 1) if divisors[place] % p == 0)
        if left % prime:
            break
        left //= prime
        divisors[place] //= prime
    factors = tuple((name, divisor) for (name, _), divisor in zip(units, divisors, strict=True))
    return _Term(left, tuple(sorted(factors)))


def _render(extent: _Extent | None) -> Dim | None:
    if extent is None:
        return None
    if all(not term.factors for term in extent):
        return sum(term.coefficient for term in extent)
    return " + ".join(map(str, extent)).replace("+ -", "- ")


class _Builder:
    """Nodes that compute shapes from the shape of one graph input; each expression once."""

    def __init__(self, graph: ir.Graph, source: ir.Value) -> None:

        self._graph = graph
        self._made: dict[str, ir.Value] = {}
        self._sizes = self._node("Shape", [source], SIZES, 4)

    def vector(self, dims: Sequence[Dim]) -> ir.Value:
        """int64 (len(dims),)."""
        if all(isinstance(dim, int) for dim in dims):
            return self._constant([int(dim) for dim in dims])
        key = "shape/" + "x".join(map(str, dims))
        if key not in self._made:
            parts = [self._constant([dim]) if isinstance(dim, int) else self._expression(dim) for dim in dims]
            self._made[key] = parts[0] if len(parts) == 1 else self._node("Concat", parts, key, len(parts), axis=0)
        return self._made[key]

    def _expression(self, text: str) -> ir.Value:
        """Of terms as ``_Term`` writes them: sums of products of whole numbers, names and ``(name//divisor)``."""
        terms = text.replace("- ", "+ -").split(" + ")
        return self._folded("Add", " + ", [(term, self._product(term)) for term in terms])

    def _product(self, term: str) -> ir.Value:
        factors = [factor.strip() for factor in term.split("*")]
        return self._folded("Mul", "*", [(factor, self._factor(factor)) for factor in factors])

    def _folded(self, operator: str, sign: str, parts: Sequence[tuple[str, ir.Value]]) -> ir.Value:
        """The parts from left to right under ``operator``; what several expressions begin with is one node."""
        text, total = parts[0]
        for part, value in parts[1:]:
            text = f"{text}{sign}{part}"
            key = f"size/{text}"
            if key not in self._made:
                self._made[key] = self._node(operator, [total, value], key, 1)
            total = self._made[key]
        return total

    def _factor(self, text: str) -> ir.Value:
        if text.lstrip("-").isdecimal():
            return self._constant([int(text)])
        name, _, divisor = text.strip("()").partition("//")
        key = f"size/{name}"
        if key not in self._made:
            self._made[key] = self._node("Gather", [self._sizes, self._constant([AXES[name]])], key, 1, axis=0)
        if not divisor:
            return self._made[key]
        part = f"size/{text}"
        if part not in self._made:
            self._made[part] = self._node("Div", [self._made[key], self._constant([int(divisor)])], part, 1)
        return self._made[part]

    def _constant(self, values: Sequence[int]) -> ir.Value:
        import onnx_ir as ir

        name = "const/" + "x".join(map(str, values))
        if name not in self._made:
            tensor = ir.tensor(np.array(values, np.int64), name=name)
            value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
            self._graph.register_initializer(value)
            self._made[name] = value
        return self._made[name]

    def _node(self, operator: str, inputs: Sequence[ir.Value], name: str, length: int, **attributes: int) -> ir.Value:
        import onnx_ir as ir

        node = ir.node(operator, inputs, attributes=attributes or None, name=name)
        node.outputs[0].name = name
        node.outputs[0].dtype = ir.DataType.INT64
        node.outputs[0].shape = ir.Shape([length])
        self._graph.append(node)
        return node.outputs[0]
