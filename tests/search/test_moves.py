from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from search_models import chain, skip_graph

from dipgo_deploy.search.costs import Costs
from dipgo_deploy.search.moves import Band, moved_places, propose, repair

ALL = (Costs(skip_graph(), 9), Costs(chain("residual", 4), 9))
rows = st.lists(st.tuples(*[st.booleans()] * 4), min_size=9, max_size=9).map(tuple)


@settings(max_examples=40, deadline=None)
@given(gates=rows, low=st.floats(0.1, 0.75), seed=st.integers(0, 99), costs=st.sampled_from(ALL))
def test_repaired_and_moved_gates_lie_in_the_band(gates, low: float, seed: int, costs: Costs) -> None:
    band = Band(low, low + 0.05)
    repaired = repair(gates, costs, band, random.Random(seed))
    if repaired is None:
        return
    assert band.holds(costs.ratio(repaired))
    assert costs.clean(repaired) == repaired
    moved = propose(repaired, costs, band, random.Random(seed))
    if moved is not None:
        assert moved != repaired
        assert band.holds(costs.ratio(moved))


def test_repair_succeeds_where_it_can() -> None:
    costs = ALL[0]
    for target in (0.2, 0.4, 0.6, 0.8):
        found = repair(((True,) * 4,) * 9, costs, Band(target, target + 0.05), random.Random(0))
        assert found is not None
    assert repair(((True,) * 4,) * 9, costs, Band(0.95, 0.97), random.Random(0)) is None


@settings(max_examples=40, deadline=None)
@given(gates=rows, seed=st.integers(0, 99))
def test_moved_places_keep_the_rows_and_the_first_step(gates, seed: int) -> None:
    found = list(moved_places(gates, random.Random(seed)))
    for moved in found:
        assert moved != gates
        assert moved[0] == gates[0]
        assert sorted(moved) == sorted(gates)
    assert len(found) <= 3 * 4 * 8  # it ends: three distances, moves of one row and of groups, eight rows to move


def test_every_launch_goes_to_the_steps_beside_it_and_neighbours_go_together() -> None:
    places = {0, 3, 4, 8}
    gates = tuple((step in places,) * 2 for step in range(12))
    moved = {
        frozenset(step for step, row in enumerate(one) if any(row)) for one in moved_places(gates, random.Random(0))
    }
    assert {frozenset({0, 2, 4, 8}), frozenset({0, 3, 5, 8}), frozenset({0, 3, 4, 7}), frozenset({0, 3, 4, 9})} <= moved
    seeds = (moved_places(gates, random.Random(seed)) for seed in range(20))
    anywhere = {frozenset(step for step, row in enumerate(one) if any(row)) for found in seeds for one in found}
    assert frozenset({0, 4, 5, 8}) in anywhere
    assert frozenset({0, 2, 3, 8}) in anywhere
    assert list(moved_places(((True, True),), random.Random(0))) == []
