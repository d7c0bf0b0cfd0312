"""The rows of a solver, launch by launch: each the least-squares fit to the full run's latent at that launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dipgo_deploy.calibrate.core import Group, Launch, Report, finite
from dipgo_deploy.calibrate.least_squares import RIDGES, Fit, Sums, best_fit
from dipgo_deploy.calibrate.runs import Runs
from dipgo_deploy.schedule.solver import Solver

# (number of the launch, launch, images, their latents) -> guided predictions, float32 (images, C, h, w).
Predict = Callable[[int, Launch, Group, np.ndarray], np.ndarray]
# (number of the launch, launch, all images with their latents): told before the first prediction of a launch.
Prepare = Callable[[int, Launch, Iterable[tuple[Group, np.ndarray]]], None]


@dataclass(frozen=True)
class FittedRows:
    """Rows of these launches, with what they were fitted on.

    fits: one a launch, and that of the final latent; weights of the initial noise, the new predictions and the draws.
    predictions: the new ones, each float32 (images, C, h, w).
    sums: of the images that were fitted to, one a fit.
    """

    launches: tuple[Launch, ...]
    fits: tuple[Fit, ...]
    predictions: tuple[np.ndarray, ...]
    sums: tuple[Sums, ...]

    @property
    def residual(self) -> float:
        """Relative error of the final latent on images held aside."""
        return self.fits[-1].residual

    def final(self, runs: Runs, group: Group) -> np.ndarray:
        """Final latents of these images, float32 (images, C, h, w)."""
        columns = [runs.noises[0], *self.predictions, *runs.noises[1:]]
        return _sum(columns, self.fits[-1], group)


@dataclass(frozen=True)
class _Known:
    fit: Fit
    sums: Sums
    prediction: np.ndarray


class KnownLaunches:
    """Launches that were fitted before: two sets of launches that begin alike are the same up to where they differ.

    Only for launches that compute every block: what another predicts depends on what its blocks read.
    """

    def __init__(self, limit: int) -> None:
        """limit: predictions that are kept at most."""
        self._limit = limit
        self._known: OrderedDict[tuple[Launch, ...], _Known] = OrderedDict()

    def get(self, launches: tuple[Launch, ...]) -> _Known | None:
        """The last of these launches, after those before it."""
        if launches in self._known:
            self._known.move_to_end(launches)
        return self._known.get(launches)

    def put(self, launches: tuple[Launch, ...], known: _Known) -> None:
        """Keep it, in place of the one that was not asked for the longest."""
        self._known[launches] = known
        while len(self._known) > self._limit:
            self._known.popitem(last=False)


def fit_rows(
    runs: Runs,
    launches: Sequence[Launch],
    predict: Predict,
    *,
    groups: Sequence[Group] | None = None,
    ridges: Sequence[float] = RIDGES,
    known: KnownLaunches | None = None,
    prepare: Prepare | None = None,
    report: Report = lambda stage, done, total: None,
) -> FittedRows:
    """Fit the rows of ``launches``, in order, each on the predictions of those before it.

    Args:
        runs: the full runs, with the latents of the launches' targets.
        launches: what is launched.
        predict: makes predictions.
        groups: fit to these images only.
        ridges: to choose from on images held aside, for each row.
        known: launches fitted before on the same images.
        prepare: told the latents of each launch before it predicts.
        report: told (stage, done, total).

    Raises:
        UserError: a prediction that is not finite.
    """
    groups = runs.groups if groups is None else groups
    total = len(launches) + 1
    fits: list[Fit] = []
    sums: list[Sums] = []
    predictions: list[np.ndarray] = []
    for place, launch in enumerate(launches):
        report("fitting launches", place, total)
        prefix = tuple(launches[: place + 1])
        found = known.get(prefix) if known is not None else None
        if found is None:
            columns = [runs.noises[0], *predictions, *runs.noises[1:]]
            fit, training = _fit(columns, runs.latents(launch.target), groups, ridges)
            if prepare is not None:
                prepare(place, launch, ((group, _sum(columns, fit, group)) for group in groups))
            prediction = runs.column()
            for group in groups:
                latents = _sum(columns, fit, group)
                prediction[group.rows] = finite(predict(place, launch, group, latents), f"launch {place}")
            found = _Known(fit, training, prediction)
            if known is not None:
                known.put(prefix, found)
        fits.append(found.fit)
        sums.append(found.sums)
        if launch.predicts:
            predictions.append(found.prediction)
    report("fitting launches", total - 1, total)
    fit, training = _fit([runs.noises[0], *predictions, *runs.noises[1:]], runs.final, groups, ridges)
    report("fitting launches", total, total)
    return FittedRows(tuple(launches), (*fits, fit), tuple(predictions), (*sums, training))


def solver_of(
    launches: Sequence[Launch],
    weights: Sequence[Sequence[float] | np.ndarray],
    noises: int,
    provenance: Mapping[str, Any],
) -> Solver:
    """A solver of rows that have columns for new predictions only.

    weights: one row a launch and the final one, each of the initial noise, new predictions and ``noises`` draws.
    """
    predicting = [place for place, launch in enumerate(launches) if launch.predicts]
    rows = []
    for row in weights:
        known = len(row) - 1 - noises
        whole = [0.0] * (1 + len(launches) + noises)
        whole[0] = float(row[0])
        for place, weight in zip(predicting[:known], row[1 : 1 + known], strict=True):
            whole[1 + place] = float(weight)
        for number in range(noises):
            whole[1 + len(launches) + number] = float(row[1 + known + number])
        rows.append(whole)
    return Solver.model_validate(
        {
            "timesteps": [launch.timestep for launch in launches],
            "rows": rows[:-1],
            "final": rows[-1],
            "noises": noises,
            "provenance": provenance,
        }
    )


def _fit(
    columns: Sequence[np.ndarray], target: np.ndarray, groups: Sequence[Group], ridges: Sequence[float]
) -> tuple[Fit, Sums]:
    training, aside = Sums(len(columns)), Sums(len(columns))
    for group in groups:
        wide = np.stack([column[group.rows].reshape(-1) for column in columns], axis=1)
        (aside if group.held_aside else training).add(wide, target[group.rows].reshape(-1))
    return best_fit(training, aside, ridges), training


def _sum(columns: Sequence[np.ndarray], fit: Fit, group: Group) -> np.ndarray:
    history = np.stack([column[group.rows] for column in columns]).astype(np.float64)
    latents: np.ndarray = np.tensordot(fit.weights, history, axes=1).astype(np.float32)
    return latents
