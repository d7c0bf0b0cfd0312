"""How much guidance an evaluation has: as a share of the run's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from dipgo_deploy.errors import UserError

_SPAN = re.compile(r"(?P<first>\d{1,6})(?:-(?P<last>\d{1,6}))?(?:=(?P<share>[0-9.eE+-]{1,40}))?")

Half = Literal["unconditional", "conditional"]
"""Of the batch of guidance, where its halves are launched one after the other."""

HALVES: tuple[Half, Half] = ("unconditional", "conditional")
"""In the order of the rows, and of the launches."""

UNCONDITIONAL, CONDITIONAL = "/unconditional", "/conditional"
"""Behind the name of a value or block as one half has it; a conditional-only evaluation has the latter."""


def share_of_scale(scale: float, share: float, off: float) -> float:
    """The guidance scale of an evaluation that has this share of the guidance of a run of ``scale``; off: the scale
    that does nothing."""
    return scale if share == 1 else off + share * (scale - off)


def shares_of(before: Sequence[float], conditional: Sequence[str], shares: Sequence[str]) -> tuple[float, ...]:
    """The guidance of evaluations with changes, as options name them.

    Args:
        before: of each evaluation.
        conditional: ``30-49`` or ``30``: evaluations that become conditional only.
        shares: ``10-19=0.5``: evaluations with how much of the guidance they get.

    Raises:
        UserError: not written so, an evaluation that there is not, or one that is named twice.
    """
    found, named = list(before), set[int]()
    for option, texts in (("--conditional", conditional), ("--share", shares)):
        for text in texts:
            first, last, share = _span(option, text)
            if last >= len(found):
                raise UserError(f"{option} {text}: there are the evaluations 0 to {len(found) - 1}")
            steps = range(first, last + 1)
            twice = sorted(named & {*steps})
            if twice:
                raise UserError(f"{option} {text}: evaluation {twice[0]} is named twice")
            named.update(steps)
            for step in steps:
                found[step] = share
    return tuple(found)


def _span(option: str, text: str) -> tuple[int, int, float]:
    """First and last evaluation, and the share."""
    match = _SPAN.fullmatch(text)
    example = "30-49" if option == "--conditional" else "10-19=0.5"
    if match is None or (match["share"] is None) != (option == "--conditional"):
        raise UserError(f"{option} {text[:60]}: give evaluations, as in {example}")
    first = int(match["first"])
    last = first if match["last"] is None else int(match["last"])
    if last < first:
        raise UserError(f"{option} {text}: ends before it begins; give {last}-{first}")
    try:
        share = 0.0 if match["share"] is None else float(match["share"])
    except ValueError:
        raise UserError(f"{option} {text}: {match['share']} is no number; give one, as in {example}") from None
    return first, last, share
