"""The gates that the DiP-GO authors released: a pickle of one dictionary an evaluation.

Each dictionary maps (``down`` | ``mid`` | ``up``, kind, i, j) to a tensor [gate of the cached value, gate of the
current value] with one 1 and one 0. i counts from the outside of the UNet inwards on both sides, as DeepCache does:
("up", "block", 0, 0) is the LAST up block to run (U0 in the paper). The released files hold tensors saved from CUDA,
so plain ``pickle.load`` would need torch and a GPU, and would run whatever a file asks for. Here nothing is run:
pickles are read as data, and each tensor's storage is a file of its own in torch's legacy format.
"""

from __future__ import annotations

import struct
from io import BytesIO
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule import validation
from dipgo_deploy.schedule.importers.base import Importer, check_rows, of_rows
from dipgo_deploy.schedule.importers.pickles import Call, Global, Persistent, read_pickle
from dipgo_deploy.schedule.importers.torch_storage import FORMATS, TENSOR, vector

if TYPE_CHECKING:
    from dipgo_deploy.schedule.document import Gates

_STORAGE_BYTES = "torch.storage._load_from_bytes"
_OUTER = frozenset({TENSOR, _STORAGE_BYTES, "collections.OrderedDict"})
_STORAGE_CLASSES = frozenset(FORMATS)
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
# Of one gate's storage, and of each pickle in it; the released ones have less than a thousand and 30.
_MOST_STORAGE_BYTES = 64 * 1024
_MOST_OPCODES = 100


def read_gates(data: bytes, names: tuple[str, ...], most: int = validation.MAX_EVALUATIONS) -> Gates:
    """T x N gates from the bytes of a released pickle, T at most ``most``; ``names``: the model's N whole blocks, in
    order."""
    stream = BytesIO(data)
    document = read_pickle(stream, _OUTER)
    if stream.read(1):
        raise UserError("there are more bytes behind the pickle's end: refused")
    if not isinstance(document, list) or not document or not all(isinstance(step, dict) for step in document):
        raise UserError("not a list with one dictionary of gates an evaluation")
    check_rows(len(document), most)
    ups = sum(name.startswith("up_blocks.") for name in names)
    return tuple(_step_gates(step, units, names, ups) for step, units in enumerate(document))


def _step_gates(step: int, units: dict[Any, Any], names: tuple[str, ...], ups: int) -> tuple[bool, ...]:
    # The names first: reading a tensor takes a thousand times as long.
    try:
        blocks = {_block_name(key, ups): tensor for key, tensor in units.items()}
        # In the model's order, which is no matter in a dictionary; unknown ones behind.
        given = [name for name in names if name in blocks] + [name for name in blocks if name not in names]
        validation.check_block_names(given, names)
    except UserError as error:
        raise UserError(f"evaluation {step}: {error}") from error
    return tuple(_is_kept(step, name, blocks[name]) for name in names)


def _is_kept(step: int, name: str, tensor: Any) -> bool:
    try:
        values = vector(tensor, 2, _storage)
    except UserError as error:
        raise UserError(f"evaluation {step}, block {name}: {error}") from error
    if values not in ((0, 1), (1, 0)):
        shown = ", ".join(f"{value:g}" for value in values)
        raise UserError(f"evaluation {step}, block {name}: [{shown}] is neither [0, 1] (kept) nor [1, 0] (removed)")
    return values == (0, 1)


def _block_name(key: Any, ups: int) -> str:
    match key:
        case ("down", "block", int(i), 0):
            return f"down_blocks.{i}"
        case ("mid", "mid_block", 0, 0):
            return "mid_block"
        case ("up", "block", int(i), 0):
            return f"up_blocks.{ups - 1 - i}"
    raise UserError(f"{repr(key)[:80]} is no whole block: only schedules of whole blocks can be imported")


def _storage(place: Any) -> tuple[str, bytes]:
    """Class and bytes of one storage in torch's legacy file format: five pickles, an element count, raw bytes."""
    match place:
        case Call(name=name, arguments=(bytes(payload),)) if name == _STORAGE_BYTES:
            pass
        case _:
            raise UserError("the gate's tensor has no storage")
    if len(payload) > _MOST_STORAGE_BYTES:
        raise UserError(f"the tensor's storage has {len(payload):,} bytes, which no gate needs")
    stream = BytesIO(payload)
    names = (frozenset[str](),) * 3 + (_STORAGE_CLASSES, frozenset[str]())
    magic, protocol, system, root, keys = (read_pickle(stream, allowed, most=_MOST_OPCODES) for allowed in names)
    if magic != _MAGIC or protocol != _PROTOCOL or not isinstance(system, dict):
        raise UserError("the tensor's storage is not in torch's legacy format")
    if system.get("little_endian") is not True:
        raise UserError("the tensor's storage is big-endian, which is not supported")
    raw = stream.read()
    match root:
        case Persistent(identity=("storage", Global(name=kind), str(key), str(), int(count), None)) if keys == [key]:
            if len(raw) == 8 + count * struct.calcsize(FORMATS[kind]) and raw[:8] == struct.pack("<q", count):
                return kind, raw[8:]
    raise UserError("the tensor's storage is cut off or malformed")


IMPORTER = Importer(
    kind="dipgo-gates",
    title="Read gates that DiP-GO's authors released.",
    file="their pickle, which is read as data: nothing in it is executed",
    read=of_rows(read_gates),
    example="gates.pkl --model fashion-sd --steps 50 -o gates.json",
)
