"""Graphs weighed by what they cost: never more of them, never more launches, the supernet's predictions."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_plans import random_gates, random_graph

from dipgo_deploy.errors import UserError
from dipgo_deploy.plan.compile import compile_plan
from dipgo_deploy.plan.graph import BlockGraph
from dipgo_deploy.plan.model import Plan, Variant
from dipgo_deploy.plan.weigh import GraphCosts, _limits, seconds_of, weigh

FREE = GraphCosts(1.0, 0.0, 0.0, 0.0, 0.0)


def nbytes(variant: Variant) -> int:
    return 10 * len(variant.computed)


def seconds_by(costs: GraphCosts) -> Callable[[Plan], float]:
    return lambda plan: seconds_of(
        [nbytes(variant) for variant in plan.variants],
        [launch.variant for launch in plan.launches],
        plan.macs_run,
        costs,
    )


def compiler(graph: BlockGraph, gates: list[list[bool]]) -> Callable[[int | None], Plan]:
    return lambda limit: compile_plan(graph, gates, max_variants=limit)


@settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), max_examples=60)
@given(st.integers(0, 10**9), st.sampled_from([0.0, 1.0, 100.0, 1e6]))
def test_it_is_never_dearer_never_more_and_what_a_limit_makes(seed: int, price: float) -> None:
    source = random.Random(seed)
    graph = random_graph(source)
    gates = random_gates(source, source.randint(1, 6), len(graph.blocks))
    compiled = compiler(graph, gates)
    try:
        written = compiled(None)
    except UserError:
        return  # a block that is needed and was never computed
    costs = GraphCosts(1.0, price * source.random(), price, price * source.random(), price * source.random())
    seconds = seconds_by(costs)
    found = weigh(compiled, seconds)
    assert found.written == written and found.written_seconds == seconds(written)
    assert found.seconds == seconds(found.plan) <= found.written_seconds
    assert len(found.plan.variants) <= len(written.variants) and len(found.plan.launches) <= len(written.launches)
    if found.plan is not found.written:
        assert found.plan == compiled(len(found.plan.variants))  # limits are held to the supernet elsewhere
    for asked, kept in zip(gates, found.plan.keep, strict=True):
        assert all(kept[block] for block, gate in enumerate(asked) if gate)
    if not price:
        assert found.plan.macs_run <= written.macs_run


def test_graphs_that_cost_nothing_stay_and_dear_ones_go(chain: Callable[..., BlockGraph]) -> None:
    graph = chain("output")
    gates = [[True] * 4, [True, False, True, True], [True] * 4, [True, True, False, True]]
    compiled = compiler(graph, gates)
    free = weigh(compiled, seconds_by(FREE))
    assert free.plan is free.written and len(free.plan.variants) == 3
    dear = weigh(compiled, seconds_by(replace(FREE, load_seconds=1e9)))
    assert len(dear.plan.variants) == 1 and dear.plan.promoted and not dear.plan.launches[0].reads
    shared = weigh(compiled, seconds_by(replace(FREE, load_seconds=1e9, pictures=1e12)))
    assert shared.plan is shared.written  # loading is shared by many pictures
    switching = weigh(compiled, seconds_by(replace(FREE, switch_seconds_per_byte=1e6)))
    assert len(switching.plan.variants) == 1


def test_seconds_add_up(chain: Callable[..., BlockGraph]) -> None:
    plan = compiler(chain("output"), [[True] * 4, [True, False, True, True], [True] * 4])(None)
    assert [launch.variant for launch in plan.launches] == [0, 1, 0]
    sizes = [nbytes(variant) for variant in plan.variants]
    costs = GraphCosts(2.0, 3.0, 5.0, 7.0, 11.0, pictures=2.0)
    expected = plan.macs_run / 2 + 3 * 3 + (2 * 5 + sum(sizes) * 7) / 2 + (sizes[1] + sizes[0]) * 11
    assert seconds_by(costs)(plan) == pytest.approx(expected)


def test_limits_end_at_the_least() -> None:
    assert list(_limits(3)) == [2, 1] and list(_limits(1)) == []
    assert _limits(48)[0] == 36 and _limits(48)[-1] == 1


def test_fewer_than_can_be_are_not_asked_again(chain: Callable[..., BlockGraph]) -> None:
    compiled = compiler(chain("output"), [[True] * 4, [True, False, True, True], [True, True, False, True]])
    asked: list[int | None] = []

    def of_two_denoisers(limit: int | None) -> Plan:
        asked.append(limit)
        if limit == 2:
            raise UserError("2 denoisers are run")
        return compiled(limit)

    found = weigh(of_two_denoisers, seconds_by(replace(FREE, load_seconds=1e9)))
    assert asked == [None, 2] and found.plan is found.written
