"""The block graph: what the traced model says depends on what. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dipgo_deploy.schedule.guidance import CONDITIONAL, HALVES, UNCONDITIONAL
from dipgo_deploy.schedule.kinds import CacheKind

InputRole = Literal["step", "constant"]


@dataclass(frozen=True)
class Value:
    """A named tensor: a boundary tensor, the input of a residual block, or the noise prediction.

    Attributes:
        name: unique name.
        nbytes: size of the tensor in bytes.
        reads: the named values and graph inputs it is computed from when the walk back stops at named values.
        work: indices into ``BlockGraph.costs`` of the traced nodes on that walk (nodes can be shared by several
            values, e.g. the time embedding).
    """

    name: str
    nbytes: int
    reads: frozenset[str]
    work: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Block:
    """A unit whose outputs can come from a cache.

    outputs: names of its boundary tensors, aliases resolved. inputs: for a residual cache, ``inputs[i]`` is the value
    that ``outputs[i]`` is ``inputs[i] + residual`` of; empty for an output cache.
    """

    name: str
    outputs: tuple[str, ...]
    cache: CacheKind = "output"
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockGraph:
    """The traced model condensed to its named values.

    Attributes:
        inputs: graph input name -> ``step`` (changes at every step: latent, timestep) or ``constant`` (text embedding,
            class labels, guidance scale).
        values: every named value by name.
        blocks: in order of execution.
        predictions: names of the values that are the noise predictions, one a denoiser; with ``halves`` those of
            guided evaluations, then those of conditional-only ones.
        costs: multiply-accumulates of each traced node.
        halves: of a model that was traced conditional only, too: value -> the guided value whose second half, the
            conditional one, is what it is. ``blocks`` are then those of guided evaluations, then in the same order
            those of conditional-only ones.
        guides: of a model that was traced for one half of guidance at a time: guided value -> the prediction that it
            is made of, one of each half, which are its inputs ``HALVES``.
        pairs: with both halves side by side (``in_halves``): value of the unconditional one -> of the conditional one.
            ``predictions`` are then the guided ones, followed by those of conditional-only evaluations, and ``blocks``
            those of the conditional half, followed by those of the other.
    """

    inputs: Mapping[str, InputRole]
    values: Mapping[str, Value]
    blocks: tuple[Block, ...]
    predictions: tuple[str, ...]
    costs: tuple[int, ...] = ()
    halves: Mapping[str, str] = field(default_factory=dict)
    guides: Mapping[str, str] = field(default_factory=dict)
    pairs: Mapping[str, str] = field(default_factory=dict)

    def with_halves(self) -> BlockGraph:
        """As it would be traced conditional only, too: with half the bytes and half the cost of everything."""
        if self.halves:
            return self

        def half(name: str) -> str:
            return name + CONDITIONAL if name in self.values else name

        values = dict(self.values)
        for value in self.values.values():
            work = frozenset(len(self.costs) + node for node in value.work)
            reads = frozenset(map(half, value.reads))
            values[half(value.name)] = Value(half(value.name), value.nbytes // 2, reads, work)
        blocks = tuple(
            Block(
                block.name + CONDITIONAL, tuple(map(half, block.outputs)), block.cache, tuple(map(half, block.inputs))
            )
            for block in self.blocks
        )
        return BlockGraph(
            self.inputs,
            values,
            (*self.blocks, *blocks),
            (*self.predictions, *map(half, self.predictions)),
            (*self.costs, *(cost // 2 for cost in self.costs)),
            {half(name): name for name in self.values},
        )

    def in_halves(self) -> BlockGraph:
        """Of ``guides`` both halves side by side, each with values and costs of its own, and the guided predictions."""

        def other(name: str) -> str:
            return name + UNCONDITIONAL if name in self.values else name

        values = {}
        for value in self.values.values():
            if value.name in self.guides:
                made_of = self.guides[value.name]
                reads = (value.reads - set(HALVES)) | {made_of, other(made_of)}
                values[value.name] = Value(value.name, value.nbytes, reads, value.work)
                continue
            values[value.name] = value
            work = frozenset(len(self.costs) + node for node in value.work)
            values[other(value.name)] = Value(other(value.name), value.nbytes, frozenset(map(other, value.reads)), work)
        blocks = tuple(
            Block(
                block.name + UNCONDITIONAL,
                tuple(map(other, block.outputs)),
                block.cache,
                tuple(map(other, block.inputs)),
            )
            for block in self.blocks
        )
        return BlockGraph(
            self.inputs,
            values,
            (*self.blocks, *blocks),
            (*self.guides, *self.predictions),
            (*self.costs, *self.costs),
            pairs={other(name): name for name in self.values if name not in self.guides},
        )

    @property
    def forms(self) -> int:
        """How many forms each block of a schedule has among ``blocks``."""
        return 2 if self.halves or self.pairs else 1

    @property
    def conditional_only(self) -> bool:
        """Whether evaluations can be conditional only."""
        return bool(self.halves or self.guides or self.pairs)

    @property
    def schedule_blocks(self) -> tuple[Block, ...]:
        """The blocks that a schedule has gates for."""
        return self.blocks[: len(self.blocks) // self.forms]
