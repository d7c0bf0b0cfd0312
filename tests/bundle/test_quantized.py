"""Whole numbers and scales: every value lies within half a step, and what was packed comes back."""

from __future__ import annotations

import numpy as np
import pytest

from dipgo_deploy.bundle.quantized import STEPS, largest, scale_shape, step_of, to_numbers, to_weight, unpacked


@pytest.mark.parametrize(
    ("dtype", "shape", "axis", "block"),
    [("int8", (6, 5, 3, 3), 0, None), ("int8", (8, 6), 1, None), ("int4", (8, 6), 0, 4), ("int4", (6, 8), 1, 2)],
)
def test_every_value_is_the_nearest_number(dtype: str, shape: tuple[int, ...], axis: int, block: int | None) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    scale = largest(weight, axis, block) / np.float32(STEPS[dtype])
    assert scale.shape == scale_shape(shape, axis, block)
    numbers = to_numbers(weight, scale, dtype, axis, block)
    assert numbers.dtype == np.int8 and len(np.unique(numbers)) > 10
    error = np.abs(to_weight(numbers, scale, axis, block) - weight)
    assert np.all(error <= step_of(scale, shape, axis, block) * 0.5001)
    # A scale belongs to its channel or block alone.
    other = np.array(weight)
    other[(slice(None),) * axis + (0,)] *= 100
    moved = largest(other, axis, block) != largest(weight, axis, block)
    assert moved.sum() == (1 if block is None else moved.size // moved.shape[axis])


def test_packed_numbers_come_back() -> None:
    ir = pytest.importorskip("onnx_ir", reason="the packing is its")

    ml_dtypes = pytest.importorskip("ml_dtypes", reason="comes with onnx")
    numbers = np.random.default_rng(0).integers(-8, 8, (3, 5)).astype(np.int8)
    data = np.frombuffer(ir.tensor(numbers.astype(ml_dtypes.int4)).tobytes(), np.uint8)
    assert len(data) == 8
    np.testing.assert_array_equal(unpacked(data, "int4", (3, 5)), numbers)
    np.testing.assert_array_equal(unpacked(numbers.view(np.uint8).ravel(), "int8", (3, 5)), numbers)
