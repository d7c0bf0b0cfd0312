"""Schedules with solvers of their own, fitted with the predictions of the model in torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dipgo_deploy.calibrate.core import (
    CalibrationOptions,
    Launch,
    Report,
    conditions_digest,
    grouped,
    nearest,
)
from dipgo_deploy.calibrate.fitted import Refine, fitted_solver, fitted_to, opened_runs
from dipgo_deploy.calibrate.forecast_weights import ReadWeights
from dipgo_deploy.calibrate.launch_search import KNOWN, LaunchSearchOptions, check_counts, search_launches
from dipgo_deploy.calibrate.refine import RefineOptions, refined
from dipgo_deploy.calibrate.rows import Prepare
from dipgo_deploy.calibrate.supernet_model import SupernetModel
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import sole_user
from dipgo_deploy.schedule.document import Gates, Schedule
from dipgo_deploy.schedule.forecast import Forecast, RuleForecast, check_fitted
from dipgo_deploy.schedule.solver import Solver
from dipgo_deploy.search.problem import Problem


def calibrate(
    problem: Problem,
    schedule: Schedule,
    options: CalibrationOptions | None = None,
    *,
    refine: RefineOptions | None = None,
    fit_forecast: bool = False,
    folder: Path | None = None,
    resume: bool = False,
    report: Report = lambda stage, done, total: None,
) -> Schedule:
    """The schedule with a solver of its own, fitted to the full run of ``problem`` (or of its reference).

    Evaluations in which no block runs are gone from it, unless a forecast makes something of them. The caches of
    blocks that are read later and what is kept of each image lie in files below ``folder`` (None: a temporary one).

    Args:
        problem: the schedule's model, sampler, number of steps, kinds of cache and forecast (see ``with_schedule``).
        schedule: gates for it, with a solver or without one.
        options: see there.
        refine: how the fit is refined by gradients, None: not at all.
        fit_forecast: in place of the weights of the schedule's forecast, fit others to as many stored values.
        folder: where a calibration that was interrupted can go on from.
        resume: go on from what is in ``folder``.
        report: told (stage, done, total).

    Raises:
        UserError: too few images, a folder that cannot be used, or a run whose latents are not finite.
    """
    options = options or CalibrationOptions()
    options.check()
    case = launched(problem, schedule, fit_forecast=fit_forecast)
    scales: Sequence[float | None] = options.guidance_scales or (problem.guidance_scale,)
    facts = _facts(problem, scales)
    with TemporaryDirectory() as temporary:
        work = folder or Path(temporary)
        model = SupernetModel(problem, case.gates, scales, work, case.reads, case.guidance)
        solver = fitted_solver(
            model,
            case.launches,
            grouped(len(problem.conditions), scales, options),
            options,
            folder=work,
            settings={
                **facts,
                "schedule": hashlib.sha256(schedule.to_json().encode()).hexdigest(),
                **({"fit_forecast": True} if fit_forecast else {}),
            },
            provenance=facts,
            refine=_refine(model, refine, report),
            prepare=case.prepare(model),
            resume=resume,
            report=report,
        )
    return case.fitted(schedule, solver, options)


@dataclass(frozen=True)
class Launched:
    """What a schedule launches, as a calibration runs it.

    Attributes:
        gates: one row a launch.
        launches: the launches.
        reads: what their removed blocks read; None: the value that they stored last.
        guidance: how much each has of it; None: all.
    """

    gates: Gates
    launches: tuple[Launch, ...]
    reads: Forecast | ReadWeights | None
    guidance: tuple[float, ...] | None = None

    def prepare(self, model: SupernetModel) -> Prepare | None:
        """What has to be done before each launch predicts."""
        return partial(self.reads.fit, model) if isinstance(self.reads, ReadWeights) else None

    def fitted(self, schedule: Schedule, solver: Solver, options: CalibrationOptions) -> Schedule:
        """The schedule of these launches with what was fitted."""
        forecast = self.reads
        if isinstance(forecast, ReadWeights):
            forecast = forecast.forecast({"images": options.images, "held_aside": options.aside})
        return schedule.with_solver(solver, self.gates, self.guidance).with_forecast(forecast)


def launched(problem: Problem, schedule: Schedule, *, fit_forecast: bool = False) -> Launched:
    """What the schedule launches; ``problem`` has its forecast. fit_forecast: see ``calibrate``.

    Raises:
        UserError: ``fit_forecast`` for a schedule without a forecast by a rule.
    """
    steps, launches = launches_of(problem, schedule.gates)
    reads: Forecast | ReadWeights | None = None if schedule.forecast is None else schedule.forecast.at(steps)
    if fit_forecast:
        if not isinstance(reads, RuleForecast):
            raise UserError("the schedule has no forecast by a rule, whose order says how many values are read")
        check_fitted(schedule.conditional_only)
        reads = ReadWeights(reads.order + 1, len(problem.target.blocks))
    guidance = None if schedule.guidance is None else tuple(schedule.guidance[step] for step in steps)
    return Launched(tuple(schedule.gates[step] for step in steps), tuple(launches), reads, guidance)


def calibrated_launches(
    problem: Problem,
    counts: Sequence[int],
    options: CalibrationOptions | None = None,
    *,
    search: LaunchSearchOptions | None = None,
    refine: RefineOptions | None = None,
    folder: Path | None = None,
    resume: bool = False,
    report: Report = lambda stage, done, total: None,
    found: Callable[[int, Schedule], None] = lambda count, schedule: None,
) -> dict[int, Schedule]:
    """For each number of launches the whole launches that come closest to the full run, with their fitted solver.

    Args:
        problem: model and sampler; its reference's full run is fitted to, if it has one.
        counts: numbers of launches.
        options: see there.
        search: see there.
        refine: how each fit is refined by gradients, None: not at all.
        folder: for full runs, where an interrupted search can go on from.
        resume: go on from what is in ``folder``.
        report: told (stage, done, total).
        found: told each schedule when it is there.

    Raises:
        UserError: more launches than the full run has, too few images, a folder that cannot be used, or latents that
            are not finite.
    """
    options = options or CalibrationOptions()
    options.check()
    full = [float(timestep) for timestep in (problem.reference or problem).matrix.timesteps]
    check_counts(counts, len(full))
    scales: Sequence[float | None] = options.guidance_scales or (problem.guidance_scale,)
    facts = _facts(problem, scales)
    blocks = len(problem.target.blocks)
    whole: dict[int, Schedule] = {}
    with ExitStack() as stack:
        work = folder or Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(sole_user(work, "--checkpoint"))
        model = SupernetModel(problem, ((True,) * blocks,) * max(counts), scales, work)
        groups = grouped(len(problem.conditions), scales, options)
        settings = {**facts, "model": problem.target.model.config_hash}
        columns = 1 + model.noises + max(counts) + KNOWN
        runs = opened_runs(
            model,
            groups,
            range(len(full)),
            options,
            columns,
            folder=work,
            settings=settings,
            resume=resume,
            report=report,
        )
        searched = search_launches(runs, model.predict, full, counts, search or LaunchSearchOptions(), report)
        for count, (launches, tried) in searched:
            provenance = {**facts, "searched": {"fits": tried}}
            solver = fitted_to(runs, model, launches, options, provenance, _refine(model, refine, report), report)
            gates: Gates = ((True,) * blocks,) * count
            parameters = {"launches": count, "guidance_scale": problem.guidance_scale}
            schedule = problem.target.schedule(((True,) * blocks,) * problem.steps, "launch search", parameters)
            whole[count] = schedule.with_solver(solver, gates)
            found(count, whole[count])
    return whole


def _refine(model: SupernetModel, options: RefineOptions | None, report: Report) -> Refine | None:
    return None if options is None else partial(refined, model, options=options, report=report)


def launches_of(problem: Problem, gates: Gates) -> tuple[list[int], list[Launch]]:
    """The launches of gates (`Costs.width` a row) with their evaluations; without a forecast, those in which no block
    runs are left out."""
    blocks = len(problem.target.blocks)
    analysis = problem.costs.analyse(gates)
    own = problem.matrix.timesteps
    full = (problem.reference or problem).matrix.timesteps
    steps, launches = [], []
    for step in sorted(analysis.launches):
        if not any(gates[step][:blocks]) and problem.costs.forecast is None:
            continue  # caches alone: with the solver's own rows there is no need for such a prediction
        target = nearest(full, own[step])
        steps.append(step)
        launches.append(Launch(float(full[target]), target, step in analysis.predicts))
    return steps, launches


def _facts(problem: Problem, scales: Sequence[float | None]) -> dict[str, Any]:
    """What a fit is made to, and on what, but for the images."""
    sampler = (problem.reference or problem).target.sampler
    return {
        "reference": {"sampler": sampler.class_name, "num_inference_steps": sampler.num_inference_steps},
        "conditions": len(problem.conditions),
        "conditions_sha256": conditions_digest(problem.names),
        "guidance_scales": [scale for scale in scales if scale is not None],
        "latent": list(problem.sample_shape[-2:]),
        "dtype": "fp32",
        "backend": "torch",
    }
