"""A schedule's own solver, fitted launch by launch: numpy only, whatever makes the predictions.

The schedule is run on calibration images. The latent of each launch is the weighted sum of what that run has so far
(initial noise, its own predictions, noise draws) that is closest to the full run's latent at the same timestep, over
all images and pixels; the last row is fitted to the full run's final latent. One weight a column, no gradients.
Related: S4S (arXiv 2502.17423) and L2P (2604.26365) fit weights of past predictions.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dipgo_deploy._version import __version__
from dipgo_deploy.calibrate.least_squares import RIDGES, Fit, Sums, best_fit
from dipgo_deploy.calibrate.store import Store
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import sole_user
from dipgo_deploy.runtime.noise import TorchNoise
from dipgo_deploy.schedule.solver import Solver
from dipgo_deploy.search.samples import Pair

# Seeds of a calibration, of a search (from 0) and of a measurement (from a million) must not meet.
FIRST_SEED = 2_000_000

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CalibrationOptions:
    """How a schedule is calibrated.

    Attributes:
        images: how many, all conditions in turn.
        guidance_scales: each image has one of them, in turn; none: the problem's own.
        held_aside: share of the images that choose the ridge and give the residuals.
        ridges: relative to the mean squared column; chosen for each launch.
        batch: images that go through the model at a time.
        seed: of the first image's noise, counted from ``FIRST_SEED``.
    """

    images: int = 200
    guidance_scales: tuple[float, ...] = ()
    held_aside: float = 0.2
    ridges: tuple[float, ...] = RIDGES
    batch: int = 20
    seed: int = 0

    @property
    def aside(self) -> int:
        """How many images are held aside."""
        return round(self.images * self.held_aside)

    def check(self) -> None:
        """Refuse (UserError) too few images, before anything is loaded."""
        if self.aside < 1 or self.aside >= self.images:
            raise UserError(
                f"--images {self.images}: {self.aside} of them would be held aside; give more, so that some are left "
                "to fit and some to judge"
            )


@dataclass(frozen=True)
class Launch:
    """One evaluation of the fitted schedule.

    Attributes:
        timestep: what the denoiser is told.
        target: the evaluation of the full run whose latent it is to have.
        predicts: whether its prediction is a new one.
    """

    timestep: float
    target: int
    predicts: bool


@dataclass(frozen=True)
class Group:
    """Images that go through the model together.

    Attributes:
        pairs: the images.
        scale: their guidance scale, None without guidance.
        rows: theirs of the store.
        held_aside: whether they choose the ridge, instead of being fitted to.
    """

    pairs: tuple[Pair, ...]
    scale: float | None
    rows: slice
    held_aside: bool


class Model(Protocol):
    """What is calibrated. Latents and predictions are float32 (images, C, h, w)."""

    sample_shape: tuple[int, int, int]
    noises: int  # that a full run draws after the initial one
    kept_bytes: int  # of each image between two launches, in files

    def full_run(self, group: Group, wanted: Collection[int]) -> tuple[Mapping[int, np.ndarray], np.ndarray]:
        """The full run of these images: the latents of the ``wanted`` evaluations, and the final ones."""

    def predict(self, place: int, launch: Launch, group: Group, latents: np.ndarray) -> np.ndarray:
        """The guided prediction of ``launch``, number ``place``, from these latents, after those before it."""


def nearest(timesteps: Sequence[float] | np.ndarray, timestep: float) -> int:
    """The evaluation of the full run whose timestep is the nearest."""
    return int(np.abs(np.asarray(timesteps, np.float64) - timestep).argmin())


def grouped(conditions: int, scales: Sequence[float | None], options: CalibrationOptions) -> list[Group]:
    """Every image in one group; a group has one guidance scale and is held aside or not."""
    kinds: dict[tuple[float | None, bool], list[Pair]] = {}
    for place in range(options.images):
        pair = Pair(place % conditions, FIRST_SEED + options.seed + place)
        # The scale changes after every round of conditions, so that each condition meets each scale.
        scale = scales[place // conditions % len(scales)]
        kinds.setdefault((scale, place >= options.images - options.aside), []).append(pair)
    groups = []
    first = 0
    for (scale, aside), pairs in kinds.items():
        for start in range(0, len(pairs), options.batch):
            part = tuple(pairs[start : start + options.batch])
            groups.append(Group(part, scale, slice(first, first + len(part)), aside))
            first += len(part)
    return groups


def fitted_solver(
    model: Model,
    launches: Sequence[Launch],
    groups: Sequence[Group],
    options: CalibrationOptions,
    *,
    folder: Path,
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    resume: bool = False,
    report: Report = lambda stage, done, total: None,
) -> Solver:
    """Rows and timesteps of these launches, fitted to the model's full runs.

    Args:
        folder: for what is kept of each image.
        settings: what has to be the same to go on with what is there.
        provenance: what is known of model and reference; images, seeds, ridges and residuals are added to it.

    Raises:
        UserError: a folder that cannot be used, or a run whose latents are not finite.
    """
    columns = 1 + sum(launch.predicts for launch in launches) + model.noises
    own = {name: getattr(options, name) for name in ("images", "held_aside", "batch", "seed")}
    settings = {**settings, **own, "sample_shape": list(model.sample_shape)}
    with sole_user(folder, "--checkpoint"):
        shape = model.sample_shape
        each = 4 * math.prod(shape) * (columns + len(launches) + 1) + model.kept_bytes
        if not resume:  # else much of it is there already
            _check_room(folder, options.images, each)
        store = Store(folder, settings, options.images, columns, len(launches) + 1, shape, resume=resume)
        _full_runs(model, groups, launches, store, report)
        fits = _fit(model, launches, groups, store, options, report)
    first = FIRST_SEED + options.seed
    images = {
        "images": options.images,
        "held_aside": options.aside,
        "seeds": [first, first + options.images - 1],
    }
    return _solver(model, launches, fits, {**provenance, **images, "tool_version": __version__})


def _check_room(folder: Path, images: int, each: int) -> None:
    """Refuse (UserError) more than the file system has left, before anything is written."""
    free = shutil.disk_usage(folder).free
    if images * each > free:
        raise UserError(
            f"{folder}: {images} images need {images * each / 2**30:,.1f} GiB in files, and {free / 2**30:,.1f} GiB "
            "are free; give fewer --images or another --checkpoint folder"
        )


def conditions_digest(names: Sequence[str]) -> str:
    """sha256 of the prompts, or of the classes' numbers as text."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _full_runs(model: Model, groups: Sequence[Group], launches: Sequence[Launch], store: Store, report: Report) -> None:
    """The latents of the full run, for all images whose targets are not there yet."""
    total = groups[-1].rows.stop
    wanted: dict[int, list[int]] = {}
    for row, launch in enumerate(launches):
        wanted.setdefault(launch.target, []).append(row)
    report("full runs", store.done, total)
    for group in groups:
        if group.rows.stop <= store.done:
            continue
        latents, final = model.full_run(group, wanted.keys())
        for step, rows in wanted.items():
            for row in rows:
                store.targets[group.rows, row] = _finite(latents[step], "the full run")
        store.targets[group.rows, len(launches)] = _finite(final, "the full run")
        store.targets_done(group.rows.stop)
        report("full runs", group.rows.stop, total)


def _fit(
    model: Model,
    launches: Sequence[Launch],
    groups: Sequence[Group],
    store: Store,
    options: CalibrationOptions,
    report: Report,
) -> list[tuple[list[int], Fit]]:
    """For each launch and the final latent, the columns that may be read and the fit to them."""
    columns = [0, *range(store.history.shape[1] - model.noises, store.history.shape[1])]
    for group in groups:
        for place, noise in zip(columns, noise_of(group.pairs, model.sample_shape, 1 + model.noises), strict=True):
            store.history[group.rows, place] = noise
    fits = []
    predicted = 0
    for row in range(len(launches) + 1):
        report("fitting launches", row, len(launches) + 1)
        readable = [0, *range(1, 1 + predicted), *columns[1:]]
        fit = _fit_row(groups, store, row, readable, options)
        fits.append((readable, fit))
        if row == len(launches):
            break
        for latents, group in _latents(groups, store, readable, fit):
            prediction = model.predict(row, launches[row], group, latents)
            if launches[row].predicts:
                store.history[group.rows, 1 + predicted] = _finite(prediction, f"launch {row}")
        predicted += launches[row].predicts
    report("fitting launches", len(launches) + 1, len(launches) + 1)
    return fits


def noise_of(pairs: Sequence[Pair], shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    """The first ``count`` draws of each image's seed, each float32 (images, *shape)."""
    streams = [TorchNoise(pair.seed) for pair in pairs]
    return [np.concatenate([stream.randn((1, *shape)) for stream in streams]) for _ in range(count)]


def _fit_row(
    groups: Sequence[Group], store: Store, row: int, readable: Sequence[int], options: CalibrationOptions
) -> Fit:
    training, aside = Sums(len(readable)), Sums(len(readable))
    for group in groups:
        history = store.history[group.rows][:, readable]
        wide = np.moveaxis(history, 1, -1).reshape(-1, len(readable))
        (aside if group.held_aside else training).add(wide, store.targets[group.rows, row].reshape(-1))
    return best_fit(training, aside, options.ridges)


def _latents(
    groups: Sequence[Group], store: Store, readable: Sequence[int], fit: Fit
) -> Iterator[tuple[np.ndarray, Group]]:
    for group in groups:
        history = store.history[group.rows][:, readable].astype(np.float64)
        yield np.tensordot(history, fit.weights, axes=(1, 0)).astype(np.float32), group


def _solver(
    model: Model, launches: Sequence[Launch], fits: Sequence[tuple[list[int], Fit]], provenance: Mapping[str, Any]
) -> Solver:
    predicting = [place for place, launch in enumerate(launches) if launch.predicts]
    stored = 1 + len(predicting)
    # From columns of the store, where only new predictions have one, to those of the solver.
    place_of = {0: 0, **{1 + number: 1 + place for number, place in enumerate(predicting)}}
    place_of |= {stored + number: 1 + len(launches) + number for number in range(model.noises)}
    rows = []
    for readable, fit in fits:
        row = [0.0] * (1 + len(launches) + model.noises)
        for column, weight in zip(readable, fit.weights, strict=True):
            row[place_of[column]] = float(weight)
        rows.append(row)
    return Solver.model_validate(
        {
            "timesteps": [launch.timestep for launch in launches],
            "rows": rows[:-1],
            "final": rows[-1],
            "noises": model.noises,
            "provenance": {
                "method": "least squares",
                **provenance,
                "ridges": [fit.ridge for _, fit in fits],
                "residuals": [float(f"{fit.residual:.4g}") for _, fit in fits],
            },
        }
    )


def _finite(array: np.ndarray, where: str) -> np.ndarray:
    if not np.isfinite(array).all():
        raise UserError(f"{where}: a value is not finite, so nothing can be fitted; look at the model and its weights")
    return array
