"""Pieces that run at the same evaluations joined into as few segments as can be. Pure Python."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

# Orders of pieces followed at once. Below it the search is exact; models are nearly chains and stay far below.
_WIDTH = 64


def merge_pieces(
    colours: Sequence[Hashable], before: Sequence[Sequence[int]], apart: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    """Put pieces into segments, in an order in which all launches of an evaluation can follow each other.

    Args:
        colours: per piece what must be equal within a segment (the evaluations at which it runs).
        before: the pieces that come before each; together they must be free of cycles.
        apart: the pieces that must not share its segment.

    Returns the pieces of each segment in order; each segment needs only earlier ones.

    Breadth-first over sets of finished pieces: one more segment takes all pieces of one colour that can follow. Taking
    all is never worse than taking some, because whatever can follow the smaller set can follow the larger one; so
    a set inside another one of the same number of segments is dropped, and the number of segments is the least there
    is. Two things make it a heuristic: pairs that are kept apart, where pieces are taken first come first served, and
    more than ``_WIDTH`` sets after the same number of segments, of which the largest are followed.
    """
    needs = [_mask(places) for places in before]
    foes = [_mask(places) for places in apart]
    palette: dict[Hashable, int] = {}
    for place, colour in enumerate(colours):
        palette[colour] = palette.get(colour, 0) | 1 << place
    everything = (1 << len(colours)) - 1
    level: list[tuple[int, tuple[tuple[int, ...], ...]]] = [(0, ())]
    while level and level[0][0] != everything:
        reached: dict[int, tuple[tuple[int, ...], ...]] = {}
        for done, segments in level:
            for members in palette.values():
                taken = _take(members & ~done, done, needs, foes)
                if taken:
                    reached.setdefault(done | _mask(taken), (*segments, taken))
        level = _largest(reached)
        if not level:
            raise ValueError("the pieces form a cycle")
    return list(level[0][1])


def _take(members: int, done: int, needs: Sequence[int], foes: Sequence[int]) -> tuple[int, ...]:
    """All of ``members`` that can follow ``done`` in one segment, in an order in which each finds what it needs."""
    taken: list[int] = []
    mask = 0
    again = True
    while again:
        again = False
        rest = members & ~mask
        while rest:
            bit = rest & -rest
            rest ^= bit
            place = bit.bit_length() - 1
            if not needs[place] & ~(done | mask) and not foes[place] & mask:
                taken.append(place)
                mask |= bit
                again = True
    return tuple(taken)


def _largest(reached: dict[int, tuple[tuple[int, ...], ...]]) -> list[tuple[int, tuple[tuple[int, ...], ...]]]:
    kept: list[tuple[int, tuple[tuple[int, ...], ...]]] = []
    for done, segments in sorted(reached.items(), key=lambda item: -item[0].bit_count()):
        if len(kept) == _WIDTH:
            break
        if not any(done & ~larger == 0 for larger, _ in kept):
            kept.append((done, segments))
    return kept


def _mask(places: Sequence[int]) -> int:
    mask = 0
    for place in places:
        mask |= 1 << place
    return mask
