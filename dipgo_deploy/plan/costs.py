"""Multiply-accumulates of a set of values whose traced nodes may be shared. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem


class CostTable:
    """Adds up the costs of the union of several values' work.

    Nodes that belong to exactly the same values are one *atom* here, so a set of work is a short bit mask, a union
    is ``|``, and a sum is one table look-up for every eight atoms.

    atoms: per value (in the order given), the bit mask of its atoms.
    """

    def __init__(self, work: Sequence[frozenset[int]], costs: Sequence[int]) -> None:
        """Take each value's nodes, and each node's cost; ValueError when a node has no cost."""
        owners: dict[int, int] = {}
        for value, nodes in enumerate(work):
            for node in nodes:
                if not 0 <= node < len(costs):
                    raise ValueError(f"work names node {node}, but there are {len(costs)} costs")
                owners[node] = owners.get(node, 0) | 1 << value
        cost_of: dict[int, int] = {}
        for node in sorted(owners):
            cost_of[owners[node]] = cost_of.get(owners[node], 0) + costs[node]
        atoms = [0] * len(work)
        for atom, owner in enumerate(cost_of):
            for value in bits(owner):
                atoms[value] |= 1 << atom
        self.atoms: tuple[int, ...] = tuple(atoms)
        self._tables = _byte_tables(list(cost_of.values()))

    def atoms_of(self, values: int) -> int:
        """Union of the atoms of the values in the bit mask ``values``."""
        mask = 0
        for value in bits(values):
            mask |= self.atoms[value]
        return mask

    def total(self, atoms: int) -> int:
        """Sum of the costs of the atoms in the bit mask ``atoms``."""
        return sum(map(getitem, self._tables, atoms.to_bytes(len(self._tables), "little")))

    def macs(self, values: int) -> int:
        """Cost of computing the values in the bit mask ``values``, shared nodes counted once."""
        return self.total(self.atoms_of(values))


def bits(mask: int) -> list[int]:
    """Positions of the set bits of ``mask``, ascending."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


def _byte_tables(costs: list[int]) -> list[list[int]]:
    """For each run of eight costs, the sums of all 256 subsets."""
    tables = []
    for start in range(0, len(costs), 8):
        sums = [0]
        for cost in costs[start : start + 8]:
            sums += [total + cost for total in sums]
        tables.append(sums)
    return tables
