"""Guidance whose halves are launched one after the other: evaluations taken apart into turns. Pure Python.

The demand is walked on the block graph with both halves side by side (``BlockGraph.in_halves``), so that each half has
its own caches and a conditional-only evaluation is one without the other half. Everything after that is laid out on
the graph as it was traced, for one half: a turn is one half of an evaluation, the unconditional one first, and turns
are to variants and segments what evaluations are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from dipgo_deploy.plan.buffers import Lifetime
from dipgo_deploy.plan.costs import bits
from dipgo_deploy.plan.graph import BlockGraph
from dipgo_deploy.plan.index import GraphIndex, index_graph
from dipgo_deploy.plan.live import Demand, Need
from dipgo_deploy.plan.model import Launch
from dipgo_deploy.plan.values import Terms
from dipgo_deploy.schedule.guidance import HALVES, UNCONDITIONAL, Half

G = TypeVar("G")


def turn_of(step: int, half: int) -> int:
    """The turn of a half (its place in ``HALVES``) of an evaluation."""
    return len(HALVES) * step + half


def evaluation_of(turn: int) -> int:
    """The evaluation that a turn is of."""
    return turn // len(HALVES)


def half_of(turn: int) -> int:
    """The place in ``HALVES`` of a turn's half."""
    return turn % len(HALVES)


@dataclass(frozen=True)
class Turns:
    """How both halves side by side belong to the graph of one.

    Attributes:
        index: of the graph of one half.
        places: of each half, where each value of ``index`` is among the values side by side.
        guides: the guided value of each denoiser.
    """

    index: GraphIndex
    places: tuple[tuple[int, ...], ...]
    guides: tuple[str, ...]

    @classmethod
    def of(cls, graph: BlockGraph, both: GraphIndex) -> Turns:
        """graph: as it was traced, with ``guides``. both: of ``graph.in_halves()``."""
        index = index_graph(replace(graph, guides={}))
        position = {name: place for place, name in enumerate(both.names)}
        conditional = tuple(position[name] for name in index.names)
        other = tuple(position.get(name + UNCONDITIONAL, -1) for name in index.names)
        return cls(index, (other, conditional), tuple(graph.guides))

    def together(self, mask: int) -> int:
        """Values of one half as those of both."""
        return sum(1 << place[value] for value in bits(mask) for place in self.places if place[value] >= 0)

    def guide_name(self, denoiser: int) -> str:
        """Of the graph that guides for a denoiser."""
        return "guidance" + (f"_{denoiser + 1}" if denoiser else "")

    def guide_macs(self, denoiser: int) -> int:
        """Multiply-accumulates of that graph."""
        return self.index.costs.macs(1 << self.index.names.index(self.guides[denoiser]))

    def demand(self, demands: Demand) -> Demand:
        """What each turn has to do, in values of one half; ``prediction_slots`` stay those of the evaluations."""
        launches = []
        for need in demands.launches:
            for half in range(len(HALVES)):
                computed, reads, stores = (self._of(half, mask) for mask in (need.computed, need.reads, need.stores))
                if computed or reads:
                    turn = turn_of(need.step, half)
                    denoiser = need.denoiser % len(self.guides)
                    launches.append(Need(turn, computed, reads, stores, need.predicts, denoiser))
        stored, forecasts, guided = [], [], []
        for step, row in enumerate(demands.stored):
            for half, places in enumerate(self.places):
                stored.append(
                    tuple(turn_of(row[place], half) if place >= 0 and row[place] >= 0 else -1 for place in places)
                )
                known = demands.forecasts[step]
                forecasts.append(
                    {value: _in_turns(known[place], half) for value, place in enumerate(places) if place in known}
                )
                guided.append(demands.guided[step])
        return Demand(tuple(launches), tuple(stored), demands.prediction_slots, (), tuple(forecasts), tuple(guided))

    @cached_property
    def _own(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Of each half the values of ``index`` that it has, and where they are side by side."""
        guided = set(self.guides)
        names = self.index.names
        return tuple(
            tuple((value, place) for value, place in enumerate(places) if names[value] not in guided)
            for places in self.places
        )

    def _of(self, half: int, mask: int) -> int:
        """The values of ``mask`` that are of a half, as those of ``index``."""
        return sum(1 << value for value, place in self._own[half] if mask >> place & 1)


def _in_turns(terms: Terms, half: int) -> Terms:
    return tuple(term._replace(stored=turn_of(term.stored, half)) for term in terms)


@dataclass(frozen=True)
class Passing:
    """The predictions of both halves between their launches and the one that guides.

    Attributes:
        lifetimes: of them in the arena.
        place: number of a launch -> of its prediction among ``lifetimes``.
        last: number of an evaluation's last launch -> the numbers of the launches that predict for it.
    """

    lifetimes: tuple[Lifetime, ...]
    place: Mapping[int, int]
    last: Mapping[int, tuple[int, ...]]


def passing(turns: Sequence[int], predicts: Sequence[bool], guided: Sequence[bool], nbytes: int) -> Passing:
    """turns: of each launch. predicts: whether each makes a prediction. guided: of each turn. nbytes: of one."""
    lifetimes: list[Lifetime] = []
    place: dict[int, int] = {}
    last: dict[int, tuple[int, ...]] = {}
    ends = {evaluation_of(turn): number for number, turn in enumerate(turns)}
    for number, (turn, makes) in enumerate(zip(turns, predicts, strict=True)):
        if makes and guided[turn]:
            end = ends[evaluation_of(turn)]
            place[number] = len(lifetimes)
            lifetimes.append(Lifetime(nbytes, number, end, read=True))
            last[end] = (*last.get(end, ()), number)
    return Passing(tuple(lifetimes), place, last)


def with_guides(
    graphs: tuple[G, ...], passed: Passing, denoiser_of: Callable[[int], int], guide: Callable[[int], G]
) -> tuple[tuple[G, ...], dict[int, int]]:
    """Graphs, followed by one that guides for each denoiser that is run; and the number of the one that follows a
    launch, by the launch's own.

    Args:
        denoiser_of: a launch's, by its number.
        guide: makes that of a denoiser.
    """
    denoisers = {end: denoiser_of(end) for end in passed.last}
    place = {denoiser: len(graphs) + number for number, denoiser in enumerate(dict.fromkeys(denoisers.values()))}
    return (*graphs, *map(guide, place)), {end: place[denoiser] for end, denoiser in denoisers.items()}


def in_evaluations(
    launches: Sequence[Launch],
    passed: Passing,
    offsets: Sequence[int],
    guides: Mapping[int, int],
) -> tuple[Launch, ...]:
    """Launches of turns as those of evaluations, with the ones that guide after them.

    Args:
        launches: ``step`` is a turn; ``prediction`` is any number where the launch makes one.
        offsets: of ``passed.lifetimes``.
        guides: number of the variant or segment that guides after a launch, by the launch's own number.
    """
    found: list[Launch] = []
    slot = 0
    for number, launch in enumerate(launches):
        half: Half = HALVES[half_of(launch.step)]
        step = evaluation_of(launch.step)
        passes = offsets[passed.place[number]] if number in passed.place else None
        own = None
        if launch.prediction is not None and passes is None:
            own, slot = slot, slot + 1
        found.append(replace(launch, step=step, half=half, prediction=own, passes=passes))
        if number in passed.last:
            reads = tuple(offsets[passed.place[maker]] for maker in passed.last[number])
            found.append(Launch(step, guides[number], reads, (), slot))
            slot += 1
    return tuple(found)
