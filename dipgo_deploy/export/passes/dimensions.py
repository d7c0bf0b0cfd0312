"""Open sizes in a traced graph: torch's symbols become expressions over batch, height and width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from dipgo_deploy.bundle.shapes import BATCH, Dim, SizeRanges
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.dynamic import AXES, IMAGE_AXES

_META = "dipgo_deploy.extents"


@dataclass(frozen=True)
class Term:
    """``coefficient`` times the product of ``name // divisor``."""

    coefficient: int
    factors: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        parts = [name if divisor == 1 else f"({name}//{divisor})" for name, divisor in self.factors]
        if self.coefficient != 1 or not parts:
            parts.insert(0, str(self.coefficient))
        return "*".join(parts)


Extent = tuple[Term, ...]
"""A sum of terms."""


def extents_of(value: ir.Value | None) -> tuple[Extent, ...] | None:
    """What ``NameDimensions`` found for each dimension of a value; None where one of them is not known."""
    found: tuple[Extent | None, ...] | None = None if value is None else value.meta.get(_META)
    if found is None or None in found:
        return None
    return tuple(extent for extent in found if extent is not None)


@dataclass(frozen=True)
class NameDimensions(ir.passes.InPlacePass):
    """Every dimension that torch named after its own symbols gets its expression over the sizes; ``extents_of`` has it
    as terms. What cannot be told (a dimension that the exporter does not know) stays unnamed.

    source: name of the input that the sizes are those of, a latent (B, C, h, w) or images (B, H, W, 3) of ``pixels``
    pixels to one of the latent. ranges: the sizes that are open.
    """

    source: str
    ranges: SizeRanges
    pixels: int | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class. Raises UserError for an input or output whose shape is no such expression."""
        reader = _reader(model, self.source, self.ranges, self.pixels)
        for value in ir.convenience.create_value_mapping(model.graph).values():
            if value.shape is None:
                continue
            extents = [(Term(dim, ()),) if isinstance(dim, int) else reader.read(dim.value) for dim in value.shape]
            value.meta[_META] = tuple(extents)
            dims = [render(extent) for extent in extents]
            value.shape = ir.Shape(dims)
            if (value.is_graph_input() or value.is_graph_output()) and None in dims:
                raise UserError(
                    f"{value.name}: its shape is no expression of batch, height and width; give plain numbers"
                )
        return ir.passes.PassResult(model, True)


class _Reader:
    """torch's expressions over its symbols -> terms over the sizes.

    symbols: size and multiple by torch's symbol, which counts in those multiples.
    """

    def __init__(self, symbols: Mapping[str, tuple[str, int]]) -> None:
        self._symbols = symbols

    def read(self, text: str | None) -> Extent | None:
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


def _reader(model: ir.Model, name_of_source: str, ranges: SizeRanges, pixels: int | None) -> _Reader:
    source = next(value for value in model.graph.inputs if value.name == name_of_source)
    assert source.shape is not None
    symbols: dict[str, tuple[str, int]] = {}
    for name, axis in (AXES if pixels is None else IMAGE_AXES).items():
        allowed = getattr(ranges, name)
        if allowed.is_static:
            continue
        dim = source.shape[axis]
        text = "" if isinstance(dim, int) else str(dim.value)
        factor = allowed.multiple * (1 if pixels is None or name == BATCH else pixels)
        symbol = text.removeprefix(f"{factor}*")
        if not symbol.isidentifier():
            raise UserError(f"{name}: the exporter made it {dim}, which cannot vary; give a plain number")
        symbols[symbol] = (name, allowed.multiple)
    return _Reader(symbols)


def _term(coefficient: int, units: Sequence[tuple[str, int]]) -> Term:
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
    return Term(left, tuple(sorted(factors)))


def render(extent: Extent | None) -> Dim | None:
    """An extent as a shape has it: a number, or an expression for ``bundle.shapes.evaluate``."""
    if extent is None:
        return None
    if all(not term.factors for term in extent):
        return sum(term.coefficient for term in extent)
    return " + ".join(map(str, extent)).replace("+ -", "- ")
