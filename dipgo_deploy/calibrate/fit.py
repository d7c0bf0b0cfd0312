"""A schedule's own solver: the rows of its sampler matrix, fitted launch by launch to a full run.

The schedule is run on calibration images. The latent of each launch is the weighted sum of what that run has so far
(initial noise, its own predictions, noise draws) that is closest to the full run's latent at the same timestep, over
all images and pixels; the last row is fitted to the full run's final latent. One weight a column, no gradients.
Related: S4S (arXiv 2502.17423) and L2P (2604.26365) fit weights of past predictions.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipgo_deploy import __version__
from dipgo_deploy.calibrate.least_squares import RIDGES, Fit, Sums, best_fit
from dipgo_deploy.calibrate.store import Store
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import sole_user
from dipgo_deploy.schedule.document import FORMAT_VERSION, Schedule, gate_rows
from dipgo_deploy.schedule.solver import Solver
from dipgo_deploy.search.problem import Batch, Pair, Problem, with_guidance_scale
from dipgo_deploy.supernet import CacheState, run_loop

# Seeds of a calibration, of a search (from 0) and of a measurement (from a million) must not meet.
FIRST_SEED = 2_000_000

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CalibrationOptions:
    """How a schedule is calibrated.

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


@dataclass(frozen=True)
class _Launch:
    """One evaluation of the fitted schedule: its row of gates, its timestep, the evaluation of the full run whose
    latent it is to have, and whether its prediction is a new one."""

    gates: tuple[bool, ...]
    timestep: float
    target: int
    predicts: bool


@dataclass(frozen=True)
class _Group:
    """Images that go through the model together: the problem at their guidance scale, and rows of the store."""

    problem: Problem
    pairs: tuple[Pair, ...]
    rows: slice
    held_aside: bool

    @property
    def reference(self) -> Problem:
        """The problem whose full run is fitted to."""
        return self.problem.reference or self.problem

    def batch(self) -> Batch:
        """Inputs of the full run: the noises are those that its sampler draws."""
        return self.reference.batch(self.pairs)


def calibrate(
    problem: Problem,
    schedule: Schedule,
    options: CalibrationOptions | None = None,
    *,
    folder: Path | None = None,
    resume: bool = False,
    report: Report = lambda stage, done, total: None,
) -> Schedule:
    """The schedule with a solver of its own, fitted to the full run of ``problem`` (or of its reference).

    Evaluations in which no block runs are gone from it. The caches of blocks that are read later and what is kept of
    each image lie in files below ``folder`` (None: a temporary one).

    Args:
        problem: the schedule's model, sampler, number of steps and kinds of cache.
        schedule: gates for it, with a solver or without one.
        options: see there.
        folder: where a calibration that was interrupted can go on from.
        resume: go on from what is in ``folder``.
        report: told (stage, done, total).

    Raises:
        UserError: too few images, a folder that cannot be used, or a run whose latents are not finite.
    """
    options = options or CalibrationOptions()
    _check(options)
    launches = _launches(problem, schedule)
    groups = _groups(problem, options)
    reference = problem.reference or problem
    predicting = sum(launch.predicts for launch in launches)
    columns = 1 + predicting + reference.matrix.noises
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        work = folder or Path(temporary)
        stack.enter_context(sole_user(work, "--checkpoint"))
        settings = _settings(problem, schedule, options)
        rows = len(launches) + 1
        store = Store(work, settings, options.images, columns, rows, problem.sample_shape, resume=resume)
        _full_runs(groups, launches, store, report)
        fits = _fit(problem, launches, groups, store, options, work, report)
    solver = _solver(problem, launches, fits, options)
    fields = {name: getattr(schedule, name) for name in Schedule.model_fields}
    changed = {"format_version": FORMAT_VERSION, "steps": len(launches), "solver": solver}
    return Schedule.model_validate({**fields, **changed, "keep": gate_rows([launch.gates for launch in launches])})


def _check(options: CalibrationOptions) -> None:
    held = round(options.images * options.held_aside)
    if held < 1 or held >= options.images:
        raise UserError(
            f"--images {options.images}: {held} of them would be held aside: give more, so that some are left to fit "
            "and some to judge"
        )


def _launches(problem: Problem, schedule: Schedule) -> list[_Launch]:
    analysis = problem.costs.analyse(schedule.gates)
    own = problem.matrix.timesteps
    full = (problem.reference or problem).matrix.timesteps
    found = []
    for step in sorted(analysis.launches):
        if not any(schedule.gates[step]):
            continue  # caches alone: with the solver's own rows there is no need for such a prediction
        target = int(np.abs(full - own[step]).argmin())
        found.append(_Launch(schedule.gates[step], float(full[target]), target, step in analysis.predicts))
    return found


def _groups(problem: Problem, options: CalibrationOptions) -> list[_Group]:
    """Every image in one group; a group has one guidance scale and is held aside or not."""
    count = len(problem.conditions)
    scales: Sequence[float | None] = options.guidance_scales or (problem.guidance_scale,)
    at_scale = {
        scale: problem if scale == problem.guidance_scale else with_guidance_scale(problem, scale)
        for scale in dict.fromkeys(scales)
        if scale is not None
    }
    held = round(options.images * options.held_aside)
    kinds: dict[tuple[float | None, bool], list[Pair]] = {}
    for place in range(options.images):
        pair = Pair(place % count, FIRST_SEED + options.seed + place)
        # The scale changes after every round of conditions, so that each condition meets each scale.
        scale = scales[place // count % len(scales)]
        kinds.setdefault((scale, place >= options.images - held), []).append(pair)
    groups = []
    first = 0
    for (scale, aside), pairs in kinds.items():
        for start in range(0, len(pairs), options.batch):
            part = tuple(pairs[start : start + options.batch])
            at = problem if scale is None else at_scale[scale]
            groups.append(_Group(at, part, slice(first, first + len(part)), aside))
            first += len(part)
    return groups


def _settings(problem: Problem, schedule: Schedule, options: CalibrationOptions) -> dict[str, Any]:
    digest = hashlib.sha256(schedule.to_json().encode()).hexdigest()
    reference = (problem.reference or problem).target.sampler
    return {
        "schedule": digest,
        "reference": f"{reference.class_name}:{reference.num_inference_steps}",
        "images": options.images,
        "guidance_scales": list(_scales(problem, options)),
        "held_aside": options.held_aside,
        "batch": options.batch,
        "seed": options.seed,
        "conditions": _conditions_digest(problem),
        "sample_shape": list(problem.sample_shape),
    }


@torch.no_grad()
def _full_runs(groups: Sequence[_Group], launches: Sequence[_Launch], store: Store, report: Report) -> None:
    """The latents of the full run, for all images whose targets are not there yet."""
    total = groups[-1].rows.stop
    wanted: dict[int, list[int]] = {}
    for row, launch in enumerate(launches):
        wanted.setdefault(launch.target, []).append(row)
    report("full runs", store.done, total)
    for group in groups:
        if group.rows.stop <= store.done:
            continue
        batch = group.batch()
        problem = group.reference

        def record(evaluation: Any, rows: slice = group.rows) -> None:
            for row in wanted.get(evaluation.step, ()):
                store.targets[rows, row] = _finite(evaluation.model_input, "the full run")

        final = run_loop(
            problem.supernet,
            problem.scheduler,
            [[True] * len(problem.target.blocks)] * problem.steps,
            batch.latents,
            batch.conditions,
            num_inference_steps=problem.options.steps,
            guidance_scale=problem.guidance_scale,
            noises=batch.noises,
            set_timesteps_kwargs=problem.set_timesteps,
            record=record,
            keep=lambda step: (),
        )
        store.targets[group.rows, len(launches)] = _finite(final, "the full run")
        store.targets_done(group.rows.stop)
        report("full runs", group.rows.stop, total)


def _fit(
    problem: Problem,
    launches: Sequence[_Launch],
    groups: Sequence[_Group],
    store: Store,
    options: CalibrationOptions,
    folder: Path,
    report: Report,
) -> list[tuple[list[int], Fit]]:
    """For each launch and the final latent, the columns that may be read and the fit to them."""
    noises = (problem.reference or problem).matrix.noises
    columns = [0, *range(store.history.shape[1] - noises, store.history.shape[1])]
    for group in groups:
        batch = group.batch()
        store.history[group.rows, 0] = batch.latents.cpu().numpy()
        for place, noise in zip(columns[1:], batch.noises, strict=True):
            store.history[group.rows, place] = noise.cpu().numpy()
    runner = _Runner(problem, launches, groups, folder)
    found = []
    predicted = 0
    for row in range(len(launches) + 1):
        report("fitting launches", row, len(launches) + 1)
        readable = [0, *range(1, 1 + predicted), *columns[1:]]
        fit = _fit_row(groups, store, row, readable, options)
        found.append((readable, fit))
        if row == len(launches):
            break
        for latents, group in _latents(groups, store, readable, fit):
            prediction = runner.predict(row, group, latents)
            if launches[row].predicts:
                store.history[group.rows, 1 + predicted] = _finite(prediction, f"launch {row}")
        predicted += launches[row].predicts
    report("fitting launches", len(launches) + 1, len(launches) + 1)
    return found


def _fit_row(
    groups: Sequence[_Group], store: Store, row: int, readable: Sequence[int], options: CalibrationOptions
) -> Fit:
    training, aside = Sums(len(readable)), Sums(len(readable))
    for group in groups:
        history = store.history[group.rows][:, readable]
        wide = np.moveaxis(history, 1, -1).reshape(-1, len(readable))
        (aside if group.held_aside else training).add(wide, store.targets[group.rows, row].reshape(-1))
    return best_fit(training, aside, options.ridges)


def _latents(
    groups: Sequence[_Group], store: Store, readable: Sequence[int], fit: Fit
) -> Iterator[tuple[torch.Tensor, _Group]]:
    for group in groups:
        history = store.history[group.rows][:, readable].astype(np.float64)
        yield torch.from_numpy(np.tensordot(history, fit.weights, axes=(1, 0)).astype(np.float32)), group


class _Runner:
    """The schedule's evaluations, for all groups side by side; caches that are read later lie in files."""

    def __init__(self, problem: Problem, launches: Sequence[_Launch], groups: Sequence[_Group], folder: Path) -> None:
        from dipgo_deploy.export.mapped import MappedCaches

        self._launches = launches
        self._names = [block.name for block in problem.target.blocks]
        self._supernet = problem.source.supernet(problem.options.granularity, problem.cache_kinds)
        if not all(all(launch.gates) for launch in launches):
            self._supernet.store = MappedCaches(folder)
        self._states = {group.rows.start: CacheState() for group in groups}

    @torch.no_grad()
    def predict(self, row: int, group: _Group, latents: torch.Tensor) -> torch.Tensor:
        """The guided prediction (B, C, h, w) of launch ``row``."""
        problem, launch = group.problem, self._launches[row]
        conditions = group.reference.conditions_of(group.pairs)
        halves = 1 if problem.guidance_scale is None else 2
        model_input = torch.cat([latents.to(problem.device)] * halves)
        read = {name for later in self._launches[row + 1 :] for name in self._removed(later.gates)}
        output, after = self._supernet.step(
            model_input,
            torch.full((len(model_input),), launch.timestep, device=problem.device),
            conditions,
            launch.gates,
            self._states[group.rows.start],
            row,
            read,
        )
        self._states[group.rows.start] = after
        raw = output[:, : latents.shape[1]].float()
        if problem.guidance_scale is None:
            return raw
        unconditional, conditional = raw.chunk(2)
        return unconditional + problem.guidance_scale * (conditional - unconditional)

    def _removed(self, gates: Sequence[bool]) -> Iterator[str]:
        return (name for name, kept in zip(self._names, gates, strict=True) if not kept)


def _solver(
    problem: Problem,
    launches: Sequence[_Launch],
    fits: Sequence[tuple[list[int], Fit]],
    options: CalibrationOptions,
) -> Solver:
    reference = problem.reference or problem
    noises = reference.matrix.noises
    predicting = [place for place, launch in enumerate(launches) if launch.predicts]
    stored = 1 + len(predicting)
    # From columns of the store, where only new predictions have one, to those of the solver.
    place_of = {0: 0, **{1 + number: 1 + place for number, place in enumerate(predicting)}}
    place_of |= {stored + number: 1 + len(launches) + number for number in range(noises)}
    rows = []
    for readable, fit in fits:
        row = [0.0] * (1 + len(launches) + noises)
        for column, weight in zip(readable, fit.weights, strict=True):
            row[place_of[column]] = float(weight)
        rows.append(row)
    sampler = reference.target.sampler
    height, width = problem.sample_shape[1:]
    return Solver.model_validate(
        {
            "timesteps": [launch.timestep for launch in launches],
            "rows": rows[:-1],
            "final": rows[-1],
            "noises": noises,
            "provenance": {
                "method": "least squares",
                "reference": {"sampler": sampler.class_name, "num_inference_steps": sampler.num_inference_steps},
                "images": options.images,
                "held_aside": round(options.images * options.held_aside),
                "seeds": [FIRST_SEED + options.seed, FIRST_SEED + options.seed + options.images - 1],
                "conditions": len(problem.conditions),
                "conditions_sha256": _conditions_digest(problem),
                "guidance_scales": list(_scales(problem, options)),
                "latent": [height, width],
                "dtype": "fp32",
                "backend": "torch",
                "ridges": [fit.ridge for _, fit in fits],
                "residuals": [float(f"{fit.residual:.4g}") for _, fit in fits],
                "tool_version": __version__,
            },
        }
    )


def _scales(problem: Problem, options: CalibrationOptions) -> tuple[float, ...]:
    own = () if problem.guidance_scale is None else (problem.guidance_scale,)
    return options.guidance_scales or own


def _conditions_digest(problem: Problem) -> str:
    return hashlib.sha256("\n".join(problem.names).encode()).hexdigest()


def _finite(tensor: torch.Tensor, where: str) -> np.ndarray:
    array = tensor.float().cpu().numpy()
    if not np.isfinite(array).all():
        raise UserError(f"{where}: a value is not finite, so nothing can be fitted: look at the model and its weights")
    return array
