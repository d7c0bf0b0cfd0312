"""Spectrum (arXiv 2603.01623) as its authors' code has it: a growing window, a Chebyshev fit of the last hidden states.

Settings are theirs: ``w`` (1), ``m`` (4), ``lam`` (0.1), ``window_size`` (2), ``flex_window`` (0.75) and
``warmup_steps`` (5). What is estimated is what the last block gives, before the output's norm and projection, which run
at every step. The fit is to all values that were computed so far, at most 100, and its weights depend on the numbers of
the steps only: the schedule gets a forecast of output caches, of which only the last block's is read. The authors' code
rounds the fit to bfloat16; here it is not.
"""

from __future__ import annotations

import math

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.importers.base import Imported, Importer, Source, whole_steps
from dipgo_deploy.schedule.importers.linear import as_forecast
from dipgo_deploy.schedule.importers.settings import Settings
from dipgo_deploy.schedule.importers.spectrum import MOST_DEGREE, reads

_KEPT = 100
_LINE = 1.0  # the line through the last two values goes a whole step of theirs for each such distance


def computed(steps: int, window: float, growth: float, warmup: int) -> tuple[bool, ...]:
    """Which of the T evaluations run."""
    runs: list[bool] = []
    skipped = 0
    for step in range(steps):
        run = step < warmup
        if not run:
            run = (skipped + 1) % max(1, math.floor(window)) == 0
            window = round(window + growth, 3) if run else window
        skipped = 0 if run else skipped + 1
        runs.append(run)
    return tuple(runs)


def _read(data: bytes, source: Source) -> Imported:
    settings = Settings.from_json(data, "Spectrum")
    share = settings.number("w", 1.0, least=0, most=1)
    degree = settings.integer("m", 4, least=1, most=MOST_DEGREE)
    ridge = settings.number("lam", 0.1, least=1e-6)
    window = settings.integer("window_size", 2, least=1)
    growth = settings.number("flex_window", 0.75, least=0)
    warmup = settings.integer("warmup_steps", 5, least=1)
    settings.ignore("algo_name")
    settings.done()
    runs = computed(source.steps, window, growth, warmup)
    if all(runs):
        raise UserError(f"these settings leave nothing out of {source.steps} steps; give more steps or other settings")
    values = reads(runs, share, degree, ridge, kept=_KEPT, line=_LINE)
    blocks = len(source.names)
    return Imported(
        whole_steps(runs, blocks),
        as_forecast(runs, values, (True,) * blocks),
        notes=("the authors' code rounds its fit to bfloat16; this one is not rounded",),
    )


IMPORTER = Importer(
    kind="spectrum-features",
    title="Read the settings of Spectrum's authors: a fit of the last block's hidden states.",
    file='JSON such as {"w": 0.5, "m": 4, "lam": 0.1, "window_size": 2, "flex_window": 0.75, "warmup_steps": 5}',
    read=_read,
    example="spectrum.json --model ./flux --steps 50 -o schedule.json",
    cache="output",
)
