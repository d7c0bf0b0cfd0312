"""What a removed block reads: a weighted sum of the values that it stored last, by a rule or by given weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.solver import FrozenJson, Numbers

MOST_TERMS = 32
"""Values of one block that are kept at most; a forecast that reads fewer keeps fewer."""
# An extrapolation ten times as far as the values lie apart, to the second order, has no weight above 300.
MOST_WEIGHT = 1e3
CONTRACTION = 0.5
"""What HiCache recommends."""

AS_STORED = (1.0,)
"""The weights of a plain read: the value that was stored last."""

Weights = tuple[float, ...]
Order = Literal[1, 2]
Gates = Sequence[Sequence[bool]]


def _rows(value: Any) -> Any:
    """Stop at the first entry that is no list: the library would make an error of its own for each of them."""
    for place, row in enumerate(value if isinstance(value, (list, tuple)) else ()):
        if not isinstance(row, (list, tuple)):
            raise ValueError(f"entry {place} is {repr(row)[:60]}, not a list")
        for block, cell in enumerate(row):
            if not isinstance(cell, (list, tuple)):
                raise ValueError(f"evaluation {place}, column {block}: {repr(cell)[:60]} is not a list of weights")
            if len(cell) > MOST_TERMS:
                raise ValueError(
                    f"evaluation {place}, column {block}: {len(cell)} weights, more than the {MOST_TERMS} values that "
                    "are kept"
                )
    return value


class Reads(Protocol):
    """What says how removed blocks are read."""

    def weights_of(self, step: int, block: int, stored: Sequence[int]) -> Weights:
        """What block number ``block`` reads at evaluation ``step``: weights of the values that it stored at the
        evaluations ``stored``, the latest first; at most as many as there are."""

    @property
    def terms(self) -> int:
        """The most values of one block that are read."""


class _Forecast(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RuleForecast(_Forecast):
    """Every removed block is extrapolated from its last ``order + 1`` stored values, or from as many as there are.

    The derivatives are differences of stored values, divided by how far their evaluations lie apart: what TaylorSeer
    (arXiv 2503.06923) does. ``hermite`` is HiCache (2508.16984): Hermite polynomials in place of powers.

    Attributes:
        kind: ``taylor`` or ``hermite``.
        order: of the last derivative.
        contraction: of ``hermite`` only.
        positions: of the T evaluations on the axis on which is extrapolated; None: their numbers.
    """

    kind: Literal["taylor", "hermite"]
    order: Order
    contraction: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    positions: Numbers | None = Field(default=None, exclude_if=lambda value: value is None)

    def weights_of(self, step: int, block: int, stored: Sequence[int]) -> Weights:
        """As ``Reads`` has it."""
        places = [self._position(other) for other in (step, *stored[: self.order + 1])]
        # Weights depend on distances alone.
        return _extrapolation(
            tuple(place - places[1] for place in places), self.contraction if self.kind == "hermite" else None
        )

    @property
    def terms(self) -> int:
        """As ``Reads`` has it."""
        return self.order + 1

    def _position(self, step: int) -> float:
        return float(step) if self.positions is None else self.positions[step]

    def facts(self, gates: Gates, conditional_only: Sequence[bool] = ()) -> dict[str, Any]:
        """What it is, as JSON values: kind, order, how many reads there are, and how many of fewer values."""
        short = total = 0
        for row, stored in zip(gates, stored_before(gates, conditional_only), strict=True):
            for kept, values in zip(row, stored, strict=True):
                total += not kept
                short += not kept and len(values) <= self.order
        own = {} if self.contraction is None else {"contraction": self.contraction}
        return {"kind": self.kind, "order": self.order, **own, "reads": total, "short_reads": short}

    def summary(self, gates: Gates, conditional_only: Sequence[bool] = ()) -> str:
        """The same as one line."""
        facts = self.facts(gates, conditional_only)
        line = f"{self.kind}, order {self.order}, of {facts['reads']} reads"
        short = facts["short_reads"]
        return line + (f"; {short} come before enough values are stored, and use those there are" if short else "")

    def at(self, steps: Sequence[int]) -> RuleForecast:
        """The same for a schedule that has these evaluations only."""
        return self.model_copy(update={"positions": tuple(self._position(step) for step in steps)})

    def check(self, gates: Gates, names: Sequence[str], conditional_only: Sequence[bool] = ()) -> None:
        """Refuse (UserError) a rule that cannot be followed with these gates (T x N). conditional_only: of each
        evaluation, where any is."""
        if (self.contraction is not None) != (self.kind == "hermite"):
            raise UserError("forecast.contraction: belongs to the kind hermite, and that needs it")
        if self.positions is not None:
            if len(self.positions) != len(gates):
                raise UserError(
                    f"forecast.positions: {len(self.positions)} for {len(gates)} evaluations; give one each"
                )
            steps = [after - before for before, after in zip(self.positions, self.positions[1:], strict=False)]
            if not all(map(math.isfinite, self.positions)) or not (
                all(step > 0 for step in steps) or all(step < 0 for step in steps)
            ):
                raise UserError("forecast.positions: must be finite and rise, or fall, from one to the next")
        _check_weights(self, gates, names, conditional_only)


class FittedForecast(_Forecast):
    """Each removed block has weights of its own at each evaluation.

    Attributes:
        kind: ``weights``.
        weights: T rows of N lists: weights of the values that the block stored last, the latest first, up to 32;
            empty for a kept block, and for a removed one that reads its last value as it is.
        provenance: how they were fitted.
    """

    kind: Literal["weights"]
    weights: Annotated[tuple[tuple[Numbers, ...], ...], BeforeValidator(_rows)]
    provenance: FrozenJson = Field(default_factory=dict, validate_default=True)

    def weights_of(self, step: int, block: int, stored: Sequence[int]) -> Weights:
        """As ``Reads`` has it."""
        return _stripped(self.weights[step][block] or AS_STORED)

    @property
    def terms(self) -> int:
        """As ``Reads`` has it."""
        return max((len(weights) for row in self.weights for weights in row), default=1)

    def facts(self, gates: Gates, conditional_only: Sequence[bool] = ()) -> dict[str, Any]:
        """What it is, as JSON values: kind, how many reads there are, and how many of these as they are."""
        total = sum(not kept for row in gates for kept in row)
        given = sum(bool(weights) for row in self.weights for weights in row)
        return {"kind": self.kind, "reads": total, "plain_reads": total - given}

    def summary(self, gates: Gates, conditional_only: Sequence[bool] = ()) -> str:
        """The same as one line."""
        facts = self.facts(gates, conditional_only)
        return f"fitted weights for {facts['reads'] - facts['plain_reads']} of {facts['reads']} reads"

    def at(self, steps: Sequence[int]) -> FittedForecast:
        """The same for a schedule that has these evaluations only."""
        return self.model_copy(update={"weights": tuple(self.weights[step] for step in steps)})

    def check(self, gates: Gates, names: Sequence[str], conditional_only: Sequence[bool] = ()) -> None:
        """Refuse (UserError) weights that do not fit these gates (T x N), or where evaluations are conditional only."""
        check_fitted(conditional_only)
        if len(self.weights) != len(gates):
            raise UserError(f"forecast.weights: {len(self.weights)} rows for {len(gates)} evaluations; give one each")
        for step, (row, kept) in enumerate(zip(self.weights, gates, strict=True)):
            if len(row) != len(names):
                raise UserError(f"forecast.weights: evaluation {step} has {len(row)} lists for {len(names)} blocks")
            for name, weights, is_kept in zip(names, row, kept, strict=True):
                if weights and is_kept:
                    raise UserError(
                        f"forecast.weights: evaluation {step}, block {name}: is computed there, so it has no weights"
                    )
        _check_weights(self, gates, names)


Forecast = RuleForecast | FittedForecast
AnyForecast = Annotated[Forecast, Field(discriminator="kind")]


def stored_before(gates: Gates, conditional_only: Sequence[bool] = ()) -> Iterator[tuple[tuple[int, ...], ...]]:
    """For each evaluation and block the evaluations of the values that the block stored last, the latest first.

    conditional_only: of each evaluation; none where all are guided. What such an evaluation stored has no
    unconditional half, so a guided one reads what was stored after it alone.
    """
    stored: list[tuple[int, ...]] = [()] * (len(gates[0]) if gates else 0)
    whole = list(stored)  # as guided evaluations have it
    for step, row in enumerate(gates):
        alone = bool(conditional_only) and conditional_only[step]
        yield tuple(stored if alone else whole)
        for block, kept in enumerate(row):
            if kept:
                stored[block] = (step, *stored[block][: MOST_TERMS - 1])
                whole[block] = () if alone else (step, *whole[block][: MOST_TERMS - 1])


def reads(
    forecast: Forecast | None, gates: Gates, conditional_only: Sequence[bool] = ()
) -> Iterator[tuple[Weights, ...]]:
    """For each evaluation and block the weights of what is read; empty where the block is computed, or nothing was
    stored. conditional_only: as ``stored_before`` has it."""
    for step, (row, stored) in enumerate(zip(gates, stored_before(gates, conditional_only), strict=True)):
        yield tuple(
            ()
            if kept or not stored[block]
            else AS_STORED
            if forecast is None
            else forecast.weights_of(step, block, stored[block])
            for block, kept in enumerate(row)
        )


def check_fitted(conditional_only: Sequence[bool]) -> None:
    """Refuse (UserError) fitted weights of a forecast where evaluations are conditional only: each weight is fitted to
    whole values."""
    if any(conditional_only):
        raise UserError(
            "guidance: fitted weights of a forecast do not go with conditional-only evaluations; forecast by a rule "
            "(taylor, hermite), or leave out one of the two"
        )


def _check_weights(
    forecast: Forecast, gates: Gates, names: Sequence[str], conditional_only: Sequence[bool] = ()
) -> None:
    known = stored_before(gates, conditional_only)
    for step, (row, stored) in enumerate(zip(reads(forecast, gates, conditional_only), known, strict=True)):
        for block, weights in enumerate(row):
            where = f"forecast: evaluation {step}, block {names[block]}"
            if len(weights) > len(stored[block]):
                raise UserError(
                    f"{where}: reads the last {len(weights)} values, and {len(stored[block])} were stored before; give "
                    "as many weights as there are values"
                )
            absurd = next((weight for weight in weights if not abs(weight) <= MOST_WEIGHT), None)
            if absurd is not None:
                raise UserError(
                    f"{where}: the weight {absurd:g} is not finite or beyond {MOST_WEIGHT:g}; keep the block more "
                    "often, or forecast with a lower order"
                )


@lru_cache(maxsize=100_000)
def _extrapolation(places: tuple[float, ...], contraction: float | None) -> Weights:
    """Weights of the values at ``places[1:]``, the latest first, for the one at ``places[0]``."""
    here, *stored = places
    count = len(stored)
    # Per value the weights that it is made of; after i rounds, of the i-th derivatives there.
    level = [[float(place == other) for other in range(count)] for place in range(count)]
    total = level[0]
    for order in range(1, count):
        level = [
            [(a - b) / (stored[place] - stored[place + 1]) for a, b in zip(level[place], level[place + 1], strict=True)]
            for place in range(len(level) - 1)
        ]
        power = _term(here - stored[0], order, contraction) / math.factorial(order)
        total = [sofar + power * weight for sofar, weight in zip(total, level[0], strict=True)]
    return _stripped(total)


def _term(distance: float, order: int, contraction: float | None) -> float:
    """The power of the distance that a derivative of this order comes with; ``contraction``: the scaled Hermite
    polynomial (the physicists') in its place."""
    if contraction is None:
        return float(distance**order)
    scaled = contraction * distance
    polynomial = 2 * scaled if order == 1 else 4 * scaled**2 - 2
    return float(contraction**order * polynomial)


def _stripped(weights: Sequence[float]) -> Weights:
    """Without the last ones that are zero; one is left."""
    count = len(weights)
    while count > 1 and not weights[count - 1]:
        count -= 1
    return tuple(weights[:count])
