"""Search, calibration, judgement and export of a model, one after the other within a number of minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dipgo_deploy import arguments
from dipgo_deploy.bench.quality import Row, measure, schedule_cases
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.staging import check_target, remove_leftovers
from dipgo_deploy.calibrate.core import CalibrationOptions
from dipgo_deploy.calibrate.fit import calibrated_launches
from dipgo_deploy.calibrate.launch_search import LaunchSearchOptions
from dipgo_deploy.calibrate.refine import RefineOptions
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, export_bundle
from dipgo_deploy.export.options import check_options
from dipgo_deploy.models.location import denoiser_config, pipeline_index
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.optimize.effort import Effort, effort, judges_within
from dipgo_deploy.optimize.goal import QUALITY, Goal
from dipgo_deploy.optimize.weighing import HERE, Weighing, weighed
from dipgo_deploy.plan.weigh import GraphCosts
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.search.problem import Problem, ProblemOptions, load_problem
from dipgo_deploy.search.samples import Pair
from dipgo_deploy.supernet.loop import Evaluation

# Images that choose a number of launches have other seeds than those that judge it, from 0.
CHOOSING_SEED = 500_000

Stage = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Optimized:
    """What came out.

    Attributes:
        bundle: the engine directory.
        schedule: what it runs.
        full: evaluations of the full run.
        effort: what the time allowed of a search; None where a schedule was given.
        judges: images that judged.
        row: the schedule's pictures beside the full run's, on images that chose nothing; None without a VAE.
        met: whether they reach the quality that was asked for; None where none was.
        seconds: of each stage.
        graph_costs: what the graphs were weighed with; None where there was nothing to weigh, or they were not.
    """

    bundle: Bundle
    schedule: Schedule
    full: int
    effort: Effort | None
    judges: int
    row: Row | None
    met: bool | None
    seconds: dict[str, float] = field(default_factory=dict)
    graph_costs: GraphCosts | None = None


def optimize(
    problem: ProblemOptions,
    engine_dir: str | Path,
    goal: Goal | None = None,
    export: ExportOptions | None = None,
    *,
    schedule: Schedule | None = None,
    weighing: Weighing | None = HERE,
    batch: int = 16,
    stage: Stage = lambda name: None,
    progress: Progress = lambda name, done, total: None,
    say: Stage = lambda line: None,
) -> Optimized:
    """Find the launches of a model, fit their solver, export them, and judge the pictures.

    The launches are whole ones: on what was measured here skipping a part of them does not pay once a solver is fitted.
    With a quality the smallest number of launches that reaches it on images of its own is taken; other images judge it.

    Args:
        problem: the model, its sampler and steps, and the prompts or classes.
        engine_dir: what is written.
        goal: see there.
        export: how it is exported; sizes and guidance are those of ``problem``.
        schedule: in place of a search; ``problem`` is then of its sampler, steps and blocks (see ``of_schedule``).
        weighing: how a further graph is weighed; skipped blocks are computed after all where it costs more than it
            saves. None: the schedule stays as it is.
        batch: images that go through the model at a time.
        stage: told each stage. progress: told (stage, done, total). say: told what is found, a line each.

    Raises:
        UserError: bad input, too little time, no number of launches that reaches the quality, or what
            ``export_bundle`` raises.
    """
    goal, export = goal or Goal(), export or ExportOptions()
    goal.check()
    check_options(export)
    if weighing is not None:
        weighing.check()
    if export.graph_costs is not None:
        raise UserError("graph_costs: goes into weighing here, so that what is judged is what is exported")
    target = arguments.path("engine_dir", engine_dir)
    remove_leftovers(target)  # now, as the search may need the room
    check_target(target, overwrite=export.overwrite)
    full, counts = check_goal(problem, goal) if schedule is None else (0, ())
    clock = _Clock(stage)
    clock("loading")
    loaded = load_problem(problem, stage)
    if schedule is not None:
        loaded.source.check(schedule)
        full = loaded.steps
    by_quality = schedule is None and goal.launches is None and goal.speedup is None
    clock("timing an evaluation")
    evaluation = seconds_of_an_evaluation(loaded)
    chosen = None
    if schedule is None:
        chosen = effort(goal.minutes, evaluation, full, counts, batch)
        say(
            f"{evaluation:.3g} s an evaluation: {chosen.images} images to fit to, {chosen.fits} candidates, "
            f"{chosen.iterations} steps of refinement; at most about {chosen.minutes:.1f} minutes"
        )
    quality = (QUALITY if goal.quality is None else goal.quality) if by_quality else None
    judged = loaded.can_decode and loaded.source.time_scale is None
    judges = 0
    if chosen is not None:
        judges = chosen.judges if judged else 0
        clock("searching launches")
        schedule = _search(loaded, counts, chosen, batch, quality, progress, say)
    assert schedule is not None
    costs = None
    if weighing is not None:
        schedule, line, costs = weighed(loaded, schedule, export, weighing, clock)
        say(line)
    if chosen is None and judged:
        judges = judges_within(goal.minutes, evaluation, full, schedule.steps)
        say(f"{evaluation:.3g} s an evaluation: {judges} images to judge by")
    row = None
    if judges:
        clock("judging")
        row = _judged(loaded, schedule, judges, 0, batch)
    clock("exporting")
    options = replace(export, height=problem.height, width=problem.width, num_frames=problem.num_frames)
    if problem.guidance is not None:
        options = replace(options, guidance=problem.guidance)
    bundle = export_bundle(problem.model, schedule, target, options, stage, note=say)
    clock.stop()
    met = None if quality is None or row is None else row.ssim.low >= quality
    return Optimized(bundle, schedule, full, chosen, judges, row, met, clock.seconds, costs)


def check_goal(problem: ProblemOptions, goal: Goal) -> tuple[int, tuple[int, ...]]:
    """Evaluations of the full run, and the numbers of launches to try: by the model's configuration alone.

    Raises:
        UserError: no such model or sampler, a goal that its full run cannot have, or a quality of pictures for a model
            without a VAE.
    """
    target = schedule_target(problem.model, problem.sampler, problem.steps, problem.granularity, problem.cache)
    counts = goal.counts(target.steps)
    by_quality = goal.launches is None and goal.speedup is None
    family, _ = denoiser_config(problem.model)
    if by_quality and not family.pixels and pipeline_index(problem.model).get("vae") is None:
        raise UserError(f"{problem.model}: has no VAE to judge pictures with; give --launches or --speedup")
    return target.steps, counts


def of_schedule(problem: ProblemOptions, schedule: Schedule) -> ProblemOptions:
    """The problem whose full run a schedule was made for."""
    kinds = {block.cache for block in schedule.blocks}
    return replace(
        problem,
        sampler=schedule.sampler.class_name,
        steps=schedule.sampler.num_inference_steps,
        granularity=schedule.model.granularity,
        cache=kinds.pop() if len(kinds) == 1 else None,
    )


class _Clock:
    """Seconds of each stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._name, self._start = "", time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> None:
        self.stop()
        self._name, self._start = name, time.perf_counter()
        self._stage(name)

    def stop(self) -> None:
        if self._name:
            self.seconds[self._name] = time.perf_counter() - self._start
        self._name = ""


class _Timed(Exception):
    """Ends the loop that is timed."""


def seconds_of_an_evaluation(problem: Problem) -> float:
    """Of the denoiser for one image, the second one of a loop: the first also warms up."""
    import torch

    at: list[float] = []

    def record(evaluation: Evaluation) -> None:
        at.append(time.perf_counter())
        if len(at) == 2:
            raise _Timed

    gates = [[True] * len(problem.target.blocks)] * problem.steps
    start = time.perf_counter()
    try:
        with torch.no_grad():
            problem.run(problem.batch([Pair(0, CHOOSING_SEED)]), gates, record=record)
    except _Timed:
        return at[1] - at[0]
    return (time.perf_counter() - start) / max(problem.steps, 1)


class _Enough(Exception):
    """Ends the search for a quality."""


def _search(
    problem: Problem,
    counts: Sequence[int],
    chosen: Effort,
    batch: int,
    quality: float | None,
    progress: Progress,
    say: Stage,
) -> Schedule:
    """The schedule of the smallest number of launches that is good enough; without a quality, of the only one."""
    schedules: list[Schedule] = []
    reached: dict[int, float] = {}

    def found(count: int, schedule: Schedule) -> None:
        schedules.append(schedule)
        if quality is None:
            return
        ssim = _judged(problem, schedule, chosen.judges, CHOOSING_SEED, batch, Path(pictures)).ssim
        say(f"{count} launches: SSIM {ssim.value:.4f} ({ssim.low:.4f} to {ssim.high:.4f}) on images that choose")
        reached[count] = ssim.low
        if ssim.low >= quality:
            raise _Enough

    refine = RefineOptions(iterations=chosen.iterations) if chosen.iterations else None
    # The full run of the images that choose is made once and kept there.
    with TemporaryDirectory() as pictures:
        try:
            calibrated_launches(
                problem,
                counts,
                CalibrationOptions(images=chosen.images, batch=batch),
                search=LaunchSearchOptions(budget=chosen.fits),
                refine=refine,
                report=progress,
                found=found,
            )
        except _Enough:
            return schedules[-1]
    if quality is not None:
        closest = max(reached, key=lambda count: reached[count])
        raise UserError(
            f"--quality {quality:g}: {closest} launches reach {reached[closest]:.4f} at the lower end of the interval; "
            "give a lower one, more --minutes, or --launches"
        )
    return schedules[-1]


def _judged(
    problem: Problem, schedule: Schedule, images: int, seed: int, batch: int, folder: Path | None = None
) -> Row:
    per_condition = max(2, -(-images // len(problem.conditions)))
    (case,) = schedule_cases([(f"{schedule.steps} launches", schedule)], problem)
    (row,) = measure(problem, [case], per_condition, seed=seed, batch=batch, folder=folder, resume=folder is not None)
    return row


def facts(result: Optimized) -> dict[str, Any]:
    """Plain data."""
    plan = result.bundle.manifest.plan
    return {
        "engine_dir": str(result.bundle.path),
        "launches": len({launch.step for launch in plan.launches}),
        "evaluations": result.full,
        "quality": None if result.row is None else result.row.as_json(),
        "quality_met": result.met,
        "effort": None if result.effort is None else vars(result.effort),
        "judges": result.judges,
        "graphs": len(result.bundle.manifest.plan.variants),
        "graph_costs": None if result.graph_costs is None else vars(result.graph_costs),
        "seconds": {name: round(value, 1) for name, value in result.seconds.items()},
    }
