from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dipgo_deploy.bench.statistics import bootstrap, mean, share


def test_the_interval_of_a_mean_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).standard_normal(400)
    found = mean(values)
    low, high = stats.norm.interval(0.95, loc=values.mean(), scale=stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high), abs=1e-4)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (7, 10), (100, 100)])
def test_the_interval_of_a_share_is_that_of_scipy(successes: int, trials: int) -> None:
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    found = share(successes, trials)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-3)


def test_a_bootstrap_of_the_mean_finds_its_standard_error() -> None:
    values = np.random.default_rng(1).standard_normal(500)
    found = bootstrap(lambda rows: float(values[rows].mean()), np.zeros(500, int), draws=400)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(1.96 * stats.sem(values), rel=0.15)


def test_a_bootstrap_stays_within_groups() -> None:
    groups = np.array([0, 0, 1, 1])
    values = np.array([0.0, 0.0, 5.0, 5.0])
    found = bootstrap(lambda rows: float(values[rows].mean()), groups)
    assert (found.low, found.high) == (2.5, 2.5)
