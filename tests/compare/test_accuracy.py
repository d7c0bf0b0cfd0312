from __future__ import annotations

import math

import numpy as np
import pytest
from polygraphy.comparator import RunResults

from dipgo_deploy.compare.accuracy import Tolerance, compare_runs


def runs(expected: list[dict[str, np.ndarray]], actual: list[dict[str, np.ndarray]]) -> RunResults:
    results = RunResults()
    results.add(expected, runner_name="reference")
    results.add(actual, runner_name="judged")
    return results


@pytest.fixture
def tensor() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)


def test_errors_are_what_their_definitions_say(tensor, capfd):
    other = tensor + np.random.default_rng(1).normal(size=tensor.shape).astype(np.float32) * 1e-3
    ((error,),) = compare_runs(runs([{"x": tensor}], [{"x": other}]), Tolerance(1e-2))
    a, b = tensor.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    assert error.max_absolute == pytest.approx(np.abs(a - b).max(), rel=1e-5)
    assert error.relative == pytest.approx(np.abs(a - b).max() / np.abs(a).max(), rel=1e-5)
    assert error.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
    assert error.psnr == pytest.approx(20 * np.log10(a.max()) - 10 * np.log10(np.square(a - b).mean()), abs=1e-3)
    assert error.passed
    assert capfd.readouterr() == ("", "")  # polygraphy's log would spoil --json


def test_each_tensor_of_each_iteration_has_its_own_scale(tensor):
    big, wrong = tensor * 1000, tensor * 1000 + 0.05
    errors = compare_runs(
        runs([{"x": big, "y": tensor}, {"x": tensor}], [{"x": wrong, "y": tensor + 0.05}, {"x": tensor + 0.05}]),
        Tolerance(1e-3),
    )
    assert [[(error.name, error.passed) for error in row] for row in errors] == [
        [("x", True), ("y", False)],
        [("x", False)],
    ]


def test_the_tolerance_is_the_last_value_that_passes():
    expected, actual = np.array([4.0, 0.0], np.float32), np.array([4.0, 1.0], np.float32)
    for relative, absolute, passed in ((0.25, 0, True), (0.2499, 0, False), (0, 1.0, True), (0, 0.999, False)):
        ((error,),) = compare_runs(runs([{"x": expected}], [{"x": actual}]), Tolerance(relative, absolute))
        assert error.passed is passed


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, -1])
def test_one_bad_value_is_enough(tensor, bad, position):
    other = tensor.copy()
    other.reshape(-1)[position] = bad
    ((error,),) = compare_runs(runs([{"x": tensor}], [{"x": other}]), Tolerance(1e9, 1e9))
    assert not error.passed
    assert math.isinf(error.relative) and math.isinf(error.max_absolute)


def test_equal_tensors_zeros_and_other_shapes(tensor):
    zeros = np.zeros(4, np.float32)
    (equal, zero, shape) = compare_runs(
        runs([{"x": tensor}, {"x": zeros}, {"x": tensor}], [{"x": tensor}, {"x": zeros}, {"x": tensor[:1]}]),
        Tolerance(0.0),
    )
    assert equal[0].passed and equal[0].relative == 0 and math.isinf(equal[0].psnr)
    assert zero[0].passed and zero[0].cosine == 1
    assert not shape[0].passed and math.isinf(shape[0].relative)


@pytest.mark.parametrize(("expected", "actual"), [({"x": 1}, {"y": 1}), ({"x": 1, "y": 1}, {"x": 1}), ({}, {})])
def test_a_missing_tensor_is_not_passed_over(expected, actual):
    def arrays(names: dict[str, int]) -> dict[str, np.ndarray]:
        return {name: np.ones(2, np.float32) for name in names}

    with pytest.raises(ValueError, match="cannot be compared"):
        compare_runs(runs([arrays(expected)], [arrays(actual)]), Tolerance(1.0))
