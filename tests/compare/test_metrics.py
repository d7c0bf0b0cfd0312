from __future__ import annotations

import math

import numpy as np

from dipgo_deploy.compare.metrics import peak, relative_error


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
