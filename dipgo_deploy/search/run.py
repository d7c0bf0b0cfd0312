"""One search from end to end: a method, several ratios, schedules with their provenance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dipgo_deploy.errors import UserError
from dipgo_deploy.files import sole_user
from dipgo_deploy.schedule.document import Gates, Schedule
from dipgo_deploy.search import checkpoint
from dipgo_deploy.search.baselines import BASELINES, Task, baseline
from dipgo_deploy.search.baselines.deepcache import DeepCache
from dipgo_deploy.search.baselines.dynamic import DynamicProgramming
from dipgo_deploy.search.baselines.refine import refine
from dipgo_deploy.search.baselines.uniform import Uniform, alternating_gates, uniform_gates
from dipgo_deploy.search.costs import Costs, latency_graph
from dipgo_deploy.search.evaluate import Objective, image_objective
from dipgo_deploy.search.latency import measure_latency
from dipgo_deploy.search.loop_loss import LoopLoss
from dipgo_deploy.search.paths import path_costs
from dipgo_deploy.search.postprocess import TOLERANCE, check_ratio, select, unreachable
from dipgo_deploy.search.problem import Pair, Problem, cache_kinds, costs_of, with_cache
from dipgo_deploy.search.pruner import SIZES, Pruner, PrunerSize
from dipgo_deploy.search.samples import SampleStream
from dipgo_deploy.search.train import Progress, Trainer, TrainOptions, train

METHODS = ("dipgo", "dipgo+refine", "refine", *BASELINES)
_WITHOUT_OBJECTIVE = ("dipgo", "uniform", "dp")
# Methods that move whole evaluations, and so leave all of them guided.
_WITHOUT_HALVES = ("uniform", "deepcache", "annealing", "dp")
# Seeds of the images that hard gates are judged on while searching, away from those the pruner learns from.
_JUDGED = 500_000
# Images that the costs of paths are measured on: they take more than two loops an evaluation.
_PATH_IMAGES = 4
# Images of one gradient.
_GRADIENT_IMAGES = 4


@dataclass(frozen=True)
class SearchOptions:
    """How schedules are searched.

    Attributes:
        method: one of ``METHODS``.
        ratios: shares of the cost to save.
        budget: evaluations of the true objective a ratio (``dipgo`` makes none).
        images: that objective's images, of which image_batch go through the model at a time.
        pool, one_noise: see `SampleStream`.
        warm_start: gates (`Costs.width` a row, as ``starts``) that the pruner starts at instead of keep-all;
            ``uniform``: each ratio has a pruner of its own, which starts at the uniform interval there and is priced
            down to it.
        starts: more gates by name that the refinement may start at, where their ratio is the one asked for.
        max_variants: most distinct graphs of a schedule.
        prune_by: what is saved.
    """

    method: str = "dipgo+refine"
    ratios: tuple[float, ...] = (0.8,)
    budget: int = 200
    images: int = 16
    image_batch: int = 16
    seed: int = 0
    pool: int | None = None
    one_noise: bool = False
    size: PrunerSize = field(default_factory=lambda: SIZES["small"])
    train: TrainOptions = field(default_factory=TrainOptions)
    warm_start: Gates | Literal["uniform"] | None = None
    starts: tuple[tuple[str, Gates], ...] = ()
    max_variants: int | None = None
    prune_by: Literal["macs", "latency"] = "macs"
    threads: int | None = None
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Reporter:
    """Who is told what.

    stage: a stage by name.
    iteration: each iteration of the pruner.
    evaluation: each evaluation (count, lowest loss so far).
    found: each schedule.
    progress: of a calibration (stage, done, total).
    """

    stage: Callable[[str], None] = lambda stage: None
    iteration: Callable[[Progress], None] = lambda progress: None
    evaluation: Callable[[int, float], None] = lambda count, best: None
    found: Callable[[Found], None] = lambda found: None
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None


@dataclass(frozen=True)
class Found:
    """A schedule for one ratio.

    Attributes:
        target: what was asked for.
        ratio: the share of the cost saved (what ``prune_by`` says).
        loss: of the true objective, None for a method that makes no use of it.
    """

    target: float
    ratio: float
    loss: float | None
    schedule: Schedule


def search(
    problem: Problem,
    options: SearchOptions,
    *,
    folder: Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    paths: Callable[[], np.ndarray] | None = None,
    objective: Callable[[Problem], Objective] | None = None,
    finish: Callable[[Schedule], Schedule] | None = None,
) -> list[Found]:
    """Find one schedule a ratio; all come from one trained pruner, unless each has one that starts near the ratio.

    Each schedule is reported as soon as it is found; a ratio that turns out to be out of reach does not keep the others
    from being searched.

    Args:
        problem: what is pruned.
        options: see there.
        folder: for the pruner's checkpoints and log.
        resume: go on from there.
        reporter: told what happens.
        paths: `measured_paths` of several searches on the same images, None to measure them when they are needed.
        objective: makes what methods are judged by, None the loss under the problem's own sampler.
        finish: what is made of each schedule, None: nothing.

    Raises:
        UserError: an unknown method, a start of another size, a ratio out of reach (before anything is searched, where
            that can be known, else after all), a loss the model has no images for, or what `train` raises.
    """
    reporter = reporter or Reporter()
    if options.method not in METHODS:
        raise UserError(f"--method {options.method}: is unknown; use {', '.join(METHODS)}")
    if problem.costs.guidance_gates:
        check_guidance_gates(options.method, options.max_variants)
    problem = _by_latency(problem, options, reporter) if options.prune_by == "latency" else problem
    for ratio in options.ratios:
        check_ratio(ratio, problem.costs, options.tolerance)
    problem.check_loss(options.train.loss)
    for name, start in options.starts:
        _check_start(problem, start, name)
    scores: dict[float, list[list[float]]] = {}
    if options.method.startswith("dipgo"):
        with nullcontext() if folder is None else sole_user(folder, "--checkpoint"):
            scores = _scores(problem, options, folder, resume, reporter)
    seen = None
    if options.method not in _WITHOUT_OBJECTIVE:
        reporter.stage("running the full loop for the objective")
        seen = objective(problem) if objective is not None else _plain_objective(problem, options, reporter)

    paths = paths or measured_paths(problem, options, reporter)
    found: list[Found] = []
    refused: UserError | None = None
    for ratio in options.ratios:
        reporter.stage(f"searching gates at {ratio:g}")
        try:
            one = _one(problem, options, ratio, scores.get(ratio), seen and seen.afresh(), paths)
        except UserError as error:
            refused = refused or error
            continue
        if finish is not None:
            one = replace(one, schedule=finish(one.schedule))
        found.append(one)
        reporter.found(one)
    if refused is not None:
        raise refused
    return found


def check_guidance_gates(method: str, max_variants: int | None) -> None:
    """Refuse (UserError) a search of conditional-only evaluations that could find none."""
    if method in _WITHOUT_HALVES:
        others = ", ".join(name for name in METHODS if name not in _WITHOUT_HALVES)
        raise UserError(f"--search-guidance: --method {method} leaves all evaluations guided; use {others}")
    if max_variants == 1:
        raise UserError(
            "--search-guidance: conditional-only evaluations run in graphs of their own; allow --max-variants 2"
        )


def _plain_objective(problem: Problem, options: SearchOptions, reporter: Reporter) -> Objective:
    return image_objective(
        problem,
        judged(problem, options),
        options.train.loss,
        options.image_batch,
        on_evaluation=reporter.evaluation,
    )


def measured_paths(
    problem: Problem, options: SearchOptions, reporter: Reporter | None = None
) -> Callable[[], np.ndarray]:
    """The costs of paths, measured when they are first asked for."""

    def measure() -> np.ndarray:
        (reporter or Reporter()).stage("measuring the costs of paths")
        return path_costs(problem, judged(problem, options)[:_PATH_IMAGES])

    return _Lazily(measure)


def choose_cache(
    problem: Problem,
    options: SearchOptions,
    reporter: Reporter | None = None,
    objective: Callable[[Problem], Objective] | None = None,
) -> Problem:
    """``problem`` with the kind of cache that loses least, on the true objective (``objective`` as in `search`).

    Each kind that all blocks can have is tried with the uniform interval at every ratio that has one, on the images
    that the search judges by; the lowest mean loss wins. A family with one kind is left as it is.
    """
    kinds = cache_kinds(problem)
    if len(kinds) < 2:
        return problem
    (reporter or Reporter()).stage("choosing the kind of cache")

    def plain(candidate: Problem) -> Objective:
        return image_objective(candidate, judged(problem, options), options.train.loss, options.image_batch)

    tried = []
    for kind in kinds:
        candidate = problem if kind == kinds[0] else with_cache(problem, kind)
        seen = (objective or plain)(candidate)
        losses = [seen(uniform_gates(candidate.costs, ratio)) for ratio in options.ratios]
        tried.append((sum(losses) / len(losses), candidate))
    return min(tried, key=lambda one: one[0])[1]


def _scores(
    problem: Problem, options: SearchOptions, folder: Path | None, resume: bool, reporter: Reporter
) -> dict[float, list[list[float]]]:
    """Keep scores for each ratio."""
    if options.warm_start != "uniform":
        reporter.stage("training the pruner")
        scores = train_pruner(problem, options, folder=folder, resume=resume, reporter=reporter)
        return dict.fromkeys(options.ratios, scores)
    by_ratio = {}
    for ratio in options.ratios:
        reporter.stage(f"training the pruner for {ratio:g}")
        kept = (1 - ratio) * problem.costs.full / problem.costs.own_full
        start = replace(
            options,
            warm_start=uniform_gates(problem.costs, ratio),
            train=replace(options.train, stop_share=max(options.train.stop_share, kept)),
        )
        own = None if folder is None else folder / f"{ratio:g}"
        # An interrupted run has not come to the later ratios yet.
        begun = resume and (own is None or (own / checkpoint.NAME).is_file())
        by_ratio[ratio] = train_pruner(problem, start, folder=own, resume=begun, reporter=reporter)
    return by_ratio


def train_pruner(
    problem: Problem,
    options: SearchOptions,
    *,
    folder: Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> list[list[float]]:
    """Train one pruner and return its keep scores (T, `Costs.width`).

    Raises:
        UserError: a warm start of another size, and what `train` raises.
    """
    torch.manual_seed(options.seed)
    pruner = Pruner(problem.steps, problem.costs.width, options.size)
    if options.warm_start is not None and options.warm_start != "uniform":
        _check_start(problem, options.warm_start, "--warm-start")
        pruner.warm_start(options.warm_start)
    stream = SampleStream(len(problem.conditions), options.seed, options.pool, options.one_noise)
    trainer = Trainer(problem, pruner, options.train, stream)
    settings = {
        "problem": asdict(problem.options),
        "model": problem.target.model.config_hash,
        "size": asdict(options.size),
        "warm_start": options.warm_start,
    }
    notify = reporter.iteration if reporter is not None else lambda progress: None
    return train(trainer, settings, folder, resume=resume, notify=notify)


class _Gradients:
    """Gradients of the loss with respect to hard gates, each on some of the judged images in turn; counted."""

    def __init__(self, problem: Problem, options: SearchOptions) -> None:
        self._loss = LoopLoss(problem, options.train.loss, options.train.precision)
        self._pairs = judged(problem, options)
        self.count = 0

    def __call__(self, gates: Gates) -> np.ndarray:
        first = self.count * _GRADIENT_IMAGES
        self.count += 1
        pairs = [self._pairs[(first + place) % len(self._pairs)] for place in range(_GRADIENT_IMAGES)]
        return self._loss.gradient(gates, pairs)


def judged(problem: Problem, options: SearchOptions) -> tuple[Pair, ...]:
    """The images that hard gates are judged on."""
    return SampleStream(len(problem.conditions), options.seed + _JUDGED).pairs(0, options.images)


class _Lazily:
    """A value that is made when it is first asked for."""

    def __init__(self, make: Callable[[], np.ndarray]) -> None:
        self._make = make
        self._value: np.ndarray | None = None

    def __call__(self) -> np.ndarray:
        if self._value is None:
            self._value = self._make()
        return self._value


def _one(
    problem: Problem,
    options: SearchOptions,
    ratio: float,
    scores: list[list[float]] | None,
    objective: Objective | None,
    paths: Callable[[], np.ndarray],
) -> Found:
    limit = options.max_variants
    task = Task(
        target=ratio,
        objective=objective or Objective(problem.costs, _no_objective),
        budget=options.budget,
        seed=options.seed,
        tolerance=options.tolerance,
        path_costs=paths,
        max_variants=limit,
    )
    parameters: dict[str, Any] = {}
    if scores is not None:
        # Refinement brings its starts to the ratio; so there the nearest that a threshold reaches will do.
        near = options.tolerance if options.method == "dipgo" else 1.0
        chosen = select(scores, problem.costs, ratio, tolerance=near, max_variants=limit)
        gates = chosen.gates
        parameters = {"threshold": min(chosen.threshold, 1.0), **_pruner_parameters(options)}
        if options.method == "dipgo+refine":
            gates, more = _refined(problem, options, task, {"pruner": gates})
            parameters |= more
    elif options.method == "refine":
        gates, parameters = _refined(problem, options, task, {})
    else:
        method = baseline(options.method)
        gates = method.search(task)
        parameters = method.parameters()
        if objective is not None:
            parameters |= {"budget": options.budget, "images": options.images}
        if limit is not None:
            gates = _within(problem.costs, gates, limit, task)
    loss = objective(gates) if objective is not None else None
    achieved = problem.costs.ratio(gates)
    parameters |= {
        "loss": options.train.loss,
        "seed": options.seed,
        "target_ratio": ratio,
        "achieved_ratio": achieved,
        "prune_by": options.prune_by,
        "guidance_scale": problem.guidance_scale,
    }
    if problem.reference is not None:
        sampler = problem.reference.target.sampler
        parameters["reference"] = {"sampler": sampler.class_name, "steps": problem.reference.steps}
    if limit is not None:
        parameters["max_variants"] = limit
    if problem.costs.guidance_gates:
        parameters["search_guidance"] = True
    if loss is not None:
        parameters["objective"] = loss
    # The schedule is written without its dead gates, first evaluation whole: what it says is what is run.
    analysis = problem.costs.analyse(gates)
    schedule = problem.target.schedule(analysis.kept, options.method, parameters)
    if problem.costs.guidance_gates:
        schedule = schedule.with_guidance(analysis.guidance)
    return Found(ratio, achieved, loss, schedule)


def _no_objective(gates: Gates) -> float:
    raise ValueError("this method makes no use of the objective")


def _pruner_parameters(options: SearchOptions) -> dict[str, Any]:
    return {
        "pruner": asdict(options.size),
        "train": asdict(options.train),
        "pool": options.pool,
        "one_noise": options.one_noise,
        "warm_start": "uniform" if options.warm_start == "uniform" else options.warm_start is not None,
    }


def _refined(
    problem: Problem, options: SearchOptions, task: Task, starts: Mapping[str, Gates]
) -> tuple[Gates, dict[str, Any]]:
    """Refined gates, and what made them, for the provenance."""
    starts = {**starts, **_other_starts(task, options)}
    if not starts:
        closest = task.costs.ratio(uniform_gates(task.costs, task.target))
        raise UserError(f"refine: {unreachable(task.target, closest, task.tolerance)}, or give --start")
    losses = {name: task.objective(start) for name, start in starts.items()}
    gradients = _Gradients(problem, options)
    gates = refine(replace(task, gradient=gradients), list(starts.values()))
    return gates, {
        "budget": options.budget,
        "images": options.images,
        "start_losses": losses,
        "gradients": gradients.count,
    }


def _other_starts(task: Task, options: SearchOptions) -> Mapping[str, Gates]:
    """What refinement may start at beside the pruner's gates, where there is such a thing at the ratio."""
    starts = {}
    for name, method in (("uniform", Uniform()), ("dp", DynamicProgramming()), ("deepcache", DeepCache())):
        try:
            starts[name] = method.search(task)
        except UserError:
            continue
    if task.costs.guidance_gates:
        starts["alternating"] = alternating_gates(task.costs, task.target)
    for name, gates in options.starts:
        if abs(task.costs.ratio(gates) - task.target) <= task.tolerance:
            starts[name] = gates
    return starts


def _within(costs: Costs, gates: Gates, limit: int, task: Task) -> Gates:
    limited = costs.limited(gates, limit)
    ratio = costs.ratio(limited)
    if abs(ratio - task.target) > task.tolerance:
        raise UserError(
            f"--max-variants {limit}: these gates need {costs.variants(gates)} graphs; with {limit} they save "
            f"{ratio:.4f} instead of {task.target:g}; allow more, or use --method dipgo"
        )
    return limited


def _check_start(problem: Problem, gates: Gates, name: str) -> None:
    if len(gates) != problem.steps or len(gates[0]) != problem.costs.width:
        raise UserError(
            f"{name}: {len(gates)} x {len(gates[0])} gates, the search has {problem.steps} x "
            f"{problem.costs.width}; give a schedule for this model, sampler and number of steps"
        )


def _by_latency(problem: Problem, options: SearchOptions, reporter: Reporter) -> Problem:
    reporter.stage("measuring the latency of each block")
    table = measure_latency(problem.traced, threads=options.threads)
    return replace(problem, costs=costs_of(problem, latency_graph(problem.traced.graph, table)))
