from __future__ import annotations

import math

import numpy as np
import pytest

from dipgo_deploy.compare.metrics import Agreement, agreement, peak, relative_error, worst


def test_the_error_is_relative_to_the_largest_expected_value():
    expected = np.array([1.0, -4.0, 0.0], np.float32)
    assert relative_error(np.array([1.0, -4.0, 0.5], np.float32), expected) == 0.125
    assert relative_error(expected, expected) == 0


def test_what_is_not_finite_is_infinitely_wrong():
    expected = np.ones(3, np.float32)
    for bad in (np.nan, np.inf):
        assert math.isinf(relative_error(np.array([1.0, bad, 1.0], np.float32), expected))


def test_zeros_are_not_divided_by():
    zeros = np.zeros(3, np.float32)
    assert relative_error(zeros, zeros) == 0
    assert relative_error(np.full(3, 1e-6, np.float32), zeros) > 1e5
    assert peak(np.zeros(0)) > 0


def test_half_precision_differences_are_not_rounded():
    actual, expected = np.array([1000.0], np.float16), np.array([1000.25], np.float32)
    assert relative_error(actual, expected) == 0.25 / 1000.25


def test_agreement_of_tensors() -> None:
    expected = np.array([3.0, -4.0, 0.0], np.float32)
    found = agreement(expected + np.float32([0.0, 0.0, 0.3]), expected)
    assert found.relative == pytest.approx(0.075)
    assert found.psnr == pytest.approx(10 * np.log10(16 / 0.03))
    assert found.cosine == pytest.approx(5 / np.sqrt(25.09))
    assert agreement(expected, expected) == (0.0, np.inf, pytest.approx(1.0))
    assert agreement(np.float32([np.nan, 0, 0]), expected)[:2] == (np.inf, -np.inf)
    nothing = np.zeros(3, np.float32)
    assert agreement(nothing, nothing).cosine == 1 and agreement(expected, nothing).cosine == 0


def test_the_worst_of_several() -> None:
    assert worst([Agreement(1e-6, 90.0, 0.9), Agreement(1e-3, 95.0, 1.0)]) == Agreement(1e-3, 90.0, 0.9)
