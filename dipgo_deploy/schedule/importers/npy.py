"""Masks that NumPy saved (``.npy``): T x N booleans, or 0 and 1 of any number type; T alone for whole evaluations."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.schedule import validation
from dipgo_deploy.schedule.importers.base import Importer, of_rows

if TYPE_CHECKING:
    from dipgo_deploy.schedule.document import Gates


def read_gates(data: bytes, names: tuple[str, ...], most: int = validation.MAX_EVALUATIONS) -> Gates:
    """T x N gates from the bytes of a file, T at most ``most``. Arrays of objects, which are pickles, are refused."""
    import numpy as np

    from dipgo_deploy.schedule.document import mask_gates

    try:
        stream = BytesIO(data)
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream, max_header_size=1000)
    except Exception as error:  # whatever a damaged header makes numpy raise
        raise UserError(f"not a file of numpy.save ({one_line(error, 80)})") from error
    if dtype.kind not in "biuf":
        raise UserError(f"an array of {dtype}, not of numbers")
    if len(shape) not in (1, 2) or not 0 < shape[0] <= most or shape[1:] not in ((), (len(names),)):
        raise UserError(
            f"an array of shape {shape}; give (evaluations, {len(names)}), one column a block, or (evaluations,)"
        )
    if len(data) - stream.tell() != dtype.itemsize * int(np.prod(shape)):
        raise UserError("the file is cut off, or has more than one array")
    stream.seek(0)
    return mask_gates(np.load(stream, allow_pickle=False), len(names))


IMPORTER = Importer(
    kind="npy",
    title="Read a mask that NumPy saved.",
    file="an array of 0 and 1 with a row for each evaluation and a column for each block (a .npy file)",
    read=of_rows(read_gates),
    example="mask.npy --model fashion-dit --steps 50 -o mask.json",
)
