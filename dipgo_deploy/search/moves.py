"""Small changes of T x N gates at (almost) equal cost, for searches on the true objective."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.costs import Costs

T = TypeVar("T")
Rows = list[tuple[bool, ...]]

# How far an evaluation's row is moved at most, and how often a move or a repair is tried before it is given up.
_REACH = 4
# How far launches are moved when places are searched, in turn.
_SHIFTS = (1, 2, 3)
_TRIES = 50


@dataclass(frozen=True)
class Band:
    """Ratios (shares of the cost saved) that a search may use: from ``low``, which is the most it may cost."""

    low: float
    high: float

    def holds(self, ratio: float) -> bool:
        """Whether a ratio lies in the band."""
        return self.low - 1e-9 <= ratio <= self.high + 1e-9


def propose(gates: Gates, costs: Costs, band: Band, rng: random.Random) -> Gates | None:
    """Another set of gates in the band, one move away; None when none was found.

    The moves: two evaluations change places; two evaluations take rows that make sense of themselves
    (`Costs.patterns`); a kept and a removed gate change places. Where halves of guidance are gates, two of them are
    traded for a launch. A move that leaves the band is brought back by `repair`.
    """
    before, moves = costs.clean(gates), _MOVES + _GUIDANCE_MOVES * costs.guidance_gates
    for _ in range(_TRIES):
        move = moves[int(rng.random() * len(moves))]
        rows = move(list(before), costs, rng)
        after = repair(tuple(rows), costs, band, rng)
        if after is not None and after != before:
            return after
    return None


def moved_places(gates: Gates, rng: random.Random) -> Iterator[Gates]:
    """``gates`` with launches at other evaluations, at equal cost for launches of all blocks or none.

    Rows with something kept go an evaluation earlier or later, one by one and neighbours together, in random order;
    then two evaluations, then three. A row that meets another one changes places with it.
    """
    busy = [step for step in range(1, len(gates)) if any(gates[step])]
    for by in _SHIFTS:
        moves = [(place, place, sign * by) for place in range(len(busy)) for sign in (-1, 1)]
        # As many groups of neighbours: they close a gap without opening another beside it.
        groups = [(_pick(range(len(busy)), rng), _pick(range(len(busy)), rng)) for _ in moves]
        moves += [
            (min(a, b), max(a, b), by if rng.random() < 0.5 else -by)
            for a, b in groups
            if a is not None and b is not None and a != b
        ]
        moves.sort(key=lambda move: rng.random())
        for first, last, distance in moves:
            moved = _shifted(gates, busy[first : last + 1], distance)
            if moved is not None and moved != gates:
                yield moved


def _shifted(gates: Gates, steps: Sequence[int], by: int) -> Gates | None:
    """The rows of these evaluations ``by`` evaluations later; what stood there takes the places that became free, in
    order."""
    targets = [step + by for step in steps]
    if min(targets) < 1 or max(targets) >= len(gates):
        return None
    rows = list(gates)
    displaced = [gates[target] for target in targets if target not in steps]
    freed = [step for step in steps if step not in targets]
    for step, row in zip(freed, displaced, strict=True):
        rows[step] = row
    for step, target in zip(steps, targets, strict=True):
        rows[target] = gates[step]
    return tuple(rows)


def repair(gates: Sequence[Sequence[bool]], costs: Costs, band: Band, rng: random.Random) -> Gates | None:
    """``gates`` brought into the band by removing or adding gates and rows at random; None when that fails."""
    current = costs.clean(gates)
    for _ in range(_TRIES * costs.steps):
        ratio = costs.ratio(current)
        if band.holds(ratio):
            return current
        changed = _smaller(current, costs, rng) if ratio < band.low else _larger(current, costs, rng)
        after = costs.ratio(changed)
        # An evaluation over the band is refused, so that the next try can be a smaller one.
        overshoots = after > band.high if ratio < band.low else after < band.low
        if not overshoots or rng.random() < 0.1:
            current = costs.clean(changed)
    return None


def _smaller(gates: Gates, costs: Costs, rng: random.Random) -> Gates:
    rows = list(gates)
    step = _pick([t for t in range(1, len(rows)) if any(rows[t])], rng)
    if step is None:
        return gates
    block = _pick([k for k, kept in enumerate(rows[step]) if kept], rng)
    assert block is not None
    rows[step] = tuple(kept and k != block for k, kept in enumerate(rows[step]))
    return tuple(rows)


def _larger(gates: Gates, costs: Costs, rng: random.Random) -> Gates:
    rows = list(gates)
    step = _pick([t for t in range(1, len(rows)) if not all(rows[t])], rng)
    if step is None:
        return gates
    pattern = _pick(costs.patterns(), rng)
    assert pattern is not None
    rows[step] = tuple(kept or more for kept, more in zip(rows[step], pattern, strict=True))
    return tuple(rows)


def _exchange_steps(rows: Rows, costs: Costs, rng: random.Random) -> Rows:
    """An evaluation's row goes a little earlier or later."""
    step = _pick([t for t in range(1, len(rows)) if any(rows[t])], rng)
    if step is None:
        return rows
    other = step + (1 + int(rng.random() * _REACH)) * (1 if rng.random() < 0.5 else -1)
    other = min(max(other, 1), len(rows) - 1)
    rows[step], rows[other] = rows[other], rows[step]
    return rows


def _take_patterns(rows: Rows, costs: Costs, rng: random.Random) -> Rows:
    """Two evaluations, the first of them with something to give, get other rows."""
    choices = (*costs.patterns(), *rows[1:])
    given = _pick([t for t in range(1, len(rows)) if any(rows[t])], rng)
    taken = 1 + int(rng.random() * (len(rows) - 1))
    for step in {taken, given if given is not None else taken}:
        row = _pick(choices, rng)
        assert row is not None
        rows[step] = row
    return rows


def _exchange_gates(rows: Rows, costs: Costs, rng: random.Random) -> Rows:
    """A kept gate goes, a removed one comes."""
    kept = _pick([(t, k) for t in range(1, len(rows)) for k, on in enumerate(rows[t]) if on], rng)
    removed = _pick([(t, k) for t in range(1, len(rows)) for k, on in enumerate(rows[t]) if not on], rng)
    for cell, value in ((kept, False), (removed, True)):
        if cell is not None:
            row = list(rows[cell[0]])
            row[cell[1]] = value
            rows[cell[0]] = tuple(row)
    return rows


def _trade_halves(rows: Rows, costs: Costs, rng: random.Random) -> Rows:
    """Two guided evaluations become conditional only, and there is one more launch; or the other way round."""
    launched = [step for step in range(1, len(rows)) if any(rows[step])]
    less = rng.random() < 0.5
    pair = _several([step for step in launched if rows[step][-1] == less], 2, rng)
    if len(pair) < 2:
        return rows
    whole = rows[pair[0]]
    for step in pair:
        rows[step] = (*rows[step][:-1], not less)
    if less:
        place = _pick([step for step in range(1, len(rows)) if step not in launched], rng)
        if place is not None:
            rows[place] = whole
    else:
        place = _pick([step for step in launched if step not in pair], rng)
        if place is not None:
            rows[place] = (False,) * costs.width
    return rows


_Move = Callable[[Rows, Costs, random.Random], Rows]
_MOVES: tuple[_Move, ...] = (_exchange_steps, _take_patterns, _exchange_gates)
_GUIDANCE_MOVES: tuple[_Move, ...] = (_trade_halves,)


def _several(items: Sequence[T], count: int, rng: random.Random) -> list[T]:
    """Some of different places, fewer where there are not so many."""
    left, found = list(items), list[T]()
    while left and len(found) < count:
        found.append(left.pop(int(rng.random() * len(left))))
    return found


def _pick(items: Sequence[T], rng: random.Random) -> T | None:
    # Only Random.random() is promised to give the same numbers in every Python version.
    return items[int(rng.random() * len(items))] if items else None
