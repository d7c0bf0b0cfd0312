"""Tables of rotary position embeddings, as float32 constants.

diffusers' models compute theirs in float64 or as complex numbers, in every evaluation. A traced graph would do so too,
and TensorRT does neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

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
