"""The whole blocks of a transformer by the list that they stand in, for methods that keep the first or last ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dipgo_deploy.errors import UserError

_BLOCK = re.compile(r"(?P<stack>.+)\.(?P<number>\d+)")


def stacks_of(names: Sequence[str]) -> dict[str, list[str]]:
    """List of blocks -> its blocks in order. Raises UserError for units that are no whole blocks of a transformer."""
    stacks: dict[str, list[str]] = {}
    for name in names:
        found = _BLOCK.fullmatch(name)
        if found is None or found["stack"].startswith(("down_blocks", "up_blocks")) or "." in found["stack"]:
            raise UserError(
                f"{name} of this model is no whole block of a transformer; use a transformer with --granularity block"
            )
        stacks.setdefault(found["stack"], []).append(name)
    if any(stack in ("down_blocks", "up_blocks") for stack in stacks):
        raise UserError("this method is about the blocks of a transformer; give a model that is one, not a UNet")
    return stacks


def outer(names: Sequence[str], first: int, last: int, most: str) -> frozenset[str]:
    """The ``first`` and the ``last`` blocks of each list. Raises UserError, with ``most`` in front, for more than there
    are."""
    kept: set[str] = set()
    for stack, blocks in stacks_of(names).items():
        if first + last > len(blocks):
            raise UserError(
                f"{most}: {first} and {last} blocks of the {len(blocks)} in {stack} are more than there are"
            )
        kept.update(blocks[:first], blocks[len(blocks) - last :])
    return frozenset(kept)
