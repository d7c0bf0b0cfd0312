"""The unconditional half as a gate, on small graphs to count by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_models import chain, skip_graph

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.schedule.validation import missing_halves
from dipgo_deploy.search import moves
from dipgo_deploy.search.baselines.uniform import uniform_gates
from dipgo_deploy.search.costs import Costs
from dipgo_deploy.search.halves import joined, parted
from dipgo_deploy.search.moves import Band, propose, repair
from dipgo_deploy.search.postprocess import select

STEPS = 7
GRAPHS = {"skips": skip_graph(), "residual": chain("residual", 4), "output": chain("output", 4)}
ALL = {name: Costs(graph, STEPS, guidance_gates=True) for name, graph in GRAPHS.items()}
rows = st.lists(st.tuples(*[st.booleans()] * 5), min_size=STEPS, max_size=STEPS).map(tuple)
names = st.sampled_from(sorted(ALL))


def test_gates_say_which_halves_are_left_out() -> None:
    gates = (
        (False, False, False),  # whole, whatever it says
        (True, False, False),  # conditional only
        (False, False, True),  # nothing: it goes on conditional only
        (False, True, True),  # guided again, of what the conditional-only one stored there is no other half
        (False, False, False),  # nothing: it goes on guided
    )
    kept, guidance = parted(gates)
    assert guidance == (1, 0, 0, 1, 1)
    assert kept == ((True, True), (True, False), (False, False), (True, True), (False, False))
    assert joined(kept, guidance) == (
        (True, True, True),
        (True, False, False),
        (False, False, False),
        (True, True, True),
        (False, False, False),
    )


def test_a_conditional_only_evaluation_costs_half() -> None:
    costs = ALL["skips"]
    assert costs.width == 5
    assert costs.gamma[:4] == Costs(skip_graph(), STEPS).gamma
    assert costs.gamma[4] == costs.own[4] == 0.5
    rest = [[False] * 5] * (STEPS - 2)
    assert costs.analyse([[True] * 5, [True, True, True, True, False], *rest]).cost == 100 + 50
    # Removed blocks read the conditional half of what is stored.
    assert costs.analyse([[True] * 5, [True, False, False, True, False], *rest]).cost == 100 + 25
    # A guided evaluation computes what the conditional-only one before it stored.
    again = costs.analyse([[True] * 5, [True, True, True, True, False], [True, False, False, False, True], *rest[1:]])
    assert again.cost == 100 + 50 + 100
    assert again.kept[2] == (True,) * 4


@settings(max_examples=80, deadline=None)
@given(gates=rows, name=names)
def test_what_has_no_effect_is_gone_and_the_rest_costs_the_same(gates, name: str) -> None:
    costs = ALL[name]
    found = costs.analyse(gates)
    again = costs.analyse(found.gates)
    assert again.gates == found.gates
    assert again.cost == found.cost
    assert parted(found.gates) == (found.kept, found.guidance)
    half = [share == 0 for share in found.guidance]
    assert not missing_halves(found.kept, [[True] * 4] * STEPS, half)
    given_ = Costs(GRAPHS[name], STEPS, guidance=found.guidance)  # as a schedule with this guidance
    assert given_.analyse(found.kept).cost == found.cost


@settings(max_examples=40, deadline=None)
@given(gates=rows, name=names)
def test_without_conditional_only_evaluations_nothing_changes(gates, name: str) -> None:
    plain = Costs(GRAPHS[name], STEPS)
    kept = [row[:4] for row in gates]
    found = ALL[name].analyse(joined(kept, [1.0] * STEPS))
    assert found.cost == plain.analyse(kept).cost
    assert found.kept == plain.clean(kept)
    assert set(found.guidance) == {1.0}


@settings(max_examples=40, deadline=None)
@given(gates=rows, low=st.floats(0.1, 0.75), seed=st.integers(0, 99), name=names)
def test_moves_stay_in_the_band(gates, low: float, seed: int, name: str) -> None:
    costs, band = ALL[name], Band(low, low + 0.08)
    repaired = repair(gates, costs, band, random.Random(seed))
    if repaired is None:
        return
    assert band.holds(costs.ratio(repaired))
    moved = propose(repaired, costs, band, random.Random(seed))
    assert moved is None or (moved != repaired and band.holds(costs.ratio(moved)) and costs.clean(moved) == moved)


def test_moves_trade_halves_for_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine guided launches become ten of which two are conditional only, at equal cost, and the other way round."""
    monkeypatch.setattr(moves, "_MOVES", ())  # without the moves that every search has
    costs = Costs(skip_graph(), 20, guidance_gates=True)
    start = uniform_gates(costs, 0.55)
    band = Band(costs.ratio(start), costs.ratio(start))

    def launches(gates: Gates | None) -> tuple[int, int]:
        assert gates is not None and band.holds(costs.ratio(gates))
        found = costs.analyse(gates)
        return len(found.launches), sum(found.guidance[step] == 0 for step in found.launches)

    traded = [propose(start, costs, band, random.Random(seed)) for seed in range(5)]
    assert {launches(gates) for gates in traded} == {(10, 2)}
    assert traded[0] is not None and launches(start) == (9, 0)
    again = {launches(propose(traded[0], costs, band, random.Random(seed))) for seed in range(20)}
    assert again == {(11, 4), (9, 0)}


def test_thresholds_rank_halves_beside_blocks() -> None:
    costs = ALL["residual"]
    scores = [[0.9] * 4 + [0.1 * step] for step in range(STEPS)]
    found = select(scores, costs, 3 * 0.5 / STEPS, tolerance=0.01)
    assert costs.analyse(found.gates).guidance == (1, 0, 0, 0, 1, 1, 1)


def test_patterns_are_there_guided_and_conditional_only() -> None:
    patterns = ALL["skips"].patterns()
    plain = Costs(skip_graph(), STEPS).patterns()
    assert {row[:4] for row in patterns} == set(plain)
    assert len(patterns) == 2 * len(plain) - 1
    assert patterns[0] == (True,) * 5
    assert patterns[-1] == (False,) * 5


def test_few_variants_with_halves() -> None:
    costs = ALL["skips"]
    gates = [[True] * 5, [True, True, True, True, False], [True, False, False, True, False], [True] * 5]
    gates += [[True, False, False, True, True], [False] * 5, [True] * 5]
    assert costs.variants(gates) == 4
    limited = costs.limited(gates, 2)
    assert costs.variants(limited) == 2
    assert costs.clean(limited) == limited
    with pytest.raises(UserError, match="halves of guidance"):
        costs.limited(gates, 1)
