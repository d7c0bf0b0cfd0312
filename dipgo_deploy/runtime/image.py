"""From latents to pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dipgo_deploy.backends.base import Backend
from dipgo_deploy.bundle.manifest import Graph
from dipgo_deploy.runtime.component import Component

if TYPE_CHECKING:
    from PIL.Image import Image


class Decoder:
    """The VAE decoder of an engine directory.

    Raises:
        UserError: the graph cannot be loaded.
    """

    def __init__(self, engine_dir: Path, graph: Graph, backend: Backend) -> None:
        self._component = Component(engine_dir, graph, backend)

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Latents (n, C, h, w), any n -> images float32 (n, H, W, 3) in [0, 1]."""
        graph = self._component.graph
        batch = graph.inputs[0].shape[0]
        parts = []
        for start in range(0, len(latents), batch):
            part = latents[start : start + batch]
            outputs = self._component({graph.inputs[0].name: pad_batch(part, batch)})
            parts.append(outputs[graph.outputs[0].name][: len(part)].astype(np.float32))
        return np.concatenate(parts)


def pad_batch(array: np.ndarray, batch: int) -> np.ndarray:
    """Repeat the last row until there are ``batch`` of them: real values, so that padding cannot overflow."""
    missing = batch - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Float images in [0, 1] to uint8, rounded as diffusers does; what is not a number becomes 0."""
    return np.nan_to_num(np.clip(images, 0.0, 1.0) * 255.0).round().astype(np.uint8)


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
