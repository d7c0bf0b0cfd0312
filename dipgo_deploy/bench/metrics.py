"""What is measured of each picture: likeness to the full run's picture, and what learned judges say of it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dipgo_deploy.quality import similarity
from dipgo_deploy.search.losses import psnr, ssim


@dataclass(frozen=True)
class Metric:
    """One number a picture.

    measure: pictures (B, 3, H, W) in [0, 1], the full run's of the same seeds, and their prompts -> (B,). name: in
    tables and files. higher: whether more is better. digits: that are shown.
    """

    name: str
    higher: bool
    digits: int
    measure: Callable[[Tensor, Tensor, Sequence[str]], Tensor]


def _paired(name: str, higher: bool, digits: int, measure: Callable[[Tensor, Tensor], Tensor]) -> Metric:
    return Metric(name, higher, digits, lambda pictures, full, _: measure(pictures, full))


SSIM = _paired("ssim", True, 4, ssim)
PSNR = _paired("psnr", True, 2, psnr)
FLIP = _paired("flip", False, 4, similarity.flip)
HAARPSI = _paired("haarpsi", True, 4, similarity.haarpsi)
GMSD = _paired("gmsd", False, 4, similarity.gmsd)


def to_the_full_run() -> tuple[list[Metric], list[str]]:
    """What needs no weights, and a line on each that cannot be measured here."""
    found = [SSIM, PSNR, HAARPSI, GMSD]
    if similarity.has_flip():
        return [*found, FLIP], []
    return found, ["FLIP is not measured: pip install 'dipgo-deploy[bench]'"]
