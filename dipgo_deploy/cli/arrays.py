"""Arrays and pictures from files that a command is given: sizes are checked before anything of that size is made."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.files import read_bytes

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from dipgo_deploy.runtime.requests import Embeds

# Of one file, as it is and unpacked: embeddings of a prompt are 0.3 MB (SD 1.5) to 8 MB (FLUX).
MOST_BYTES = 384 * 2**20
_MOST_ARRAYS = 64
_MOST_AXES = 8
_NPY_VERSIONS = ((1, 0), (2, 0))
# Of a zip archive: end record, locator of the one for archives beyond 4 GiB, header in front of each entry.
_ZIP_END, _ZIP64_LOCATOR, _ZIP_COMMENT = b"PK\x05\x06", b"PK\x06\x07", 2**16
_ZIP_END_BYTES, _ZIP64_LOCATOR_BYTES, _ZIP_ENTRY_BYTES = 22, 20, 30
_MOST_LISTED = 2**16  # bytes of the list of entries


def load_array(option: str, path: Path | None) -> np.ndarray | None:
    """Read a .npy file; pickled objects are refused.

    Raises:
        UserError: no such file, not an array of plain numbers, or more than 384 MiB.
    """
    if path is None:
        return None
    data = _content(option, path)
    if data[:4] == b"PK\x03\x04":
        raise UserError(f"{option} {path}: holds several arrays; save one with numpy.save")
    try:
        return _npy(data)
    except ValueError as error:
        raise UserError(f"{option} {path}: not a .npy file of numbers ({one_line(error)})") from None


def load_embeds(option: str, texts: tuple[str, ...]) -> Embeds | None:
    """Embeddings: one .npy file; ``NAME=FILE.npy`` for each condition; or one .npz or .safetensors file with the
    conditions by name. None where nothing is given.

    Raises:
        UserError: a file that cannot be read, a name given twice, or several files without names.
    """
    if not texts:
        return None
    pairs = [_name_and_file(text) for text in texts]
    if len(pairs) == 1 and pairs[0][0] is None:
        path = pairs[0][1]
        return _load_named(option, path) if path.suffix.lower() in _NAMED else load_array(option, path)
    embeds: dict[str, np.ndarray] = {}
    for name, path in pairs:
        if name is None:
            raise UserError(f"{option} {path}: one of several; give each with its condition's name, NAME={path}")
        if name in embeds:
            raise UserError(f"{option} {name}={path}: {name} is given twice; give it once")
        array = load_array(f"{option} {name}:", path)
        assert array is not None  # only without a path
        embeds[name] = array
    return embeds


def load_picture(option: str, path: Path) -> Image:
    """Read a picture file as ``read_picture`` does. Raises UserError as it does, or where there is no such file."""
    from dipgo_deploy.runtime.picture_file import read_picture

    return read_picture(f"{option} {path}", _content(option, path))


def _name_and_file(text: str) -> tuple[str | None, Path]:
    name, sign, file = text.partition("=")
    # A file whose own name has the sign in it is that file.
    return (name, Path(file)) if sign and name.isidentifier() and not Path(text).is_file() else (None, Path(text))


def _load_named(option: str, path: Path) -> dict[str, np.ndarray]:
    suffix = path.suffix.lower()
    try:
        return _NAMED[suffix](option, path)
    except ValueError as error:
        raise UserError(f"{option} {path}: not a {suffix} file of arrays ({one_line(error)})") from None


def _content(option: str, path: Path) -> bytes:
    try:
        return read_bytes(path, MOST_BYTES, "file of arrays or picture")
    except UserError as error:
        raise UserError(f"{option} {error}") from None


def _safetensors(option: str, path: Path) -> dict[str, np.ndarray]:
    from dipgo_deploy.bundle.safetensors_file import TensorFile

    _content_size(option, path)
    try:
        tensors = TensorFile(path).tensors
        widened = 4 * sum(tensor.items for tensor in tensors.values())  # bfloat16 and float8 become float32
        if widened > MOST_BYTES:
            raise ValueError(f"{widened} bytes of values, more than {MOST_BYTES}")
        return {name: tensor.read() for name, tensor in tensors.items()}
    except OverflowError as error:  # an extent beyond 64 bits, beside one of 0
        raise ValueError(error) from None
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read: {error.strerror or error}") from None


def _content_size(option: str, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{option} {path}: larger than {MOST_BYTES // 2**20} MiB; give the embeddings of fewer prompts")


def _npz(option: str, path: Path) -> dict[str, np.ndarray]:
    data = _content(option, path)
    _check_listing(data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            _check_entries(entries, len(data))
            return {entry.filename.removesuffix(".npy"): _npy(archive.read(entry)) for entry in entries}
    except ValueError:
        raise
    except Exception as error:  # zipfile and zlib raise whatever a broken archive leads them to
        raise ValueError(one_line(error) or type(error).__name__) from None


_NAMED = {".npz": _npz, ".safetensors": _safetensors}


def _check_listing(data: bytes) -> None:
    """Refuse an archive whose list of entries is so long that reading it alone would take much memory."""
    end = data.rfind(_ZIP_END, -_ZIP_END_BYTES - _ZIP_COMMENT)
    if end < 0 or len(data) < end + _ZIP_END_BYTES:
        raise ValueError("no zip archive, or cut short")
    if data[end - _ZIP64_LOCATOR_BYTES : end].startswith(_ZIP64_LOCATOR):
        raise ValueError("a zip archive for more than 4 GiB")
    (listed,) = struct.unpack_from("<I", data, end + 12)
    if listed > _MOST_LISTED:
        raise ValueError(f"{listed} bytes of names, more than {_MOST_LISTED}")


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse too many entries, too large ones, and ones that share their bytes, before any is unpacked."""
    if len(entries) > _MOST_ARRAYS:
        raise ValueError(f"{len(entries)} arrays, more than {_MOST_ARRAYS}")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("two arrays of one name")
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MOST_BYTES:
        raise ValueError(f"{unpacked} bytes when unpacked, more than {MOST_BYTES}")
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise ValueError(f"{entry.filename} overlaps another entry")
        end = (
            entry.header_offset
            + _ZIP_ENTRY_BYTES
            + len(entry.filename.encode("utf-8", "replace"))
            + entry.compress_size
        )
    if end > size:
        raise ValueError("cut short")


def _npy(data: bytes) -> np.ndarray:
    """The array of a .npy file; ValueError for anything else, before memory is taken for what its header claims."""
    import numpy as np
    from numpy.lib import format as npy

    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        if version not in _NPY_VERSIONS:
            raise ValueError(f"format version {version}")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, by_columns, dtype = read(file)
    except Exception as error:  # numpy parses the header as Python, which fails in many ways
        raise ValueError(one_line(error) or type(error).__name__) from None
    if dtype.kind not in "biuf":
        raise ValueError(f"values of type {one_line(dtype, 40)}, needs numbers")
    if len(shape) > _MOST_AXES or any(isinstance(extent, bool) or extent < 0 for extent in shape):
        raise ValueError(f"shape {one_line(shape, 80)}")
    claimed, there = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if claimed != there:
        raise ValueError(f"its header claims {one_line(claimed, 40)} bytes of values, {there} are there")
    array = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if by_columns else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)
