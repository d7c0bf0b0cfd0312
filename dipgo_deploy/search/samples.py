"""Which images a search looks at: pairs of a prompt (or class) and a seed, a function of the position alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

# Seeds of a search and of a measurement must not meet.
HELD_OUT = 1_000_000


@dataclass(frozen=True)
class Pair:
    """One image: which condition (prompt or class, by position) and the seed of its noise."""

    condition: int
    seed: int


@dataclass(frozen=True)
class SampleStream:
    """An endless, reproducible stream of images.

    Every round goes through all conditions once, in an order of its own. seed: start of everything. pool: how many
    images there are before the same ones come again (None: always new ones). one_noise: all images have the same
    noise, as in the authors' code.
    """

    conditions: int
    seed: int = 0
    pool: int | None = None
    one_noise: bool = False

    def pair(self, position: int) -> Pair:
        """The image at a position, from 0."""
        if self.pool is not None:
            position %= self.pool
        turn, place = divmod(position, self.conditions)
        order = list(range(self.conditions))
        # Only Random.random() is promised to give the same numbers in every Python version.
        rng = random.Random(self.seed * 1_000_003 + turn)
        order.sort(key=[rng.random() for _ in order].__getitem__)
        return Pair(order[place], self.seed if self.one_noise else self.seed + position)

    def pairs(self, start: int, count: int) -> tuple[Pair, ...]:
        """``count`` images from ``start`` on."""
        return tuple(self.pair(start + place) for place in range(count))


def held_out(conditions: int, per_condition: int, seed: int = 0) -> tuple[Pair, ...]:
    """``per_condition`` images of every condition, in order, with seeds that no search of common length uses."""
    return tuple(
        Pair(condition, HELD_OUT + seed + condition * per_condition + place)
        for condition in range(conditions)
        for place in range(per_condition)
    )
