"""Tables of rotary position embeddings, as float32 constants.

diffusers' models compute theirs in float64 or as complex numbers, in every evaluation. A traced graph would do so too,
and TensorRT does neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.models.forward import replaced_forward

if TYPE_CHECKING:
    from torch import Tensor, nn

# Positions of an axis for which a table is made where their number is open: 8192 pixels in tokens of 16.
_MOST_POSITIONS = 512


def along(function: Callable[..., Any], theta: float, extent: int, count: int) -> Tensor:
    """``function`` of the angles at positions 0 to count - 1 of one axis, each twice: float32 (count, extent)."""
    import torch

    # An extent that a trace leaves open is no int.
    known = count if isinstance(count, int) else _MOST_POSITIONS
    angle = np.outer(np.arange(known), theta ** (-np.arange(0, extent, 2) / extent))
    values = torch.from_numpy(np.repeat(function(angle), 2, axis=1).astype(np.float32))
    return values if known is count else values[torch.arange(count)]


def rotate(features: Tensor, table: Tensor) -> Tensor:
    """Pairs of features turned by cosines and sines: the product of complex numbers.

    features: (..., tokens, heads, extent). table: float32 (..., tokens, extent / 2, 2).
    """
    import torch

    real, imaginary = features.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table.unsqueeze(-3).unbind(-1)
    turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)
    return turned.flatten(-2).to(features.dtype)


def turns(positions: np.ndarray, extents: Sequence[int], theta: float, dtype: Any = np.float32) -> Tensor:
    """Table for ``rotate`` of tokens at positions (tokens, axes), with so many features for each axis.

    dtype: in which the model computes frequencies and angles.
    """
    import torch

    angles = []
    for axis, extent in enumerate(extents):
        powers = np.arange(0, extent, 2).astype(dtype) / dtype(extent)
        angles.append(np.outer(positions[:, axis].astype(dtype), 1 / dtype(theta) ** powers))
    angle = np.concatenate(angles, axis=1).astype(np.float32)
    return torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], axis=-1))


@contextmanager
def precomputed(rope: nn.Module, arguments: Callable[[], Sequence[Any]]) -> Iterator[None]:
    """Inside the context ``rope`` gives its own tables for these arguments, as constants.

    A traced graph would compute them in every evaluation. arguments: called outside of any trace.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():  # those of a trace, which would write the computation down
        made = type(rope).forward(rope, *arguments())

    def tables(hidden_states: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return tuple(table.to(hidden_states.device) for table in made)

    with replaced_forward(rope, tables):
        yield
