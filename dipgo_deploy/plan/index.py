"""A block graph as integers: values in topological order, sets of values as bit masks. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from graphlib import CycleError, TopologicalSorter
from operator import or_

from dipgo_deploy.plan.costs import CostTable, bits
from dipgo_deploy.plan.graph import BlockGraph
from dipgo_deploy.plan.model import Cache


@dataclass(frozen=True)
class GraphIndex:
    """What the passes look up, by position of a value; bit ``1 << position`` stands for the value in a mask.

    Attributes:
        names: topological order, so whatever a value needs has a lower position.
        reads: positions read by the value's own nodes.
        reads_mask: the same as a mask.
        stepwise: whether those nodes also read a graph input that changes at every evaluation.
        base: for an output of a residual block the position of the value it is a residual of, else -1.
        block: position of the block the value is an output of, else -1.
        outputs: per block, the mask of its outputs.
        free: mask of the values that belong to no block and so are always computed.
        predictions: positions of the noise predictions, one a denoiser.
        own: per denoiser, the mask of the values that no other one's prediction alone needs.
        nbytes: sizes in bytes.
        forms: how many forms each block of a schedule has among the blocks.
        whole: of the conditional half of a value, the position of that value, else -1.
        half: of a value that has a conditional half, the position of that, else -1.
        guided: per prediction, whether it is a guided one.
        paired: of a value of one half of guidance the position of the other half's, where both are side by side, else
            -1.
    """

    names: tuple[str, ...]
    reads: tuple[tuple[int, ...], ...]
    reads_mask: tuple[int, ...]
    stepwise: tuple[bool, ...]
    base: tuple[int, ...]
    block: tuple[int, ...]
    outputs: tuple[int, ...]
    block_names: tuple[str, ...]
    free: int
    predictions: tuple[int, ...]
    own: tuple[int, ...]
    nbytes: tuple[int, ...]
    costs: CostTable
    forms: int
    whole: tuple[int, ...]
    half: tuple[int, ...]
    guided: tuple[bool, ...]
    paired: tuple[int, ...]

    @property
    def schedule_blocks(self) -> int:
        """How many blocks a schedule has gates for."""
        return len(self.outputs) // self.forms

    def all_forms(self, block: int) -> int:
        """Mask of all forms of a block, by any of them."""
        first = block % self.schedule_blocks
        return sum(1 << first + form * self.schedule_blocks for form in range(self.forms))

    def cache(self, value: int, nth: int = 0) -> Cache:
        """The cache that a block output is stored in; nth: see ``Cache``."""
        return Cache(self.names[value], "output" if self.base[value] < 0 else "residual", nth)

    def gated(self, gates: int, denoiser: int = 0) -> int:
        """Mask of the values that an evaluation of a denoiser computes when it keeps the blocks in ``gates``."""
        mask = self.free
        for block in bits(gates):
            mask |= self.outputs[block]
        return mask & self.own[denoiser]


def index_graph(graph: BlockGraph) -> GraphIndex:
    """Check ``graph`` and number its values.

    Raises ValueError for a graph that no trace can give: an unknown or doubly owned name, a residual block whose
    inputs do not match its outputs, a cycle, or work without a cost.
    """
    owner, base = _outputs(graph)
    for name, value in graph.values.items():
        for read in value.reads:
            if read not in graph.values and read not in graph.inputs:
                raise ValueError(f"value {name!r} reads {read!r}, which is neither a value nor a graph input")
    if not graph.predictions:
        raise ValueError("the graph has no prediction")
    for prediction in graph.predictions:
        if prediction not in graph.values:
            raise ValueError(f"the prediction {prediction!r} is not a value of the graph")
    for name, guided in graph.halves.items():
        if name not in graph.values or guided not in graph.values:
            raise ValueError(f"{name!r} is half of {guided!r}: one of them is not a value of the graph")
    names = _topological(graph, base)
    position = {name: place for place, name in enumerate(names)}
    reads = tuple(tuple(sorted(position[r] for r in graph.values[n].reads if r in position)) for n in names)
    outputs = tuple(sum(1 << position[name] for name in set(block.outputs)) for block in graph.blocks)
    reads_mask = tuple(sum(1 << place for place in places) for places in reads)
    bases = tuple(position[base[n]] if n in base else -1 for n in names)
    predictions = tuple(position[prediction] for prediction in graph.predictions)
    whole = tuple(position[graph.halves[name]] if name in graph.halves else -1 for name in names)
    half_of = {guided: value for value, guided in enumerate(whole) if guided >= 0}
    pairs = {position[one]: position[other] for one, other in graph.pairs.items()}
    pairs |= {other: one for one, other in pairs.items()}
    return GraphIndex(
        names=names,
        reads=reads,
        reads_mask=reads_mask,
        stepwise=tuple(any(graph.inputs.get(r) == "step" for r in graph.values[n].reads) for n in names),
        base=bases,
        block=tuple(owner.get(n, -1) for n in names),
        outputs=outputs,
        block_names=tuple(block.name for block in graph.blocks),
        free=sum(1 << place for place, n in enumerate(names) if n not in owner),
        predictions=predictions,
        own=_own([_behind(prediction, reads_mask, bases) for prediction in predictions], len(names)),
        nbytes=tuple(graph.values[n].nbytes for n in names),
        costs=CostTable([graph.values[n].work for n in names], graph.costs),
        forms=graph.forms,
        whole=whole,
        half=tuple(half_of.get(place, -1) for place in range(len(names))),
        guided=tuple(place < len(predictions) // graph.forms for place in range(len(predictions))),
        paired=tuple(pairs.get(place, -1) for place in range(len(names))),
    )


def _behind(prediction: int, reads: Sequence[int], bases: Sequence[int]) -> int:
    """Mask of a value and of all that it is made of when nothing is removed."""
    behind = 1 << prediction
    for value in range(prediction, -1, -1):  # what a value needs has a lower position
        if behind >> value & 1:
            behind |= reads[value] | (1 << bases[value] if bases[value] >= 0 else 0)
    return behind


def _own(behind: Sequence[int], count: int) -> tuple[int, ...]:
    """Per prediction the mask of all values but those that only others are made of."""
    everything = (1 << count) - 1
    others = [reduce(or_, (mask for place, mask in enumerate(behind) if place != one), 0) for one in range(len(behind))]
    return tuple(everything & ~(other & ~mask) for mask, other in zip(behind, others, strict=True))


def _outputs(graph: BlockGraph) -> tuple[dict[str, int], dict[str, str]]:
    """Block of each block output, and what each residual output is a residual of."""
    owner: dict[str, int] = {}
    base: dict[str, str] = {}
    for place, block in enumerate(graph.blocks):
        wanted = len(block.outputs) if block.cache == "residual" else 0
        if len(block.inputs) != wanted:
            raise ValueError(f"block {block.name!r} ({block.cache}) needs {wanted} inputs, it has {len(block.inputs)}")
        for name in (*block.outputs, *block.inputs):
            if name not in graph.values:
                raise ValueError(f"block {block.name!r} names {name!r}, which is not a value of the graph")
        for name in block.outputs:
            if owner.setdefault(name, place) != place:
                raise ValueError(f"{name!r} is an output of two blocks")
        base.update(zip(block.outputs, block.inputs, strict=False))
    return owner, base


def _topological(graph: BlockGraph, base: Mapping[str, str]) -> tuple[str, ...]:
    """Value names, each after all that it reads or is a residual of; ties by the order of ``graph.values``."""
    before: dict[str, list[str]] = {}
    for name, value in graph.values.items():
        before[name] = sorted(r for r in value.reads if r in graph.values)
        if name in base:
            before[name].append(base[name])
    try:
        return tuple(TopologicalSorter(before).static_order())
    except CycleError as error:
        raise ValueError(f"the values form a cycle: {' -> '.join(error.args[1])}") from error
