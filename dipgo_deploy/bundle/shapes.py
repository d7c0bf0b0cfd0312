"""Sizes that a bundle leaves open: the ranges of batch, height and width, and the expressions that depend on them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import pydantic

from dipgo_deploy.errors import UserError

BATCH, HEIGHT, WIDTH = "batch", "height", "width"
NAMES = (BATCH, HEIGHT, WIDTH)

# A dimension: an int, or an expression over the names.
Dim = int | str

_TOKEN = re.compile(r"\s*(?:(\d{1,18})|([A-Za-z_]\w*)|(//|[-+*()]))")
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


def evaluate(expression: str, values: Mapping[str, int]) -> int:
    """The value of an expression of whole numbers, names, ``+``, ``-``, ``*``, ``//`` and parentheses.

    Raises:
        ValueError: another character, an unknown name, a division by zero, or something left over.
    """
    return _Parser(expression, values).value()


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


class _Parser:
    """Recursive descent; the nesting is bounded by the length of an expression."""

    def __init__(self, expression: str, values: Mapping[str, int]) -> None:
        if len(expression) > _LONGEST:
            raise ValueError(f"an expression of {len(expression)} characters is too long")
        self._expression = expression
        self._values = values
        self._tokens: list[str] = []
        place = 0
        while expression[place:].strip():
            match = _TOKEN.match(expression, place)
            if match is None:
                raise ValueError(f"expression {expression!r}: cannot be read at {expression[place:].strip()[:20]!r}")
            self._tokens.append(match.group(match.lastindex or 0))
            place = match.end()

    def value(self) -> int:
        total = self._sum()
        if self._tokens:
            raise ValueError(f"expression {self._expression!r}: {self._tokens[0]!r} is left over")
        return total

    def _sum(self) -> int:
        total = self._product()
        while self._next("+", "-"):
            sign = 1 if self._tokens.pop(0) == "+" else -1
            total += sign * self._product()
        return total

    def _product(self) -> int:
        total = self._atom()
        while self._next("*", "//"):
            if self._tokens.pop(0) == "*":
                total *= self._atom()
                continue
            divisor = self._atom()
            if divisor == 0:
                raise ValueError(f"expression {self._expression!r}: division by zero")
            total //= divisor
        return total

    def _atom(self) -> int:
        token = self._tokens.pop(0) if self._tokens else ""
        if token == "(":
            total = self._sum()
            if not self._next(")"):
                raise ValueError(f"expression {self._expression!r}: a parenthesis is not closed")
            self._tokens.pop(0)
            return total
        if token == "-":
            return -self._atom()
        if token.isdecimal():
            return int(token)
        if token not in self._values:
            raise ValueError(f"expression {self._expression!r}: {token!r} is not one of {', '.join(self._values)}")
        return self._values[token]

    def _next(self, *tokens: str) -> bool:
        return bool(self._tokens) and self._tokens[0] in tokens


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
