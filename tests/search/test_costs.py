from __future__ import annotations

import pytest
from search_models import chain, skip_graph

from dipgo_deploy.errors import UserError
from dipgo_deploy.search.costs import Costs, latency_graph


def test_gamma_counts_what_goes_with_a_block() -> None:
    """Of 100: U0 takes everything with it, U1 takes D1; D1 and D0 only themselves."""
    costs = Costs(skip_graph(), 4)
    assert costs.step_cost == 100
    assert costs.gamma == pytest.approx((0.1, 0.2, 0.5, 1.0))


def test_gamma_of_a_chain_depends_on_what_is_cached() -> None:
    assert Costs(chain("residual"), 3).gamma == pytest.approx((10 / 63, 20 / 63, 30 / 63))
    # With output caches all before a removed block is computed for nothing, the embedding too.
    assert Costs(chain("output"), 3).gamma == pytest.approx((11 / 63, 31 / 63, 61 / 63))


def test_removal_goes_on_to_what_is_computed_for_nothing() -> None:
    costs = Costs(skip_graph(), 3)
    gates = [[True] * 4, [True, True, False, True], [True, True, True, False]]
    assert costs.clean(gates) == ((True,) * 4, (True, False, False, True), (False,) * 4)
    assert costs.analyse(gates).cost == 100 + 10 + 40
    assert costs.ratio(gates) == pytest.approx(0.5)


def test_a_kept_block_that_a_later_step_reads_stays() -> None:
    costs = Costs(skip_graph(), 3)
    # U1 of evaluation 1 is not used there (U0 is removed), but U0 of evaluation 2 reads its cache.
    gates = [[True] * 4, [True, True, True, False], [True, False, False, True]]
    assert costs.clean(gates)[1] == (True, True, True, False)


def test_the_first_step_is_whole_whatever_is_said() -> None:
    costs = Costs(skip_graph(), 2)
    assert costs.clean([[False] * 4, [False] * 4]) == ((True,) * 4, (False,) * 4)
    assert costs.ratio([[False] * 4, [False] * 4]) == 0.5


def test_steps_without_a_launch_take_an_earlier_prediction() -> None:
    found = Costs(skip_graph(), 4).analyse([[True] * 4, [False] * 4, [True] * 4, [False] * 4])
    assert found.launches == {0, 2}
    assert found.prediction_slots == (0, 0, 1, 1)
    assert found.predicts == (0, 2)


def test_patterns_are_the_shallow_paths() -> None:
    rows = Costs(skip_graph(), 3).patterns()
    assert (True, False, False, True) in rows
    assert rows[0] == (True,) * 4
    assert rows[-1] == (False,) * 4


def test_unused_predictions_cost_nothing() -> None:
    costs = Costs(skip_graph(), 3, used=(True, True, False))
    assert costs.ratio([[True] * 4] * 3) == pytest.approx(1 / 3)


def test_limited_only_raises_gates() -> None:
    costs = Costs(skip_graph(), 4)
    gates = costs.clean([[True] * 4, [True, False, False, True], [True, False, True, True], [True] * 4])
    assert costs.variants(gates) == 3
    limited = costs.limited(gates, 2)
    assert costs.variants(limited) <= 2
    assert all(
        after or not before for a, b in zip(limited, gates, strict=True) for after, before in zip(a, b, strict=True)
    )


def test_latency_takes_the_place_of_the_macs() -> None:
    graph = skip_graph()
    seconds = {"D0/out0": 4e-3, "D1/out0": 3e-3, "U1/out0": 2e-3, "U0/out0": 1e-3, "noise_pred": 0.0}
    costs = Costs(latency_graph(graph, seconds), 3)
    assert costs.gamma == pytest.approx((0.4, 0.3, 0.5, 1.0))
    with pytest.raises(UserError, match="no time for D1/out0"):
        latency_graph(graph, {name: value for name, value in seconds.items() if name != "D1/out0"})


def test_rows_must_be_all_there() -> None:
    with pytest.raises(ValueError, match="2 rows"):
        Costs(skip_graph(), 3).analyse([[True] * 4] * 2)


def test_ratios_may_be_shares_of_another_run() -> None:
    """Two evaluations of 100 for a run of eight: three quarters of it saved before any gate is removed."""
    costs = Costs(skip_graph(), 2, reference_steps=8)
    assert (costs.full, costs.own_full) == (800, 200)
    assert costs.ratio([[True] * 4] * 2) == pytest.approx(0.75)
    assert costs.ratio([[True] * 4, [False] * 4]) == pytest.approx(1 - 100 / 800)
    assert costs.gamma == Costs(skip_graph(), 2).gamma
