"""What a schedule has to be better than: plain solvers that launch the denoiser as often, on the same images."""

from __future__ import annotations

from collections.abc import Sequence

from dipgo_deploy.bench.quality import Case
from dipgo_deploy.calibrate.core import nearest
from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.builders import full
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.solver import extrapolated
from dipgo_deploy.search.problem import Problem, with_sampler

NOISE_SOLVERS = ("ddim", "ddim-trailing", "dpm++2m", "dpm++2m-karras", "dpm++2m-trailing", "deis", "unipc")
FLOW_SOLVERS = ("flow-euler", "flow-dpm++2m", "flow-unipc")


def baseline_cases(problem: Problem, launches: Sequence[int]) -> tuple[list[Case], list[str]]:
    """Plain solvers with as many evaluations, for each number of launches, and a line on each that cannot be had.

    Multistep solvers with as many steps; Heun's with half of them (one evaluation less than an even number); Taylor
    extrapolation of first order over the full run's steps.

    Raises:
        UserError: a number of launches that is below 1 or beyond the full run's.
    """
    flow = "Flow" in problem.target.sampler.class_name or bool(problem.target.sampler.config.get("use_flow_sigmas"))
    heun = "flow-heun" if flow else "heun"
    cases, refused = [], []
    for count in dict.fromkeys(launches):
        if not 1 <= count <= problem.steps:
            raise UserError(f"--launches {count}: give 1 to {problem.steps}, the full run's")
        plain = [(name, count) for name in (FLOW_SOLVERS if flow else NOISE_SOLVERS)]
        for name, steps in (*plain, (heun, (count + 1) // 2)):
            try:
                made = with_sampler(problem, name, steps)
            except UserError as error:
                refused.append(f"{name}, {steps} steps: left out ({error})")
                continue
            if made.steps > count:
                refused.append(f"{name}, {steps} steps: left out (evaluates the denoiser {made.steps} times)")
                continue
            cases.append(Case(f"{name}, {steps} steps", solver=(name, steps), group=count))
        if count > 1:
            cases.append(Case(f"taylor-1, {count} of {problem.steps}", fitted=taylor(problem, count), group=count))
    return cases, refused


def taylor(problem: Problem, launches: int) -> Schedule:
    """The full run's sampler with evenly spread launches, between which the prediction is extrapolated linearly.

    The whole-step form of TaylorSeer (arXiv 2503.06923), of first order: the prediction of an evaluation that is not
    launched lies on the line through the last two launched ones.
    """
    steps = problem.steps
    at = [place * steps // launches for place in range(launches)]
    weights = [[0.0] * launches for _ in range(steps)]
    for step in range(steps):
        last = sum(known <= step for known in at) - 1
        beyond = 0.0 if last == 0 else (step - at[last]) / (at[last] - at[last - 1])
        weights[step][last] = 1 + beyond
        if beyond:
            weights[step][last - 1] = -beyond
    solver = extrapolated(problem.matrix, at, weights, {"method": "first-order Taylor extrapolation"})
    whole = problem.target.schedule(full(steps, len(problem.target.blocks)), "taylor", {"launches": launches})
    return whole.with_solver(solver, full(launches, len(problem.target.blocks)))


def without_solver(problem: Problem, name: str, schedule: Schedule) -> tuple[Case | None, str]:
    """A fitted schedule's launches under the full run's own sampler, at the steps whose timesteps are nearest.

    Returns:
        The case, or None and a line that says why there is none.
    """
    assert schedule.solver is not None
    at = [nearest(problem.matrix.timesteps, timestep) for timestep in schedule.solver.timesteps]
    label = f"{name}, without its solver"
    if at != sorted(set(at)) or at[0] != 0:
        return None, f"{label}: left out (its launches lie on no {len(at)} steps of the full run, the first among them)"
    if {block.name: block.cache for block in schedule.blocks} != problem.cache_kinds:
        return None, f"{label}: left out (it has other caches than the first schedule)"
    if schedule.forecast is not None:
        return None, f"{label}: left out (its forecast is one of its own launches, and the full run has others)"
    if schedule.guidance is not None:
        return None, f"{label}: left out (its guidance is one of its own launches, and the full run has all of it)"
    rows = dict(zip(at, schedule.gates, strict=True))
    nothing = (False,) * len(schedule.blocks)
    return Case(label, gates=tuple(rows.get(step, nothing) for step in range(problem.steps))), ""
