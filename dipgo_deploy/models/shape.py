"""The extents that a model is traced at, and its conditions there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dipgo_deploy.bundle.shapes import SizeRanges, Sizes
from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import InputSpec, ModelFamily


@dataclass(frozen=True)
class TraceShape:
    """Extents of a trace: images per launch, latent height and width, text tokens, and whether guidance doubles the
    batch inside the graph. ``sizes``: ranges of the first three, which are then the largest. ``frames``: of the latent,
    where it has a time axis. ``apart``: the halves of guidance are launched one after the other, each of ``batch``
    images."""

    batch: int = 1
    height: int = 64
    width: int = 64
    text_length: int = 77
    guidance: bool = True
    sizes: SizeRanges | None = None
    frames: int | None = None
    apart: bool = False

    def at(self, sizes: Sizes) -> TraceShape:
        """The static extents of one choice of sizes."""
        return replace(self, batch=sizes.batch, height=sizes.height, width=sizes.width, sizes=None)

    @property
    def extents(self) -> tuple[int, ...]:
        """Of the latent behind its channels: [frames,] height, width."""
        return (*(() if self.frames is None else (self.frames,)), self.height, self.width)

    @property
    def model_batch(self) -> int:
        """Batch that the denoiser itself sees."""
        return 2 * self.batch if self.guidance and not self.apart else self.batch

    @property
    def whole(self) -> TraceShape:
        """With both halves of guidance: of a run's conditions."""
        return replace(self, apart=False)


def check_masks(specs: tuple[InputSpec, ...], family: ModelFamily, scale: int, time_scale: int | None) -> None:
    """Refuse (UserError) a mask in channels that are not the pixels, or the frames, of one of the latent.

    scale, time_scale: of its VAE.
    """
    for spec in specs:
        use = family.pictures.get(spec.name)
        if use is not None and use.form == "first_frame" and spec.shape[1] != time_scale:
            raise UserError(
                f"{family.diffusers_class}: takes a mask of {spec.shape[1]} channels, its VAE makes {time_scale} "
                "frames of one of the latent; use the VAE that it was trained with"
            )
        if use is not None and use.form == "mask" and spec.shape[1] not in (1, scale**2):
            raise UserError(
                f"{family.diffusers_class}: takes a mask of {spec.shape[1]} channels, its VAE has {scale}x{scale} "
                "pixels to one of the latent; use the VAE that it was trained with"
            )


def condition_specs(family: ModelFamily, config: Mapping[str, Any], shape: TraceShape) -> tuple[InputSpec, ...]:
    """The condition inputs at ``shape``."""
    inputs = family.inputs(config, shape.model_batch, *shape.extents, text_length=shape.text_length)
    return tuple(spec for spec in inputs if spec.role == "condition")
