from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipgo_deploy.calibrate.least_squares import Sums, best_fit


def data(rows: int, columns: int, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    source = np.random.default_rng(seed)
    weights = source.standard_normal(columns)
    wide = source.standard_normal((rows, columns))
    return wide, weights, wide @ weights + noise * source.standard_normal(rows)


@given(st.integers(1, 5), st.integers(0, 10), st.integers(1, 7))
def test_parts_in_any_number_give_the_weights_of_the_whole(columns: int, seed: int, parts: int) -> None:
    wide, weights, target = data(60, columns, seed=seed)
    sums = Sums(columns)
    for some, goal in zip(np.array_split(wide, parts), np.array_split(target, parts), strict=True):
        sums.add(some, goal)
    np.testing.assert_allclose(sums.solve(0.0), weights, atol=1e-9)
    assert sums.residual(weights) < 1e-6


def test_residual_is_the_relative_error() -> None:
    wide, weights, target = data(500, 3, noise=0.5)
    sums = Sums(3)
    sums.add(wide, target)
    other = weights + 0.1
    expected = np.sqrt(np.mean((wide @ other - target) ** 2) / np.mean(target**2))
    assert sums.residual(other) == pytest.approx(expected)


def test_the_ridge_is_chosen_on_what_is_held_aside() -> None:
    """Two columns that are almost one: fitted to noise their weights explode, which only other data show."""
    source = np.random.default_rng(0)

    def sums(rows: int) -> Sums:
        first = source.standard_normal(rows)
        wide = np.stack([first, first + 1e-4 * source.standard_normal(rows)], 1)
        found = Sums(2)
        found.add(wide, first + 0.5 * source.standard_normal(rows))
        return found

    training, aside = sums(20), sums(2000)
    loose, fit = training.solve(1e-12), best_fit(training, aside, (1e-12, 1e-3))
    assert np.abs(loose).max() > 100
    assert fit.ridge == 1e-3 and np.abs(fit.weights).max() < 1
    assert fit.residual == aside.residual(fit.weights) < aside.residual(loose)
