"""The traced nodes in groups that are always needed together: what segments are made of. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dipgo_deploy.plan.graph import BlockGraph

# Weights up to this size may be in several graphs: shapes, scalars, tables of frequencies.
TRIVIAL_BYTES = 4096


@dataclass(frozen=True)
class Tensor:
    """What is known of a traced tensor.

    Attributes:
        kind: dtype and shape in words; tensors of equal kind can be added.
        nbytes: size in bytes.
        passable: whether a graph can take it from another one (False for types that no graph has as an input, such as
            bool).
    """

    kind: str
    nbytes: int
    passable: bool = True


@dataclass(frozen=True)
class Node:
    """One traced node. inputs, outputs: tensors and graph inputs by name, weights left out. weights: by name."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macs: int = 0
    weights: frozenset[str] = frozenset()


@dataclass(frozen=True)
class NodeGraph:
    """The traced model node by node. nodes: in topological order. tensors: every output of a node by name. weights:
    bytes of each weight by name."""

    nodes: tuple[Node, ...]
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, int]


@dataclass(frozen=True)
class Piece:
    """Nodes that exactly the same named values need: wanted whenever one of them is computed.

    Attributes:
        owners: these values.
        reads: graph inputs, named values and tensors of other pieces.
        makes: the named values and the tensors that others read.
        macs, weights: of its nodes and of those that are copied into it.
    """

    owners: frozenset[str]
    reads: frozenset[str]
    makes: tuple[str, ...]
    macs: int
    weights: frozenset[str]


@dataclass(frozen=True)
class PieceGraph:
    """All pieces, each after those it reads from, with the sizes of tensors and weights."""

    pieces: tuple[Piece, ...]
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, int]

    def weight_bytes(self, pieces: Sequence[int]) -> int:
        """Bytes of the weights of a graph that is made of these pieces."""
        names = frozenset().union(*(self.pieces[piece].weights for piece in pieces))
        return sum(self.weights[name] for name in names)


def split(nodes: NodeGraph, graph: BlockGraph) -> PieceGraph:
    """Group the nodes by the named values of ``graph`` that need them.

    Of such a group, what depends on constant inputs only (the keys and values of a text) is a piece of its own where it
    multiplies anything, because it need not be computed again at every evaluation. A tensor that leaves its piece, such
    as the time embedding, is passed. What cannot be passed is computed again where it is needed (the node is copied),
    and so is what depends on nothing but trivial weights.

    Groups of equal owners form no cycle: along an unnamed tensor the owners become fewer, along a named value the first
    owner in topological order comes strictly later, and neither can lead back. What is constant comes before the rest.
    """
    maker = {output: place for place, node in enumerate(nodes.nodes) for output in node.outputs}
    groups = _groups(nodes, graph)
    copied = _constants(nodes, maker, graph)
    while True:
        reads = _reads(nodes, maker, graph, groups, copied)
        # What would have to be passed and cannot be.
        stuck = {maker[name] for _, name in reads if name in maker and not nodes.tensors[name].passable}
        stuck = {place for place in stuck if not set(nodes.nodes[place].outputs) & set(graph.values)}
        if not stuck:
            break
        copied |= stuck
    return PieceGraph(_pieces(nodes, maker, graph, groups, copied, reads), nodes.tensors, nodes.weights)


class _Group(NamedTuple):
    """What the nodes of a piece have in common. constant: they depend on constant inputs only."""

    owners: frozenset[str]
    constant: bool


def _groups(nodes: NodeGraph, graph: BlockGraph) -> list[_Group]:
    owners = _owners(nodes, graph)
    cached = {name for block in graph.blocks for name in block.outputs}
    steady = {name for name, role in graph.inputs.items() if role == "constant"}
    constant = set()
    for place, node in enumerate(nodes.nodes):
        if all(name in steady for name in node.inputs):
            constant.add(place)
            steady.update(name for name in node.outputs if name not in cached)
    worth = {owners[place] for place in constant if nodes.nodes[place].macs}
    return [_Group(names, place in constant and names in worth) for place, names in enumerate(owners)]


def _owners(nodes: NodeGraph, graph: BlockGraph) -> list[frozenset[str]]:
    """Per node the named values whose walk back, which stops at named values, reaches it."""
    owners: list[set[str]] = [set() for _ in nodes.nodes]
    reached: dict[str, set[str]] = {name: {name} for name in graph.values}
    for place in range(len(nodes.nodes) - 1, -1, -1):
        node = nodes.nodes[place]
        for output in node.outputs:
            owners[place] |= reached.get(output, set())
        for name in node.inputs:
            if name not in graph.values:
                reached.setdefault(name, set()).update(owners[place])
    return [frozenset(names) for names in owners]


def _constants(nodes: NodeGraph, maker: Mapping[str, int], graph: BlockGraph) -> set[int]:
    """Nodes that depend on nothing but trivial weights."""
    constant: set[int] = set()
    for place, node in enumerate(nodes.nodes):
        if (
            all(maker.get(name) in constant for name in node.inputs)
            and not set(node.outputs) & set(graph.values)
            and sum(nodes.weights[name] for name in node.weights) <= TRIVIAL_BYTES
        ):
            constant.add(place)
    return constant


def _reads(
    nodes: NodeGraph,
    maker: Mapping[str, int],
    graph: BlockGraph,
    groups: Sequence[_Group],
    copied: set[int],
) -> set[tuple[_Group, str]]:
    """(group, name) of all that a group reads from outside, through copied nodes."""
    reads: set[tuple[_Group, str]] = set()
    for place, node in enumerate(nodes.nodes):
        if place in copied or not groups[place].owners:
            continue
        pending = list(node.inputs)
        while pending:
            name = pending.pop()
            origin = maker.get(name)
            if origin in copied:
                pending.extend(nodes.nodes[origin].inputs)
            elif origin is None or name in graph.values or groups[origin] != groups[place]:
                reads.add((groups[place], name))
    return reads


def _pieces(
    nodes: NodeGraph,
    maker: Mapping[str, int],
    graph: BlockGraph,
    groups: Sequence[_Group],
    copied: set[int],
    reads: set[tuple[_Group, str]],
) -> tuple[Piece, ...]:
    members: dict[_Group, set[int]] = {}
    for place, group in enumerate(groups):
        if group.owners and place not in copied:
            members.setdefault(group, set()).add(place)
    wanted = {name for _, name in reads} | set(graph.values)
    pieces = []
    for group, places in members.items():
        outputs = [name for place in sorted(places) for name in nodes.nodes[place].outputs if name in wanted]
        work = _with_copies(nodes, maker, places, copied)
        pieces.append(
            Piece(
                owners=group.owners,
                reads=frozenset(name for reader, name in reads if reader == group),
                makes=tuple(outputs),
                macs=sum(nodes.nodes[place].macs for place in work),
                weights=frozenset().union(*(nodes.nodes[place].weights for place in work)),
            )
        )
    return _sorted(pieces)


def _with_copies(nodes: NodeGraph, maker: Mapping[str, int], places: set[int], copied: set[int]) -> set[int]:
    work = set(places)
    pending = [name for place in places for name in nodes.nodes[place].inputs]
    while pending:
        origin = maker.get(pending.pop())
        if origin in copied and origin not in work:
            work.add(origin)
            pending.extend(nodes.nodes[origin].inputs)
    return work


def _sorted(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Each piece after those that make what it reads."""
    maker = {name: place for place, piece in enumerate(pieces) for name in piece.makes}
    order: list[int] = []
    done: set[int] = set()

    for first in range(len(pieces)):
        pending = [first]
        while pending:
            place = pending[-1]
            needs = sorted({maker[name] for name in pieces[place].reads if name in maker} - done)
            if needs and place not in done:
                pending.extend(needs)
                continue
            pending.pop()
            if place not in done:
                done.add(place)
                order.append(place)
    return tuple(pieces[place] for place in order)
