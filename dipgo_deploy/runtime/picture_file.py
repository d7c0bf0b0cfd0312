"""Pictures from a file's bytes, and as such, with what they were made with where people's tools look for it."""

from __future__ import annotations

import io
import logging
import warnings
from typing import IO, TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.runtime.image import as_8_bit

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Pillow's name of the format, by suffix."""
MOST_PIXELS = 2**25  # above 7680 x 4320
# Of what Pillow reads: no format that starts another program, none for measurements.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
# Where EXIF has a comment of the user, and how that says its encoding.
_EXIF, _USER_COMMENT, _UTF16 = 0x8769, 0x9286, b"UNICODE\0"


_log = logging.getLogger(__name__)


def read_picture(name: str, data: bytes, most: int = MOST_PIXELS) -> Image:
    """A picture as RGB, upright as its camera says; 16 bits of grey become 8.

    name: what it is, for messages. most: pixels.

    Raises:
        UserError: not a picture that Pillow reads, more pixels, or values that are no 8 or 16 bits.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings(record=True) as doubts, Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            if picture.width * picture.height > most:
                extents = f"{picture.width} x {picture.height} pixels"
                raise UserError(f"{name}: {extents}, more than {most}; give a smaller one")
            ImageOps.exif_transpose(picture, in_place=True)
            found = as_8_bit(picture, name).convert("RGB")
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "none of " + ", ".join(_FORMATS) if unknown else one_line(error) or type(error).__name__
        raise UserError(f"{name}: not a picture that can be read ({reason})") from None
    if doubts:
        _log.warning("%s: read, but: %s", name, one_line(doubts[0].message))
    return found


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
