"""Likeness of pictures: numbers of the package piq 0.8.0, recorded, and what has to hold of every such measure."""

from __future__ import annotations

import pytest
import torch

from dipgo_deploy.quality.similarity import flip, gmsd, haarpsi, has_flip


def waves(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pairs of pictures that are the same on every machine."""
    rows, columns = torch.arange(height)[:, None] / height, torch.arange(width)[None] / width
    one = torch.stack([torch.sin(9 * rows + k * columns) / 2 + 0.5 for k in range(6)])
    other = torch.stack([torch.cos(7 * rows * columns + k) / 2 + 0.5 for k in range(6)])
    return one.reshape(2, 3, height, width), (0.7 * one + 0.3 * other).reshape(2, 3, height, width)


RECORDED = {
    (32, 32): [[0.631641, 0.64968], [0.086307, 0.095553]],
    (29, 34): [[0.647958, 0.650664], [0.084858, 0.096143]],
    (64, 48): [[0.632956, 0.630836], [0.07563, 0.083486]],
}


@pytest.mark.parametrize(("shape", "haar", "deviation"), [(key, *value) for key, value in RECORDED.items()])
def test_values_are_those_of_piq(shape: tuple[int, int], haar: list[float], deviation: list[float]) -> None:
    one, other = waves(*shape)
    assert haarpsi(one, other).tolist() == pytest.approx(haar, abs=1e-5)
    assert gmsd(one, other).tolist() == pytest.approx(deviation, abs=1e-5)


def test_equal_pictures_are_alike_and_both_ways_are_the_same() -> None:
    one, other = waves(32, 32)
    assert haarpsi(one, one).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert gmsd(one, one).tolist() == [0, 0]
    torch.testing.assert_close(haarpsi(one, other), haarpsi(other, one))
    torch.testing.assert_close(gmsd(one, other), gmsd(other, one))
    grey = torch.full((1, 3, 16, 16), 0.0)
    assert haarpsi(grey, grey).tolist() == [1]


def test_what_cannot_be_compared_is_refused() -> None:
    one, _ = waves(32, 32)
    for measure in (haarpsi, gmsd):
        with pytest.raises(ValueError, match="cannot be compared"):
            measure(one, one[:1])
        with pytest.raises(ValueError, match="at least 16x16"):
            measure(one[..., :8], one[..., :8])


@pytest.mark.skipif(not has_flip(), reason="no flip-evaluator")
def test_flip_is_none_for_equal_pictures_and_grows_with_the_difference() -> None:
    one, other = waves(32, 32)
    near = 0.8 * one + 0.2 * other
    assert flip(one, one).tolist() == [0, 0]
    assert (flip(near, one) > 0).all() and (flip(near, one) < flip(other, one)).all()
