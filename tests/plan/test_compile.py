"""The plan against a naive executor of the supernet's definition, on random graphs and schedules."""

from __future__ import annotations

import random
from collections.abc import Sequence
from zlib import crc32

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dipgo_deploy.errors import UserError
from dipgo_deploy.plan.compile import compile_plan
from dipgo_deploy.plan.graph import Block, BlockGraph, Value
from dipgo_deploy.plan.model import Cache, Plan

# Values are residues: adding and subtracting is exact, and different computations collide with chance 2**-61.
PRIME = 2**61 - 1
RELAXED = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def compute(name: str, arguments: Sequence[int]) -> int:
    return hash((crc32(name.encode()), *arguments)) % PRIME


def graph_input(graph: BlockGraph, name: str, step: int) -> int:
    return compute(name, [step if graph.inputs[name] == "step" else -1])


def residual_source(graph: BlockGraph) -> dict[str, str]:
    return {o: i for b in graph.blocks if b.cache == "residual" for o, i in zip(b.outputs, b.inputs, strict=True)}


def naive(graph: BlockGraph, gates: Sequence[Sequence[bool]]) -> list[int | None]:
    """Predictions by the definition: kept blocks compute and store, removed ones read. None: a store was missing."""
    owner = {output: k for k, block in enumerate(graph.blocks) for output in block.outputs}
    source = residual_source(graph)
    store: dict[str, int | None] = {}
    predictions = []
    for step, row in enumerate(gates):
        known: dict[str, int | None] = {name: graph_input(graph, name, step) for name in graph.inputs}

        def value(name: str, row=row, known=known) -> int | None:
            if name not in known:
                if name not in owner or row[owner[name]]:
                    arguments = [value(read) for read in sorted(graph.values[name].reads)]
                    known[name] = None if None in arguments else compute(name, arguments)
                elif name in source:
                    parts = value(source[name]), store.get(name)
                    known[name] = None if None in parts else sum(parts) % PRIME
                else:
                    known[name] = store.get(name)
            return known[name]

        for block, kept in zip(graph.blocks, row, strict=True):
            for output in block.outputs if kept else ():
                made, origin = value(output), value(source[output]) if output in source else 0
                store[output] = None if made is None or origin is None else (made - origin) % PRIME
        predictions.append(value(graph.prediction))
    return predictions


def execute(plan: Plan, graph: BlockGraph, spoil: tuple[int, str] | None = None, tight: bool = False) -> list[int]:
    """Predictions by slot, from the plan's variants, launches and arena bytes alone.

    Every byte of the arena remembers what was written to it, so a wrong offset, an overlap or a stale tensor shows.
    spoil: (launch, value) whose computation is made wrong. tight: whatever a variant computes or reads must serve
    its prediction or its writes.
    """
    source = residual_source(graph)
    arena: list[tuple[str, int, int] | None] = [None] * plan.arena_bytes
    predictions: list[int] = []

    def load(cache: Cache, offset: int) -> int:
        cells = arena[offset : offset + graph.values[cache.value].nbytes]
        assert cells[0] is not None, f"{cache} is read before it is written"
        content = cells[0][1]
        assert cells == [(cache.value, content, i) for i in range(graph.values[cache.value].nbytes)], f"{cache} is torn"
        return content

    for number, launch in enumerate(plan.launches):
        variant = plan.variants[launch.variant]
        loaded = {cache: load(cache, offset) for cache, offset in zip(variant.reads, launch.reads, strict=True)}
        known: dict[str, int] = {name: graph_input(graph, name, launch.step) for name in graph.inputs}
        touched: set[object] = set()

        def value(name: str, variant=variant, loaded=loaded, known=known, touched=touched, number=number) -> int:
            if name not in known:
                if Cache(name, "output") in loaded:
                    touched.add(Cache(name, "output"))
                    known[name] = loaded[Cache(name, "output")]
                elif Cache(name, "residual") in loaded:
                    touched.add(Cache(name, "residual"))
                    known[name] = (value(source[name]) + loaded[Cache(name, "residual")]) % PRIME
                else:
                    assert name in variant.computed, f"{name} is neither computed nor read"
                    touched.add(name)
                    known[name] = compute(name, [value(read) for read in sorted(graph.values[name].reads)])
                    if spoil == (number, name):
                        known[name] = (known[name] + 1) % PRIME
            return known[name]

        if variant.predicts:
            assert launch.prediction == len(predictions)
            predictions.append(value(graph.prediction))
        else:
            assert launch.prediction is None
        for cache, offset in zip(variant.writes, launch.writes, strict=True):
            assert cache.value in variant.computed
            content = value(cache.value) - (value(source[cache.value]) if cache.kind == "residual" else 0)
            for i in range(graph.values[cache.value].nbytes):
                arena[offset + i] = cache.value, content % PRIME, i
        # Loading again after the writes shows a write over a read or over another write of the same launch.
        for cache, offset in zip(variant.reads, launch.reads, strict=True):
            assert load(cache, offset) == loaded[cache]
        for cache, offset in zip(variant.writes, launch.writes, strict=True):
            load(cache, offset)
        assert not tight or touched == {*variant.computed, *variant.reads}
    return predictions


def random_graph(rng: random.Random) -> BlockGraph:
    """A block graph of one of three looks: any DAG, a UNet with skips, a chain; caches of both kinds mixed."""
    look = rng.choice(["dag", "dag", "unet", "chain"])
    residuals = rng.choice([0, 0.5, 1])
    inputs = {"stack": "step", "text": "constant"}
    values: dict[str, Value] = {}
    blocks: list[Block] = []
    count = rng.randint(1, 5)

    def add(name: str, reads: list[str]) -> str:
        work = frozenset({len(values)} | {rng.randint(0, 3) for _ in range(rng.randint(0, 2))})
        values[name] = Value(name, rng.randint(1, 6), frozenset(reads), work)
        return name

    def some(pool: list[str], most: int = 3) -> list[str]:
        return [rng.choice(pool) for _ in range(rng.randint(1, most))]

    hidden = add("embed", some(list(inputs)) if look == "dag" else ["stack"])
    skips: list[str] = []
    for k in range(count):
        pool = [*inputs, *values]
        residual = rng.random() < residuals
        outputs: list[str] = []
        sources: list[str] = []
        down = look == "unet" and k < count // 2
        for j in range(1 if look == "chain" else rng.randint(1, 3)):
            if look == "dag":
                reads = some(pool)
            elif look == "chain":
                reads = [hidden, rng.choice(["text", hidden])]
            else:
                reads = [hidden, *(skips[-2:] if not down else [])]
            if residual:
                origin = rng.choice([v for v in pool if v in values]) if look == "dag" else hidden
                if look == "dag" and rng.random() < 0.4:
                    origin = add(f"b{k}/in{j}", some(pool))
                sources.append(origin)
                reads = [*reads, origin] if rng.random() < 0.85 else reads
            if outputs and rng.random() < 0.5:
                reads.append(rng.choice(outputs))
            outputs.append(add(f"b{k}/out{j}", reads))
        if down:
            skips += outputs
        elif look == "unet":
            del skips[-2:]
        hidden = outputs[-1]
        blocks.append(Block(f"b{k}", tuple(outputs), "residual" if residual else "output", tuple(sources)))
    prediction = hidden
    if rng.random() < 0.95:
        extra = some(["stack", *values]) if look == "dag" or rng.random() < 0.2 else []
        prediction = add("noise_pred", [hidden, *extra])
    return BlockGraph(inputs, values, tuple(blocks), prediction, tuple(range(1, len(values) + 4)))


def random_gates(rng: random.Random, steps: int, blocks: int) -> list[list[bool]]:
    density = rng.choice([0.1, 0.3, 0.5, 0.8, 1])
    gates = [[rng.random() < density for _ in range(blocks)] for _ in range(steps)]
    if rng.random() < 0.8:
        gates[0] = [True] * blocks
    return gates


@st.composite
def cases(draw):
    rng = draw(st.randoms(use_true_random=False))
    graph = random_graph(rng)
    gates = random_gates(rng, rng.randint(1, 7), len(graph.blocks))
    used = [rng.random() < 0.8 for _ in gates] if rng.random() < 0.4 else [True] * len(gates)
    used[rng.randint(0, len(gates) - 1)] = True
    return graph, gates, used, rng.choice([1, 2, 4])


def check(plan: Plan, graph: BlockGraph, used: Sequence[bool], expected: Sequence[int | None], tight: bool) -> None:
    """The plan gives the expected predictions at all used steps, and its numbers agree with each other."""
    predictions = execute(plan, graph, tight=tight)
    assert len(plan.source) == len(expected)
    for step, use in enumerate(used):
        if use:
            assert predictions[plan.source[step]] == expected[step], f"step {step}"
    assert all(0 <= slot < len(predictions) for slot in plan.source)
    assert plan.lower_bound_bytes <= plan.arena_bytes
    assert [launch.step for launch in plan.launches] == sorted({launch.step for launch in plan.launches})
    assert [variant.name for variant in plan.variants] == [f"v{i:02d}" for i in range(len(plan.variants))]
    first_launches = [[x.variant for x in plan.launches].index(i) for i in range(len(plan.variants))]
    assert first_launches == sorted(first_launches)
    assert len({(v.computed, v.reads, v.predicts) for v in plan.variants}) == len(plan.variants)
    for variant in plan.variants:
        assert list(variant.reads) == sorted(variant.reads)
        assert list(variant.writes) == sorted(variant.writes)
        work = frozenset().union(*(graph.values[name].work for name in variant.computed))
        assert variant.macs == sum(graph.costs[node] for node in work)
    assert plan.macs_run == sum(plan.variants[launch.variant].macs for launch in plan.launches)


@settings(RELAXED, max_examples=1500)
@given(cases())
def test_plan_equals_supernet(case):
    graph, gates, used, alignment = case
    expected = naive(graph, gates)
    broken = any(use and prediction is None for use, prediction in zip(used, expected, strict=True))
    if broken:
        with pytest.raises(UserError, match=r"step \d+ removes block 'b\d'"):
            compile_plan(graph, gates, prediction_used=used, alignment=alignment)
        return
    plan = compile_plan(graph, gates, prediction_used=used, alignment=alignment)
    check(plan, graph, used, expected, tight=True)
    assert plan.keep == tuple(map(tuple, gates))
    assert plan.promoted == ()
    assert plan.macs_run <= plan.macs_schedule <= plan.macs_full * len(gates)
    assert all(offset % alignment == 0 for launch in plan.launches for offset in (*launch.reads, *launch.writes))
    assert plan == compile_plan(graph, gates, prediction_used=used, alignment=alignment)


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
    try:
        plan = compile_plan(graph, gates, prediction_used=used, alignment=alignment)
    except UserError:
        return
    steps = [step for step, use in enumerate(used) if use]

    def outcome(spoil=None):
        predictions = execute(plan, graph, spoil)
        return [predictions[plan.source[step]] for step in steps]

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
    assert {plan.source[step] for step, use in enumerate(used) if use} == set(range(len(predictions)))
