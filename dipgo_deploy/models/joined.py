"""Variants of a family whose denoiser is given pictures beside its latent, as further channels of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.pictures import PictureUse
from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import InputSpec, ModelFamily

if TYPE_CHECKING:
    from torch import Tensor, nn

# Latents of a picture that is followed: its tokens are behind those of the latent.
FOLLOWED = "image_latents"
MASK, MASKED_LATENTS, CONTROL_LATENTS = "mask", "masked_image_latents", "control_image_latents"


@dataclass(frozen=True)
class Beside:
    """What stands behind the latent's channels.

    Attributes:
        name: of the condition.
        channels: None: as many as the latent has; -1: what the others leave of the model's.
    """

    name: str
    use: PictureUse
    channels: int | None = None


def _counts(beside: tuple[Beside, ...], latent: int, whole: int) -> list[int]:
    """Channels of each part, beside a latent of so many, of ``whole`` channels."""
    counts = [latent if part.channels is None else part.channels for part in beside]
    rest = whole - latent - sum(count for count in counts if count > 0)
    return [rest if count < 0 else count for count in counts]


def variant_name(family: ModelFamily, kind: str) -> str:
    """The class name of a variant of a family, such as ``FluxTransformer2DModel+Fill``."""
    return f"{family.class_name}+{kind}"


def with_channels(
    family: ModelFamily, kind: str, beside: tuple[Beside, ...], alone: Mapping[str, Any] | None = None, **changes: Any
) -> ModelFamily:
    """The variant ``kind`` of a family: at every evaluation conditions (B, C', [f,] h, w) are joined to the latent (B,
    C, [f,] h, w) along its channels, in this order.

    alone: settings of a model that is given its latent alone, besides as many channels. changes: fields of the family.
    """

    def _alone(config: Mapping[str, Any]) -> dict[str, Any]:
        into = config.get("out_channels") or config["in_channels"]
        return {**config, **(alone or {}), "in_channels": into}

    names = [part.name for part in beside]

    def counts(config: Mapping[str, Any]) -> tuple[int, list[int]]:
        """Channels of the latent, and of what is beside it."""
        channels = family.latent_channels(_alone(config))
        into, out = int(config["in_channels"]), int(config.get("out_channels") or config["in_channels"])
        parts = _counts(beside, channels, into * channels // out)
        if into * channels != out * (channels + sum(parts)) or min(parts) < 1:
            raise UserError(
                f"{family.diffusers_class}: in_channels {into}, out_channels {out}: for {changes['pipelines'][0]} only "
                f"models work whose input is the latent with {' and '.join(names)}"
            )
        return channels, parts

    def latent_channels(config: Mapping[str, Any]) -> int:
        return counts(config)[0]

    def inputs(config: Mapping[str, Any], batch: int, *size_and_text: int) -> tuple[InputSpec, ...]:
        own = family.inputs(_alone(config), batch, *size_and_text)
        shapes = [(batch, count, *size_and_text[: family.axes]) for count in counts(config)[1]]
        joined = (
            InputSpec(name, shape, "model", "condition", "image") for name, shape in zip(names, shapes, strict=True)
        )
        return (*own, *joined)

    def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        import torch

        others = {name: tensor for name, tensor in conditions.items() if name not in names}
        parts = [conditions[part.name].to(latent.dtype) for part in beside]
        return family.call(model, torch.cat([latent, *parts], dim=1), timestep, others)

    return replace(
        family,
        class_name=variant_name(family, kind),
        latent_channels=latent_channels,
        inputs=inputs,
        call=call,
        joined=tuple(names),
        pictures={part.name: part.use for part in beside},
        **changes,
    )
