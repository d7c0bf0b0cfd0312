"""Whole numbers and scales: every value lies within half a step, and what was packed comes back."""

from __future__ import annotations

import numpy as np
import pytest

from dipgo_deploy.bundle.quantized import (
    NUMBER_TYPES,
    largest,
    scale_shape,
    spacing,
    step_of,
    to_numbers,
    to_weight,
    unpacked,
)


@pytest.mark.parametrize(
    ("dtype", "shape", "axis", "block"),
    [
        ("int8", (6, 5, 3, 3), 0, None),
        ("int8", (8, 6), 1, None),
        ("int4", (8, 6), 0, 4),
        ("int4", (6, 8), 1, 2),
        ("float8e4m3fn", (6, 5, 3, 3), 0, None),
        ("float8e4m3fn", (8, 6), 1, None),
    ],
)
def test_every_value_is_the_nearest_number(dtype: str, shape: tuple[int, ...], axis: int, block: int | None) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    scale = largest(weight, axis, block) / np.float32(NUMBER_TYPES[dtype].largest)
    assert scale.shape == scale_shape(shape, axis, block)
    numbers = to_numbers(weight, scale, dtype, axis, block)
    assert numbers.dtype.itemsize == 1 and len(np.unique(numbers.astype(np.float32))) > 10
    error = np.abs(to_weight(numbers, scale, axis, block) - weight)
    assert np.all(error <= step_of(scale, shape, axis, block) * spacing(numbers, dtype) * 0.5001)
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


def test_floats_lie_as_far_apart_as_their_type_says() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="comes with onnx")
    every = np.arange(0, 0x7E, dtype=np.uint8)  # 0 to the last but one
    numbers = unpacked(every, "float8e4m3fn", every.shape)
    following = unpacked(every + 1, "float8e4m3fn", every.shape).astype(np.float32)
    assert numbers.dtype == ml_dtypes.float8_e4m3fn and following[-1] == NUMBER_TYPES["float8e4m3fn"].largest
    np.testing.assert_array_equal(spacing(numbers, "float8e4m3fn"), following - numbers.astype(np.float32))
    beyond = to_numbers(np.array([[1.0, -1.0, 0.0]], np.float32), np.array([1e-3], np.float32), "float8e4m3fn", 0, None)
    np.testing.assert_array_equal(beyond.astype(np.float32), [[448, -448, 0]])
