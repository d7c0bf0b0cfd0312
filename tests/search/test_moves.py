from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from search_models import chain, skip_graph

from dipgo_deploy.search.costs import Costs
from dipgo_deploy.search.moves import Band, propose, repair

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
