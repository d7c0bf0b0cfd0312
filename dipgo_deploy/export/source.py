"""What an export starts from: the denoiser, its family and configuration, and the pipeline around it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.export.trace import TraceShape
from dipgo_deploy.models.family import BlockSpec, ModelFamily
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.identity import config_hash

if TYPE_CHECKING:
    import torch

DEFAULT_TEXT_LENGTH = 77


@dataclass(frozen=True)
class Source:
    """A loaded model. ``pipeline`` is None for a folder that holds only a denoiser."""

    name: str
    denoiser: torch.nn.Module
    family: ModelFamily
    config: Mapping[str, Any]
    pipeline: Any | None

    @property
    def config_hash(self) -> str:
        """Hash that a schedule records."""
        return config_hash(self.config)

    def specs(self, schedule: Schedule) -> tuple[BlockSpec, ...]:
        """The schedule's blocks."""
        return self.family.blocks(self.config, schedule.model.granularity)

    def check(self, schedule: Schedule, *, allow_other_config: bool = False) -> None:
        """Refuse (UserError) a schedule that was not made for this model."""
        caches = {spec.name: spec.caches for spec in self.specs(schedule)}
        schedule.check_model(self.family.class_name, self.config_hash, caches, allow_other_config=allow_other_config)

    def trace_shape(self, *, batch: int, guidance: bool, height: int | None, width: int | None) -> TraceShape:
        """Static extents; ``height`` and ``width`` in pixels, the model's native size where None.

        Raises:
            UserError: a size that the VAE's scale does not divide, or no native size is known.
        """
        if batch < 1:
            raise UserError(f"--batch {batch}: give a number of images of at least 1")
        native = self.config.get("sample_size")
        native_height, native_width = (native, native) if native is None or isinstance(native, int) else native
        latent_height = self._latent_extent("--height", height, native_height)
        latent_width = self._latent_extent("--width", width, native_width)
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        length = int(tokenizer.model_max_length) if tokenizer is not None else DEFAULT_TEXT_LENGTH
        return TraceShape(batch=batch, height=latent_height, width=latent_width, text_length=length, guidance=guidance)

    def default_guidance_scale(self) -> float | None:
        """The stock pipeline's own default, None without a pipeline."""
        if self.pipeline is None:
            return None
        parameter = inspect.signature(type(self.pipeline).__call__).parameters.get("guidance_scale")
        return float(parameter.default) if parameter is not None else None

    def _latent_extent(self, option: str, pixels: int | None, native: int | None) -> int:
        if pixels is None:
            if native is None:
                raise UserError(f"{self.name}: its configuration has no sample_size; give --height and --width")
            return int(native)
        scale = int(getattr(self.pipeline, "vae_scale_factor", 0) or 8)
        if pixels < scale or pixels % scale:
            raise UserError(f"{option} {pixels}: give a multiple of {scale} pixels")
        return pixels // scale


def load_source(name: str) -> Source:
    """Load a built-in model, a folder in diffusers' format, or a hub id, in float32.

    Raises:
        UserError: no such model, or one that cannot be read.
    """
    from dipgo_deploy.models.location import config_folder
    from dipgo_deploy.supernet.load import load_denoiser, load_pipeline

    denoiser, family, config = load_denoiser(name)
    pipeline = None
    if (config_folder(name) / "model_index.json").is_file():
        components: dict[str, Any] = {family.component: denoiser}
        pipeline = load_pipeline(name, **components)
    return Source(name=name, denoiser=denoiser, family=family, config=config, pipeline=pipeline)
