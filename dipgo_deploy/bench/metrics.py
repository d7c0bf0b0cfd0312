"""What is measured of each picture: likeness to the full run's picture, and what learned judges say of it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dipgo_deploy.errors import UserError
from dipgo_deploy.extras import install
from dipgo_deploy.quality import similarity
from dipgo_deploy.quality.learned import Judged, Lpips, clip_model, image_reward
from dipgo_deploy.search.losses import psnr, ssim


@dataclass(frozen=True)
class Metric:
    """One number a picture.

    Attributes:
        measure: pictures (B, 3, H, W) in [0, 1], the full run's of the same seeds, and their prompts -> (B,).
        name: in tables and files.
        higher: whether more is better.
        digits: that are shown.
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
    return found, [f"FLIP is not measured; {install('bench')}"]


LEARNED = ("lpips", "clip", "hps", "image-reward")


def learned_there(folder: Path) -> tuple[str, ...]:
    """Which learned judges have a folder in ``folder``; raises UserError for none."""
    there = tuple(name for name in LEARNED if (folder / name).is_dir())
    if not there:
        raise UserError(f"--metric-weights {folder}: has no folder {', '.join(LEARNED)}; put weights into one of these")
    return there


def learned(folder: Path, *, prompts: bool) -> tuple[list[Metric], list[str]]:
    """The judges whose weights are in ``folder``, each in a folder of its own, and a line on each that is left out.

    ``lpips`` to the full run's picture; ``clip`` (times 100), ``hps`` and ``image-reward`` of picture and prompt alone.
    prompts: whether there are any.

    Raises:
        UserError: none of them is there, or one cannot be used.
    """
    found: list[Metric] = []
    left_out = []
    for name in learned_there(folder):
        if name == "lpips":
            found.append(_paired(name, False, 4, Lpips(folder / name)))
        elif not prompts:
            left_out.append(f"{name} is not measured: it needs prompts, and the model has none")
        elif name == "image-reward":
            found.append(_alone(name, image_reward(folder / name)))
        else:
            found.append(_alone(name, clip_model(folder / name), 100.0 if name == "clip" else 1.0))
    return found, left_out


def _alone(name: str, judge: Judged, scale: float = 1.0) -> Metric:
    return Metric(name, True, 4, lambda pictures, _, prompts: scale * judge(pictures, prompts))
