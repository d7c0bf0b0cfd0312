"""How pipelines guide a prediction by an unconditional one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dipgo_deploy.models.packed import PACK

if TYPE_CHECKING:
    from torch import Tensor


def away_from_unconditional(unconditional: Tensor, conditional: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): a scale of 1 does nothing."""
    return unconditional + scale * (conditional - unconditional)


def beyond_conditional(unconditional: Tensor, conditional: Tensor, scale: Tensor | float) -> Tensor:
    """The same, counted from the conditional prediction: a scale of 0 does nothing."""
    return conditional + scale * (conditional - unconditional)


def renormalised(unconditional: Tensor, conditional: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance whose tokens, two by two latent pixels of all channels, keep the conditional norm."""
    guided = away_from_unconditional(unconditional, conditional, scale)
    return guided * (_norms(conditional) / _norms(guided))


def _norms(prediction: Tensor) -> Tensor:
    """Of each token, at each of its latent pixels: (B, C, h, w) -> (B, 1, h, w)."""
    pixels = (prediction * prediction).sum(dim=1, keepdim=True)
    batch, _, height, width = pixels.shape
    tokens = pixels.reshape(batch, 1, height // PACK, PACK, width // PACK, PACK)
    whole = tokens.sum(dim=(3, 5), keepdim=True).expand(tokens.shape)
    return whole.reshape(pixels.shape).sqrt()


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance as a family's pipeline has it.

    Attributes:
        combine(unconditional, conditional, scale): the guided prediction, of two of (B, C, h, w) in float32 and a scale
            of one element; it is traced for the export.
        argument: the scale in the pipeline's call.
        off: the scale that does nothing; below it the pipeline has no guidance.
        order: how the pipeline evaluates the halves: in one batch, or one after the other, the conditional one first.
        only_with_negative: the pipeline guides only where it is given a negative prompt.
    """

    combine: Callable[[Tensor, Tensor, Tensor | float], Tensor] = away_from_unconditional
    argument: str = "guidance_scale"
    off: float = 1.0
    order: Literal["unconditional first", "conditional first", "separate"] = "unconditional first"
    only_with_negative: bool = False


PLAIN = Guidance()
"""That of most pipelines."""
