"""Costs of shared work."""

from __future__ import annotations

import random

import pytest

from dipgo_deploy.plan.costs import CostTable, bits


def test_union_counts_shared_nodes_once():
    rng = random.Random(0)
    for _ in range(100):
        costs = [rng.randint(0, 10**12) for _ in range(rng.randint(1, 60))]
        work = [frozenset(rng.choices(range(len(costs)), k=rng.randint(0, 12))) for _ in range(rng.randint(1, 25))]
        table = CostTable(work, costs)
        for _ in range(10):
            mask = rng.getrandbits(len(work))
            nodes = frozenset().union(*(work[value] for value in bits(mask)))
            assert table.macs(mask) == sum(costs[node] for node in nodes)


def test_a_node_without_a_cost_is_refused():
    with pytest.raises(ValueError, match="node 2"):
        CostTable([frozenset({2})], [1, 1])


def test_bits():
    assert bits(0) == []
    assert bits(0b1011001) == [0, 3, 4, 6]
