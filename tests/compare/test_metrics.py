from __future__ import annotations

import math

import numpy as np
import pytest

from dipgo_deploy.compare.metrics import Agreement, Tolerance, agreement, image_errors, tensor_error, worst
from dipgo_deploy.difference import peak, relative_error


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


def test_of_a_video_the_worst_frame_is_told() -> None:
    rng = np.random.default_rng(0)
    expected = rng.random((2, 3, 4, 4, 3))
    expected[:, 1] *= 0.01  # a dark frame, whose error is small beside the others
    actual = expected + 1e-4 * rng.random(expected.shape)
    actual[1, 2, 0, 0, 0] += 0.05
    whole, frame = image_errors("images", actual, expected, Tolerance(1e-2))
    assert (whole.name, frame.name) == ("images", "images, frame 2")
    assert frame.relative == pytest.approx(whole.relative) and frame.max_absolute == pytest.approx(whole.max_absolute)
    assert not frame.passed and not whole.passed and frame.psnr < whole.psnr
    dark = expected.copy()
    dark[:, 1] += 5e-3
    assert [error.passed for error in image_errors("images", dark, expected, Tolerance(1e-2))] == [True, True]
    assert len(image_errors("images", actual[:, 0], expected[:, 0], Tolerance(1e-2))) == 1  # pictures
    assert len(image_errors("images", actual[:1], expected, Tolerance(1e-2))) == 1  # of other shapes


@pytest.fixture
def tensor() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)


def test_errors_are_what_their_definitions_say(tensor):
    other = tensor + np.random.default_rng(1).normal(size=tensor.shape).astype(np.float32) * 1e-3
    error = tensor_error("x", other, tensor, Tolerance(1e-2))
    a, b = tensor.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    assert error.max_absolute == pytest.approx(np.abs(a - b).max(), rel=1e-5)
    assert error.relative == pytest.approx(np.abs(a - b).max() / np.abs(a).max(), rel=1e-5)
    assert error.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
    assert error.psnr == pytest.approx(
        20 * np.log10(np.abs(a).max()) - 10 * np.log10(np.square(a - b).mean()), abs=1e-3
    )
    assert error.passed and error.limit == 1e-2


def test_the_tolerance_is_the_last_value_that_passes():
    expected, actual = np.array([4.0, 0.0], np.float32), np.array([4.0, 1.0], np.float32)
    for relative, absolute, passed in ((0.25, 0, True), (0.2499, 0, False), (0, 1.0, True), (0, 0.999, False)):
        assert tensor_error("x", actual, expected, Tolerance(relative, absolute)).passed is passed


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, -1])
def test_one_bad_value_is_enough(tensor, bad, position):
    other = tensor.copy()
    other.reshape(-1)[position] = bad
    error = tensor_error("x", other, tensor, Tolerance(1e9, 1e9))
    assert not error.passed
    assert math.isinf(error.relative) and math.isinf(error.max_absolute)


def test_equal_tensors_zeros_and_other_shapes(tensor):
    zeros = np.zeros(4, np.float32)
    equal, zero = (tensor_error("x", array, array, Tolerance(0.0)) for array in (tensor, zeros))
    assert equal.passed and equal.relative == 0 and math.isinf(equal.psnr)
    assert zero.passed and zero.cosine == 1
    shape = tensor_error("x", tensor[:1], tensor, Tolerance(1e9, 1e9))
    assert not shape.passed and math.isinf(shape.relative)
