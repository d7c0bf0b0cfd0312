"""Byte offsets for cache tensors in one arena, by liveness. Pure Python."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Bytes. TensorRT wants every tensor at a multiple of it, CUDA allocates at such, and plans place caches so.
ALIGNMENT = 256


@dataclass(frozen=True)
class Lifetime:
    """One stored version of a cache tensor.

    Attributes:
        nbytes: its size.
        first, last: launches that write it and read it last, inclusive.
        read: False for a write that nobody reads, made only because its variant also runs at a launch where it is
            read; such a write still needs room at its own launch.
    """

    nbytes: int
    first: int
    last: int
    read: bool = True


# The first key of an order; ties go by place.
_ORDERS: tuple[Callable[[Lifetime], tuple[int, ...]], ...] = (
    lambda life: (-life.nbytes, life.first),
    lambda life: (-life.nbytes * (life.last - life.first + 1), life.first),
    lambda life: (life.first - life.last, -life.nbytes, life.first),
    lambda life: (life.first, -life.nbytes),
    lambda life: (-life.last, -life.nbytes),
)
_MOST_MOVES = 60


def aligned(nbytes: int, alignment: int) -> int:
    """``nbytes`` rounded up to a multiple of ``alignment``."""
    return -(-nbytes // alignment) * alignment


def allocate(lifetimes: Sequence[Lifetime], alignment: int) -> tuple[tuple[int, ...], int]:
    """Offset of each lifetime and the size of the arena, both in bytes.

    Greedy: one after the other at the lowest aligned offset where it meets none that is alive at a common launch. The
    order decides how much is wasted, so several are tried until nothing is: the largest first, which is enough for most
    plans, four others, and then each time the tensor at the top moved to the front. Both ends of a lifetime count, so
    a write never overlaps a read of the same launch.
    """
    # Writes that nobody reads need their room, too, at their launch.
    least = _most_alive(lifetimes, alignment)
    best: tuple[list[int], int] = [], 0
    order: list[int] = []
    for attempt, key in enumerate(_ORDERS):
        tried = sorted(range(len(lifetimes)), key=lambda i: (*key(lifetimes[i]), i))  # noqa: B023
        placed = _place(lifetimes, tried, alignment)
        if not attempt or placed[1] < best[1]:
            best, order = placed, tried
        if best[1] == least:
            return tuple(best[0]), best[1]
    tops, top = best
    for _ in range(_MOST_MOVES):
        highest = max(order, key=lambda i: tops[i] + aligned(lifetimes[i].nbytes, alignment))  # noqa: B023
        order = [highest, *(i for i in order if i != highest)]
        tops, top = _place(lifetimes, order, alignment)
        if top < best[1]:
            best = tops, top
        if top == least:
            break
    return tuple(best[0]), best[1]


def _place(lifetimes: Sequence[Lifetime], order: Sequence[int], alignment: int) -> tuple[list[int], int]:
    """Offsets when the tensors are placed in ``order``, and the size that they take."""
    launches = 1 + max((life.last for life in lifetimes), default=-1)
    # Placed tensors as (offset, end): those alive when a launch begins or written by it, and those written by it.
    alive: list[list[tuple[int, int]]] = [[] for _ in range(launches)]
    begun: list[list[tuple[int, int]]] = [[] for _ in range(launches)]
    offsets = [0] * len(lifetimes)
    peak = 0
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
    return offsets, peak


def lower_bound(lifetimes: Sequence[Lifetime], alignment: int) -> int:
    """The most aligned bytes of caches that are alive at one launch: what every allocation needs.

    Writes that nobody reads are left out, so the bound can be below what even a perfect allocation of these
    lifetimes takes, and never above it.
    """
    return _most_alive([life for life in lifetimes if life.read], alignment)


def _most_alive(lifetimes: Sequence[Lifetime], alignment: int) -> int:
    change: dict[int, int] = {}
    for life in lifetimes:
        size = aligned(life.nbytes, alignment)
        change[life.first] = change.get(life.first, 0) + size
        change[life.last + 1] = change.get(life.last + 1, 0) - size
    most = total = 0
    for launch in sorted(change):
        total += change[launch]
        most = max(most, total)
    return most
