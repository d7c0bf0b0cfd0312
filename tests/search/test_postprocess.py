from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_models import chain, skip_graph

from dipgo_deploy.errors import UserError
from dipgo_deploy.search.costs import Costs
from dipgo_deploy.search.postprocess import check_ratio, select

STEPS = 8
GRAPHS = {"skips": skip_graph(), "residual": chain("residual", 4), "output": chain("output", 4)}
ALL = {name: Costs(graph, STEPS) for name, graph in GRAPHS.items()}
scores = st.lists(
    st.lists(st.integers(0, 1000).map(lambda value: value / 1000), min_size=4, max_size=4),
    min_size=STEPS,
    max_size=STEPS,
)


@settings(max_examples=60, deadline=None)
@given(rows=scores, target=st.floats(0, 0.85), name=st.sampled_from(sorted(ALL)))
def test_the_closest_threshold_is_found(rows: list[list[float]], target: float, name: str) -> None:
    costs = ALL[name]
    levels = sorted({value for row in rows[1:] for value in row})
    ratios = [costs.ratio([[value >= level for value in row] for row in rows]) for level in [*levels, float("inf")]]
    closest = min(ratios, key=lambda ratio: abs(ratio - target))
    if abs(closest - target) > 0.03:
        with pytest.raises(UserError, match="closest reachable ratio is") as caught:
            select(rows, costs, target, tolerance=0.03)
        # Two ratios may be equally close; each is an honest answer.
        said = float(str(caught.value).split("ratio is ")[1].split(":")[0])
        assert abs(said - target) == pytest.approx(abs(closest - target), abs=1e-4)
        return
    found = select(rows, costs, target, tolerance=0.03)
    assert abs(found.ratio - target) <= 0.03
    assert found.ratio == pytest.approx(costs.ratio(found.gates))
    assert found.gates == costs.clean([[value >= found.threshold for value in row] for row in rows])
    assert all(found.gates[0])
    assert costs.clean(found.gates) == found.gates


def test_equal_scores_cannot_be_told_apart() -> None:
    with pytest.raises(UserError, match=r"--prune-ratio 0\.4.*closest reachable ratio is 0\.0000"):
        select([[0.7] * 4] * STEPS, ALL["skips"], 0.4)


def test_more_variants_than_allowed_are_never_returned() -> None:
    costs = ALL["skips"]
    rows = [[((7 * t + 3 * k) % 11) / 11 for k in range(4)] for t in range(STEPS)]
    found = select(rows, costs, 0.4, tolerance=0.2, max_variants=2)
    assert costs.variants(found.gates) <= 2
    assert found.ratio == pytest.approx(costs.ratio(found.gates))


@pytest.mark.parametrize("target", [0.95, 0.99])
def test_a_ratio_beyond_the_first_step_is_refused_at_once(target: float) -> None:
    with pytest.raises(UserError, match=r"closest reachable ratio is 0\.8750"):
        check_ratio(target, ALL["skips"])
    check_ratio(0.875, ALL["skips"])
