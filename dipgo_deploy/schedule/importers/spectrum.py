"""Spectrum (arXiv 2603.01623) as stable-diffusion.cpp has it: a growing window, a Chebyshev fit of denoised latents.

Settings are that program's: ``w`` (0.4), ``m`` (3), ``lam`` (1), ``window_size`` (2), ``flex_window`` (0.5),
``warmup_steps`` (4) and ``stop_percent`` (0.9). Which steps run depends on counters, and the weights of the fit on
the numbers of the steps only. What is estimated is the denoised latent x - sigma v of flow matching, from up to max(m
+ 1, 6) of them: the schedule gets a solver.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.importers.base import Imported, Importer, Source, flow_sigmas
from dipgo_deploy.schedule.importers.linear import Value, as_predictions
from dipgo_deploy.schedule.importers.settings import Settings

_NOMINAL_STEPS = 50  # steps lie at -1 + 2 step / 50, however many there are
MOST_DEGREE = 20


def computed(steps: int, window: float, growth: float, warmup: int, stop: int) -> tuple[bool, ...]:
    """Which of the T evaluations run."""
    runs: list[bool] = []
    skipped = 0
    for step in range(steps):
        wait = step < warmup or (stop > 0 and step >= stop) or sum(runs) < 2
        run = wait or (skipped + 1) % max(1, math.floor(window)) == 0
        if run:
            window += growth if step >= warmup else 0
            skipped = 0
        else:
            skipped += 1
        runs.append(run)
    return tuple(runs)


def reads(
    runs: Sequence[bool], share: float, degree: int, ridge: float, *, kept: int | None = None, line: float | None = None
) -> list[Value]:
    """What stands for each evaluation: a ridge fit of Chebyshev polynomials to the last ``kept`` computed values, mixed
    with the line through the last two.

    kept: None: one more than the degree, at least 6. line: how far the line goes for each distance of the last two
    evaluations; None: half a distance, however far it is.
    """
    import numpy as np

    def basis(step: int) -> list[float]:
        place = 2 * step / _NOMINAL_STEPS - 1
        values = [1.0, place]
        while len(values) <= degree:
            values.append(2 * place * values[-1] - values[-2])
        return values[: degree + 1]

    values: list[Value] = []
    known: list[int] = []
    for step, run in enumerate(runs):
        if run:
            known = [*known, step][-(kept or max(degree + 1, 6)) :]
            values.append({step: 1.0})
            continue
        table = np.array([basis(other) for other in known])
        fit = table @ np.linalg.solve(table.T @ table + ridge * np.eye(degree + 1), np.array(basis(step)))
        weights = dict(zip(known, (share * fit).tolist(), strict=True))
        if len(known) > 1:
            length = 0.5 if line is None else line * (step - known[-1]) / (known[-1] - known[-2])
            weights[known[-1]] += (1 - share) * (1 + length)
            weights[known[-2]] -= (1 - share) * length
        else:
            weights[known[-1]] += 1 - share
        values.append(weights)
    return values


def _read(data: bytes, source: Source) -> Imported:
    settings = Settings.from_json(data, "Spectrum")
    share = settings.number("w", 0.4, least=0, most=1)
    degree = settings.integer("m", 3, least=1, most=MOST_DEGREE)
    ridge = settings.number("lam", 1.0, least=1e-6)
    window = settings.integer("window_size", 2, least=1)
    growth = settings.number("flex_window", 0.5, least=0)
    warmup = settings.integer("warmup_steps", 4)
    stop = settings.number("stop_percent", 0.9, least=0, most=1)
    settings.done()
    steps = source.steps
    runs = computed(steps, window, growth, warmup, int(stop * steps))
    if all(runs):
        raise UserError(f"these settings leave nothing out of {steps} steps; give more steps or other settings")
    sigmas = flow_sigmas(source.target)[:-1]
    return Imported(predictions=as_predictions(runs, reads(runs, share, degree, ridge), sigmas))


IMPORTER = Importer(
    kind="spectrum",
    title="Read the settings of Spectrum in stable-diffusion.cpp, for models of flow matching.",
    file='JSON such as {"w": 0.4, "m": 3, "window_size": 2, "warmup_steps": 4}; what it leaves out has its default',
    read=_read,
    example="spectrum.json --model ./flux --steps 28 -o schedule.json",
)
