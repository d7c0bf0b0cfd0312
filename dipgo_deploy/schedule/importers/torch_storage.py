"""Numbers inside files that torch saved, read from their bytes: no torch, and nothing in a file is executed."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.importers.pickles import Call, Global, Persistent, read_pickle

TENSOR = "torch._utils._rebuild_tensor_v2"

FORMATS: Mapping[str, str] = {
    "torch.FloatStorage": "f",
    "torch.DoubleStorage": "d",
    "torch.HalfStorage": "e",
    "torch.LongStorage": "q",
    "torch.IntStorage": "i",
    "torch.ShortStorage": "h",
    "torch.CharStorage": "b",
    "torch.ByteStorage": "B",
    "torch.BoolStorage": "?",
}
"""Storage class -> ``struct`` format of one element."""


def vector(value: Any, length: int, storage_of: Callable[[Any], tuple[str, bytes]]) -> tuple[float, ...]:
    """The elements of a one-dimensional tensor in a pickle's data.

    storage_of: what the tensor has as its storage -> the storage's class and bytes. Raises UserError for anything but a
    tensor of ``length`` elements within its storage.
    """
    match value:
        case Call(name=name, arguments=(place, int(offset), (int(size),), (int(stride),), bool(), _)) if name == TENSOR:
            pass
        case _:
            raise UserError("not a tensor of one dimension")
    if size != length:
        raise UserError(f"a tensor of {size} elements, not of {length}")
    kind, storage = storage_of(place)
    element = struct.Struct(f"<{FORMATS[kind]}")
    places = [(offset + index * stride) * element.size for index in range(size)]
    if any(not 0 <= place <= len(storage) - element.size for place in places):
        raise UserError(f"the tensor reaches beyond its storage of {len(storage)} bytes")
    return tuple(element.unpack_from(storage, place)[0] for place in places)


_CENTRAL_ENTRY = b"PK\x01\x02"
_MOST_ENTRIES = 20_000


@dataclass(frozen=True)
class TorchArchive:
    """A file of ``torch.save`` (the zip format of torch 1.6 and later).

    document: what was saved, with tensors as `Call` of ``TENSOR`` and other objects as `Call` of their class.
    """

    document: Any
    _zip: zipfile.ZipFile
    _root: str
    _size: int
    _storages: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, data: bytes, allowed: frozenset[str]) -> TorchArchive:
        """Decode the bytes of a file. ``allowed``: dotted names that its pickle may refer to, besides tensors.

        Raises UserError for a file that is no such zip, is compressed, big-endian, or refers to any other name.
        """
        if (entries := data.count(_CENTRAL_ENTRY)) > _MOST_ENTRIES:
            raise UserError(f"not a file of torch.save: {entries:,} entries, more than any schedule needs")
        try:
            archive = zipfile.ZipFile(BytesIO(data))
        except Exception as error:  # what zipfile raises for a damaged directory is anybody's guess
            raise UserError("not a file of torch.save: it is no complete zip archive") from error
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"not a file of torch.save: it has {len(pickles)} data.pkl, not one")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and _entry(archive, f"{root}byteorder") != b"little":
            raise UserError("its tensors are big-endian, which is not supported")
        names = allowed | {TENSOR, "collections.OrderedDict"} | FORMATS.keys()
        document = read_pickle(BytesIO(_entry(archive, pickles[0])), frozenset(names), objects=True)
        return cls(document, archive, root, len(data))

    def vector(self, value: Any, length: int) -> tuple[float, ...]:
        """The elements of a one-dimensional tensor of the document. Raises UserError for anything else."""
        return vector(value, length, self._storage)

    def _storage(self, place: Any) -> tuple[str, bytes]:
        match place:
            case Persistent(identity=("storage", Global(name=kind), str(key), str(), int())) if kind in FORMATS:
                pass
            case _:
                raise UserError("the tensor has no storage")
        if key not in self._storages:
            self._storages[key] = _entry(self._zip, f"{self._root}data/{key}")
            # Entries lie one behind the other in the file, so that all of them are no larger than it.
            if sum(map(len, self._storages.values())) > self._size:
                raise UserError("its entries overlap, which torch.save does not do: refused")
        return kind, self._storages[key]


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of one entry. torch does not compress them, so none can be larger than the file."""
    try:
        entry = archive.getinfo(name)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{name[:80]} is compressed, which torch.save does not do: refused")
        return archive.read(entry)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{name[:80]} in it is missing or damaged") from error
