"""Launches that can share one static graph, and how to make more of them share. Pure Python."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dipgo_deploy.plan.costs import bits
from dipgo_deploy.plan.index import GraphIndex
from dipgo_deploy.plan.live import Demand, Need, demand
from dipgo_deploy.plan.turns import Turns, evaluation_of
from dipgo_deploy.plan.values import Assignment
from dipgo_deploy.schedule.forecast import Reads
from dipgo_deploy.schedule.validation import missing_halves

# Up to this many variants too many, merges are chosen by what they really cost; above it, by estimate.
_NEAR = 32
# Merges compiled to learn their real cost, a round: as many as keep a round under a number of cells (evaluations x
# values).
_LEAST_TRIALS, _MOST_TRIALS, _CELLS_PER_ROUND = 4, 32, 100_000


@dataclass(frozen=True)
class Group:
    """The launches of one variant, as masks of values; ``writes`` is the union of what its launches store.

    Every member can write the union: what is written is computed by all of them, and the input that a residual is
    taken from is at hand, because (computed, reads) decides which values a graph has.
    """

    computed: int
    reads: int
    writes: int
    predicts: bool
    denoiser: int
    steps: tuple[int, ...]


def group_launches(launches: Sequence[Need]) -> tuple[Group, ...]:
    """One group for each distinct (computed, reads, predicts, denoiser), in order of its first launch."""
    members: dict[tuple[int, int, bool, int], list[Need]] = {}
    for launch in launches:
        key = launch.computed, launch.reads, launch.predicts, launch.denoiser
        members.setdefault(key, []).append(launch)
    groups = []
    for (computed, reads, predicts, denoiser), shared in members.items():
        writes = 0
        for launch in shared:
            writes |= launch.stores
        groups.append(Group(computed, reads, writes, predicts, denoiser, tuple(launch.step for launch in shared)))
    return tuple(groups)


def promote(
    index: GraphIndex,
    assignments: Sequence[Assignment],
    used: Sequence[bool],
    limit: int,
    forecast: Reads | None = None,
    turns: Turns | None = None,
) -> tuple[tuple[Assignment, ...], Demand]:
    """Re-enable blocks (gates 0 -> 1) until at most ``limit`` variants are left; returns the new assignments and their
    demand.

    Greedy: two variants become one by asking all their evaluations for the union of what both compute, read and
    predict; the pair that adds the fewest multiply-accumulates goes first. Added work changes what later evaluations
    find in the caches, and often costs more there than in the merged evaluations, so the demand is computed anew after
    each round. Close to the limit, the merges that look cheapest are compiled and the one with the cheapest run is
    taken; far above it, where that would take long, a round merges half of the excess by estimate.

    Always ends: a merge makes the assignments of at least one evaluation strictly larger, and evaluations that are all
    asked for everything share one variant. Those of two denoisers never do: ``limit`` is at least the number of
    denoisers that are run. ``assignments`` must have no missing reads. turns: where the halves of guidance are launched
    one after the other, so that the variants are those of turns.
    """
    laid_out = index if turns is None else turns.index
    current = tuple(assignments)
    demands = demand(index, current, used, forecast)
    cells = len(current) * len(index.names)
    trials_per_round = max(_LEAST_TRIALS, min(_MOST_TRIALS, _CELLS_PER_ROUND // cells))
    while True:
        groups = _groups_of(demands, turns)
        excess = len(groups) - limit
        if excess <= 0:
            return current, demands
        if excess > _NEAR:
            merged = _merge(index, current, _clusters(laid_out, groups, excess // 2), turns)
            current, demands = _complete(index, merged, used, forecast)
            continue
        pairs = _cheapest_pairs(laid_out, groups, trials_per_round)
        trials = [_complete(index, _merge(index, current, [pair], turns), used, forecast) for pair in pairs]
        current, demands = min(
            trials,
            key=lambda trial: (len(_groups_of(trial[1], turns)) >= len(groups), trial[1].macs(index)),
        )


def _groups_of(demands: Demand, turns: Turns | None) -> tuple[Group, ...]:
    return group_launches(demands.launches if turns is None else turns.demand(demands).launches)


def _merge(
    index: GraphIndex,
    assignments: Sequence[Assignment],
    clusters: Sequence[Sequence[Group]],
    turns: Turns | None,
) -> list[Assignment]:
    """Ask every evaluation of each cluster for the union of what its groups do, of turns in both halves."""
    merged = list(assignments)
    for cluster in clusters:
        computed = reads = gates = 0
        for group in cluster:
            computed |= group.computed
            reads |= group.reads
        if turns is not None:
            computed, reads = turns.together(computed), turns.together(reads)
        for value in bits(computed & ~index.free):
            gates |= index.all_forms(index.block[value])
        predicts = any(group.predicts for group in cluster)
        for group in cluster:
            for step in group.steps if turns is None else map(evaluation_of, group.steps):
                old = merged[step]
                own = index.own[old.denoiser]
                merged[step] = replace(
                    old,
                    gates=old.gates | gates,
                    compute=old.compute | computed,
                    need=old.need | (computed | reads) & own,
                    predict=old.predict or predicts,
                )
    return merged


def _complete(
    index: GraphIndex, assignments: Sequence[Assignment], used: Sequence[bool], forecast: Reads | None
) -> tuple[tuple[Assignment, ...], Demand]:
    """Keep also the blocks that the assignments would read before they were ever stored, or without the half that they
    need."""
    current = list(assignments)
    while True:
        found = demand(index, current, used, forecast)
        missing = {(step, index.block[value]) for step, value in found.missing} or _without_half(index, current)
        if not missing:
            return tuple(current), found
        for step, block in missing:
            current[step] = replace(current[step], gates=current[step].gates | index.all_forms(block))


def _without_half(index: GraphIndex, assignments: Sequence[Assignment]) -> set[tuple[int, int]]:
    """Removed blocks at guided evaluations of which the last one that kept them was conditional only, whether anything
    needs them or not: a schedule has no such gates."""
    conditional_only = [not index.guided[assignment.denoiser] for assignment in assignments]
    if not any(conditional_only):
        return set()
    blocks = range(index.schedule_blocks)
    gates = [[bool(assignment.gates >> block & 1) for block in blocks] for assignment in assignments]
    guided = [assignment.denoiser % sum(index.guided) for assignment in assignments]
    runs = [[bool(index.outputs[block] & index.own[denoiser]) for block in blocks] for denoiser in guided]
    return {(step, block) for step, block, _ in missing_halves(gates, runs, conditional_only)}


def _cheapest_pairs(index: GraphIndex, groups: Sequence[Group], count: int) -> list[tuple[Group, Group]]:
    """The pairs with the smallest estimated added cost."""
    atoms = [index.costs.atoms_of(group.computed) for group in groups]
    launches = [len(group.steps) for group in groups]
    pairs = (
        (i, j)
        for i in range(len(groups))
        for j in range(i + 1, len(groups))
        if groups[i].denoiser == groups[j].denoiser
    )
    best = heapq.nsmallest(
        count, ((_added(index, atoms[i], launches[i], atoms[j], launches[j]), i, j) for i, j in pairs)
    )
    return [(groups[i], groups[j]) for _, i, j in best]


def _clusters(index: GraphIndex, groups: Sequence[Group], merges: int) -> list[list[Group]]:
    """Merge the cheapest pair ``merges`` times by estimate; returns the clusters of two groups and more."""
    members = {i: [group] for i, group in enumerate(groups)}
    atoms = {i: index.costs.atoms_of(group.computed) for i, group in enumerate(groups)}
    launches = {i: len(group.steps) for i, group in enumerate(groups)}

    def entry(i: int, j: int) -> tuple[int, int, int]:
        return _added(index, atoms[i], launches[i], atoms[j], launches[j]), i, j

    heap = [entry(i, j) for i in members for j in members if i < j and _of_one(members[i], members[j])]
    heapq.heapify(heap)
    for new in range(len(groups), len(groups) + merges):
        i = j = -1
        while heap and not (i in members and j in members):
            _, i, j = heapq.heappop(heap)
        if not (i in members and j in members):
            break  # what is left is of different denoisers
        atoms[new] = atoms[i] | atoms[j]
        launches[new] = launches[i] + launches[j]
        joined = members.pop(i) + members.pop(j)
        for other, theirs in members.items():
            if _of_one(theirs, joined):
                heapq.heappush(heap, entry(other, new))
        members[new] = joined
    return [cluster for cluster in members.values() if len(cluster) > 1]


def _of_one(cluster: Sequence[Group], other: Sequence[Group]) -> bool:
    """Whether two clusters are of one denoiser."""
    return cluster[0].denoiser == other[0].denoiser


def _added(index: GraphIndex, left: int, left_launches: int, right: int, right_launches: int) -> int:
    """Estimated multiply-accumulates added when two groups, given by their atoms, both do the union."""
    total = index.costs.total
    union = total(left | right)
    return (union - total(left)) * left_launches + (union - total(right)) * right_launches
