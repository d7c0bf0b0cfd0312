"""From latents to pictures, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from dipgo_deploy.backends.base import Backend
from dipgo_deploy.bundle.manifest import Components, Graph, VideoChunk
from dipgo_deploy.bundle.shapes import SizeRanges, Sizes
from dipgo_deploy.errors import NotFiniteError, UserError
from dipgo_deploy.runtime.chunks import Chunked
from dipgo_deploy.runtime.component import Component

if TYPE_CHECKING:
    from PIL.Image import Image


Picture: TypeAlias = "Image | np.ndarray"


class Decoder:
    """The VAE decoder of an engine directory.

    Raises:
        UserError: the graph cannot be loaded.
    """

    def __init__(self, engine_dir: Path, components: Components, backend: Backend) -> None:
        graph = components.vae_decoder
        assert graph is not None  # checked by the caller
        self._graph = graph
        self._decode: Component | Chunked
        if components.vae_chunks:
            self._decode = Chunked(engine_dir, components.decoders, components.vae_chunks, backend)
        else:
            self._decode = Component(engine_dir, graph, backend)

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Latents (n, C, [f,] h, w), any n -> images float32 (n, [F,] H, W, 3) in [0, 1]."""
        graph = self._graph
        most = graph.inputs[0].shape[0]
        parts = []
        for start in range(0, len(latents), most):
            part = latents[start : start + most]
            batch = batch_for(len(part), most, graph.sizes)
            sizes = None if graph.sizes is None else Sizes(batch, *latents.shape[-2:])
            images = self._decoded(pad_batch(part, batch), sizes)
            parts.append(images[: len(part)].astype(np.float32))
        return np.concatenate(parts)

    def _decoded(self, latents: np.ndarray, sizes: Sizes | None) -> np.ndarray:
        name = self._graph.outputs[0].name
        if isinstance(self._decode, Component):
            return self._decode({self._graph.inputs[0].name: latents}, sizes)[name]
        return np.concatenate(self._decode(lambda start, shape: latents[:, :, start : start + shape[2]])[name], axis=1)


class Encoder:
    """The VAE encoder of an engine directory, or its image encoder. chunks: of one that goes through time.

    Raises:
        UserError: a graph cannot be loaded.
    """

    def __init__(
        self, engine_dir: Path, graphs: Sequence[Graph], backend: Backend, chunks: Sequence[VideoChunk] = ()
    ) -> None:
        self._graph = graphs[0]
        self._encode: Component | Chunked
        if chunks:
            self._encode = Chunked(engine_dir, graphs, chunks, backend)
        else:
            self._encode = Component(engine_dir, self._graph, backend)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Images float32 (n, H, W, 3) in [0, 1], any n -> ``mean`` and, unless the VAE is deterministic, ``std`` of
        their latents, float32 (n, C, [f,] h, w), both times the scaling factor; or embeddings of each and of none. A
        VAE of videos encodes one that begins with the image (``with_grey``)."""
        graph = self._graph
        most = graph.inputs[0].shape[0]
        parts = []
        for start in range(0, len(images), most):
            part = images[start : start + most]
            batch = batch_for(len(part), most, graph.sizes)
            outputs = self._encoded(pad_batch(part, batch))
            parts.append({name: array[: len(part)].astype(np.float32) for name, array in outputs.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _encoded(self, images: np.ndarray) -> dict[str, np.ndarray]:
        taken, mean = self._graph.inputs[0], self._graph.outputs[0]
        if isinstance(self._encode, Component):
            sizes = None
            if self._graph.sizes is not None:
                pixels = taken.shape[1] // mean.shape[2]
                sizes = Sizes(len(images), images.shape[1] // pixels, images.shape[2] // pixels)
            given = images if len(taken.shape) == 4 else with_grey(images, 0, taken.shape)
            return self._encode({taken.name: given}, sizes)
        found = self._encode(lambda start, shape: with_grey(images, start, shape))
        return {name: np.concatenate(latents, axis=2) for name, latents in found.items()}


def with_grey(images: np.ndarray, start: int, shape: Sequence[int]) -> np.ndarray:
    """Frames (n, F, H, W, 3) from ``start`` on of a video whose first is the image (n, H, W, 3), and grey behind it."""
    frames = np.full(shape, 0.5, np.float32)
    if start == 0:
        frames[:, 0] = images
    return frames


def to_pictures(pictures: Picture | Sequence[Picture], height: int, width: int, name: str = "image") -> np.ndarray:
    """Pictures as float32 (n, H, W, 3) in [0, 1], as diffusers' ``VaeImageProcessor`` makes them.

    pictures: PIL pictures of any size, which are resized (Lanczos), or arrays (H, W, 3) or (n, H, W, 3) of the wanted
    size, float in [0, 1] or uint8; one, or several in a list. name: of the argument, for messages.

    Raises:
        UserError: anything else.
    """
    items = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    if not items:
        raise UserError(f"{name}: an empty list; give at least one picture")
    return np.concatenate([_picture(item, height, width, name) for item in items])


def _picture(item: object, height: int, width: int, name: str) -> np.ndarray:
    from PIL import Image

    if isinstance(item, Image.Image):
        # In this order: diffusers resizes the picture in its own mode.
        resized = as_8_bit(item, name).resize((width, height), resample=Image.Resampling.LANCZOS).convert("RGB")
        return np.array(resized)[None].astype(np.float32) / np.float32(255)
    if not isinstance(item, np.ndarray):
        raise UserError(f"{name}: {type(item).__name__}, needs a PIL picture or a numpy array")
    array = item[None] if item.ndim == 3 else item
    if array.ndim != 4 or array.shape[1:] != (height, width, 3) or not len(array):
        raise UserError(f"{name}: shape {item.shape}, needs ({height}, {width}, 3); a PIL picture is resized to that")
    if array.dtype == np.uint8:
        return array.astype(np.float32) / np.float32(255)
    if array.dtype not in (np.float16, np.float32, np.float64) or not ((array >= 0) & (array <= 1)).all():
        raise UserError(f"{name}: {array.dtype} array, needs floats from 0 to 1, or uint8")
    return array.astype(np.float32)


def to_masks(masks: Picture | Sequence[Picture], height: int, width: int, name: str = "mask_image") -> np.ndarray:
    """Masks as float32 (n, H, W) of 0 and 1, as diffusers' pipelines make them: 1 from half of white on.

    masks: as for ``to_pictures``, in grey or colours; arrays may be (H, W) too.

    Raises:
        UserError: anything else.
    """
    from PIL import Image

    items = list(masks) if isinstance(masks, (list, tuple)) else [masks]
    if not items:
        raise UserError(f"{name}: an empty list; give at least one picture")
    found = []
    for item in items:
        if isinstance(item, Image.Image):
            resized = as_8_bit(item, name).resize((width, height), resample=Image.Resampling.LANCZOS).convert("L")
            grey = np.array(resized)[None] / np.float32(255)
        else:
            colours = (
                np.repeat(item[..., None], 3, axis=-1) if isinstance(item, np.ndarray) and item.ndim == 2 else item
            )
            grey = _picture(colours, height, width, name).mean(axis=-1)
        found.append((grey >= 0.5).astype(np.float32))
    return np.concatenate(found)


def to_squares(pictures: Picture | Sequence[Picture], side: int, name: str = "ip_adapter_image") -> np.ndarray:
    """Pictures as float32 (n, side, side, 3) in [0, 1], as CLIP's image processor prepares them for its encoder: the
    shorter side resized (bicubic) to ``side``, the middle cut out.

    pictures: PIL pictures or arrays (H, W, 3) of any size, float in [0, 1] or uint8; one, or several in a list.

    Raises:
        UserError: anything else.
    """
    from PIL import Image

    items = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    if not items:
        raise UserError(f"{name}: an empty list; give at least one picture")
    squares = []
    for item in items:
        picture = item
        if isinstance(item, np.ndarray) and item.ndim == 3:
            picture = Image.fromarray(to_uint8(_picture(item, item.shape[0], item.shape[1], name))[0])
        if not isinstance(picture, Image.Image):
            raise UserError(f"{name}: {type(item).__name__}, needs a PIL picture or an array (H, W, 3)")
        picture = as_8_bit(picture, name).convert("RGB")
        shorter, longer = sorted(picture.size)
        other = int(side * longer / shorter)
        size = (side, other) if picture.width <= picture.height else (other, side)
        resized = np.array(picture.resize(size, resample=Image.Resampling.BICUBIC))
        top, left = (resized.shape[0] - side) // 2, (resized.shape[1] - side) // 2
        squares.append(resized[top : top + side, left : left + side].astype(np.float32) / np.float32(255))
    return np.stack(squares)


def as_8_bit(picture: Image, name: str) -> Image:
    """A picture as it is, or of 16 bits of grey as 8 ("L"): Pillow's own conversion would cut all above 255 to white.

    Raises:
        UserError: 32-bit values, whose range nothing tells.
    """
    from PIL import Image

    # Pillow before 11 opens a 16-bit PNG as "I".
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        values = np.asarray(picture).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if picture.mode in ("I", "F"):
        kind = "whole numbers" if picture.mode == "I" else "floats"
        raise UserError(
            f"{name}: a picture of 32-bit {kind}, which say nothing of what is black and white; save it with 8 or 16"
            " bits (in Python: an array of floats from 0 to 1)"
        )
    return picture


def batch_for(images: int, most: int, sizes: SizeRanges | None) -> int:
    """The batch of a launch for ``images`` pictures, at most ``most``: as many where the batch is open."""
    return most if sizes is None else max(images, sizes.batch.min)


def pad_batch(array: np.ndarray, batch: int) -> np.ndarray:
    """Repeat the last row until there are ``batch`` of them: real values, so that padding cannot overflow."""
    missing = batch - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Float images in [0, 1] to uint8, rounded as diffusers does.

    Raises:
        NotFiniteError: NaN or infinity among the values.
    """
    if not np.isfinite(images).all():
        raise NotFiniteError("picture: values that are not finite (NaN or infinity) have no colour")
    return (np.clip(images, 0.0, 1.0) * 255.0).round().astype(np.uint8)


def to_pil(images: np.ndarray) -> list[Image]:
    """Float images (n, H, W, 3) in [0, 1] as RGB pictures."""
    from PIL import Image

    return [Image.fromarray(image) for image in to_uint8(images)]


def grid(images: Sequence[Image], columns: int | None = None) -> Image:
    """One picture of all images, row by row, as near to a square as it goes.

    Raises:
        ValueError: no images.
    """
    from PIL import Image

    if not images:
        raise ValueError("no images")
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet
