"""Fewer graphs where a further one costs more than it saves: skipped blocks are re-enabled for that. Pure Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dipgo_deploy.errors import UserError
from dipgo_deploy.plan.model import Plan

PICTURES = 10.0
"""That share the loading where nothing else is said. Of one, next to nothing would be skipped of a small model: a graph
too many costs a process its loading once, a block computed after all costs a server at every picture. Of very many, the
loading would cost nothing."""

# Up to so many graphs every smaller number of them is tried, above it a few.
_EVERY = 12


@dataclass(frozen=True)
class GraphCosts:
    """What graphs cost on a machine. Seconds but for the first and the last.

    Attributes:
        macs_per_second: of a launch.
        launch_seconds: of each launch, beside its multiply-accumulates.
        load_seconds: of a graph. load_seconds_per_byte: of its weights, which each graph lays out anew.
        switch_seconds_per_byte: of the weights of a graph that is launched after another one, which finds them out of
            the processor's caches.
        pictures: that share the loading; 1 for a process that draws once.
    """

    macs_per_second: float
    launch_seconds: float
    load_seconds: float
    load_seconds_per_byte: float
    switch_seconds_per_byte: float
    pictures: float = PICTURES


@dataclass(frozen=True)
class Weighed:
    """plan: the cheapest that was found. written: the plan of the schedule as it stands. seconds, written_seconds: a
    picture, as the costs have it."""

    plan: Plan
    written: Plan
    seconds: float
    written_seconds: float


def weigh(compiled: Callable[[int | None], Plan], seconds_of_plan: Callable[[Plan], float]) -> Weighed:
    """The cheapest of the plans with fewer and fewer graphs; of equal ones that with the most.

    None has more graphs or launches than the schedule as it stands.

    Args:
        compiled: the plan with at most so many graphs, None for the schedule as it stands; UserError where so few
            cannot be.
        seconds_of_plan: of a picture, see ``seconds_of``.
    """
    written = best = compiled(None)
    least = cost = seconds_of_plan(written)
    for limit in _limits(len(written.variants)):
        try:
            plan = compiled(limit)
        except UserError:
            break  # so few cannot be: each denoiser has graphs of its own
        if len(plan.launches) > len(written.launches) or len(plan.variants) > len(written.variants):
            continue
        seconds = seconds_of_plan(plan)
        if seconds < least:
            best, least = plan, seconds
    return Weighed(best, written, least, cost)


def seconds_of(nbytes: Sequence[int], order: Sequence[int], macs: int, costs: GraphCosts) -> float:
    """Of a picture, its share of loading included; runs follow one another, so that the first launch of one comes
    after the last of another.

    Args:
        nbytes: of the weights of each graph.
        order: the graph of each launch.
        macs: of all launches.
    """
    switched = sum(nbytes[here] for before, here in zip([order[-1], *order], order, strict=False) if before != here)
    loading = len(nbytes) * costs.load_seconds + sum(nbytes) * costs.load_seconds_per_byte
    return (
        macs / costs.macs_per_second
        + len(order) * costs.launch_seconds
        + switched * costs.switch_seconds_per_byte
        + loading / costs.pictures
    )


def _limits(graphs: int) -> Sequence[int]:
    """Numbers of graphs to try, from the largest."""
    if graphs <= _EVERY:
        return range(graphs - 1, 0, -1)
    found = []
    while graphs > 1:
        graphs = graphs * 3 // 4
        found.append(graphs)
    return found
