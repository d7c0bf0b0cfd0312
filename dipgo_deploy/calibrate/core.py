"""What a calibration is made of: its images, its launches, and what makes predictions. numpy only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dipgo_deploy.calibrate.least_squares import RIDGES
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.noise import TorchNoise
from dipgo_deploy.search.samples import Pair

# Seeds of a calibration, of a search (from 0) and of a measurement (from a million) must not meet.
FIRST_SEED = 2_000_000

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CalibrationOptions:
    """How a schedule is calibrated.

    Attributes:
        images: how many, all conditions in turn.
        guidance_scales: each image has one of them, in turn; none: the problem's own.
        held_aside: share of the images that choose the ridge and give the residuals.
        ridges: relative to the mean squared column; chosen for each launch.
        batch: images that go through the model at a time.
        seed: of the first image's noise, counted from ``FIRST_SEED``.
    """

    images: int = 200
    guidance_scales: tuple[float, ...] = ()
    held_aside: float = 0.2
    ridges: tuple[float, ...] = RIDGES
    batch: int = 20
    seed: int = 0

    @property
    def aside(self) -> int:
        """How many images are held aside."""
        return round(self.images * self.held_aside)

    def check(self, option: str = "--images") -> None:
        """Refuse (UserError) too few images, before anything is loaded. option: what the message calls them."""
        if self.aside < 1 or self.aside >= self.images:
            raise UserError(
                f"{option} {self.images}: {self.aside} of them would be held aside; give more, so that some are left "
                "to fit and some to judge"
            )


@dataclass(frozen=True)
class Launch:
    """One evaluation of the fitted schedule.

    Attributes:
        timestep: what the denoiser is told.
        target: the evaluation of the full run whose latent it is to have.
        predicts: whether its prediction is a new one.
    """

    timestep: float
    target: int
    predicts: bool


@dataclass(frozen=True)
class Group:
    """Images that go through the model together.

    Attributes:
        pairs: the images.
        scale: their guidance scale, None without guidance.
        rows: theirs of the arrays.
        held_aside: whether they choose the ridge, instead of being fitted to.
    """

    pairs: tuple[Pair, ...]
    scale: float | None
    rows: slice
    held_aside: bool


class Model(Protocol):
    """What is calibrated. Latents and predictions are float32 (images, C, h, w)."""

    sample_shape: tuple[int, ...]
    noises: int  # that a full run draws after the initial one
    kept_bytes: int  # of each image between two launches, in files

    def full_run(self, group: Group, wanted: Collection[int]) -> tuple[Mapping[int, np.ndarray], np.ndarray]:
        """The full run of these images: the latents of the ``wanted`` evaluations, and the final ones."""

    def predict(self, place: int, launch: Launch, group: Group, latents: np.ndarray) -> np.ndarray:
        """The guided prediction of ``launch``, number ``place``, from these latents, after those before it."""


def nearest(timesteps: Sequence[float] | np.ndarray, timestep: float) -> int:
    """The evaluation of the full run whose timestep is the nearest."""
    return int(np.abs(np.asarray(timesteps, np.float64) - timestep).argmin())


def grouped(conditions: int, scales: Sequence[float | None], options: CalibrationOptions) -> list[Group]:
    """Every image in one group; a group has one guidance scale and is held aside or not."""
    kinds: dict[tuple[float | None, bool], list[Pair]] = {}
    for place in range(options.images):
        pair = Pair(place % conditions, FIRST_SEED + options.seed + place)
        # The scale changes after every round of conditions, so that each condition meets each scale.
        scale = scales[place // conditions % len(scales)]
        kinds.setdefault((scale, place >= options.images - options.aside), []).append(pair)
    groups = []
    first = 0
    for (scale, aside), pairs in kinds.items():
        for start in range(0, len(pairs), options.batch):
            part = tuple(pairs[start : start + options.batch])
            groups.append(Group(part, scale, slice(first, first + len(part)), aside))
            first += len(part)
    return groups


def conditions_digest(names: Sequence[str]) -> str:
    """sha256 of the prompts, or of the classes' numbers as text."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def noise_of(pairs: Sequence[Pair], shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    """The first ``count`` draws of each image's seed, each float32 (images, *shape)."""
    streams = [TorchNoise(pair.seed) for pair in pairs]
    return [np.concatenate([stream.randn((1, *shape)) for stream in streams]) for _ in range(count)]


def finite(array: np.ndarray, where: str) -> np.ndarray:
    """``array``; raises UserError where a value is not finite. where: what it is of."""
    if not np.isfinite(array).all():
        raise UserError(f"{where}: a value is not finite, so nothing can be fitted; look at the model and its weights")
    return array
