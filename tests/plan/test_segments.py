"""Pieces and segments against a naive executor of the supernet's definition, on random traced models and schedules."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_plans import (
    BIG,
    PRIME,
    Traced,
    compute,
    evaluate,
    expand,
    graph_input,
    half_of,
    naive,
    of_shares,
    random_forecast,
    random_gates,
    random_graph,
    random_halves,
    random_shares,
    random_turns,
    read_off,
    residual_source,
    residue,
    supernet,
    with_guide,
)

from dipgo_deploy.errors import UserError
from dipgo_deploy.plan.compile import compile_plan
from dipgo_deploy.plan.graph import Block, BlockGraph, Value
from dipgo_deploy.plan.merge import merge_pieces
from dipgo_deploy.plan.pieces import Node, NodeGraph, PieceGraph, Tensor, split
from dipgo_deploy.plan.segments import Segment, SegmentPlan, plan_segments
from dipgo_deploy.schedule.guidance import HALVES

RELAXED = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def cases(draw):
    rng = draw(st.randoms(use_true_random=False))
    traced = expand(rng, random_graph(rng))
    gates = random_gates(rng, rng.randint(1, 7), len(traced.graph.blocks))
    used = [rng.random() < 0.8 for _ in gates] if rng.random() < 0.4 else [True] * len(gates)
    used[rng.randint(0, len(gates) - 1)] = True
    return traced, gates, used, rng.choice([1, 2, 4])


def execute(
    plan: SegmentPlan,
    traced: Traced,
    spoil: tuple[int, str] | None = None,
    shares: Sequence[float] | None = None,
) -> tuple[list[int], dict[str, set[str]]]:
    """Predictions by slot, and the weights that each segment used, from the plan's launches and arena bytes alone.

    Every byte of the arena remembers what was written to it, so a wrong offset, an overlap or a stale tensor shows.
    spoil: (launch, tensor) whose write is made wrong.
    """
    source = residual_source(traced.graph)
    arena: list[tuple[int, int] | None] = [None] * plan.arena_bytes
    predictions: list[int] = []
    weights: dict[str, set[str]] = {segment.name: set() for segment in plan.segments}

    def load(nbytes: int, offset: int) -> int:
        cells = arena[offset : offset + nbytes]
        assert cells[0] is not None, "read before it is written"
        content, first = cells[0]
        assert first in (0, nbytes) and cells == [(content, first + i) for i in range(nbytes)], "torn"
        if not first:
            return content
        assert arena[offset - nbytes : offset] == [(content, i) for i in range(nbytes)], "not the second half"
        return half_of(content)

    def size(segment: Segment, name: str) -> int:
        return int(segment.tensor[1:]) if segment.kind != "part" else traced.nodes.tensors[name].nbytes

    for number, launch in enumerate(plan.launches):
        segment = plan.segments[launch.variant]
        places = [*zip(segment.reads, launch.reads, strict=True)]
        loaded = {name: load(size(segment, name), offset) for name, offset in places}
        if segment.kind == "guide":
            assert segment.reads == HALVES and launch.prediction == len(predictions) and shares is not None
            predictions.append(compute(f"*{shares[launch.step]}", [*loaded.values()]))
            continue
        known: dict[str, int] = {}

        def given(name: str, segment=segment, loaded=loaded, launch=launch) -> int | None:
            if name in loaded:
                return loaded[name]
            if name in traced.graph.inputs:
                return graph_input(traced.graph, name, launch.step, launch.half)
            weights[segment.name] |= traced.makers[name].weights
            return None

        if segment.kind == "weighted":
            terms = zip(launch.weights, loaded.values(), strict=True)
            result = sum(residue(weight) * value for weight, value in terms) % PRIME
        elif segment.kind == "sum":
            result = sum(loaded.values()) % PRIME
        elif segment.kind == "difference":
            result = (loaded["term0"] - loaded["term1"]) % PRIME
        written: list[tuple[int, int]] = []
        for cache, offset in zip(segment.writes, launch.writes, strict=True):
            if segment.kind == "part":
                result = evaluate(traced, cache.value, known, given)
                if cache.kind == "residual":
                    result = (result - evaluate(traced, source[cache.value], known, given)) % PRIME
            result += spoil == (number, cache.value)
            nbytes = size(segment, cache.value)
            written.append((nbytes, offset))
            for i in range(nbytes):
                arena[offset + i] = result, i
        if launch.passes is not None:
            assert segment.predicts and launch.prediction is None
            if segment.kind == "part":
                result = evaluate(traced, segment.prediction, known, given)
            written.append((traced.graph.values[traced.graph.predictions[0]].nbytes, launch.passes))
            for i in range(written[-1][0]):
                arena[launch.passes + i] = result, i
        elif launch.prediction is not None:
            assert segment.predicts and launch.prediction == len(predictions)
            if segment.kind == "part":
                result = evaluate(traced, segment.prediction, known, given)
            if shares is not None and shares[launch.step] and launch.half is None:
                result = compute(f"*{shares[launch.step]}", [result])
            predictions.append(result)
        else:
            assert not segment.predicts
        # Loading again after the writes shows a write over a read or over another write of the same launch.
        assert [load(size(segment, name), offset) for name, offset in places] == [loaded[name] for name, _ in places]
        for nbytes, offset in written:
            load(nbytes, offset)
    return predictions, weights


def planned(traced: Traced, gates, used, alignment: int = 1, forecast=None) -> tuple[PieceGraph, SegmentPlan]:
    pieces = split(traced.nodes, traced.graph)
    options = {"prediction_used": used, "alignment": alignment, "forecast": forecast}
    return pieces, plan_segments(traced.graph, pieces, gates, **options)


def test_the_executors_agree_on_what_is_missing():
    """The two ways to write down the definition (values, nodes) call the same schedules broken."""
    for seed in range(200):
        rng = random.Random(seed)
        traced = expand(rng, random_graph(rng))
        gates = random_gates(rng, 5, len(traced.graph.blocks))
        assert [p is None for p in supernet(traced, gates)] == [p is None for p in naive(traced.graph, gates)]


@settings(RELAXED, max_examples=600)
@given(cases())
def test_segments_equal_the_supernet(case):
    traced, gates, used, alignment = case
    expected = supernet(traced, gates)
    if any(use and prediction is None for use, prediction in zip(used, expected, strict=True)):
        with pytest.raises(UserError, match=r"evaluation \d+ removes block 'b\d'"):
            planned(traced, gates, used, alignment)
        return
    pieces, plan = planned(traced, gates, used, alignment)
    variants = compile_plan(traced.graph, gates, prediction_used=used, alignment=alignment)
    predictions, weights = execute(plan, traced)
    for step, use in enumerate(used):
        if use:
            assert predictions[variants.prediction_slots[step]] == expected[step], f"evaluation {step}"
    steps = [launch.step for launch in plan.launches]
    assert steps == sorted(steps) and set(steps) == {launch.step for launch in variants.launches}
    assert plan.lower_bound_bytes <= plan.arena_bytes
    assert all(offset % alignment == 0 for launch in plan.launches for offset in (*launch.reads, *launch.writes))
    assert len({segment.name for segment in plan.segments}) == len(plan.segments)
    assert {launch.variant for launch in plan.launches} == set(range(len(plan.segments)))
    for segment in plan.segments:
        assert segment.macs == sum(pieces.pieces[piece].macs for piece in segment.pieces)
        assert weights[segment.name] <= pieces_weights(pieces, segment)
    assert plan == planned(traced, gates, used, alignment)[1]


def test_denoisers_in_turn_equal_the_supernet():
    """Each runs at its own evaluations only; nothing of the other is launched there."""
    compared = 0
    for seed in range(60):
        rng = random.Random(seed)
        graph, gates, denoisers = random_turns(rng)
        traced = expand(rng, graph)
        pieces = split(traced.nodes, traced.graph)
        expected = supernet(traced, gates, denoisers=denoisers)
        try:
            plan = plan_segments(traced.graph, pieces, gates, denoisers=denoisers)
        except UserError:
            assert None in expected
            continue
        variants = compile_plan(traced.graph, gates, denoisers=denoisers)
        predictions, _ = execute(plan, traced)
        assert [predictions[slot] for slot in variants.prediction_slots] == expected
        for launch in plan.launches:
            segment = plan.segments[launch.variant]
            owners = {name[:3] for piece in segment.pieces for name in pieces.pieces[piece].owners}
            assert not owners or f"d{denoisers[launch.step]}." in owners
        compared += 1
    assert compared > 30


@settings(RELAXED, max_examples=150)
@given(st.randoms(use_true_random=False))
def test_guidance_equals_the_supernet(rng):
    """A conditional-only evaluation launches segments of its own, which read second halves where guided ones wrote."""
    graph, gates, shares = random_halves(rng)
    traced, denoisers = expand(rng, graph), of_shares(shares)
    pieces = split(traced.nodes, traced.graph)
    forecast = random_forecast(rng, gates, shares)
    expected = supernet(traced, [[*row, *row] for row in gates], forecast, denoisers=denoisers, shares=shares)
    try:
        plan = plan_segments(traced.graph, pieces, gates, guidance=shares, forecast=forecast)
    except UserError:
        assert None in expected
        return
    variants = compile_plan(traced.graph, gates, guidance=shares, forecast=forecast)
    predictions, _ = execute(plan, traced, shares=shares)
    assert [predictions[slot] for slot in variants.prediction_slots] == expected
    for launch in plan.launches:
        segment = plan.segments[launch.variant]
        owners = {name[:3] for piece in segment.pieces for name in pieces.pieces[piece].owners}
        assert not owners or f"d{denoisers[launch.step]}." in owners


@settings(RELAXED, max_examples=80)
@given(st.randoms(use_true_random=False))
def test_guidance_in_two_launches_equals_the_supernet(rng):
    """What is constant runs once for each half, and all else in the segments of both."""
    traced, shares = expand(rng, with_guide(random_graph(rng))), random_shares(rng)
    gates = random_gates(rng, len(shares), len(traced.graph.blocks))
    forecast = random_forecast(rng, gates, shares)
    of_halves = [supernet(traced, gates, forecast, shares=shares, half=half) for half in HALVES]
    expected = [
        made if share == 0 else None if None in (other, made) else compute(f"*{share}", [other, made])
        for other, made, share in zip(*of_halves, shares, strict=True)
    ]
    try:
        pieces = split(traced.nodes, traced.graph)
        plan = plan_segments(traced.graph, pieces, gates, guidance=shares, forecast=forecast)
    except UserError:
        assert None in expected
        return
    variants = compile_plan(traced.graph, gates, guidance=shares, forecast=forecast)
    predictions, _ = execute(plan, traced, shares=shares)
    assert [predictions[slot] for slot in variants.prediction_slots] == expected
    assert {launch.half for launch in plan.launches if shares[launch.step] == 0} <= {"conditional"}


@settings(RELAXED, max_examples=300)
@given(st.randoms(use_true_random=False))
def test_a_forecast_equals_the_supernet(rng):
    """A forecast block is a weighted sum of stored values, in a graph that every such sum shares."""
    traced = expand(rng, random_graph(rng))
    gates = random_gates(rng, rng.randint(2, 8), len(traced.graph.blocks))
    forecast, used = random_forecast(rng, gates), [True] * len(gates)
    try:
        _, plan = planned(traced, gates, used, forecast=forecast)
    except UserError:
        assert None in supernet(traced, gates, forecast)
        return
    variants = compile_plan(traced.graph, gates, forecast=forecast)
    predictions, _ = execute(plan, traced)
    assert [predictions[slot] for slot in variants.prediction_slots] == supernet(traced, gates, forecast)
    for launch in plan.launches:
        weighted = plan.segments[launch.variant].kind == "weighted"
        assert len(launch.weights) == (len(launch.reads) if weighted else 0)
        assert not weighted or any(weight != 1 for weight in launch.weights)


def pieces_weights(pieces: PieceGraph, segment: Segment) -> frozenset[str]:
    return frozenset().union(*(pieces.pieces[piece].weights for piece in segment.pieces))


@settings(RELAXED, max_examples=500)
@given(cases())
def test_each_weight_is_in_one_segment(case):
    """But for those of nodes whose output no graph can take from another one."""
    traced, gates, used, alignment = case
    try:
        pieces, plan = planned(traced, gates, used, alignment)
    except UserError:
        return
    _, weights = execute(plan, traced)
    unpassable = {
        name
        for node in traced.nodes.nodes
        for name in node.weights
        if not all(traced.nodes.tensors[output].passable for output in node.outputs)
    }
    owners: dict[str, set[str]] = {}
    for segment in plan.segments:
        for name in pieces_weights(pieces, segment):
            if traced.nodes.weights[name] >= BIG and name not in unpassable:
                owners.setdefault(name, set()).add(segment.name)
        assert segment.weight_bytes == sum(traced.nodes.weights[name] for name in pieces_weights(pieces, segment))
    assert all(len(segments) == 1 for segments in owners.values())
    assert {name for names in weights.values() for name in names} - unpassable <= {*owners} | {
        name for name, nbytes in traced.nodes.weights.items() if nbytes < BIG
    }


@settings(RELAXED, max_examples=300)
@given(cases())
def test_every_tensor_in_the_arena_is_some_launchs_business(case):
    """A tensor that some launch reads later, made wrong, changes a prediction or what is computed from it."""
    traced, gates, used, alignment = case
    try:
        pieces, plan = planned(traced, gates, used, alignment)
    except UserError:
        return
    read = set()
    for number, launch in enumerate(plan.launches):
        segment = plan.segments[launch.variant]
        for offset in launch.writes:
            later = plan.launches[number + 1 :]
            if any(offset in other.reads for other in later):
                read.add((launch.variant, offset))
        written = [any(offset in other.reads for other in plan.launches) for offset in launch.writes]
        assert segment.predicts or any(written), f"{segment.name} at evaluation {launch.step} is for nothing"
    assert all(segment.writes or segment.predicts for segment in plan.segments)
    assert read or all(not segment.writes for segment in plan.segments)


@settings(RELAXED, max_examples=300)
@given(cases())
def test_pieces_cover_the_nodes(case):
    traced, *_ = case
    pieces = split(traced.nodes, traced.graph)
    made: set[str] = set()
    for piece in pieces.pieces:
        assert not made & set(piece.makes)
        assert piece.reads <= made | set(traced.graph.inputs)
        made |= set(piece.makes)
    assert set(traced.graph.values) <= made
    assert all(traced.nodes.tensors[name].passable for name in made - set(traced.graph.values))


def test_what_is_constant_is_made_before_the_entrance_that_reads_it():
    """At evaluation 0 only ``a`` is computed. The entrance of ``b`` runs then too, because all entrances run together,
    and so must what it reads, which no input that changes reaches."""
    nodes = NodeGraph(
        nodes=(
            Node(("text",), ("caption",), 7, frozenset({"w0"})),
            Node(("stack",), ("patches",), 0, frozenset({"w1"})),
            Node(("stack", "caption"), ("mixed",), 0, frozenset({"w2"})),
            Node(("patches",), ("a",), 1000, frozenset({"w3"})),
            Node(("patches", "mixed"), ("b",), 1000, frozenset({"w4"})),
            Node(("a", "b", "mixed"), ("noise_pred",), 1000, frozenset({"w5"})),
        ),
        tensors={name: Tensor("k1", 1) for name in ("caption", "patches", "mixed", "a", "b", "noise_pred")},
        weights={f"w{i}": BIG for i in range(6)},
    )
    blocks = (Block("A", ("a",)), Block("B", ("b",)))
    values = {name: Value(name, 1, frozenset()) for name in ("a", "b", "noise_pred")}
    graph = BlockGraph({"stack": "step", "text": "constant"}, values, blocks, ("noise_pred",))
    traced = read_off(nodes, graph)
    gates, used = [[True, False], [False, True], [False, True]], [False, True, True]
    _, plan = planned(traced, gates, used)
    assert execute(plan, traced)[0] == supernet(traced, gates)[1:]
    steps = {
        name: [launch.step for launch in plan.launches if name in written_by(plan, launch)]
        for name in ("caption", "patches", "mixed", "a", "b")
    }
    assert steps == {"caption": [0], "patches": [0, 1, 2], "mixed": [0, 1, 2], "a": [0], "b": []}


def written_by(plan: SegmentPlan, launch) -> set[str]:
    return {cache.value for cache in plan.segments[launch.variant].writes}


@st.composite
def mergings(draw):
    rng = draw(st.randoms(use_true_random=False))
    count = rng.randint(1, 7)
    colours = [rng.randint(0, rng.randint(0, 3)) for _ in range(count)]
    before = [[j for j in range(i) if rng.random() < 0.35] for i in range(count)]
    return colours, before


@settings(RELAXED, max_examples=400)
@given(mergings())
def test_no_order_needs_fewer_segments(case):
    colours, before = case
    segments = merge_pieces(colours, before, [[] for _ in colours])
    flat = [place for segment in segments for place in segment]
    assert sorted(flat) == list(range(len(colours)))
    assert all(flat.index(need) < flat.index(place) for place in flat for need in before[place])
    assert all(len({colours[place] for place in segment}) == 1 for segment in segments)
    best = len(colours)
    for order in itertools.permutations(range(len(colours))):
        if all(order.index(need) < order.index(place) for place in order for need in before[place]):
            best = min(best, 1 + sum(colours[a] != colours[b] for a, b in itertools.pairwise(order)))
    assert len(segments) == best


@settings(RELAXED, max_examples=300)
@given(mergings(), st.randoms(use_true_random=False))
def test_what_is_kept_apart_is_apart(case, rng):
    colours, before = case
    foes = {frozenset(pair) for pair in itertools.combinations(range(len(colours)), 2) if rng.random() < 0.2}
    apart = [[j for j in range(len(colours)) if frozenset((i, j)) in foes] for i in range(len(colours))]
    segments = merge_pieces(colours, before, apart)
    flat = [place for segment in segments for place in segment]
    assert sorted(flat) == list(range(len(colours)))
    assert all(flat.index(need) < flat.index(place) for place in flat for need in before[place])
    for segment in segments:
        assert not any(frozenset(pair) in foes for pair in itertools.combinations(segment, 2))


def test_a_cycle_is_an_error():
    with pytest.raises(ValueError, match="cycle"):
        merge_pieces([0, 0], [[1], [0]], [[], []])
