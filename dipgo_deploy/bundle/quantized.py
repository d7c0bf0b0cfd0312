"""Weights in 8 or 4 bits: numbers times a scale, for each output channel or each block of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pydantic

Method = Literal["int8-weights", "int4-weights", "int8", "fp8"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class NumberType:
    """A type of numbers that scales make values of.

    bits: of a number. largest: what the largest value becomes. fraction: bits behind the first one, of floats; None:
    whole numbers. least_exponent: of floats, below which numbers lie no closer. opset: the first whose graphs may
    have it with scales of every type, None: all here. capability: the first compute capability of NVIDIA's whose GPUs
    have products of it.
    """

    bits: int
    largest: float
    fraction: int | None = None
    least_exponent: int = 0
    opset: int | None = None
    capability: tuple[int, int] = (0, 0)


# In 4 bits half a step more, so that all 16 numbers are used: then the largest value lies half a step beyond the last
# number above 0, as far as anything else is at most from its own.
NUMBER_TYPES: dict[str, NumberType] = {
    "int8": NumberType(bits=8, largest=127.0),
    "int4": NumberType(bits=4, largest=7.5, opset=21),
    "float8e4m3fn": NumberType(bits=8, largest=448.0, fraction=3, least_exponent=-6, opset=21, capability=(8, 9)),
}
"""By ONNX's name in lower case."""

MATRIX_TYPES: dict[Method, str] = {
    "int8-weights": "int8",
    "int4-weights": "int4",
    "int8": "int8",
    "fp8": "float8e4m3fn",
}
"""What a method makes the weights of matrix products."""
ACTIVATIONS: tuple[Method, ...] = ("int8", "fp8")
"""Methods that round what weights are times, too: they need ranges of a loop that was recorded."""


class Quantized(pydantic.BaseModel):
    """How a stored tensor of numbers makes a weight: each times its entry of ``scale``."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    scale: str = pydantic.Field(description="initializer of the graphs with the scales, in the graphs' dtype")
    axis: int = pydantic.Field(description="the axis of the channels, or the axis that is divided into blocks")
    block: int | None = pydantic.Field(
        default=None, description="numbers along the axis that share a scale; None: a scale for each index of the axis"
    )


def scale_shape(shape: tuple[int, ...], axis: int, block: int | None) -> tuple[int, ...]:
    """Of a weight of this shape."""
    if block is None:
        return (shape[axis],)
    return tuple(extent // block if place == axis else extent for place, extent in enumerate(shape))


def largest(weight: np.ndarray, axis: int, block: int | None) -> np.ndarray:
    """The largest absolute values that share a scale, in ``scale_shape``; float32."""
    if block is None:
        others = tuple(place for place in range(weight.ndim) if place != axis)
        found = np.maximum(weight.max(others), -weight.min(others))
    else:
        blocks = _in_blocks(weight, axis, block)
        found = np.maximum(blocks.max(axis + 1), -blocks.min(axis + 1))
    return np.asarray(found, np.float32)


def to_numbers(weight: np.ndarray, scale: np.ndarray, dtype: str, axis: int, block: int | None) -> np.ndarray:
    """The numbers of a float32 weight with float32 scales: the nearest ones, of the weight's shape; whole ones int8."""
    kind = NUMBER_TYPES[dtype]
    if block is None:
        exact = weight / _along(scale, weight.ndim, axis)
    else:
        exact = (_in_blocks(weight, axis, block) / np.expand_dims(scale, axis + 1)).reshape(weight.shape)
    if kind.fraction is not None:
        return np.clip(exact, -kind.largest, kind.largest).astype(_float_type(dtype))
    limit = 2 ** (kind.bits - 1)
    return np.clip(np.rint(exact), -limit, limit - 1).astype(np.int8)


def to_weight(numbers: np.ndarray, scale: np.ndarray, axis: int, block: int | None) -> np.ndarray:
    """The float32 weight that numbers stand for."""
    found = numbers.astype(np.float32)
    steps = step_of(scale, numbers.shape, axis, block)
    return np.multiply(found, steps, out=found)


def step_of(scale: np.ndarray, shape: tuple[int, ...], axis: int, block: int | None) -> np.ndarray:
    """The scale of every number, float32 of the weight's shape or one that broadcasts to it."""
    scale = scale.astype(np.float32, copy=False)
    return _along(scale, len(shape), axis) if block is None else np.repeat(scale, block, axis)


def spacing(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """How far the numbers around each lie apart, in steps of the scale: float32, 1 for whole numbers."""
    kind = NUMBER_TYPES[dtype]
    if kind.fraction is None:
        return np.ones((), np.float32)
    sizes = np.maximum(np.abs(numbers.astype(np.float32)), np.float32(2.0**kind.least_exponent))
    return np.ldexp(np.float32(1), np.frexp(sizes)[1] - 1 - kind.fraction)


def unpacked(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of stored bytes (uint8), whole ones int8; of int4 two a byte, the first in its lower half."""
    if NUMBER_TYPES[dtype].bits == 8:
        return data.view(np.int8 if dtype == "int8" else _float_type(dtype)).reshape(shape)
    halves = np.stack([data << 4, data], axis=1).view(np.int8) >> 4
    count = int(np.prod(shape))
    return halves.reshape(-1)[:count].reshape(shape)


def _float_type(dtype: str) -> Any:
    """numpy's type of ONNX's."""
    import ml_dtypes  # comes with onnx, and only export and comparison ask for it

    return {"float8e4m3fn": ml_dtypes.float8_e4m3fn}[dtype]


def _in_blocks(weight: np.ndarray, axis: int, block: int) -> np.ndarray:
    shape = weight.shape
    return weight.reshape(*shape[:axis], shape[axis] // block, block, *shape[axis + 1 :])


def _along(scale: np.ndarray, axes: int, axis: int) -> np.ndarray:
    return scale.reshape([-1 if place == axis else 1 for place in range(axes)])
