"""Layout ``segments``: the model cut so that each weight is in one graph, and an evaluation is a few launches. Pure
Python.

A *segment* is a set of pieces (see ``pieces``) that run at exactly the same evaluations. What one segment makes and
another reads lies in the arena, like a cache; whether it was made at this evaluation or at an earlier one is only a
matter of the offset that the launch is bound to, so reading an output cache costs nothing. A removed block with a
residual cache is its input plus the residual: such sums are launches of graphs without weights, which only know how
many tensors of what shape they add, so that one of them serves the whole model. Where a block is forecast, they add
stored values with the weights of the launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

from dipgo_deploy.plan.buffers import ALIGNMENT, Lifetime, allocate, lower_bound
from dipgo_deploy.plan.compile import demanded
from dipgo_deploy.plan.costs import bits
from dipgo_deploy.plan.graph import BlockGraph
from dipgo_deploy.plan.index import GraphIndex
from dipgo_deploy.plan.live import Demand
from dipgo_deploy.plan.merge import merge_pieces
from dipgo_deploy.plan.model import Cache, Launch
from dipgo_deploy.plan.pieces import PieceGraph
from dipgo_deploy.plan.turns import Turns, half_of, in_evaluations, passing, with_guides
from dipgo_deploy.plan.values import Terms
from dipgo_deploy.schedule.forecast import Reads
from dipgo_deploy.schedule.guidance import HALVES

# A piece at the model's entrance that costs less than this share of an evaluation runs whenever any of them does: one
# segment then holds them all.
_CHEAP_SHARE = 0.005

SegmentKind = Literal["part", "sum", "weighted", "difference", "guide"]


@dataclass(frozen=True)
class Segment:
    """One static graph of the layout.

    Attributes:
        kind: ``part`` of the model; ``sum`` of ``terms`` tensors, or ``weighted`` sum of them; ``difference`` of two;
            ``guide`` makes the guided prediction of those of the two halves.
        pieces: of a part, in order.
        reads: tensors taken from the arena, by name (``term0`` ... for sums and differences, ``HALVES`` to guide).
        writes: tensors put there; ``residual`` means the named value minus its block's input.
        predicts: whether it writes a prediction.
        prediction: of a part that predicts, the value that it is.
        tensor: kind of the tensors of a sum or difference, and of those that are guided.
        weight_bytes: of its own weights, which no other segment has.
    """

    name: str
    kind: SegmentKind
    reads: tuple[str, ...]
    writes: tuple[Cache, ...]
    predicts: bool
    macs: int = 0
    weight_bytes: int = 0
    pieces: tuple[int, ...] = ()
    terms: int = 0
    tensor: str = ""
    prediction: str = ""


@dataclass(frozen=True)
class SegmentPlan:
    """Segments, launches in order (``Launch.variant`` is an index into ``segments``), and the arena.

    An evaluation has any number of launches; one of them predicts where the evaluation has a prediction of its own. The
    gates, the prediction slots and their sources are those of the ``Plan`` for the same schedule. Sizes are in bytes.
    """

    segments: tuple[Segment, ...]
    launches: tuple[Launch, ...]
    arena_bytes: int
    lower_bound_bytes: int
    macs_run: int

    @property
    def weight_bytes(self) -> int:
        """Of all graphs together: what engines that share nothing would hold."""
        return sum(segment.weight_bytes for segment in self.segments)


What = Literal["value", "residual", "sum"]


class Version(NamedTuple):
    """A tensor as it was made at a step: a ``value``, the ``residual`` of one, or a removed one's ``sum``. half: read
    is its conditional half."""

    what: What
    name: str
    step: int
    half: bool = False


@dataclass(frozen=True)
class _Step:
    """What one evaluation with launches does, by names. reads: cached values with what is read of them. prediction:
    that of its denoiser."""

    step: int
    computed: frozenset[str]
    reads: Mapping[str, Terms]
    stores: frozenset[str]
    predicts: bool
    slot: int
    prediction: str


@dataclass(frozen=True)
class _Model:
    """What stays the same over the evaluations, or turns. base: of a residual cache's value, what it is a residual of.
    whole: of a conditional half, what it is of. guided: the evaluations that are. in_turns: whether turns take the
    place of evaluations."""

    pieces: PieceGraph
    maker: Mapping[str, int]
    base: Mapping[str, str]
    predictions: tuple[str, ...]
    whole: Mapping[str, str]
    guided: tuple[bool, ...]
    in_turns: bool = False

    def of_half(self, steps: frozenset[int], half: int) -> list[int]:
        """The turns of one half; of evaluations all are."""
        return sorted(step for step in steps if self.half(step) == half)

    def half(self, step: int) -> int:
        """Which half a turn is of; 0 for an evaluation."""
        return half_of(step) if self.in_turns else 0

    def stored(self, what: What, name: str, step: int) -> Version:
        """What evaluation ``step`` stored for reads of a value."""
        half = self.guided[step] and name in self.whole
        return Version(what, self.whole[name] if half else name, step, half)


@dataclass
class _Emitted:
    """A launch before memory is given out. target: place of a part in the order, or a sum's or difference's key.
    weights: of the reads of a weighted sum."""

    step: int
    target: object
    reads: list[Version]
    writes: list[Version] = field(default_factory=list)
    prediction: int | None = None
    weights: tuple[float, ...] = ()


def plan_segments(
    graph: BlockGraph,
    pieces: PieceGraph,
    gates: Sequence[Sequence[bool]],
    *,
    denoisers: Sequence[int] | None = None,
    prediction_used: Sequence[bool] | None = None,
    alignment: int = ALIGNMENT,
    forecast: Reads | None = None,
    guidance: Sequence[float] | None = None,
) -> SegmentPlan:
    """Cut the model where the schedule cuts it: the same predictions as ``compile_plan`` gives for these gates.

    pieces: of the same trace (``pieces.split``). The other arguments and what is re-enabled are those of
    ``compile_plan``.
    """
    compiled = demanded(
        graph,
        gates,
        denoisers=denoisers,
        prediction_used=prediction_used,
        alignment=alignment,
        forecast=forecast,
        guidance=guidance,
    )
    index, demands = compiled.laid_out
    model = _model(index, pieces, demands, in_turns=compiled.turns is not None)
    steps = _steps(index, demands)
    runs = _runs(graph, model, steps, max(map(index.costs.macs, index.own)))
    before, apart = _order(model, steps, runs)
    active = sorted(runs)
    parts = [
        tuple(active[place] for place in part)
        for part in merge_pieces(
            [runs[piece] for piece in active],
            [[active.index(other) for other in sorted(before[piece])] for piece in active],
            [[active.index(other) for other in sorted(apart[piece])] for piece in active],
        )
    ]
    emitted = list(_Emitter(index, model, steps, runs, parts).launches())
    owners = {need.step: need.denoiser for need in demands.launches}
    return _assemble(model, parts, emitted, alignment, compiled.turns, owners)


def _model(index: GraphIndex, pieces: PieceGraph, demands: Demand, *, in_turns: bool) -> _Model:
    return _Model(
        pieces=pieces,
        maker={name: place for place, piece in enumerate(pieces.pieces) for name in piece.makes},
        base={index.names[v]: index.names[u] for v, u in enumerate(index.base) if u >= 0},
        predictions=tuple(index.names[value] for value in index.predictions),
        whole={index.names[v]: index.names[u] for v, u in enumerate(index.whole) if u >= 0},
        guided=demands.guided,
        in_turns=in_turns,
    )


def _steps(index: GraphIndex, demands: Demand) -> list[_Step]:
    def names(mask: int) -> frozenset[str]:
        return frozenset(index.names[value] for value in bits(mask))

    steps, slot = [], 0
    for need in demands.launches:
        reads = {index.names[value]: demands.read(need.step, value) for value in bits(need.reads)}
        prediction = index.names[index.predictions[need.denoiser]]
        steps.append(_Step(need.step, names(need.computed), reads, names(need.stores), need.predicts, slot, prediction))
        slot += need.predicts
    return steps


def _runs(graph: BlockGraph, model: _Model, steps: Sequence[_Step], macs_full: int) -> dict[int, frozenset[int]]:
    """The evaluations at which each piece runs; pieces that never do are left out.

    A piece runs when one of its owners is computed. One that depends on constant inputs only runs once, of turns once
    for each half. The cheap ones among those that depend on inputs only run together, at the evaluations of their
    denoisers.
    """
    pieces = model.pieces.pieces
    block_outputs = {name for block in graph.blocks for name in block.outputs}
    runs: dict[int, frozenset[int]] = {}
    for place, piece in enumerate(pieces):
        at = frozenset(step.step for step in steps if piece.owners & step.computed)
        if at:
            runs[place] = at
    constant: set[int] = set()
    entrance: set[int] = set()
    for place in runs:
        piece = pieces[place]
        if not (block_outputs | set(model.predictions)).isdisjoint(piece.makes):
            continue
        sources = {model.maker[name] for name in piece.reads if name in model.maker}
        inputs = [graph.inputs[name] for name in piece.reads if name not in model.maker]
        if sources <= constant and "step" not in inputs:
            constant.add(place)
        elif sources <= constant | entrance and piece.macs <= _CHEAP_SHARE * macs_full:
            entrance.add(place)
    prediction_at = {step.step: step.prediction for step in steps}
    together: dict[frozenset[str], set[int]] = {}
    for place in entrance:
        together.setdefault(frozenset(map(prediction_at.__getitem__, runs[place])), set()).add(place)
    for alike in together.values():
        runs.update(dict.fromkeys(alike, frozenset().union(*(runs[place] for place in alike))))
    for place in sorted(constant, reverse=True):
        readers = [at for other, at in runs.items() if not set(pieces[place].makes).isdisjoint(pieces[other].reads)]
        wanted = runs[place].union(*readers)
        runs[place] = frozenset(model.of_half(wanted, half)[0] for half in {model.half(step) for step in wanted})
    return runs


def _order(
    model: _Model, steps: Sequence[_Step], runs: Mapping[int, frozenset[int]]
) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """Per piece those that must come before it at some evaluation, and those that must not be in a segment with it.

    Two pieces are kept apart when a launch in between makes the one's input of the other's output, and when the one
    makes a value at an evaluation at which the other wants the cached one.
    """
    before: dict[int, set[int]] = {place: set() for place in runs}
    apart: dict[int, set[int]] = {place: set() for place in runs}

    def separate(one: int, other: int) -> None:
        if one != other:
            apart[one].add(other)
            apart[other].add(one)

    for step in steps:
        for place, at in runs.items():
            if step.step not in at:
                continue
            for name in model.pieces.pieces[place].reads:
                if name not in model.maker:
                    continue
                maker = model.maker[name]
                if name not in step.reads:
                    if step.step in runs[maker]:
                        before[place].add(maker)
                    continue
                if step.step in runs.get(maker, ()):
                    separate(maker, place)
                base = name
                while base in step.reads and base in model.base:
                    base = model.base[base]
                if base != name and base not in step.reads and step.step in runs[model.maker[base]]:
                    before[place].add(model.maker[base])
                    separate(model.maker[base], place)
    return before, apart


class _Emitter:
    """Walks the evaluations and writes down launches with the versions that they read and write."""

    def __init__(
        self,
        index: GraphIndex,
        model: _Model,
        steps: Sequence[_Step],
        runs: Mapping[int, frozenset[int]],
        parts: Sequence[tuple[int, ...]],
    ) -> None:
        self._model, self._steps, self._runs, self._parts = model, steps, runs, parts
        self.externals = [_externals(model, part) for part in parts]
        self._fused = _fused_residuals(model, steps, parts, self.externals)
        self._direct = {
            name
            for name, value in zip(model.predictions, index.predictions, strict=True)
            if index.block[value] < 0 and _predicts_directly(name, model, steps, runs)
        }
        self._queue: list[_Emitted] = []

    def launches(self) -> Iterator[_Emitted]:
        """All launches in order."""
        for step in self._steps:
            yield from self._step(step)

    def _step(self, step: _Step) -> list[_Emitted]:
        self._queue = []
        self._sums: dict[str, Version] = {}
        self._uses = self._count_uses(step)
        model = self._model
        for number, part in enumerate(self._parts):
            if step.step not in self._runs[part[0]]:
                continue
            launch = _Emitted(step.step, number, [self._effective(step, name) for name in self.externals[number]])
            for place in part:
                for name in model.pieces.pieces[place].makes:
                    if name == step.prediction and name in self._direct:
                        launch.prediction = step.slot
                    else:
                        launch.writes.append(Version("value", name, step.step))
            launch.writes += [Version("residual", name, step.step) for name in self._fused[number]]
            self._queue.append(launch)
        fused = {name for names in self._fused for name in names}
        for name in sorted(step.stores & model.base.keys() - fused):
            terms = [Version("value", name, step.step), self._effective(step, model.base[name])]
            key = ("difference", 2, model.pieces.tensors[name].kind, False)
            self._queue.append(_Emitted(step.step, key, terms, [Version("residual", name, step.step)]))
        if step.predicts and step.prediction not in self._direct:
            terms = [self._effective(step, step.prediction)]
            key = ("sum", 1, model.pieces.tensors[step.prediction].kind, True)
            self._queue.append(_Emitted(step.step, key, terms, prediction=step.slot))
        return self._queue

    def _count_uses(self, step: _Step) -> dict[str, int]:
        """How often each value is wanted at an evaluation; one that only one sum wants need not exist by itself."""
        model = self._model
        running = [number for number, part in enumerate(self._parts) if step.step in self._runs[part[0]]]
        wanted = [name for number in running for name in self.externals[number]]
        wanted += [model.base[name] for name in (*step.reads, *step.stores) if name in model.base]
        wanted += [step.prediction] * step.predicts
        return {name: wanted.count(name) for name in wanted}

    def _effective(self, step: _Step, name: str) -> Version:
        """The version of a tensor that a consumer reads at an evaluation; sums are launched at their first use."""
        model = self._model
        if name not in step.reads:
            ran = self._runs[model.maker[name]]
            # What is constant ran once.
            once = step.step if step.step in ran else model.of_half(ran, model.half(step.step))[0]
            return Version("value", name, once)
        if name not in model.base and _is_plain(step.reads[name]):
            return model.stored("value", name, step.reads[name][0].stored)
        if name not in self._sums:
            terms = self._stored(step, name)
            if name in model.base:
                base = model.base[name]
                while base in step.reads and base in model.base and self._uses[base] == 1:
                    terms += self._stored(step, base)
                    base = model.base[base]
                terms.append((self._effective(step, base), 1.0))
            reads, weights = zip(*reversed(terms), strict=True)
            plain = all(weight == 1 for weight in weights)
            key = ("sum" if plain else "weighted", len(reads), model.pieces.tensors[name].kind, False)
            self._sums[name] = Version("sum", name, step.step)
            launch = _Emitted(step.step, key, list(reads), [self._sums[name]], weights=() if plain else weights)
            self._queue.append(launch)
        return self._sums[name]

    def _stored(self, step: _Step, name: str) -> list[tuple[Version, float]]:
        """What is read of a cached value, with its weights."""
        what: What = "residual" if name in self._model.base else "value"
        return [(self._model.stored(what, name, term.stored), term.weight) for term in step.reads[name]]


def _is_plain(terms: Terms) -> bool:
    """Whether what is read is a stored value as it is."""
    return len(terms) == 1 and terms[0].weight == 1


def _externals(model: _Model, part: Sequence[int]) -> tuple[str, ...]:
    """What a part reads that other parts make, or that is cached, in order of name."""
    pieces = [model.pieces.pieces[place] for place in part]
    made = {name for piece in pieces for name in piece.makes}
    return tuple(sorted({name for piece in pieces for name in piece.reads if name in model.maker} - made))


def _fused_residuals(
    model: _Model, steps: Sequence[_Step], parts: Sequence[tuple[int, ...]], externals: Sequence[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Per part the values whose residual it makes itself: those whose input it has at hand whenever it is stored."""
    fused = []
    for part, external in zip(parts, externals, strict=True):
        made = {name for place in part for name in model.pieces.pieces[place].makes}
        names = []
        for name in sorted(made & model.base.keys()):
            stored = [step for step in steps if name in step.stores]
            base = model.base[name]
            inside = base in made and all(base in step.computed for step in stored)
            if stored and (inside or base in external):
                names.append(name)
        fused.append(tuple(names))
    return fused


def _predicts_directly(
    prediction: str, model: _Model, steps: Sequence[_Step], runs: Mapping[int, frozenset[int]]
) -> bool:
    """Whether the part that makes a prediction can write it to its slot: nothing else wants it, and it makes one at
    every launch. So it is in a traced model; a prediction that is a block's output is copied to its slot."""
    if any(prediction in piece.reads for piece in model.pieces.pieces) or prediction in model.base.values():
        return False
    predicting = {step.step for step in steps if step.predicts and prediction in step.computed}
    return runs.get(model.maker[prediction], frozenset()) == predicting


def _assemble(
    model: _Model,
    parts: Sequence[tuple[int, ...]],
    emitted: Sequence[_Emitted],
    alignment: int,
    turns: Turns | None,
    denoisers: Mapping[int, int],
) -> SegmentPlan:
    """Segments with the outputs that somebody reads, and every version at its offset."""
    last_read = {version._replace(half=False): at for at, launch in enumerate(emitted) for version in launch.reads}
    read = {(version.what, version.name) for version in last_read}
    targets: list[object] = [
        *range(len(parts)),
        *dict.fromkeys(e.target for e in emitted if isinstance(e.target, tuple)),
    ]
    first = {target: next(e for e in emitted if e.target == target) for target in targets}
    segments = tuple(_segment(model, parts, targets, target, first[target], read) for target in targets)
    number_of = {target: number for number, target in enumerate(targets)}

    place: dict[Version, int] = {}
    lifetimes: list[Lifetime] = []
    kept: list[list[Version]] = []
    for number, launch in enumerate(emitted):
        kept.append([version for version in launch.writes if (version.what, version.name) in read])
        for version in kept[-1]:
            last = last_read.get(version)
            place[version] = len(lifetimes)
            nbytes = model.pieces.tensors[version.name].nbytes
            lifetimes.append(Lifetime(nbytes, number, number if last is None else last, read=last is not None))
    steps, predicts = [e.step for e in emitted], [e.prediction is not None for e in emitted]
    nbytes = model.pieces.tensors[model.predictions[0]].nbytes
    passed = passing(steps, predicts, model.guided, nbytes) if turns is not None else None
    stored = len(lifetimes)
    lifetimes += () if passed is None else passed.lifetimes
    offsets, arena = allocate(lifetimes, alignment)

    def offset_of(version: Version) -> int:
        skipped = model.pieces.tensors[version.name].nbytes // 2 if version.half else 0
        return offsets[place[version._replace(half=False)]] + skipped

    launches = tuple(
        Launch(
            step=launch.step,
            variant=number_of[launch.target],
            reads=tuple(map(offset_of, launch.reads)),
            writes=tuple(offsets[place[version]] for version in writes),
            prediction=launch.prediction,
            weights=launch.weights,
        )
        for launch, writes in zip(emitted, kept, strict=True)
    )
    if turns is not None and passed is not None:
        guide = partial(_guide, model.pieces, turns)
        segments, guides = with_guides(segments, passed, lambda end: denoisers[steps[end]], guide)
        launches = in_evaluations(launches, passed, offsets[stored:], guides)
    return SegmentPlan(
        segments=segments,
        launches=launches,
        arena_bytes=arena,
        lower_bound_bytes=lower_bound(lifetimes, alignment),
        macs_run=sum(segments[launch.variant].macs for launch in launches),
    )


def _guide(pieces: PieceGraph, turns: Turns, denoiser: int) -> Segment:
    value = turns.guides[denoiser]
    return Segment(
        name=turns.guide_name(denoiser),
        kind="guide",
        reads=HALVES,
        writes=(),
        predicts=True,
        macs=turns.guide_macs(denoiser),
        terms=len(HALVES),
        tensor=pieces.tensors[value].kind,
        prediction=value,
    )


def _segment(
    model: _Model,
    parts: Sequence[tuple[int, ...]],
    targets: Sequence[object],
    target: object,
    launch: _Emitted,
    read: set[tuple[What, str]],
) -> Segment:
    if isinstance(target, int):
        part = parts[target]
        pieces = [model.pieces.pieces[place] for place in part]
        kinds: dict[str, Literal["output", "residual"]] = {"value": "output", "residual": "residual"}
        return Segment(
            name=f"s{target:02d}",
            kind="part",
            reads=_externals(model, part),
            writes=tuple(Cache(v.name, kinds[v.what]) for v in launch.writes if (v.what, v.name) in read),
            predicts=launch.prediction is not None,
            prediction=next((n for piece in pieces for n in piece.makes if n in model.predictions), ""),
            macs=sum(piece.macs for piece in pieces),
            weight_bytes=model.pieces.weight_bytes(part),
            pieces=part,
        )
    assert isinstance(target, tuple)
    kind, terms, tensor, predicts = target
    # Sums of as many tensors of another shape or type come with a number.
    alike = [other for other in targets if isinstance(other, tuple) and (other[:2], other[3]) == (target[:2], predicts)]
    names = {"sum": f"sum{terms}", "weighted": f"weighted{terms}", "difference": "difference"}
    name = names[kind] if not predicts else "copy"
    if alike.index(target):
        name += f".{alike.index(target)}"
    return Segment(
        name=name,
        kind=kind,
        reads=tuple(f"term{i}" for i in range(terms)),
        writes=() if predicts else (Cache("difference" if kind == "difference" else "sum", "output"),),
        predicts=predicts,
        terms=terms,
        tensor=tensor,
    )
