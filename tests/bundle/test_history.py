from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipgo_deploy.bundle.history import History, final_latent, graph_coefficients, graph_latent

SHAPE = (1, 2, 3, 3)


def graph_sum(history: np.ndarray, coefficients: np.ndarray, chain: int) -> np.ndarray:
    """What the nodes of a graph do, in float32."""
    terms = np.concatenate([history[:1], history[1:chain] - history[: chain - 1], history[chain:]])
    return np.tensordot(coefficients, terms, axes=1)


weights = st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=12)


@given(weights, st.integers(0, 3), st.integers(0, 2**31))
def test_differences_give_the_weighted_sum(row: list[float], behind: int, seed: int) -> None:
    chain = len(row)
    row = row + [0.5] * behind
    history = np.random.default_rng(seed).normal(size=(len(row), *SHAPE)).astype(np.float32)
    coefficients = graph_coefficients(row, chain)
    assert coefficients.dtype == np.float32
    expected = final_latent(history, row)
    np.testing.assert_allclose(graph_sum(history, coefficients, chain), expected, atol=1e-4)
    np.testing.assert_allclose(graph_latent(history, coefficients, chain), expected, atol=1e-4)


@given(weights, st.integers(1, 5), st.integers(0, 2))
def test_slots_without_weight_at_the_end_of_the_chain_do_not_count(
    row: list[float], unwritten: int, behind: int
) -> None:
    chain = len(row) + unwritten
    whole = row + [0.0] * unwritten + [0.25] * behind
    history = np.ones((len(whole), *SHAPE), np.float32)
    history[len(row) : chain] = 1e30
    coefficients = graph_coefficients(whole, chain)
    assert not coefficients[len(row) : chain].any()
    expected = np.full(SHAPE, sum(whole), np.float32)
    np.testing.assert_allclose(graph_sum(history, coefficients, chain), expected, atol=1e-5)
    np.testing.assert_allclose(graph_latent(history, coefficients, chain), expected, atol=1e-5)


def test_a_latent_alone_in_the_first_slot() -> None:
    np.testing.assert_array_equal(graph_coefficients([1.0, 0.0, 0.0, 0.0], 3), np.float32([1, 0, 0, 0]))


def test_large_weights_that_cancel_keep_their_digits() -> None:
    """Weights of a late step: hundreds of the initial noise against hundreds of predictions that are nearly it."""
    random = np.random.default_rng(0)
    noise = random.normal(size=(1, 1, 32, 32))
    drift = 1e-2 * random.normal(size=(50, 1, 1, 32, 32)).cumsum(axis=0)
    history = np.concatenate([noise[None], noise + drift]).astype(np.float32)
    row = [130.0, *(-129.2 * np.linspace(2, 0, 50) / 50)]
    exact = np.tensordot(np.array(row), history.astype(np.float64), axes=1)
    plain = np.tensordot(np.float32(row), history, axes=1)
    ours = graph_sum(history, graph_coefficients(row, len(row)), len(row))
    assert np.abs(plain - exact).max() > 1e-5  # the case is one
    assert np.abs(ours - exact).max() < 3e-6


@pytest.mark.parametrize(("slots", "chain"), [(3, 0), (3, 4)])
def test_a_chain_that_cannot_be(slots: int, chain: int) -> None:
    with pytest.raises(ValueError, match=f"a chain of {chain} in a history of {slots} slots"):
        History(slots, chain)
