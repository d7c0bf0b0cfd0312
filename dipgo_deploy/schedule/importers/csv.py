"""Keep matrices as CSV: T rows of N cells, each 0 or 1, optionally under a row with the blocks' names."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule import validation
from dipgo_deploy.schedule.importers.base import Importer, check_rows, of_rows

if TYPE_CHECKING:
    from dipgo_deploy.schedule.document import Gates


def read_gates(data: bytes, names: tuple[str, ...], most: int = validation.MAX_EVALUATIONS) -> Gates:
    """T x N gates from CSV text, T at most ``most``. A first row that is no row of 0 and 1 has to be the block names in
    order."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start} is not UTF-8 text: not a CSV file") from error
    # One line at a time, and of each no more cells than there are blocks and one with what is behind them.
    header = False
    rows: list[tuple[str, ...]] = []
    for line in StringIO(text, newline=None):
        if not line.strip():
            continue
        row = tuple(cell.strip() for cell in line.split(",", len(names)))
        if not (rows or header) and any(cell in names for cell in row):
            header = True
            validation.check_block_names([cell[:200] for cell in row], names)
        else:
            rows.append(row)
            check_rows(len(rows), most)
    if not rows:
        raise UserError("no rows; give one row of 0 and 1 for each evaluation")
    return tuple(_gates(step, row, names) for step, row in enumerate(rows))


def _gates(step: int, row: tuple[str, ...], names: tuple[str, ...]) -> tuple[bool, ...]:
    for cell, name in zip(row, names, strict=False):
        if cell not in ("0", "1"):
            raise UserError(f"evaluation {step}, block {name}: {cell[:60]!r} is not 0 or 1")
    if len(row) < len(names):
        raise UserError(f"evaluation {step} has {len(row)} cells, block {names[len(row)]} is the first without one")
    if len(row) > len(names):
        cells = len(row) + row[-1].count(",")
        raise UserError(f"evaluation {step} has {cells} cells, but the model has {len(names)} blocks")
    return tuple(cell == "1" for cell in row)


IMPORTER = Importer(
    kind="csv",
    title="Read a table of gates.",
    file="a row of 0 and 1 for each evaluation, with one cell for each block; a first row may name the blocks",
    read=of_rows(read_gates),
    example="keep.csv --model fashion-dit --steps 50 -o keep.json",
)
