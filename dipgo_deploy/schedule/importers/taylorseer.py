"""TaylorSeer (arXiv 2503.06923) and HiCache (2508.16984): an interval, and an extrapolation of each layer in between.

Settings are those of the authors' code: ``interval`` (``fresh_threshold``), ``max_order`` and ``first_enhance``, the
steps at the beginning that all compute (2 for DiT and 3 for FLUX, if not said). The first difference is made at step
``first_enhance`` - 1, and each next order one computed step later. HiCache has Hermite polynomials in place of powers
(``hicache_scale``, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.forecast import MOST_TERMS
from dipgo_deploy.schedule.importers.base import Imported, Importer, Source, check_steps_of, whole_steps
from dipgo_deploy.schedule.importers.linear import Value, as_forecast, differences, total
from dipgo_deploy.schedule.importers.settings import Settings

if TYPE_CHECKING:
    from dipgo_deploy.schedule.forecast import RuleForecast

_OF_RULES = 2  # the highest order that a rule of a schedule has; above it the forecast is a list of weights


def computed(steps: int, interval: int, first: int) -> tuple[bool, ...]:
    """Which of the T evaluations compute: the ``first`` ones, then one in ``interval``."""
    counter, runs = 0, []
    for step in range(steps):
        run = step < max(first, 1) or counter == interval - 1
        counter = 0 if run else counter + 1
        runs.append(run)
    return tuple(runs)


def reads(runs: Sequence[bool], order: int, first: int, scale: float | None = None) -> list[Value]:
    """What is read at each evaluation. scale: of HiCache's polynomials; None: powers."""
    values, last = [], 0
    for step, held in enumerate(differences(runs, order, first)):
        last = step if runs[step] else last
        distance = step - last
        values.append(total(*((_factor(distance, place, scale), value) for place, value in enumerate(held))))
    return values


def rule_of(order: int, scale: float | None = None) -> RuleForecast | None:
    """The rule that a schedule can have for this order; None where there is none (order 0, or above 2)."""
    from dipgo_deploy.schedule.forecast import RuleForecast

    if not 0 < order <= _OF_RULES or scale == 0:
        return None
    kind = "taylor" if scale is None else "hermite"
    return RuleForecast.model_validate({"kind": kind, "order": order, "contraction": scale})


def _factor(distance: float, order: int, scale: float | None) -> float:
    if scale is None:
        return distance**order / math.factorial(order)
    below, polynomial = 0.0, 1.0  # physicists' Hermite polynomials
    for degree in range(order):
        below, polynomial = polynomial, 2 * scale * distance * polynomial - 2 * degree * below
    return scale**order * polynomial / math.factorial(order)


def _read(data: bytes, source: Source) -> Imported:
    settings = Settings.from_json(data, "TaylorSeer or HiCache")
    interval = settings.integer(settings.any_of("interval", "fresh_threshold"), least=1)
    order = settings.integer("max_order", least=0, most=MOST_TERMS - 1)
    mode = str(settings.value("mode", "HiCache" if "hicache_scale" in settings else "Taylor")).lower()
    if mode not in ("taylor", "hicache"):
        raise UserError(f"mode: {mode[:40]!r} is not Taylor or HiCache")
    scale = settings.number("hicache_scale", 0.5, least=0, most=1) if mode == "hicache" else None
    first = settings.integer("first_enhance", 2 if source.target.model.class_name.startswith("DiT") else 3)
    check_steps_of(settings, "num_steps", source)
    settings.ignore("test_flops", "test_FLOPs")
    settings.done()
    runs = computed(source.steps, interval, first)
    everything = (True,) * len(source.names)
    forecast = as_forecast(runs, reads(runs, order, first - 1, scale), everything, rule_of(order, scale))
    return Imported(whole_steps(runs, len(source.names)), forecast)


IMPORTER = Importer(
    kind="taylorseer",
    title="Read TaylorSeer's or HiCache's settings: an interval, and what is extrapolated in between.",
    file='JSON with the settings of their code, such as {"interval": 5, "max_order": 1, "first_enhance": 3}',
    read=_read,
    example="taylor.json --model ./flux --steps 50 -o schedule.json",
    granularity="layer",
)
