"""The unconditional half of an evaluation as one more gate of its row, the last. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence

from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.schedule.validation import missing_halves


def joined(gates: Sequence[Sequence[bool]], guidance: Sequence[float]) -> Gates:
    """Gates of blocks (T x N) and the guidance of each evaluation, 0 or another share, as T x (N + 1) gates.

    Where no block is kept the half is not either, so that equal evaluations are equal rows.
    """
    return tuple((*row, any(row) and share != 0) for row, share in zip(gates, guidance, strict=True))


def parted(gates: Sequence[Sequence[bool]]) -> tuple[Gates, tuple[float, ...]]:
    """What T x (N + 1) gates do: the gates of blocks (T x N), and the guidance of each evaluation, 1 or 0.

    The first evaluation is whole. One that keeps no block goes on with the guidance of the one before, whose prediction
    it may repeat. Blocks are kept where a guided evaluation would read a cache without an unconditional half.
    """
    count = len(gates[0]) - 1
    rows = [[True] * count, *([bool(kept) for kept in row[:count]] for row in gates[1:])]
    guidance = [1.0]
    for row, half in zip(rows[1:], gates[1:], strict=True):
        guidance.append(float(half[count]) if any(row) else guidance[-1])
    runs = [[True] * count] * len(rows)
    for step, block, _ in missing_halves(rows, runs, [share == 0 for share in guidance]):
        rows[step][block] = True
    return tuple(map(tuple, rows)), tuple(guidance)
