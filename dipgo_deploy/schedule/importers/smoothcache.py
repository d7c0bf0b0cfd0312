"""The schedules that the SmoothCache authors released (arXiv 2411.10510): JSON, a list of 0 and 1 for each layer kind.

A key is a kind of layer, for all blocks of the transformer (``attn``, ``mlp``; ``attn1`` with diffusers' names), or
one layer of it (``attn-0`` ... ``mlp-27``). Entry t is about evaluation t, the first evaluation first: 1 = the layer
is computed and its output stored, 0 = its stored output is used. A kind without a key is computed at every
evaluation, as SmoothCache's helper leaves it alone. Schedules of FORA (2407.01425) and Learning-to-Cache (2406.01733)
were released in this format too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dipgo_deploy.documents import json_object
from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule import validation
from dipgo_deploy.schedule.importers.base import Importer, check_only_gates, check_rows, of_rows
from dipgo_deploy.schedule.importers.layers import numbered_units, units_of_kind

if TYPE_CHECKING:
    from dipgo_deploy.schedule.document import Gates, Schedule

_LAYER = re.compile(r"(?P<kind>.+)-(?P<number>\d{1,6})", re.ASCII)


def read_gates(data: bytes, names: tuple[str, ...], most: int = validation.MAX_EVALUATIONS) -> Gates:
    """T x N gates from JSON text, T at most ``most``; ``names``: the model's N units, in order."""
    rows = _rows_of_units(_document(data), names)
    lengths = {name: len(row) for name, row in rows.items()}
    if len(set(lengths.values())) > 1:
        (first, length), *others = lengths.items()
        other = next(name for name, count in others if count != length)
        raise UserError(f"{first} has {length} entries, but {other} has {lengths[other]}: they must be as many")
    steps = next(iter(lengths.values()))
    check_rows(steps, most)
    kept_always = (True,) * steps
    return tuple(zip(*(rows.get(name, kept_always) for name in names), strict=True))


def _document(data: bytes) -> Mapping[str, Any]:
    document = json_object(data)
    if not document:
        raise UserError("has no list of 0 and 1 for any kind of layer")
    return document


def _rows_of_units(document: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, tuple[bool, ...]]:
    if len(document) > 2 * len(names):
        raise UserError(f"{len(document):,} lists for the {len(names)} layers of this model")
    rows: dict[str, tuple[bool, ...]] = {}
    by_layer: dict[str, None] = {}
    for key, entries in document.items():
        row = _row(key, entries)
        layer = _LAYER.fullmatch(key)
        if layer is None:
            units = tuple(unit for stack in units_of_kind(key, names).values() for unit in stack.values())
        else:
            layers = numbered_units(layer["kind"], names)
            number = int(layer["number"])
            if number not in layers:
                raise UserError(f"{key}: no such layer in this model, whose blocks count to {max(layers)}")
            units = (layers[number],)
            by_layer[layer["kind"]] = None
        for unit in units:
            if unit in rows:
                raise UserError(f"{key[:60]!r}: {unit} has a list already")
            rows[unit] = row
    for kind in by_layer:
        for number, unit in numbered_units(kind, names).items():
            if unit not in rows:
                raise UserError(f"{kind}-{number} is missing; give all layers of a kind, or none")
    return rows


def _row(key: str, entries: Any) -> tuple[bool, ...]:
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{key[:60]!r}: not a list of 0 and 1")
    for step, entry in enumerate(entries):
        if type(entry) is not int or entry not in (0, 1):
            raise UserError(f"{key[:60]!r}: evaluation {step} is {repr(entry)[:60]}, not 0 or 1")
    return tuple(entry == 1 for entry in entries)


def file_of(schedule: Schedule) -> str:
    """The JSON that says what a schedule does, one list a layer. Raises UserError where it does not say all."""
    check_only_gates(schedule, "output")
    names = schedule.block_names
    rows = dict(zip(names, zip(*schedule.gates, strict=True), strict=True))
    given: dict[str, list[int]] = {}
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in names):
        for number, name in numbered_units(kind, names).items():
            given[f"{kind}-{number}"] = [int(kept) for kept in rows[name]]
    return json.dumps(given, indent=1) + "\n"


IMPORTER = Importer(
    kind="smoothcache",
    title="Read a schedule that SmoothCache's authors released: theirs, FORA's or Learning-to-Cache's.",
    file="JSON with 0 and 1 for each kind of layer (attn, mlp) or each layer (attn-0)",
    read=of_rows(read_gates),
    example="50-N-2-fora.json --model fashion-dit --sampler ddim --steps 50 -o fora.json",
    granularity="layer",
    write=file_of,
)
