"""Files that ``dipgo-run`` writes: pictures and videos with what they were made with, and arrays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from dipgo_deploy.errors import UserError
from dipgo_deploy.files import written_whole
from dipgo_deploy.runtime.picture_file import PICTURES, save_picture
from dipgo_deploy.runtime.video import SUFFIXES, check_video_output, write_video

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FPS = 16
"""Frames a second where nothing says."""


def check_suffix(path: Path, output_type: str) -> None:
    """Refuse (UserError) a suffix that fits the output type of no model, before any work is done."""
    pictures, video = list(PICTURES), list(SUFFIXES)
    if path.suffix.lower() not in ([*pictures, *video] if output_type == "pil" else [".npy"]):
        check_kind(path, output_type, video=False)


def check_kind(path: Path, output_type: str, *, video: bool) -> None:
    """Refuse (UserError) a suffix that does not fit the output type of this model."""
    if video:
        check_video_output(path)
        return
    suffixes = list(PICTURES) if output_type == "pil" else [".npy"]
    if path.suffix.lower() not in suffixes:
        raise UserError(f"--output {path}: output type {output_type} is written to {', '.join(suffixes)}")


def write_output(
    path: Path,
    images: list[Image] | list[list[Image]] | np.ndarray,
    fps: int = FPS,
    parameters: str | None = None,
    *,
    option: str = "--output",
) -> None:
    """Write pictures or videos (as a grid) or an array under a name of its own, then rename.

    parameters: text that goes into the file of a picture. option: where its name comes from, for the message.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        if isinstance(images, list) and isinstance(images[0], list):
            from dipgo_deploy.runtime.image import grid

            write_video(path, [grid(frames) for frames in zip(*images, strict=True)], fps)
            return
        with written_whole(path) as file:
            _write(file, path.suffix.lower(), images, parameters)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror or error})") from None


def _write(file: BinaryIO, suffix: str, images: list[Image] | np.ndarray, parameters: str | None) -> None:
    if not isinstance(images, list):
        import numpy as np

        np.save(file, images, allow_pickle=False)
        return
    from dipgo_deploy.runtime.image import grid

    save_picture(file, suffix, grid(images), parameters)
