"""The schedules of ECAD (arXiv 2506.15682): JSON, step -> block -> component -> whether it is computed.

The layout is the authors' ``CacheSchedule.to_dict``: ``cache_schedule`` has ``num_blocks``, ``num_inference_steps``,
``schedule`` ({"000": {"0": {"attn1": true, ...}}}) and, for FLUX, ``num_single_blocks``. Components of PixArt are
``attn1``, ``attn2`` and ``ff``; of FLUX's double blocks ``full_attn``, ``full_ff`` and ``full_ff_context``; of its
single blocks (keys ``single_0`` ...) ``single_attn``, ``single_proj_mlp`` and ``single_proj_out``. False means that
the component's last output is used; where there is none yet, which is so at the first step, it is computed all the
same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dipgo_deploy.documents import json_object
from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule import validation
from dipgo_deploy.schedule.importers.base import Imported, Importer, Source, check_rows, kept_until_stored

if TYPE_CHECKING:
    from dipgo_deploy.schedule.document import Gates

_DOUBLE, _SINGLE = "transformer_blocks", "single_transformer_blocks"
_CUSTOM = ("custom_compute_attn", "custom_compute_ff")


def read_gates(data: bytes, names: tuple[str, ...], most: int = validation.MAX_EVALUATIONS) -> tuple[Gates, int]:
    """T x N gates from JSON text, T at most ``most``, and how many cells of the first step were False."""
    document = json_object(data).get("cache_schedule")
    table = document.get("schedule") if isinstance(document, dict) else None
    if not isinstance(table, dict) or not table:
        raise UserError("has no cache_schedule with a schedule: not a file of ECAD")
    check_rows(len(table), most)
    rows = {_number("step", key): row for key, row in table.items()}
    missing = next((step for step in range(len(rows)) if step not in rows), None)
    if missing is not None or len(rows) != len(table):
        raise UserError(f"schedule: step {missing if missing is not None else len(rows)} is missing or stands twice")
    gates = tuple(_row(step, rows[step], names) for step in range(len(rows)))
    return kept_until_stored(gates)


def _row(step: int, blocks: Any, names: tuple[str, ...]) -> tuple[bool, ...]:
    if not isinstance(blocks, dict) or len(blocks) > len(names):
        raise UserError(f"step {step}: not an object with one entry a block of this model")
    cells: dict[str, bool] = {}
    for block, components in blocks.items():
        stack = _SINGLE if block.startswith("single_") else _DOUBLE
        number = _number(f"step {step}, block", block.removeprefix("single_"))
        if not isinstance(components, Mapping):
            raise UserError(f"step {step}, block {block[:40]}: not an object with true or false a component")
        for component, kept in components.items():
            if component in _CUSTOM:
                if kept:
                    raise UserError(
                        f"step {step}, block {block}: {component} is code of theirs, which is no gate; for "
                        "T-GATE import its own settings"
                    )
                continue
            cells[_unit(stack, number, component)] = _cell(kept, step, block, component)
    # In the model's order, which is no matter in an object; unknown ones behind.
    given = [name for name in names if name in cells] + [name for name in cells if name not in names]
    try:
        validation.check_block_names(given, names)
    except UserError as error:
        raise UserError(f"step {step}: {error}") from error
    return tuple(cells[name] for name in names)


def _unit(stack: str, number: int, component: str) -> str:
    prefix = "single_" if stack == _SINGLE else "full_"
    return f"{stack}.{number}.{component.removeprefix(prefix)}"


def _cell(kept: Any, step: int, block: str, component: str) -> bool:
    if not isinstance(kept, bool):
        raise UserError(f"step {step}, block {block}, {component[:40]}: {repr(kept)[:40]} is not true or false")
    return kept


def _number(what: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise UserError(f"{what} {text[:40]!r}: is no number")
    return int(text)


def _read(data: bytes, source: Source) -> Imported:
    gates, first = read_gates(data, source.names, source.most)
    notes = (f"{first} components are false before anything is stored: they are computed",) if first else ()
    return Imported(gates, notes=notes)


IMPORTER = Importer(
    kind="ecad",
    title="Read a schedule that ECAD's authors released, for PixArt or FLUX.1.",
    file="their JSON: for each step and block what is computed",
    read=_read,
    example="ours_fast.json --model ./flux --steps 20 -o ecad.json",
    granularity="layer",
)
