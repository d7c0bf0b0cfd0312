"""What an export starts from: the denoiser, its family and configuration, and the pipeline around it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.shapes import Range, SizeRanges
from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import BlockSpec, CacheKind, Granularity, InputSpec, ModelFamily, TextScheme
from dipgo_deploy.models.location import (
    INDEX,
    config_folder,
    denoiser_config,
    lasting_name,
    native_size,
    pipeline_index,
)
from dipgo_deploy.models.shape import TraceShape
from dipgo_deploy.models.stock import starts_from_pictures
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.identity import accepted_hashes, config_hash

if TYPE_CHECKING:
    import torch

    from dipgo_deploy.models.stock import Stock
    from dipgo_deploy.schedule.forecast import Reads
    from dipgo_deploy.supernet.gated import Supernet

# Latent pixels; the kinds of a model's inputs do not depend on its size.
_ANY_SIZE = 128


@dataclass(frozen=True)
class Source:
    """A loaded model, or (``unloaded_source``) what its configuration says of it.

    Attributes:
        name: as a manifest has it, good in any working directory.
        denoiser: None where nothing is loaded.
        pipeline: None for a folder that holds only a denoiser.
        native: [frames,] height and width of the latent that the stock pipeline draws.
        scale: pixels of the picture to one of the latent.
        time_scale: frames of the video to one of the latent, None for a model of pictures.
    """

    name: str
    denoiser: Any
    family: ModelFamily
    config: Mapping[str, Any]
    pipeline: Any | None
    native: tuple[int, ...] | None
    scale: int
    time_scale: int | None = None

    @property
    def config_hash(self) -> str:
        """Hash that a schedule records."""
        return config_hash(self.config)

    @property
    def config_hashes(self) -> tuple[str, ...]:
        """All that are accepted for this configuration, that one first."""
        return accepted_hashes(self.config)

    def specs(self, schedule: Schedule) -> tuple[BlockSpec, ...]:
        """The schedule's blocks."""
        return self.family.blocks(self.config, schedule.model.granularity)

    def check(self, schedule: Schedule, *, allow_other_config: bool = False) -> None:
        """Refuse (UserError) a schedule that was not made for this model."""
        caches = {spec.name: spec.caches for spec in self.specs(schedule)}
        schedule.check_model(
            self.family.class_name,
            self.config_hashes,
            caches,
            denoisers=self.family.denoisers,
            allow_other_config=allow_other_config,
        )

    def trace_shape(
        self,
        *,
        batch: int | Range,
        guidance: bool,
        height: int | Range | None,
        width: int | Range | None,
        num_frames: int | None = None,
    ) -> TraceShape:
        """Extents; ``height`` and ``width`` in pixels, ``num_frames`` of the video, the model's native size where None.

        Raises:
            UserError: a size that the VAE's scale does not divide, or no native size is known; guidance for a model
                that has nothing to be guided away from; a range for a model that works at one size only.
        """
        given = (batch, height, width)
        if self.time_scale is not None and any(isinstance(value, Range) for value in given):
            raise UserError(f"{self.name}: videos are exported for one size and batch; give plain numbers")
        if any(isinstance(value, Range) for value in given):
            most = [value.max if isinstance(value, Range) else value for value in given]
            shape = self.trace_shape(
                batch=most[0] or 1, guidance=guidance, height=most[1], width=most[2], num_frames=num_frames
            )
            return replace(shape, sizes=self._ranges(shape, *given))
        assert isinstance(batch, int) and not isinstance(height, Range) and not isinstance(width, Range)
        family = self.family
        if family.scales_fixed and (self.scale, self.time_scale) != (
            family.pixels_per_latent,
            family.frames_per_latent,
        ):
            raise UserError(
                f"{self.name}: its VAE makes {self.scale} pixels and {self.time_scale} frames of one of the latent, "
                f"{family.diffusers_class} is for {family.pixels_per_latent} and {family.frames_per_latent}"
            )
        if batch < 1:
            raise UserError(f"--batch {batch}: give a number of images of at least 1")
        if guidance and not self.can_guide:
            reason = "takes the scale as an input" if self.distilled else "takes no prompt and has no null class"
            raise UserError(f"--guidance: {self.name} {reason}; leave it out")
        *native_frames, native_height, native_width = self.native or (None, None)
        latent_height = self._latent_extent("--height", height, native_height)
        latent_width = self._latent_extent("--width", width, native_width)
        scheme = self.text
        return TraceShape(
            batch=batch,
            height=latent_height,
            width=latent_width,
            text_length=0 if scheme is None else scheme.length,
            guidance=guidance,
            frames=self._latent_frames(num_frames, native_frames[0] if native_frames else None),
        )

    @property
    def can_guide(self) -> bool:
        """Whether there is an unconditional half for guidance: an empty prompt or a null class, and the model was not
        distilled from guidance."""
        specs = self._inputs
        halves = any(spec.source == "text" or (spec.source == "class" and spec.null is not None) for spec in specs)
        return halves and not self.distilled

    @property
    def distilled(self) -> bool:
        """Whether the scale of the guidance is one of the model's inputs."""
        return any(spec.source == "guidance" for spec in self._inputs)

    @property
    def _inputs(self) -> tuple[InputSpec, ...]:
        """At the native size, or any."""
        size = self.native or (_ANY_SIZE,) * self.family.axes
        return self.family.inputs(self.config, 1, *size, text_length=1)

    @property
    def text(self) -> TextScheme | None:
        """How its prompts are encoded; None for a model without text."""
        return self.family.text(self.config, self.pipeline)

    @property
    def guided(self) -> bool:
        """Whether the stock pipeline guides it by default."""
        return self.family.is_guided(self.config, pipeline_index(self.name))

    def supernet(
        self,
        granularity: Granularity,
        kinds: Mapping[str, CacheKind],
        forecast: Reads | None = None,
        denoisers: Sequence[str] | None = None,
        guidance: Sequence[float] | None = None,
    ) -> Supernet:
        """The gated denoiser; ``kinds``: cache kind by block name; ``forecast``: what removed blocks read;
        ``denoisers`` and ``guidance``: of each evaluation, as a schedule has them."""
        from dipgo_deploy.supernet.gated import Supernet

        specs = self.family.blocks(self.config, granularity)
        supernet = Supernet(
            self.denoiser, specs, [kinds[spec.name] for spec in specs], self.family.call, self.family.guide
        )
        supernet.forecast, supernet.denoisers, supernet.guidance = forecast, denoisers, guidance
        return supernet

    def set_timesteps(self, scheduler: Any, extents: Sequence[int], steps: int) -> dict[str, Any]:
        """What the scheduler's ``set_timesteps`` is given besides the number of steps, at a latent's extents."""
        return dict(self.family.set_timesteps(self.config, scheduler.config, *extents, steps))

    def default_guidance_scale(self, *, from_picture: bool = False) -> float | None:
        """The stock pipeline's own default, None without a pipeline. from_picture: that of its image-to-image pipeline,
        which is another one for FLUX."""
        if self.pipeline is None:
            return None
        owner = type(self.pipeline)
        if from_picture and not starts_from_pictures(owner):
            from diffusers import AutoPipelineForImage2Image

            owner = type(AutoPipelineForImage2Image.from_pipe(self.pipeline))
        takes = inspect.signature(owner.__call__).parameters
        # A model that was distilled from guidance takes its scale under the usual name.
        names = ("guidance_scale",) if self.distilled else (self.family.guide.argument, "guidance_scale")
        defaults = [takes[name].default for name in names if name in takes]
        return float(defaults[0]) if defaults else None

    def _ranges(
        self, shape: TraceShape, batch: int | Range, height: int | Range | None, width: int | Range | None
    ) -> SizeRanges | None:
        """The sizes that stay open, in latent pixels; None where none does."""
        ranges = {"batch": batch if isinstance(batch, Range) else Range.static(batch)}
        for option, asked, most in (("height", height, shape.height), ("width", width, shape.width)):
            if not isinstance(asked, Range) or asked.is_static:
                ranges[option] = Range.static(most)
                continue
            if self.family.size_multiple is None:
                raise UserError(
                    f"--{option}: {self.family.class_name} is exported for one size at a time; give a plain number"
                )
            multiple = self.family.size_multiple(self.config)
            step = multiple * self.scale
            if any(value % step for value in (asked.min, asked.opt, asked.max)):
                raise UserError(
                    f"--{option} {asked.min}:{asked.opt}:{asked.max}: {self.name} needs multiples of {step} pixels"
                )
            least, usual, most = (value // self.scale for value in (asked.min, asked.opt, asked.max))
            ranges[option] = Range(min=least, opt=usual, max=most, multiple=multiple)
        return None if all(allowed.is_static for allowed in ranges.values()) else SizeRanges(**ranges)

    def _latent_frames(self, frames: int | None, native: int | None) -> int | None:
        """Of the latent, for so many frames of the video; None for a model of pictures."""
        scale = self.time_scale
        if scale is None:
            if frames is not None:
                raise UserError(f"--num-frames {frames}: {self.name} makes pictures; leave it out")
            return None
        if frames is None:
            if native is None:
                raise UserError(f"{self.name}: nothing says how many frames its videos have; give --num-frames")
            return native
        if frames < 1 or (frames - 1) % scale:
            raise UserError(f"--num-frames {frames}: give a multiple of {scale} and 1, such as {4 * scale + 1}")
        return (frames - 1) // scale + 1

    def _latent_extent(self, option: str, pixels: int | None, native: int | None) -> int:
        if pixels is None:
            if native is None:
                raise UserError(f"{self.name}: its configuration has no sample_size; give --height and --width")
            return int(native)
        scale = self.scale
        if pixels < scale or pixels % scale:
            raise UserError(f"{option} {pixels}: give a multiple of {scale} pixels")
        return pixels // scale


def unloaded_source(name: str, stock: Stock) -> Source:
    """What a model's configuration says of it, nothing loaded: for refusals that need no weights."""
    family, config = denoiser_config(name)
    return Source(lasting_name(name), None, family, config, None, stock.native, stock.scale, stock.time_scale)


def load_source(name: str, dtype: torch.dtype | None = None, weights: str | None = None) -> Source:
    """Load a built-in model, a folder in diffusers' format, or a hub id.

    dtype: of the denoiser, float32 by default; all else is in float32. weights: where the denoiser is loaded from, by
    default from the model itself.

    Raises:
        UserError: no such model, or one that cannot be read or is not whole.
    """
    from dipgo_deploy.models.files import check_weights, say_variants
    from dipgo_deploy.models.stock import native_of, scale_of, time_scale_of
    from dipgo_deploy.supernet.load import load_denoiser, load_pipeline

    say_variants(name, check_weights(name))
    given = () if dtype is None else (dtype,)
    denoiser, family, config = load_denoiser(weights or name, *given)
    pipeline, native = None, native_size(config)
    if (config_folder(name) / INDEX).is_file():
        pipeline = load_pipeline(name, **family.parts(denoiser))
        _check_tokenizers(name, pipeline, family.text(config, pipeline))
        native = native_of(pipeline, family)
    scales = scale_of(pipeline, family), time_scale_of(pipeline, family)
    return Source(lasting_name(name), denoiser, family, config, pipeline, native, *scales)


def _check_tokenizers(name: str, pipeline: Any, scheme: TextScheme | None) -> None:
    """Refuse a pipeline with text encoders and without what turns a prompt into their ids."""
    if scheme is None or not scheme.has_encoders(pipeline):
        return
    for spec in scheme.tokenizers:
        if spec.of(pipeline) is None:
            raise UserError(f"{name}: has a text encoder, but no {spec.attribute}: its {INDEX} has to name one")
