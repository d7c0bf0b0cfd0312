"""A schedule's graphs weighed before its pictures are judged, by default with what they cost on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.export.options import ExportOptions
from dipgo_deploy.export.planning import compiled_schedule, denoiser_numbers, nominal_used
from dipgo_deploy.export.trace import TracedModel, trace_by_name
from dipgo_deploy.export.weighing import FITTED, check_graph_costs, fitted_to_its_gates
from dipgo_deploy.models.location import denoiser_config
from dipgo_deploy.plan.weigh import PICTURES, GraphCosts
from dipgo_deploy.sampler import prediction_used
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.search.problem import Problem, with_schedule

# Of each kind of measurement.
_SECONDS = 0.5
_ONE = "one graph: nothing to weigh"


@dataclass(frozen=True)
class Weighing:
    """How graphs are weighed.

    Attributes:
        costs: of a machine; None: this one is measured.
        pictures: that share the loading; None: those of ``costs``, ``plan.weigh.PICTURES`` where it is measured.
        threads: that a launch is measured with; None: the physical cores.
    """

    costs: GraphCosts | None = None
    pictures: float | None = None
    threads: int | None = None

    def check(self) -> None:
        """Refuse (UserError) costs that cannot be, before anything is loaded."""
        if self.costs is not None:
            check_graph_costs(self.costs, "graph_costs")
        if self.pictures is not None and not 1 <= self.pictures < float("inf"):
            raise UserError(f"--pictures {self.pictures:g}: give a number of at least 1")


HERE = Weighing()
"""On this machine, which is measured."""


def weighed(
    problem: Problem,
    schedule: Schedule,
    export: ExportOptions,
    weighing: Weighing,
    stage: Callable[[str], None] = lambda name: None,
) -> tuple[Schedule, str, GraphCosts | None]:
    """``weighed_on`` the trace of a problem."""
    return weighed_on(
        lambda: _traced(problem, schedule), schedule, export, weighing, stage, device=str(problem.device), halves=False
    )


def weighed_by_name(
    model: str, schedule: Schedule, weighing: Weighing, stage: Callable[[str], None] = lambda name: None
) -> tuple[Schedule, str, GraphCosts | None]:
    """``weighed_on`` the trace of a model at its native size."""

    def traced() -> Traced:
        stage("tracing the denoiser")
        numbers = denoiser_numbers(denoiser_config(model)[0], schedule)
        halves = any(schedule.conditional_only)
        one = trace_by_name(model, schedule.model.granularity, schedule.cache_kinds, conditional=halves)
        return Traced(one, nominal_used(model, schedule), numbers)

    return weighed_on(traced, schedule, ExportOptions(), weighing, stage)


@dataclass(frozen=True)
class Traced:
    """What a schedule is planned on: the trace, per evaluation whether the sampler gives its prediction any weight, and
    whose prediction it makes."""

    model: TracedModel
    used: tuple[bool, ...]
    denoisers: tuple[int, ...] | None = None


def _traced(problem: Problem, schedule: Schedule) -> Traced:
    own = with_schedule(problem, schedule)
    return Traced(own.traced, prediction_used(own.matrix))


def weighed_on(
    traced: Callable[[], Traced],
    schedule: Schedule,
    export: ExportOptions,
    weighing: Weighing,
    stage: Callable[[str], None] = lambda name: None,
    *,
    device: str = "cpu",
    halves: bool = True,
) -> tuple[Schedule, str, GraphCosts | None]:
    """The schedule with the gates that are worth it, a line that says what became of it, and the costs where they
    were needed.

    Nothing is measured where there is nothing to weigh. Where this machine cannot be measured, the schedule stays.

    Args:
        traced: called where there is something to weigh.
        device: that the model runs on. halves: whether a trace has conditional-only evaluations.
    """
    if all(map(all, schedule.gates)) and not any(schedule.conditional_only):
        return schedule, _ONE, None
    why_not = _why_not(schedule, export, weighing, device, halves=halves)
    if why_not:
        return schedule, f"graphs were not weighed: {why_not}", None
    on = traced()
    written = compiled_schedule(on.model, schedule, on.used, export, denoisers=on.denoisers)
    if len(written.variants) == 1:
        return schedule, _ONE, None
    costs = weighing.costs
    if costs is None:
        stage("measuring what graphs cost")
        try:
            costs = _measured(on.model, weighing)
        except UserError as error:
            return schedule, f"graphs were not weighed: {error}", None
    if weighing.pictures is not None:
        costs = replace(costs, pictures=weighing.pictures)
    said: list[str] = []
    options = replace(export, graph_costs=costs)
    plan = compiled_schedule(
        on.model, schedule, on.used, options, denoisers=on.denoisers, by_gates=True, say=said.append
    )
    line = f"graphs weighed for {costs.pictures:g} pictures a process: {said[0]}"
    if plan.keep == written.keep:
        return schedule, line, costs
    return schedule.with_gates(plan.keep, _provenance(schedule, costs, len(written.variants))), line, costs


def _why_not(schedule: Schedule, export: ExportOptions, weighing: Weighing, device: str, *, halves: bool) -> str:
    """Why there is nothing to weigh, or nothing to weigh it with; empty where there is."""
    if fitted_to_its_gates(schedule):
        return FITTED
    if any(schedule.conditional_only) and not halves:
        return "evaluations are conditional only; dipgo-schedule weigh does"
    if export.layout == "segments" or export.max_variants is not None:
        return "--layout segments has each weight once" if export.layout == "segments" else "--max-variants was given"
    if weighing.costs is None and (device != "cpu" or export.dtype != "fp32"):
        what = f"--device {device}" if device != "cpu" else f"--dtype {export.dtype}"
        return f"what they cost is measured on the CPU in fp32, not for {what}; give --graph-costs FILE"
    return ""


def _measured(model: TracedModel, weighing: Weighing) -> GraphCosts:
    from dipgo_deploy.bench.graph_costs import measure_graph_costs

    return measure_graph_costs(weighing.threads, pictures=PICTURES, seconds=_SECONDS, model=model)


def _provenance(schedule: Schedule, costs: GraphCosts, graphs: int) -> Mapping[str, Any]:
    """How the gates were found, and what they were weighed with."""
    return {**schedule.provenance, "weighed": {"variants_before": graphs, "costs": vars(costs)}}
