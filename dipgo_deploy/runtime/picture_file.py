"""A picture as a file's bytes, with what it was made with where people's tools look for it."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Pillow's name of the format, by suffix."""
# Where EXIF has a comment of the user, and how that says its encoding.
_EXIF, _USER_COMMENT, _UTF16 = 0x8769, 0x9286, b"UNICODE\0"


def save_picture(file: IO[bytes], suffix: str, picture: Image, parameters: str | None = None) -> None:
    """Write a picture in the format of a suffix of ``PICTURES``, without loss where it can be without.

    parameters: text that goes into the file.
    """
    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    if parameters is not None:
        options |= _with_text(suffix, parameters)
    picture.save(file, PICTURES[suffix], **options)


def _with_text(suffix: str, text: str) -> dict[str, Any]:
    """Options of Pillow's ``save`` that put a text where people's tools look for it."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if suffix == ".png":
        info = PngInfo()
        info.add_text("parameters", text)
        return {"pnginfo": info}
    exif = Image.Exif()
    # Not by get_ifd: what is put there Pillow 10 forgets.
    exif[_EXIF] = {_USER_COMMENT: _UTF16 + text.encode("utf-16-be")}
    return {"exif": exif.tobytes()}
