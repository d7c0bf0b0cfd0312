"""Sizes that a bundle leaves open: the ranges of batch, height and width, and the expressions that depend on them."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from typing import NamedTuple

import pydantic

from dipgo_deploy.errors import UserError

BATCH, HEIGHT, WIDTH = "batch", "height", "width"
NAMES = (BATCH, HEIGHT, WIDTH)

# A dimension: an int, or an expression over the names.
Dim = int | str

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}
_LONGEST = 200


class Sizes(NamedTuple):
    """What one launch is of: images, and height and width in latent pixels."""

    batch: int
    height: int
    width: int


class Range(pydantic.BaseModel):
    """A dimension's smallest, usual and largest value; all are multiples of ``multiple``."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    min: int = pydantic.Field(ge=1)
    opt: int
    max: int
    multiple: int = pydantic.Field(default=1, ge=1)

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"min {self.min}, opt {self.opt}, max {self.max} are not in order")
        if any(value % self.multiple for value in (self.min, self.opt, self.max)):
            raise ValueError(f"{self.min}, {self.opt}, {self.max} are not multiples of {self.multiple}")
        return self

    @classmethod
    def static(cls, value: int) -> Range:
        """The range of one value."""
        return cls(min=value, opt=value, max=value)

    @property
    def is_static(self) -> bool:
        """Whether there is one value only."""
        return self.min == self.max

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max and value % self.multiple == 0

    def describe(self, scale: int = 1) -> str:
        """``512 to 1024 in steps of 64``, times ``scale``."""
        if self.is_static:
            return f"{self.min * scale} only"
        step = self.multiple * scale
        return f"{self.min * scale} to {self.max * scale}" + (f" in steps of {step}" if step > 1 else "")


class SizeRanges(pydantic.BaseModel):
    """The sizes that a bundle's graphs take: images per launch, and the latent's height and width."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    batch: Range
    height: Range
    width: Range

    @property
    def min(self) -> Sizes:
        """Every dimension at its smallest."""
        return Sizes(self.batch.min, self.height.min, self.width.min)

    @property
    def opt(self) -> Sizes:
        """The usual sizes."""
        return Sizes(self.batch.opt, self.height.opt, self.width.opt)

    @property
    def max(self) -> Sizes:
        """Every dimension at its largest."""
        return Sizes(self.batch.max, self.height.max, self.width.max)

    def __contains__(self, sizes: Sizes) -> bool:
        return sizes.batch in self.batch and sizes.height in self.height and sizes.width in self.width

    def check(self, sizes: Sizes) -> None:
        """Refuse (UserError) sizes outside the ranges; the message names the first."""
        for name, value in zip(NAMES, sizes, strict=True):
            allowed: Range = getattr(self, name)
            if value not in allowed:
                unit = "" if name == BATCH else " (latent pixels)"
                raise UserError(f"{name} {value}: this engine directory takes {allowed.describe()}{unit}")


def corners(ranges: SizeRanges) -> tuple[Sizes, ...]:
    """The usual sizes, the smallest, the largest, and two in between that are not square."""
    least, most = ranges.min, ranges.max
    crossed = (Sizes(most.batch, least.height, most.width), Sizes(least.batch, most.height, least.width))
    return tuple(dict.fromkeys((ranges.opt, least, most, *crossed)))


def evaluate(expression: str, values: Mapping[str, int]) -> int:
    """The value of an expression of whole numbers, names, ``+``, ``-``, ``*``, ``//`` and parentheses.

    Raises:
        ValueError: another character, an unknown name, a division by zero, or something left over.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"an expression of {len(expression)} characters is too long")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what the parser raises for text it cannot read
        raise ValueError(f"expression {expression!r} cannot be read") from None
    return _value(tree, expression, values)


def _value(node: ast.expr, expression: str, values: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)) if type(value) is int:
            return value
        case ast.Name(id=name):
            if name not in values:
                raise ValueError(f"expression {expression!r}: {name!r} is not one of {', '.join(values)}")
            return values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, expression, values)
        case ast.BinOp(left=left, op=kind, right=right) if type(kind) in _OPERATORS:
            try:
                return _OPERATORS[type(kind)](_value(left, expression, values), _value(right, expression, values))
            except ZeroDivisionError:
                raise ValueError(f"expression {expression!r}: division by zero") from None
    raise ValueError(f"expression {expression!r}: only whole numbers, names, +, -, *, // and parentheses")


def evaluate_shape(dims: tuple[Dim, ...], sizes: Sizes) -> tuple[int, ...]:
    """The shape at ``sizes``.

    Raises:
        ValueError: a wrong expression, or an extent below 1.
    """
    values = sizes._asdict()
    shape = tuple(dim if isinstance(dim, int) else evaluate(dim, values) for dim in dims)
    if any(extent < 1 for extent in shape):
        raise ValueError(f"shape {dims} is {shape} at {values}")
    return shape


def parse_range(option: str, text: str) -> Range:
    """``512``, ``512:1024`` or ``512:768:1024`` (smallest, usual, largest); of two the smallest is the usual one.

    Raises:
        UserError: anything else.
    """
    parts = text.split(":")
    if not 1 <= len(parts) <= 3 or not all(part.isdecimal() and len(part) < 10 and int(part) for part in parts):
        raise UserError(f"{option} {text}: give a number, MIN:MAX or MIN:OPT:MAX, all at least 1")
    numbers = [int(part) for part in parts]
    least, usual, most = numbers[0], numbers[-2 if len(numbers) == 3 else 0], numbers[-1]
    if not least <= usual <= most:
        raise UserError(f"{option} {text}: {least}, {usual} and {most} are not in order; give MIN:OPT:MAX")
    return Range(min=least, opt=usual, max=most)
