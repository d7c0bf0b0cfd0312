"""From a block graph and a schedule's gates to the plan that is exported and run. Pure Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

from dipgo_deploy.errors import UserError
from dipgo_deploy.plan.buffers import ALIGNMENT, Lifetime, allocate, lower_bound
from dipgo_deploy.plan.costs import bits
from dipgo_deploy.plan.graph import BlockGraph
from dipgo_deploy.plan.index import GraphIndex, index_graph
from dipgo_deploy.plan.live import Demand, demand
from dipgo_deploy.plan.model import Cache, Launch, Plan, Variant
from dipgo_deploy.plan.turns import Turns, in_evaluations, passing, with_guides
from dipgo_deploy.plan.values import Assignment, Term, Terms
from dipgo_deploy.plan.variants import Group, group_launches, promote
from dipgo_deploy.schedule.forecast import FittedForecast, Reads
from dipgo_deploy.schedule.guidance import HALVES


def compile_plan(
    graph: BlockGraph,
    gates: Sequence[Sequence[bool]],
    *,
    denoisers: Sequence[int] | None = None,
    max_variants: int | None = None,
    prediction_used: Sequence[bool] | None = None,
    alignment: int = ALIGNMENT,
    forecast: Reads | None = None,
    guidance: Sequence[float] | None = None,
    like: Iterable[Variant] = (),
) -> Plan:
    """Turn T x N gates into launches of as few static graphs as possible, with the same predictions.

    Args:
        gates: ``gates[t][k]`` says whether block k of ``graph.blocks`` is computed at evaluation t.
        denoisers: per evaluation, which of the graph's predictions is made (default: the first); the blocks of the
            other denoisers are not computed there, whatever their gates say.
        max_variants: re-enable blocks until at most this many variants are left.
        prediction_used: per evaluation, whether the sampler gives any weight to that evaluation's prediction (default:
            all); at least one must be.
        alignment: of cache offsets, in bytes.
        forecast: what removed blocks read; None: the value that they stored last.
        guidance: per evaluation, how much of it there is (default: all); 0 is conditional only, of a graph that has
            ``halves`` or ``guides``.
        like: variants of other schedules. One that computes and reads the same here writes what they write, too, so
            that all of them are one graph.

    The result depends on the arguments only. Raises UserError for gates of the wrong shape, for a limit below one,
    for a removed block that is needed before it was ever computed, or at a guided evaluation when only the conditional
    half of it was, and for a limit that re-enables blocks where the
    weights of a forecast were fitted; ValueError for a malformed graph, alignment, ``guidance``
    or ``prediction_used``.
    """
    compiled = demanded(
        graph,
        gates,
        denoisers=denoisers,
        max_variants=max_variants,
        prediction_used=prediction_used,
        alignment=alignment,
        forecast=forecast,
        guidance=guidance,
    )
    return _assemble(compiled, alignment, like)


@dataclass(frozen=True)
class Compiled:
    """A schedule on a block graph before it is laid out. asked, kept: per evaluation the mask of kept blocks, as asked
    for and after promotion. denoisers: per evaluation, whose prediction it makes. full: the same where all are
    guided. turns: where the halves of guidance are launched one after the other."""

    index: GraphIndex
    asked: tuple[int, ...]
    kept: tuple[int, ...]
    denoisers: tuple[int, ...]
    full: tuple[int, ...]
    demand: Demand
    turns: Turns | None = None

    @property
    def laid_out(self) -> tuple[GraphIndex, Demand]:
        """What is laid out: evaluations, or their turns on the graph of one half."""
        return (self.index, self.demand) if self.turns is None else (self.turns.index, self.turns.demand(self.demand))


def demanded(
    graph: BlockGraph,
    gates: Sequence[Sequence[bool]],
    *,
    denoisers: Sequence[int] | None = None,
    max_variants: int | None = None,
    prediction_used: Sequence[bool] | None = None,
    alignment: int = ALIGNMENT,
    forecast: Reads | None = None,
    guidance: Sequence[float] | None = None,
) -> Compiled:
    """What every evaluation has to do, whatever the layout; arguments and errors are those of ``compile_plan``."""
    both = graph.in_halves() if graph.guides else graph
    index = index_graph(both)
    turns = Turns.of(graph, index) if graph.guides else None
    rows = _gate_masks(both, gates)
    used = [True] * len(rows) if prediction_used is None else [bool(use) for use in prediction_used]
    if len(used) != len(rows) or not any(used):
        raise ValueError(f"prediction_used must have {len(rows)} entries and a true one")
    several = sum(index.guided)
    own = tuple(denoisers or (0,) * len(rows))
    if len(own) != len(rows) or not set(own) <= set(range(several)):
        raise ValueError(f"denoisers must have {len(rows)} entries from 0 to {several - 1}")
    shares = tuple(guidance or (1.0,) * len(rows))
    if len(shares) != len(rows) or (not graph.conditional_only and 0 in shares):
        raise ValueError(f"guidance must have {len(rows)} entries, and a 0 needs a graph that was traced for it")
    chosen = tuple(one + several * (share == 0) for one, share in zip(own, shares, strict=True))
    if alignment < 1:
        raise ValueError(f"alignment must be at least 1, it is {alignment}")
    if max_variants is not None and max_variants < 1:
        raise UserError(f"the most variants allowed must be at least 1, it is {max_variants}")
    assignments: tuple[Assignment, ...] = tuple(
        Assignment(row, denoiser=denoiser, guidance=share)
        for row, denoiser, share in zip(rows, chosen, shares, strict=True)
    )
    demands = demand(index, assignments, used, forecast)
    if demands.missing:
        step, value = demands.missing[0]
        block = index.block_names[index.block[value] % index.schedule_blocks]
        half = max(index.half[value], index.paired[value])
        if half >= 0 and demands.stored[step][half] >= 0:
            raise UserError(
                f"evaluation {step} is guided and removes block {block!r}, of which evaluation "
                f"{demands.stored[step][half]}, which is conditional only, computed no unconditional half; keep the "
                f"block at evaluation {step}"
            )
        raise UserError(
            f"evaluation {step} removes block {block!r}, whose output is needed there but was never computed before; "
            f"keep the block at evaluation {step} or at an earlier one"
        )
    if max_variants is not None:
        least = len({launch.denoiser % (several if turns else len(index.guided)) for launch in demands.launches})
        if max_variants < least:
            what = "denoisers or halves of guidance" if not all(demands.guided) else "denoisers"
            raise UserError(f"at most {max_variants} variants: {least} {what} are run, each in graphs of its own")
        asked = assignments
        assignments, demands = promote(index, assignments, used, max_variants, forecast, turns)
        if isinstance(forecast, FittedForecast) and assignments != asked:
            raise UserError(
                f"at most {max_variants} variants would re-enable blocks, and the weights of the schedule's forecast "
                "were fitted without them; allow more variants, or fit the weights to a schedule that has fewer"
            )
    kept = tuple(assignment.gates for assignment in assignments)
    return Compiled(index, tuple(rows), kept, chosen, own, demands, turns)


def _gate_masks(graph: BlockGraph, gates: Sequence[Sequence[bool]]) -> list[int]:
    """Each evaluation's kept blocks as a mask, in all of their forms."""
    blocks = len(graph.schedule_blocks)
    if not gates:
        raise UserError("the schedule has no steps: it needs at least one row of gates")
    for step, row in enumerate(gates):
        if len(row) != blocks:
            raise UserError(
                f"evaluation {step} of the schedule has {len(row)} gates, but the model has {blocks} blocks"
            )
    masks = [sum(1 << block for block, kept in enumerate(row) if kept) for row in gates]
    return [sum(mask << blocks * form for form in range(graph.forms)) for mask in masks]


def _schedule_mask(index: GraphIndex, mask: int) -> int:
    """Of a mask of kept blocks the schedule's own."""
    blocks = index.schedule_blocks
    return (mask | mask >> blocks * (index.forms - 1)) & ((1 << blocks) - 1)


def _assemble(compiled: Compiled, alignment: int, like: Iterable[Variant]) -> Plan:
    """The demand as variants and launches with every cache at its offset."""
    whole = compiled.index
    index, demands = compiled.laid_out
    asked, kept = ([_schedule_mask(whole, mask) for mask in masks] for masks in (compiled.asked, compiled.kept))
    groups = group_launches(demands.launches)
    most = [_most_terms(demands, group) for group in groups]
    groups = _writing_like(index, groups, most, tuple(like))
    variants = tuple(
        _variant(index, f"v{number:02d}", group, terms)
        for number, (group, terms) in enumerate(zip(groups, most, strict=True))
    )
    variant_of = {step: number for number, group in enumerate(groups) for step in group.steps}
    # A cache is the same tensor under three orders: value positions, sorted names, and bytes in the arena.
    ordered = {mask: _sorted_values(index, mask) for group in groups for mask in (group.reads, group.writes)}
    launch_of = {launch.step: number for number, launch in enumerate(demands.launches)}
    last_read: dict[tuple[int, int], int] = {}
    for number, launch in enumerate(demands.launches):
        for value in bits(launch.reads):
            for term in demands.read(launch.step, value):
                last_read[launch_of[term.stored], demands.stored_as(index, value, term.stored)] = number
    place: dict[tuple[int, int], int] = {}
    lifetimes: list[Lifetime] = []
    for number, launch in enumerate(demands.launches):
        for value in ordered[groups[variant_of[launch.step]].writes]:
            place[number, value] = len(lifetimes)
            last = last_read.get((number, value))
            lifetimes.append(
                Lifetime(index.nbytes[value], number, number if last is None else last, read=last is not None)
            )
    predictions = index.nbytes[index.predictions[0]]
    steps, predicts = [need.step for need in demands.launches], [need.predicts for need in demands.launches]
    passed = passing(steps, predicts, demands.guided, predictions) if compiled.turns is not None else None
    caches = len(lifetimes)
    lifetimes += () if passed is None else passed.lifetimes
    offsets, arena = allocate(lifetimes, alignment)

    def offset_of(value: int, stored: int) -> int:
        whole = demands.stored_as(index, value, stored)
        # The conditional half comes last.
        return offsets[place[launch_of[stored], whole]] + index.nbytes[whole] - index.nbytes[value]

    launches, slot = [], 0
    for number, launch in enumerate(demands.launches):
        group, terms = groups[variant_of[launch.step]], most[variant_of[launch.step]]
        read = [
            (term, value, value in terms)
            for value in ordered[group.reads]
            for term in _padded(demands.read(launch.step, value), terms.get(value, 1))
        ]
        launches.append(
            Launch(
                step=launch.step,
                variant=variant_of[launch.step],
                reads=tuple(offset_of(value, term.stored) for term, value, _ in read),
                writes=tuple(offsets[place[number, value]] for value in ordered[group.writes]),
                prediction=slot if launch.predicts else None,
                weights=tuple(term.weight for term, _, weighted in read if weighted),
            )
        )
        slot += launch.predicts
    if compiled.turns is not None and passed is not None:
        guide = partial(_guide, compiled.turns)
        variants, guides = with_guides(variants, passed, lambda end: demands.launches[end].denoiser, guide)
        launches = list(in_evaluations(launches, passed, offsets[caches:], guides))
    macs_of_gates = cache(lambda row, denoiser: whole.costs.macs(whole.gated(row, denoiser)))
    everything = (1 << len(whole.outputs)) - 1
    blocks = range(whole.schedule_blocks)
    return Plan(
        keep=tuple(tuple(bool(row >> block & 1) for block in blocks) for row in kept),
        variants=variants,
        launches=tuple(launches),
        prediction_slots=demands.prediction_slots,
        arena_bytes=arena,
        lower_bound_bytes=lower_bound(lifetimes, alignment),
        macs_full=round(sum(macs_of_gates(everything, at) for at in compiled.full) / len(kept)),
        macs_schedule=sum(map(macs_of_gates, compiled.kept, compiled.denoisers)),
        macs_run=sum(variants[launch.variant].macs for launch in launches),
        promoted=tuple(
            (step, whole.block_names[block])
            for step, (before, after) in enumerate(zip(asked, kept, strict=True))
            for block in bits(after & ~before)
        ),
    )


def _guide(turns: Turns, denoiser: int) -> Variant:
    return Variant(
        name=turns.guide_name(denoiser),
        computed=frozenset({turns.guides[denoiser]}),
        reads=tuple(Cache(half, "output") for half in HALVES),
        writes=(),
        predicts=True,
        macs=turns.guide_macs(denoiser),
        prediction=turns.guides[denoiser],
        guides=True,
    )


def _writing_like(
    index: GraphIndex, groups: Sequence[Group], most: Sequence[Mapping[int, int]], like: Sequence[Variant]
) -> tuple[Group, ...]:
    """The groups, each of which also writes what variants that are like it write."""
    value_of = {name: value for value, name in enumerate(index.names)}
    found = []
    for group, terms in zip(groups, most, strict=True):
        own = _variant(index, "", group, terms)
        writes = group.writes
        for other in like:
            if (other.computed, other.reads, other.predicts) == (own.computed, own.reads, own.predicts):
                for cache_ in other.writes:
                    writes |= 1 << value_of[cache_.value]
        found.append(replace(group, writes=writes))
    return tuple(found)


def _most_terms(demands: Demand, group: Group) -> dict[int, int]:
    """How many stored values a variant reads of each that any of its launches forecasts."""
    most: dict[int, int] = {}
    for step in group.steps:
        for value, terms in demands.forecasts[step].items():
            if group.reads >> value & 1:
                most[value] = max(most.get(value, 0), len(terms))
    return most


def _padded(terms: Terms, count: int) -> Terms:
    """As many terms as the variant has: the last stored value again, without weight."""
    return terms + (Term(0.0, terms[0].stored),) * (count - len(terms))


def _variant(index: GraphIndex, name: str, group: Group, terms: Mapping[int, int]) -> Variant:
    """A group of launches by names. terms: values read as weighted sums, and of how many."""
    reads = tuple(
        index.cache(value, nth)
        for value in _sorted_values(index, group.reads)
        for nth in (range(1, 1 + terms[value]) if value in terms else (0,))
    )
    return Variant(
        name=name,
        computed=frozenset(index.names[value] for value in bits(group.computed)),
        reads=reads,
        writes=tuple(index.cache(value) for value in _sorted_values(index, group.writes)),
        predicts=group.predicts,
        macs=index.costs.macs(group.computed),
        prediction=index.names[index.predictions[group.denoiser]] if group.predicts else "",
    )


def _sorted_values(index: GraphIndex, mask: int) -> list[int]:
    """The values of ``mask`` in the order in which a variant lists their caches."""
    return sorted(bits(mask), key=index.cache)
