"""Predictions that tell what a stock pipeline does between its denoiser and its scheduler.

The engines guide their predictions themselves. So the pipeline is given two patterns in place of the two halves'
predictions, and what reaches its scheduler shows the guidance scale, and whether anything else was done to them.
Imports torch: import it inside functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.guidance import Guidance

# Of the largest value.
_TOLERANCE = 1e-3


def probe(shape: Sequence[int], *, conditional: bool) -> Tensor:
    """(n, C, [f,] h, w): 1 in the even columns and 0 in the odd ones for the unconditional half, and the reverse."""
    column = torch.arange(shape[-1]) % 2
    return (column if conditional else 1 - column).float().expand(*shape)


def scale_in(prediction: Tensor, guide: Guidance) -> float:
    """The guidance scale of what a pipeline made of the probes, (n, C, [f,] h, w) as its scheduler gets it.

    Raises:
        UserError: more was done to them than guidance.
    """
    halves = [prediction[..., place::2].float() for place in (0, 1)]
    even, odd = values = [float(half.flatten()[0]) for half in halves]
    scale = odd / (even + odd) - 1 + guide.off if even + odd else guide.off
    _check(halves, values)
    # Some pipelines count a prediction the other way round.
    sign = -1.0 if even + odd < 0 else 1.0
    _check([torch.tensor(values)], [[sign * value for value in _combined(guide, scale)]])
    return scale


def check_unguided(prediction: Tensor, returned: Tensor) -> None:
    """Refuse (UserError) where what reaches the scheduler is not what the denoiser returned, (n, C, [f,] h, w) both."""
    returned = returned[:, :, returned.shape[2] - prediction.shape[2] :] if returned.ndim == 5 else returned
    sign = -1.0 if float(prediction.float().sum()) < 0 else 1.0
    _check([prediction.float()], [sign * returned.to(prediction.device)])


def _check(found: Sequence[Tensor], wanted: Sequence[Any]) -> None:
    """Each of the former is the latter, in all its values."""
    for tensor, value in zip(found, wanted, strict=True):
        expected = torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)
        largest = max(1.0, float(expected.abs().max()))
        if not bool(((tensor - expected).abs() <= _TOLERANCE * largest).all()):
            raise UserError(
                "the pipeline changes predictions by more than classifier-free guidance (guidance_rescale, "
                "cfg_normalization and the like), which is not in the engines; leave it out"
            )


def _combined(guide: Guidance, scale: float) -> list[float]:
    """What guidance makes of the two probes, in even and odd columns."""
    unconditional, conditional = (probe((1, 1, 2, 2), conditional=half) for half in (False, True))
    found: list[float] = guide.combine(unconditional, conditional, scale)[0, 0, 0].tolist()
    return found
