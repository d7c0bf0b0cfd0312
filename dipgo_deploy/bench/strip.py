"""Pictures to look at: the full run's above, each case's below, where the numbers say that it is worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dipgo_deploy.files import written_whole

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 96  # pixels: smaller pictures are shown larger, in whole multiples
_GAP = 4
_LABEL = 250


def worst(similarity: np.ndarray, count: int) -> list[int]:
    """The places of the ``count`` lowest values, the lowest first."""
    return [int(place) for place in np.argsort(similarity, kind="stable")[:count]]


def strip(reference: np.ndarray, rows: Mapping[str, np.ndarray], headings: Sequence[str]) -> Image:
    """One sheet: a heading above each column, the reference's pictures, then each row's below them.

    Args:
        reference, rows: uint8 (n, 3, H, W), by label.
        headings: n.
    """
    from PIL import Image, ImageDraw

    count, _, height, width = reference.shape
    scale = max(1, -(-_SIDE // max(height, width)))
    cell_w, cell_h = width * scale + _GAP, height * scale + _GAP
    top = 16
    sheet = Image.new("RGB", (_LABEL + count * cell_w, top + (1 + len(rows)) * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        draw.text((_LABEL + column * cell_w, 2), heading, fill="black")
    for row, (label, pictures) in enumerate({"full run": reference, **rows}.items()):
        draw.text((4, top + row * cell_h + cell_h // 2 - 6), label, fill="black")
        for column in range(count):
            picture = Image.fromarray(np.moveaxis(np.asarray(pictures[column]), 0, -1))
            enlarged = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (_LABEL + column * cell_w, top + row * cell_h))
    return sheet


def write_strip(sheet: Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with written_whole(path) as file:
        sheet.save(file, format="PNG")
