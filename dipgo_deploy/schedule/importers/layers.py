"""Units of granularity ``layer`` by kind and number, as methods that cache the layers of a transformer name them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dipgo_deploy.errors import UserError

_UNIT = re.compile(r"(?P<stack>.+)\.(?P<number>\d+)\.(?P<part>[^.]+)")

# What the original DiT code calls a part of a block -> what diffusers' transformers call it.
_DIFFUSERS_NAMES: Mapping[str, tuple[str, ...]] = {"attn": ("attn", "attn1"), "mlp": ("mlp", "ff")}


def units_of_kind(kind: str, names: Sequence[str]) -> dict[str, dict[int, str]]:
    """The units among the blocks ``names`` that are layers of one kind: stack of blocks -> block's number -> unit.

    kind: ``attn``, ``mlp`` or the name of a block's submodule (``attn1``, ``ff``, ``ff_context``). Raises UserError
    when there is none of that kind, or the model's units are no layers of transformer blocks.
    """
    parts: dict[str, dict[str, dict[int, str]]] = {}
    for name in names:
        match = _UNIT.fullmatch(name)
        if match is not None:
            parts.setdefault(match["part"], {}).setdefault(match["stack"], {})[int(match["number"])] = name
    if not parts:
        raise UserError(
            f"{names[0]} of this model is no layer inside a transformer block; "
            "use a transformer with --granularity layer"
        )
    for part in _DIFFUSERS_NAMES.get(kind, (kind,)):
        if part in parts:
            return parts[part]
    raise UserError(f"this model has no layers of kind {kind[:60]!r}, only {', '.join(parts)}")


def numbered_units(kind: str, names: Sequence[str]) -> dict[int, str]:
    """The units of one kind by their block's number. Raises UserError also when two stacks of blocks have that kind."""
    stacks = units_of_kind(kind, names)
    if len(stacks) > 1:
        raise UserError(
            f"{kind}-0 can be in {' or '.join(stacks)}: for this model only schedules by kind can be imported"
        )
    return next(iter(stacks.values()))
