from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_models import chain, skip_graph

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.baselines import BASELINES, Task, baseline
from dipgo_deploy.search.baselines.dynamic import best_path
from dipgo_deploy.search.baselines.genetic import crowding, dominates, order
from dipgo_deploy.search.baselines.refine import exchange, refine
from dipgo_deploy.search.costs import Costs
from dipgo_deploy.search.evaluate import Objective

STEPS = 10
WEIGHTS = [3.0, 1.0, 1.0, 2.0, 5.0, 1.0, 1.0, 1.0, 4.0, 1.0]


def toy_loss(gates: Gates) -> float:
    """A step's weight is lost for each step since a block last ran: known, and best with the runs at heavy steps."""
    loss, age = 0.0, [0] * len(gates[0])
    for weight, row in zip(WEIGHTS, gates, strict=True):
        age = [0 if kept else old + 1 for kept, old in zip(row, age, strict=True)]
        loss += weight * sum(age)
    return loss


def task(graph: Any = None, target: float = 0.6, budget: int = 60, **options: Any) -> Task:
    objective = Objective(Costs(graph or skip_graph(), STEPS), toy_loss)
    places = np.arange(STEPS + 1)
    paths = np.where(places[None] > places[:-1, None], (places[None] - places[:-1, None] - 1.0) ** 2, np.inf)
    return Task(target, objective, budget, tolerance=0.03, path_costs=lambda: paths, **options)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("graph", ["skips", "residual"])
def test_every_method_gives_gates_at_the_ratio(name: str, graph: str) -> None:
    given_task = task(skip_graph() if graph == "skips" else chain("residual", 5), target=0.5 if name != "dp" else 0.6)
    if name == "deepcache":
        given_task = task(skip_graph(), target=0.35)
    gates = baseline(name).search(given_task)
    ratio = given_task.costs.ratio(gates)
    assert abs(ratio - given_task.target) <= given_task.tolerance
    assert all(gates[0])
    assert given_task.objective.evaluations <= given_task.budget
    assert isinstance(baseline(name).parameters(), dict)


@pytest.mark.parametrize("name", ["random", "genetic", "annealing"])
def test_the_same_seed_gives_the_same_gates(name: str) -> None:
    first, again, other = (baseline(name).search(task(seed=seed, budget=30)) for seed in (1, 1, 2))
    assert first == again
    assert name == "annealing" or first != other


@pytest.mark.parametrize("name", ["genetic", "annealing"])
def test_searching_beats_where_it_started(name: str) -> None:
    searched = task(budget=150)
    gates = baseline(name).search(searched)
    start = baseline("uniform" if name == "annealing" else "random").search(task(budget=1))
    assert toy_loss(searched.costs.clean(gates)) < toy_loss(searched.costs.clean(start))


def test_annealing_finds_the_best_steps() -> None:
    """Four full steps of ten: few enough to try them all."""
    count = 4
    full = lambda kept: tuple((step in kept,) * count for step in range(STEPS))  # noqa: E731
    best = min(toy_loss(full({0, *rest})) for rest in itertools.combinations(range(1, STEPS), 3))
    searched = task(budget=300)
    assert toy_loss(baseline("annealing").search(searched)) == best


def test_unreachable_ratios_name_the_closest() -> None:
    for name in ("uniform", "dp", "annealing"):
        with pytest.raises(UserError, match=r"closest reachable ratio is 0\.[56]000"):
            baseline(name).search(task(target=0.55))
    with pytest.raises(UserError, match="deepcache: .*closest reachable"):
        baseline("deepcache").search(task(target=0.89))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 7).flatmap(
        lambda steps: st.tuples(
            st.lists(st.floats(0, 10), min_size=steps * (steps + 1), max_size=steps * (steps + 1)),
            st.integers(1, steps),
        )
    )
)
def test_the_best_path_is_that_of_trying_all(problem: tuple[list[float], int]) -> None:
    values, kept = problem
    steps = round((len(values) + 0.25) ** 0.5 - 0.5)
    costs = np.array(values).reshape(steps, steps + 1)
    for i in range(steps):
        costs[i, : i + 1] = np.inf

    def total(path: tuple[int, ...]) -> float:
        return sum(costs[a, b] for a, b in itertools.pairwise((*path, steps)))

    path = best_path(costs, kept)
    assert len(path) == kept
    assert path[0] == 0
    best = min(total((0, *rest)) for rest in itertools.combinations(range(1, steps), kept - 1))
    assert total(path) == pytest.approx(best)


def test_non_dominated_sorting_by_hand() -> None:
    names: list[Any] = ["a", "b", "c", "d", "e"]
    aims = [(1.0, 5.0), (2.0, 2.0), (5.0, 1.0), (3.0, 3.0), (6.0, 6.0)]
    ranked = order(names, aims)
    assert set(ranked[:3]) == {"a", "b", "c"}
    assert ranked[3:] == ["d", "e"]
    assert ranked[2] == "b"  # the ends of a front come first
    assert dominates((1, 2), (1, 3))
    assert not dominates((1, 2), (1, 2))
    assert crowding([(0.0, 4.0), (1.0, 1.0), (4.0, 0.0)])[1] == pytest.approx(2.0)


def test_refinement_never_worsens_and_never_costs_more() -> None:
    refined = task(budget=80)
    starts = [baseline("uniform").search(refined), baseline("random").search(task(budget=1))]
    gates = refine(refined, starts)
    assert refined.objective(gates) < min(refined.objective(start) for start in starts)
    assert refined.costs.ratio(gates) >= min(refined.target, *map(refined.costs.ratio, starts)) - 1e-9


def toy_gradient(gates: Gates) -> np.ndarray:
    """How the toy loss changes with each gate, by trying."""
    found = np.zeros((STEPS, len(gates[0])))
    for step in range(1, STEPS):
        for block in range(len(gates[0])):
            both = []
            for kept in (True, False):
                rows = [list(row) for row in gates]
                rows[step][block] = kept
                both.append(toy_loss(tuple(tuple(row) for row in rows)))
            found[step, block] = both[0] - both[1]
    return found


def test_a_gradient_leads_to_better_gates_with_the_same_budget() -> None:
    graph = chain("residual", 5)
    losses = {}
    for kind in ("random", "led"):
        refined = task(graph, budget=25, gradient=toy_gradient if kind == "led" else None)
        gates = refine(refined, [baseline("random").search(task(graph, budget=1))])
        assert abs(refined.costs.ratio(gates) - refined.target) <= refined.tolerance
        assert refined.objective.evaluations <= 25 + 1
        losses[kind] = refined.objective(gates)
    assert losses["led"] < losses["random"]


def test_an_exchange_keeps_what_is_missed_and_removes_what_is_not() -> None:
    graph = chain("residual", 5)
    refined = task(graph, target=0.4)
    start = refine(refined, [baseline("uniform").search(task(graph, target=0.4))])
    gradient = np.zeros((STEPS, 5))
    removed = next((t, k) for t in range(1, STEPS) for k in range(5) if not start[t][k])
    gradient[removed] = -100.0
    moved = exchange(refined.costs, start, gradient, 1, refined.band, random.Random(0))
    assert moved is not None
    assert moved[removed[0]][removed[1]]
    assert refined.band.holds(refined.costs.ratio(moved))


def test_a_good_start_just_short_of_the_target_is_not_spoilt() -> None:
    """With residual caches the head runs at every step, so four full steps of ten save a little less than 0.6."""
    graph = chain("residual", 5)
    refined = task(graph, target=0.6, budget=20)
    start = baseline("uniform").search(refined)
    ratio = refined.costs.ratio(start)
    assert 0.57 <= ratio < 0.6
    gates = refine(refined, [start])
    assert refined.objective(gates) <= refined.objective(start)
    assert refined.costs.ratio(gates) >= ratio - 1e-9


def test_refinement_does_not_buy_its_gain_with_a_start_that_costs_more() -> None:
    """A start within the tolerance, but dearer than the target and the uniform interval, is brought to the target."""
    refined = task(target=0.6, budget=10)
    dear = baseline("uniform").search(refined)
    heavy = max((step for step in range(STEPS) if not any(dear[step])), key=WEIGHTS.__getitem__)
    dear = tuple((True,) * 4 if step == heavy else row for step, row in enumerate(dear))
    wide = replace(refined, tolerance=0.11)
    assert wide.target - wide.tolerance <= wide.costs.ratio(dear) < wide.target
    assert wide.costs.ratio(refine(wide, [dear])) >= wide.target - 1e-9


def test_refinement_keeps_to_the_variants() -> None:
    limited = task(budget=40, max_variants=2)
    gates = refine(limited, [baseline("uniform").search(limited)])
    assert limited.costs.variants(gates) <= 2


def test_refinement_of_nothing_usable_is_refused() -> None:
    with pytest.raises(UserError, match="closest reachable ratio"):
        refine(task(target=0.95), [((True,) * 4,) * STEPS])
