"""Weights in 8 or 4 bits: whole numbers times a scale, for each output channel or each block of inputs."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import pydantic

Method = Literal["int8-weights", "int4-weights", "int8"]
METHODS: tuple[Method, ...] = get_args(Method)
BITS: dict[str, int] = {"int8": 8, "int4": 4}
# Steps from 0 to the largest value. In 4 bits half a step more, so that all 16 numbers are used: then the largest value
# lies half a step beyond the last number above 0, as far as anything else is at most from its own.
STEPS: dict[str, float] = {"int8": 127.0, "int4": 7.5}


class Quantized(pydantic.BaseModel):
    """How a stored tensor of whole numbers makes a weight: each times its entry of ``scale``."""

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
    """The whole numbers of a float32 weight with float32 scales: the nearest ones, int8 of the weight's shape."""
    limit = 2 ** (BITS[dtype] - 1)
    if block is None:
        numbers = np.rint(weight / _along(scale, weight.ndim, axis))
    else:
        numbers = np.rint(_in_blocks(weight, axis, block) / np.expand_dims(scale, axis + 1)).reshape(weight.shape)
    return np.clip(numbers, -limit, limit - 1).astype(np.int8)


def to_weight(numbers: np.ndarray, scale: np.ndarray, axis: int, block: int | None) -> np.ndarray:
    """The float32 weight that numbers stand for."""
    found = numbers.astype(np.float32)
    steps = step_of(scale, numbers.shape, axis, block)
    return np.multiply(found, steps, out=found)


def step_of(scale: np.ndarray, shape: tuple[int, ...], axis: int, block: int | None) -> np.ndarray:
    """The scale of every number, float32 of the weight's shape or one that broadcasts to it."""
    scale = scale.astype(np.float32, copy=False)
    return _along(scale, len(shape), axis) if block is None else np.repeat(scale, block, axis)


def unpacked(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The whole numbers (int8) of stored bytes (uint8); of int4 two a byte, the first in its lower half."""
    if dtype == "int8":
        return data.view(np.int8).reshape(shape)
    halves = np.stack([data << 4, data], axis=1).view(np.int8) >> 4
    count = int(np.prod(shape))
    return halves.reshape(-1)[:count].reshape(shape)


def _in_blocks(weight: np.ndarray, axis: int, block: int) -> np.ndarray:
    shape = weight.shape
    return weight.reshape(*shape[:axis], shape[axis] // block, block, *shape[axis + 1 :])


def _along(scale: np.ndarray, axes: int, axis: int) -> np.ndarray:
    return scale.reshape([-1 if place == axis else 1 for place in range(axes)])
