"""A schedule's own solver, fitted launch by launch: numpy only, whatever makes the predictions.

The schedule is run on calibration images. The latent of each launch is the weighted sum of what that run has so far
(initial noise, its own predictions, noise draws) that is closest to the full run's latent at the same timestep, over
all images and pixels; the last row is fitted to the full run's final latent. One weight a column, no gradients.
Related: S4S (arXiv 2502.17423) and L2P (2604.26365) fit weights of past predictions.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_deploy._version import __version__
from dipgo_deploy.calibrate.core import FIRST_SEED, CalibrationOptions, Group, Launch, Model, Report
from dipgo_deploy.calibrate.rows import FittedRows, Prepare, fit_rows, solver_of
from dipgo_deploy.calibrate.runs import Runs
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import sole_user
from dipgo_deploy.schedule.solver import Solver


@dataclass(frozen=True)
class Refined:
    """Rows and timesteps that are better than the fitted ones.

    Attributes:
        launches: with their timesteps.
        weights: as ``FittedRows.fits`` has them.
        residual: relative error of the final latent on images held aside.
        facts: for the provenance.
    """

    launches: tuple[Launch, ...]
    weights: tuple[np.ndarray, ...]
    residual: float
    facts: Mapping[str, Any]


# Better rows and timesteps than the fitted ones, or None.
Refine = Callable[[Runs, FittedRows], Refined | None]


def opened_runs(
    model: Model,
    groups: Sequence[Group],
    evaluations: Collection[int],
    options: CalibrationOptions,
    columns: int,
    *,
    folder: Path,
    settings: Mapping[str, Any],
    resume: bool = False,
    report: Report = lambda stage, done, total: None,
) -> Runs:
    """The full runs of a calibration; ``folder`` is locked by the caller. See ``Runs``.

    columns: how many noises and predictions will be kept of each image.
    """
    each = 4 * math.prod(model.sample_shape) * (len(evaluations) + 1 + columns) + model.kept_bytes
    if not resume:  # else much of it is there already
        _check_room(folder, options.images, each)
    own = {name: getattr(options, name) for name in ("images", "held_aside", "batch", "seed")}
    whole = {**settings, **own, "sample_shape": list(model.sample_shape)}
    return Runs(model, groups, evaluations, folder, whole, resume=resume, report=report)


def fitted_solver(
    model: Model,
    launches: Sequence[Launch],
    groups: Sequence[Group],
    options: CalibrationOptions,
    *,
    folder: Path,
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    refine: Refine | None = None,
    prepare: Prepare | None = None,
    resume: bool = False,
    report: Report = lambda stage, done, total: None,
) -> Solver:
    """Rows and timesteps of these launches, fitted to the model's full runs.

    Args:
        model: what makes full runs and predictions.
        launches: what is launched.
        groups: the images.
        options: see there.
        folder: for what is kept of each image.
        settings: what has to be the same to go on with what is there.
        provenance: what is known of model and reference; images, seeds, ridges and residuals are added to it.
        refine: tried on the fitted rows.
        prepare: see ``fit_rows``.
        resume: go on from what is in ``folder``.
        report: told (stage, done, total).

    Raises:
        UserError: a folder that cannot be used, or a run whose latents are not finite.
    """
    with sole_user(folder, "--checkpoint"):
        evaluations = {launch.target for launch in launches}
        columns = 1 + model.noises + len(launches)
        runs = opened_runs(
            model, groups, evaluations, options, columns, folder=folder, settings=settings, resume=resume, report=report
        )
        return fitted_to(runs, model, launches, options, provenance, refine, report, prepare)


def fitted_to(
    runs: Runs,
    model: Model,
    launches: Sequence[Launch],
    options: CalibrationOptions,
    provenance: Mapping[str, Any],
    refine: Refine | None = None,
    report: Report = lambda stage, done, total: None,
    prepare: Prepare | None = None,
) -> Solver:
    """As ``fitted_solver``, where the full runs are there."""
    rows = fit_rows(runs, launches, model.predict, ridges=options.ridges, prepare=prepare, report=report)
    better = refine(runs, rows) if refine is not None else None
    first = FIRST_SEED + options.seed
    facts = {
        "method": "least squares",
        **provenance,
        "images": options.images,
        "held_aside": options.aside,
        "seeds": [first, first + options.images - 1],
        "tool_version": __version__,
        "ridges": [fit.ridge for fit in rows.fits],
        "residuals": [float(f"{fit.residual:.4g}") for fit in rows.fits],
    }
    if better is None:
        return solver_of(launches, [fit.weights for fit in rows.fits], model.noises, facts)
    refined = {**better.facts, "residual": float(f"{better.residual:.4g}")}
    facts |= {"method": "least squares, refined by gradients", "refined": refined}
    return solver_of(better.launches, better.weights, model.noises, facts)


def residual_of(solver: Solver) -> float:
    """Relative error of the final latent on the images held aside, as ``fitted_to`` recorded it."""
    known = solver.provenance
    return float(known["refined"]["residual"] if "refined" in known else known["residuals"][-1])


def _check_room(folder: Path, images: int, each: int) -> None:
    """Refuse (UserError) more than the file system has left, before anything is written."""
    free = shutil.disk_usage(folder).free
    if images * each > free:
        raise UserError(
            f"{folder}: {images} images need {images * each / 2**30:,.1f} GiB in files, and {free / 2**30:,.1f} GiB "
            "are free; give fewer --images or another --checkpoint folder"
        )
