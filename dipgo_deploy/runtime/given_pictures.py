"""The pictures of a call, made into what the denoiser's conditions have of them. Pure: no graph, no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dipgo_deploy.bundle.manifest import ConditionSpec, Manifest
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.image import to_masks, to_pictures, to_squares


@dataclass(frozen=True)
class GivenPictures:
    """Conditions of source ``image``.

    Attributes:
        rows: those that need nothing more, float32 (images, ...) by name.
        encoded: pictures that the VAE's encoder or the image encoder gets, float32 (1 or prompts, H, W, 3) in [0, 1].
    """

    rows: dict[str, np.ndarray]
    encoded: dict[str, np.ndarray]


def picture_conditions(manifest: Manifest) -> tuple[ConditionSpec, ...]:
    """The conditions that are made of pictures."""
    return tuple(spec for spec in manifest.conditions if spec.source == "image")


def check_pictures(
    manifest: Manifest, given: Mapping[str, Any], known: Sequence[str], rows: int, per_prompt: int
) -> GivenPictures:
    """What a call's pictures become. given: argument -> one or several, None where it was left out.

    known: conditions that were given as they are; nothing is made for them.

    Raises:
        UserError: a picture that is missing, not wanted or unfit.
    """
    specs = [spec for spec in picture_conditions(manifest) if spec.name not in known]
    wanted = {spec.picture.argument for spec in specs} | {"mask_image" for spec in specs if spec.picture.masked}
    started = manifest.sampler.strength is not None
    for argument, picture in given.items():
        if picture is not None and argument not in wanted and not (argument == "image" and started):
            raise UserError(f"{argument}: this engine directory takes none; leave it out")
    given = {name: _in_places(name, picture, specs) for name, picture in given.items()}
    found = GivenPictures({}, {})
    for spec in specs:
        for argument in (spec.picture.argument, *(("mask_image",) if spec.picture.masked else ())):
            if given.get(argument) is None:
                raise UserError(f"{argument}: missing; this engine directory draws from a picture as its {spec.name}")
        _make(manifest, spec, given, rows, per_prompt, found)
    return found


def _in_places(argument: str, picture: Any, specs: Sequence[ConditionSpec]) -> Any:
    """What was given, where one model has several of an argument a list with one entry for each."""
    places = 1 + max((spec.picture.place for spec in specs if spec.picture.argument == argument), default=0)
    if places == 1 or picture is None:
        return picture if picture is None else [picture]
    if not isinstance(picture, (list, tuple)) or len(picture) != places:
        count = len(picture) if isinstance(picture, (list, tuple)) else 1
        raise UserError(f"{argument}: {count} given; this engine directory takes {places}, one for each ControlNet")
    return list(picture)


def _make(
    manifest: Manifest, spec: ConditionSpec, given: Mapping[str, Any], rows: int, per_prompt: int, found: GivenPictures
) -> None:
    use, argument = spec.picture, spec.picture.argument
    if use.form in ("embeds", "states"):
        encoder = manifest.components.image_encoder
        if encoder is None:
            raise UserError(f"{argument}: this engine directory has no image encoder; give the condition {spec.name}")
        found.encoded[spec.name] = to_squares(given[argument][use.place], encoder.inputs[0].shape[1], argument)
        _check_count(argument, len(found.encoded[spec.name]), rows)
        return
    if use.form == "first_frame":
        shown = np.zeros((1, *spec.shape[1:]), np.float32)
        shown[:, :, 0] = 1
        found.rows[spec.name] = _repeated(shown, rows, per_prompt)
        return
    height, width = _pixels(manifest, spec)
    picture = given[argument][use.place]
    if use.form == "mask":
        masks = to_masks(picture, height, width, argument)
        _check_count(argument, len(masks), rows)
        found.rows[spec.name] = _repeated(_of_latent(masks, spec.shape[1:]), rows, per_prompt)
        return
    pictures = to_pictures(picture, height, width, argument)
    _check_count(argument, len(pictures), rows)
    if use.masked:
        masks = to_masks(given["mask_image"][0], height, width, "mask_image")
        _check_count("mask_image", len(masks), rows)
        pictures = np.where(masks[..., None] > 0, np.float32(0.5), pictures)
    if use.form == "pixels":
        found.rows[spec.name] = _repeated(pictures.transpose(0, 3, 1, 2), rows, per_prompt)
    elif manifest.components.vae_encoder is None:
        raise UserError(
            f"{argument}: this engine directory has no VAE encoder; give the condition {spec.name} in its place"
        )
    else:
        found.encoded[spec.name] = pictures


def _pixels(manifest: Manifest, spec: ConditionSpec) -> tuple[int, int]:
    """Height and width of the picture that a condition is made of."""
    if spec.picture.form == "pixels":
        return spec.shape[2], spec.shape[3]
    encoder, scale = manifest.components.vae_encoder, manifest.latent.scale
    if scale is None:
        if encoder is None:
            raise UserError(f"{spec.picture.argument}: nothing tells its size here; give the condition {spec.name}")
        return encoder.inputs[0].shape[1], encoder.inputs[0].shape[2]
    return manifest.latent.height * scale, manifest.latent.width * scale


def _of_latent(masks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Masks (n, H, W) at the latent's size: the first pixel of each, or all of them as channels."""
    channels, height, width = shape
    count, down, right = len(masks), masks.shape[1] // height, masks.shape[2] // width
    if channels == 1:
        return masks[:, None, ::down, ::right]
    blocks = masks.reshape(count, height, down, width, right).transpose(0, 2, 4, 1, 3)
    return blocks.reshape(count, channels, height, width)


def _check_count(argument: str, count: int, rows: int) -> None:
    if count not in (1, rows):
        raise UserError(f"{argument}: {count} given for {rows} prompts; give one, or one for each")


def _repeated(given: np.ndarray, rows: int, per_prompt: int) -> np.ndarray:
    return np.repeat(given, per_prompt if len(given) == rows else rows * per_prompt, axis=0)
