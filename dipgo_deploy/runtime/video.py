"""Videos as files: H.264 through PyAV, animations and single frames through Pillow."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from dipgo_deploy.errors import UserError
from dipgo_deploy.extras import install
from dipgo_deploy.files import short_name, written_whole

if TYPE_CHECKING:
    from PIL.Image import Image

MP4 = ".mp4"
ANIMATIONS = {".webp": "WEBP", ".gif": "GIF"}
# The empty one: a folder of PNG files.
SUFFIXES = (MP4, *ANIMATIONS, "")
# Milliseconds that a frame of an animation is shown at least; browsers slow down what is faster.
_LEAST_DURATION = 20


def check_video_output(path: Path) -> None:
    """Refuse a file that a video cannot be written to here, before one is made.

    Raises:
        UserError: a suffix of another kind of file, or .mp4 without PyAV.
    """
    if path.suffix.lower() not in SUFFIXES:
        named = ", ".join(suffix for suffix in SUFFIXES if suffix)
        raise UserError(
            f"--output {path}: a video is written to {named}, or as PNG frames to a folder without a suffix"
        )
    if path.suffix.lower() == MP4:
        try:
            import av  # noqa: F401
        except ImportError:
            raise UserError(
                f"--output {path}: .mp4 needs PyAV; {install('video')}, or write .webp, .gif or a folder of frames"
            ) from None


def write_video(path: Path, frames: Sequence[Image], fps: int) -> None:
    """Write a video whole or not at all; what kind of file says its suffix.

    path: checked by ``check_video_output``. frames: RGB, of one size. fps: frames a second.

    Raises:
        OSError: it cannot be written.
    """
    suffix = path.suffix.lower()
    if not suffix:
        _frames(path, frames)
        return
    with written_whole(path) as file:
        if suffix == MP4:
            _mp4(file, frames, fps)
        else:
            first, *rest = frames
            options = {"lossless": True} if suffix == ".webp" else {}
            duration = max(round(1000 / fps), _LEAST_DURATION)
            first.save(
                file, ANIMATIONS[suffix], save_all=True, append_images=rest, duration=duration, loop=0, **options
            )


def _mp4(file: BinaryIO, frames: Sequence[Image], fps: int) -> None:
    import av

    width, height = frames[0].size
    with av.open(file, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16"})
        # Colour at half the size is what every player takes; it needs even sides.
        even = width % 2 == 0 == height % 2
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p" if even else "yuv444p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


def _frames(folder: Path, frames: Sequence[Image]) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{short_name(folder)}.", suffix=".partial", dir=folder.parent))
    try:
        for place, image in enumerate(frames):
            image.save(aside / f"{place:05d}.png")
        aside.chmod(0o755)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
