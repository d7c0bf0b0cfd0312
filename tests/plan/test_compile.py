"""The plan against a naive executor of the supernet's definition, on random graphs and schedules."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_plans import (
    PRIME,
    behind,
    compute,
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
    residual_source,
    residue,
    with_guide,
)

from dipgo_deploy.errors import UserError
from dipgo_deploy.plan.compile import compile_plan
from dipgo_deploy.plan.graph import BlockGraph
from dipgo_deploy.plan.model import Cache, Plan
from dipgo_deploy.schedule.forecast import FittedForecast
from dipgo_deploy.schedule.guidance import HALVES
from dipgo_deploy.schedule.validation import missing_halves

RELAXED = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def execute(
    plan: Plan,
    graph: BlockGraph,
    spoil: tuple[int, str] | None = None,
    tight: bool = False,
    shares: Sequence[float] | None = None,
) -> list[int]:
    """Predictions by slot, from the plan's variants, launches and arena bytes alone.

    Every byte of the arena remembers what was written to it, so a wrong offset, an overlap or a stale tensor shows.
    spoil: (launch, value) whose computation is made wrong. tight: whatever a variant computes or reads must serve
    its prediction or its writes.
    """
    source = residual_source(graph)
    arena: list[tuple[str, int, int] | None] = [None] * plan.arena_bytes
    predictions: list[int] = []

    def load(cache: Cache, offset: int, of: str | None = None) -> int:
        nbytes = graph.values[cache.value].nbytes
        cells = arena[offset : offset + nbytes]
        assert cells[0] is not None, f"{cache} is read before it is written"
        stored, content, first = cells[0]
        half = stored == graph.halves.get(cache.value)
        assert stored == behind(cache.value, of) or half
        assert first == (nbytes if half else 0) and (not half or graph.values[stored].nbytes == nbytes + first)
        assert cells == [(stored, content, first + i) for i in range(nbytes)], f"{cache} is torn"
        return half_of(content) if half else content

    for number, launch in enumerate(plan.launches):
        variant, of = plan.variants[launch.variant], launch.half
        if variant.guides:
            made = Cache(graph.predictions[0], "output")
            names = [behind(made.value, half) for half in HALVES]
            values = [load(made, offset, half) for half, offset in zip(HALVES, launch.reads, strict=True)]
            read = dict(zip(names, values, strict=True)) | {"scale": graph_input(graph, "scale", launch.step)}
            assert launch.prediction == len(predictions) and shares is not None
            scaled = f"{variant.prediction}*{shares[launch.step]}"
            predictions.append(compute(scaled, [read[name] for name in sorted(read)]))
            continue
        loaded = {cache: load(cache, offset, of) for cache, offset in zip(variant.reads, launch.reads, strict=True)}
        weighted = [cache for cache in variant.reads if cache.nth]
        weights = dict(zip(weighted, launch.weights, strict=True))
        known: dict[str, int] = {name: graph_input(graph, name, launch.step) for name in graph.inputs}
        touched: set[object] = set()

        def value(
            name: str,
            variant=variant,
            loaded=loaded,
            weights=weights,
            known=known,
            touched=touched,
            number=number,
            step=launch.step,
            of=of,
        ) -> int:
            if name not in known:
                terms = [cache for cache in loaded if cache.value == name]
                if terms:
                    touched.update(terms)
                    assert [term.nth for term in terms] in ([0], list(range(1, 1 + len(terms))))
                    stored = sum(residue(weights.get(term, 1)) * loaded[term] for term in terms)
                    origin = value(source[name]) if terms[0].kind == "residual" else 0
                    known[name] = (origin + stored) % PRIME
                else:
                    assert name in variant.computed, f"{name} is neither computed nor read"
                    touched.add(name)
                    plain = shares is None or name != graph.predictions[0] or bool(graph.guides)
                    scaled = behind(name, of) if plain else f"{name}*{shares[step]}"
                    known[name] = compute(scaled, [value(read) for read in sorted(graph.values[name].reads)])
                    if spoil == (number, name):
                        known[name] = (known[name] + 1) % PRIME
            return known[name]

        if launch.passes is not None:
            content, nbytes = value(variant.prediction), graph.values[variant.prediction].nbytes
            assert launch.prediction is None and variant.predicts
            for i in range(nbytes):
                arena[launch.passes + i] = behind(variant.prediction, of), content, i
        elif variant.predicts:
            assert launch.prediction == len(predictions)
            predictions.append(value(variant.prediction))
        else:
            assert launch.prediction is None
        for cache, offset in zip(variant.writes, launch.writes, strict=True):
            assert cache.value in variant.computed
            content = value(cache.value) - (value(source[cache.value]) if cache.kind == "residual" else 0)
            for i in range(graph.values[cache.value].nbytes):
                arena[offset + i] = behind(cache.value, of), content % PRIME, i
        # Loading again after the writes shows a write over a read or over another write of the same launch.
        for cache, offset in zip(variant.reads, launch.reads, strict=True):
            assert load(cache, offset, of) == loaded[cache]
        for cache, offset in zip(variant.writes, launch.writes, strict=True):
            load(cache, offset, of)
        assert not tight or touched == {*variant.computed, *variant.reads}
    return predictions


@st.composite
def cases(draw):
    rng = draw(st.randoms(use_true_random=False))
    graph = random_graph(rng)
    gates = random_gates(rng, rng.randint(1, 7), len(graph.blocks))
    used = [rng.random() < 0.8 for _ in gates] if rng.random() < 0.4 else [True] * len(gates)
    used[rng.randint(0, len(gates) - 1)] = True
    return graph, gates, used, rng.choice([1, 2, 4])


@st.composite
def forecast_cases(draw):
    rng = draw(st.randoms(use_true_random=False))
    graph = random_graph(rng)
    gates = random_gates(rng, rng.randint(2, 9), len(graph.blocks))
    return graph, gates, random_forecast(rng, gates)


def check(
    plan: Plan,
    graph: BlockGraph,
    used: Sequence[bool],
    expected: Sequence[int | None],
    tight: bool,
    shares: Sequence[float] | None = None,
) -> None:
    """The plan gives the expected predictions at all used steps, and its numbers agree with each other."""
    predictions = execute(plan, graph, tight=tight, shares=shares)
    assert len(plan.prediction_slots) == len(expected)
    for step, use in enumerate(used):
        if use:
            assert predictions[plan.prediction_slots[step]] == expected[step], f"evaluation {step}"
    made = [launch.step for launch in plan.launches if launch.prediction is not None]
    # The last that was made: a launch list does not have these numbers.
    latest = [max(0, sum(step <= at for step in made) - 1) for at in range(len(expected))]
    assert list(plan.prediction_slots) == latest
    assert plan.lower_bound_bytes <= plan.arena_bytes
    assert [launch.step for launch in plan.launches] == sorted({launch.step for launch in plan.launches})
    assert [variant.name for variant in plan.variants] == [f"v{i:02d}" for i in range(len(plan.variants))]
    first_launches = [[x.variant for x in plan.launches].index(i) for i in range(len(plan.variants))]
    assert first_launches == sorted(first_launches)
    assert len({(v.computed, v.reads, v.prediction) for v in plan.variants}) == len(plan.variants)
    for variant in plan.variants:
        assert list(variant.reads) == sorted(variant.reads)
        assert list(variant.writes) == sorted(variant.writes)
        work = frozenset().union(*(graph.values[name].work for name in variant.computed))
        assert variant.macs == sum(graph.costs[node] for node in work)
    assert plan.macs_run == sum(plan.variants[launch.variant].macs for launch in plan.launches)


@settings(RELAXED, max_examples=600)
@given(cases())
def test_plan_equals_supernet(case):
    graph, gates, used, alignment = case
    expected = naive(graph, gates)
    broken = any(use and prediction is None for use, prediction in zip(used, expected, strict=True))
    if broken:
        with pytest.raises(UserError, match=r"evaluation \d+ removes block 'b\d'"):
            compile_plan(graph, gates, prediction_used=used, alignment=alignment)
        return
    plan = compile_plan(graph, gates, prediction_used=used, alignment=alignment)
    check(plan, graph, used, expected, tight=True)
    assert plan.keep == tuple(map(tuple, gates))
    assert plan.promoted == ()
    assert plan.macs_run <= plan.macs_schedule <= plan.macs_full * len(gates)
    assert all(offset % alignment == 0 for launch in plan.launches for offset in (*launch.reads, *launch.writes))
    assert plan == compile_plan(graph, gates, prediction_used=used, alignment=alignment)


@pytest.mark.parametrize("limit", [None, 1, 2, 3])
def test_denoisers_in_turn_equal_the_supernet(limit):
    """Each keeps its caches to itself, and no graph has values of two."""
    compared = 0
    for seed in range(40):
        graph, gates, denoisers = random_turns(random.Random(seed))
        try:
            plan = compile_plan(graph, gates, denoisers=denoisers, max_variants=limit)
        except UserError as error:
            too_few = limit is not None and limit < len(set(denoisers)) and "each in graphs of its own" in str(error)
            assert too_few or None in naive(graph, gates, denoisers=denoisers)
            continue
        expected = naive(graph, plan.keep, denoisers=denoisers)
        check(plan, graph, [True] * len(gates), expected, tight=limit is None)
        for launch in plan.launches:
            variant = plan.variants[launch.variant]
            own = f"d{denoisers[launch.step]}."
            assert all(name.startswith(own) for name in (*variant.computed, *(cache.value for cache in variant.reads)))
        assert all(block.startswith(f"d{denoisers[step]}.") for step, block in plan.promoted)
        compared += 1
    assert compared > (3 if limit == 1 else 20)


@settings(RELAXED, max_examples=200)
@given(st.randoms(use_true_random=False), st.none() | st.integers(1, 4))
def test_guidance_equals_the_supernet(rng, limit):
    """A conditional-only evaluation reads second halves; a guided one never reads what has no first half."""
    graph, gates, shares = random_halves(rng)
    denoisers, forecast = of_shares(shares), random_forecast(rng, gates, shares)
    used = [True] * len(gates)

    def definition(rows):
        return naive(graph, [[*row, *row] for row in rows], forecast, denoisers=denoisers, shares=shares)

    try:
        plan = compile_plan(graph, gates, guidance=shares, max_variants=limit, forecast=forecast)
    except UserError as error:
        too_few = limit is not None and limit < len(set(denoisers)) and "each in graphs of its own" in str(error)
        assert too_few or None in definition(gates)
        return
    expected = definition(plan.keep)
    check(plan, graph, used, expected, tight=limit is None, shares=shares)
    assert len(plan.keep[0]) == len(gates[0])
    for launch in plan.launches:
        variant = plan.variants[launch.variant]
        own = f"d{denoisers[launch.step]}."
        assert all(name.startswith(own) for name in (*variant.computed, *(cache.value for cache in variant.reads)))
    if limit is None:
        assert plan.keep == tuple(map(tuple, gates))
        assert plan.macs_run <= plan.macs_schedule <= plan.macs_full * len(gates)
        return
    names = [block.name for block in graph.schedule_blocks]
    everywhere = [[True] * len(names)] * len(gates)
    conditional_only = [share == 0 for share in shares]
    if not missing_halves(gates, everywhere, conditional_only):
        assert not missing_halves(plan.keep, everywhere, conditional_only)


@settings(RELAXED, max_examples=100)
@given(st.randoms(use_true_random=False), st.none() | st.integers(1, 4))
def test_guidance_in_two_launches_equals_the_supernet(rng, limit):
    """Each half has caches of its own, one graph serves both, and a conditional-only evaluation is one of them."""
    graph, shares = with_guide(random_graph(rng)), random_shares(rng)
    gates = random_gates(rng, len(shares), len(graph.blocks))
    both, forecast = graph.in_halves(), random_forecast(rng, gates, shares)

    def definition(rows):
        return naive(both, [[*row, *row] for row in rows], forecast, denoisers=of_shares(shares), shares=shares)

    try:
        plan = compile_plan(graph, gates, guidance=shares, max_variants=limit, forecast=forecast)
    except UserError:
        assert None in definition(gates)
        return
    predictions = execute(plan, graph, tight=limit is None, shares=shares)
    assert [predictions[slot] for slot in plan.prediction_slots] == definition(plan.keep)
    assert sum(not variant.guides for variant in plan.variants) <= (limit or len(plan.variants))
    assert {launch.half for launch in plan.launches if shares[launch.step] == 0} <= {"conditional"}
    assert plan.macs_run == sum(plan.variants[launch.variant].macs for launch in plan.launches)
    if limit is None:
        assert plan.keep == tuple(map(tuple, gates))
        assert plan.macs_run <= plan.macs_schedule <= plan.macs_full * len(gates)


def test_a_guided_evaluation_that_lacks_a_half_is_named(chain):
    graph = chain("output").with_halves()
    whole, without = [True] * 4, [True, False, True, True]
    message = r"evaluation 2 is guided and removes block 'b1', of which evaluation 1, which is conditional only"
    with pytest.raises(UserError, match=message):
        compile_plan(graph, [whole, whole, without], guidance=[1, 0, 1])
    kept = compile_plan(graph, [whole, without, without], guidance=[1, 0, 1])  # the whole of it is still there
    assert [launch.step for launch in kept.launches] == [0, 1, 2]
    assert kept.launches[2].reads == tuple(kept.launches[0].writes)
    assert kept.launches[1].reads[0] == kept.launches[0].writes[0] + 16
    halved = kept.variants[kept.launches[1].variant]
    full = kept.variants[kept.launches[2].variant]
    assert halved.macs * 2 == full.macs


@settings(RELAXED, max_examples=400)
@given(forecast_cases(), st.none() | st.integers(1, 4))
def test_a_forecast_equals_the_supernet(case, limit):
    """Generations of caches are values like others, and launches that share a graph have weights of their own."""
    graph, gates, forecast = case
    used = [True] * len(gates)
    try:
        plan = compile_plan(graph, gates, forecast=forecast, max_variants=limit)
    except UserError as error:
        fitted = limit is not None and isinstance(forecast, FittedForecast)
        assert (fitted and "were fitted without them" in str(error)) or None in naive(graph, gates, forecast)
        return
    check(plan, graph, used, naive(graph, plan.keep, forecast), tight=limit is None)
    if forecast is None:
        assert plan == compile_plan(graph, gates, max_variants=limit)


@settings(RELAXED, max_examples=500)
@given(cases(), st.integers(1, 4))
def test_promotion_meets_the_limit_and_the_promoted_schedule(case, limit):
    graph, gates, used, alignment = case
    try:
        free = compile_plan(graph, gates, prediction_used=used, alignment=alignment)
    except UserError:
        return
    plan = compile_plan(graph, gates, prediction_used=used, alignment=alignment, max_variants=limit)
    assert len(plan.variants) <= limit
    check(plan, graph, used, naive(graph, plan.keep), tight=False)
    names = [block.name for block in graph.blocks]
    raised = {(step, names.index(block)) for step, block in plan.promoted}
    assert len(raised) == len(plan.promoted)
    for step, row in enumerate(gates):
        for block, kept in enumerate(row):
            assert plan.keep[step][block] == (kept or (step, block) in raised)
            assert not (kept and (step, block) in raised)
    if len(free.variants) <= limit:
        assert plan == free


@settings(RELAXED, max_examples=300)
@given(cases())
def test_nothing_computed_is_dead(case):
    """Whatever one launch computes matters: made wrong, it changes the prediction of a used step."""
    graph, gates, used, alignment = case
    # A block that does not read what its residual is taken from: the sum of two residuals can cancel a value exactly.
    assume(all(origin in graph.values[output].reads for output, origin in residual_source(graph).items()))
    try:
        plan = compile_plan(graph, gates, prediction_used=used, alignment=alignment)
    except UserError:
        return
    steps = [step for step, use in enumerate(used) if use]

    def outcome(spoil=None):
        predictions = execute(plan, graph, spoil)
        return [predictions[plan.prediction_slots[step]] for step in steps]

    right = outcome()
    for number, launch in enumerate(plan.launches):
        for name in plan.variants[launch.variant].computed:
            assert outcome((number, name)) != right, f"{name} is dead at launch {number}"


@settings(RELAXED, max_examples=300)
@given(cases())
def test_no_launch_repeats_a_prediction(case):
    """Two slots never hold the same prediction, and every slot is some used step's."""
    graph, gates, used, alignment = case
    try:
        plan = compile_plan(graph, gates, prediction_used=used, alignment=alignment)
    except UserError:
        return
    predictions = execute(plan, graph)
    assert len(set(predictions)) == len(predictions)
    assert {plan.prediction_slots[step] for step, use in enumerate(used) if use} == set(range(len(predictions)))


@settings(RELAXED, max_examples=300)
@given(cases(), st.randoms(use_true_random=False))
def test_schedules_share_what_they_compute_alike(case, rng):
    """Each plan still gives the supernet's predictions, and variants of one computation write the same."""
    graph, gates, used, alignment = case
    schedules = (gates, [[True] * len(graph.blocks), *random_gates(rng, rng.randint(1, 5), len(graph.blocks))])
    uses = (used, [True] * len(schedules[1]))
    try:
        alone = [
            compile_plan(graph, rows, prediction_used=use, alignment=alignment)
            for rows, use in zip(schedules, uses, strict=True)
        ]
    except UserError:
        return
    like = [variant for plan in alone for variant in plan.variants]
    written: dict[object, set[object]] = {}
    for rows, use, before in zip(schedules, uses, alone, strict=True):
        plan = compile_plan(graph, rows, prediction_used=use, alignment=alignment, like=like)
        check(plan, graph, use, naive(graph, rows), tight=False)
        for new, old in zip(plan.variants, before.variants, strict=True):
            assert set(old.writes) <= set(new.writes) and replace(new, writes=old.writes) == old
            written.setdefault((new.computed, new.reads, new.predicts), set()).add(new.writes)
    assert all(len(found) == 1 for found in written.values())
