"""Methods that estimate what is not computed from what was: their state as weighted sums of computed values.

Such a method is run here on unit vectors: a `Value` has a weight for each evaluation whose computed value is part of
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.importers.base import Predictions

if TYPE_CHECKING:
    from dipgo_deploy.schedule.forecast import Forecast, RuleForecast

_ROUNDING = 1e-12
_NEGLIGIBLE = 1e-9

Value = Mapping[int, float]
"""Evaluation -> weight of the value that it computed."""


def total(*terms: tuple[float, Value]) -> Value:
    """The weighted sum of values."""
    weights: dict[int, float] = {}
    for factor, value in terms:
        for step, weight in value.items():
            weights[step] = weights.get(step, 0.0) + factor * weight
    return weights


def differences(computed: Sequence[bool], order: int, first: int) -> list[list[Value]]:
    """For each evaluation the last computed value and its divided differences, up to ``order``, as TaylorSeer has them.

    A difference is that of the differences before, over the distance of the last two computed evaluations; the first
    is made at evaluation ``first`` at the earliest.
    """
    held: list[Value] = []
    last = 0
    table = []
    for step, run in enumerate(computed):
        if run:
            fresh: list[Value] = [{step: 1.0}]
            for place in range(order):
                if place >= len(held) or step < first:
                    break
                distance = step - last
                fresh.append(total((1 / distance, fresh[place]), (-1 / distance, held[place])))
            held, last = fresh, step
        table.append(held)
    return table


def as_forecast(
    computed: Sequence[bool], reads: Sequence[Value], removed: Sequence[bool], rule: RuleForecast | None = None
) -> Forecast | None:
    """The forecast of blocks that are removed where an evaluation is not ``computed``, which then read ``reads``.

    removed: for each of the N blocks whether it is one of those; the others run at every evaluation. rule: what is
    returned if it gives the same weights: it holds for other gates too. None where every read is of the last value as
    it is. Raises UserError for a read of a value that is no longer kept.
    """
    from dipgo_deploy.schedule.forecast import AS_STORED, FittedForecast

    weights: list[tuple[float, ...]] = []
    stored: list[int] = []
    plain = as_rule = True
    for step, run in enumerate(computed):
        if run:
            stored.insert(0, step)
            weights.append(())
            continue
        row = _of_last(step, reads[step], stored)
        plain = plain and row == AS_STORED
        as_rule = as_rule and rule is not None and _same(row, rule.weights_of(step, 0, stored))
        weights.append(() if row == AS_STORED else row)
    if plain or as_rule:
        return None if plain else rule
    rows = tuple(tuple(row if gone else () for gone in removed) for row in weights)
    return FittedForecast(kind="weights", weights=rows, provenance={})


def _of_last(step: int, value: Value, stored: Sequence[int]) -> tuple[float, ...]:
    """The weights of the last stored values, the latest first."""
    from dipgo_deploy.schedule.forecast import MOST_TERMS

    used = {other: weight for other, weight in value.items() if weight}
    # What a recursion has left of values long ago is below the rounding of float32.
    old = next((o for o, weight in used.items() if o not in stored[:MOST_TERMS] and abs(weight) > _NEGLIGIBLE), None)
    if old is not None:
        raise UserError(
            f"evaluation {step} reads the value of evaluation {old}, {stored.index(old)} computed ones before the "
            f"last; the last {MOST_TERMS} are kept; give a lower order"
        )
    row = [used.get(other, 0.0) for other in stored[:MOST_TERMS]]
    while len(row) > 1 and not row[-1]:
        row.pop()
    return tuple(row)


def _same(row: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two rows of weights differ by rounding only."""
    return len(row) == len(other) and all(abs(a - b) < _ROUNDING for a, b in zip(row, other, strict=True))


def as_predictions(
    computed: Sequence[bool], reads: Sequence[Value], sigmas: Sequence[float] | None = None
) -> Predictions:
    """Predictions of the whole denoiser that are launched where ``computed``, and else ``reads``; sigmas: see there."""
    launched = tuple(step for step, run in enumerate(computed) if run)
    rows = []
    for step, run in enumerate(computed):
        value = {step: 1.0} if run else reads[step]
        rows.append(tuple(value.get(launch, 0.0) for launch in launched))
    return Predictions(launched, tuple(rows), None if sigmas is None else tuple(sigmas))
