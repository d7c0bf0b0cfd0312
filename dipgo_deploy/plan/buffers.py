"""Byte offsets for cache tensors in one arena, by liveness. Pure Python."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lifetime:
    """One stored version of a cache tensor.

    nbytes: its size. first, last: launches that write it and read it last, inclusive. read: False for a write that
    nobody reads, made only because its variant also runs at a launch where it is read; such a write still needs
    room at its own launch.
    """

    nbytes: int
    first: int
    last: int
    read: bool = True


def aligned(nbytes: int, alignment: int) -> int:
    """``nbytes`` rounded up to a multiple of ``alignment``."""
    return -(-nbytes // alignment) * alignment


def allocate(lifetimes: Sequence[Lifetime], alignment: int) -> tuple[tuple[int, ...], int]:
    """Offset of each lifetime and the size of the arena, both in bytes.

    Greedy by size: the largest first, each at the lowest aligned offset where it meets no other that is alive at a
    common launch. Both ends of a lifetime count, so a write never overlaps a read of the same launch.
    """
    launches = 1 + max((life.last for life in lifetimes), default=-1)
    # Placed tensors as (offset, end): those alive when a launch begins or written by it, and those written by it.
    alive: list[list[tuple[int, int]]] = [[] for _ in range(launches)]
    begun: list[list[tuple[int, int]]] = [[] for _ in range(launches)]
    offsets = [0] * len(lifetimes)
    peak = 0
    order = sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].nbytes, lifetimes[i].first, i))
    for i in order:
        life = lifetimes[i]
        size = aligned(life.nbytes, alignment)
        taken = alive[life.first]
        later = [span for launch in range(life.first + 1, life.last + 1) for span in begun[launch]]
        offset = 0
        for start, end in sorted(taken + later) if later else taken:
            if offset + size <= start:
                break
            offset = max(offset, end)
        offsets[i] = offset
        peak = max(peak, offset + size)
        span = (offset, offset + size)
        begun[life.first].append(span)
        for launch in range(life.first, life.last + 1):
            insort(alive[launch], span)
    return tuple(offsets), peak


def lower_bound(lifetimes: Sequence[Lifetime], alignment: int) -> int:
    """The most aligned bytes of caches that are alive at one launch: what every allocation needs.

    Writes that nobody reads are left out, so the bound can be below what even a perfect allocation of these
    lifetimes takes, and never above it.
    """
    change: dict[int, int] = {}
    for life in lifetimes:
        if life.read:
            size = aligned(life.nbytes, alignment)
            change[life.first] = change.get(life.first, 0) + size
            change[life.last + 1] = change.get(life.last + 1, 0) - size
    most = total = 0
    for launch in sorted(change):
        total += change[launch]
        most = max(most, total)
    return most
