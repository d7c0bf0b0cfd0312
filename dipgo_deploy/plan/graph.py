"""The block graph: what the traced model says depends on what. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

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
        predictions: names of the values that are the noise predictions, one a denoiser.
        costs: multiply-accumulates of each traced node.
    """

    inputs: Mapping[str, InputRole]
    values: Mapping[str, Value]
    blocks: tuple[Block, ...]
    predictions: tuple[str, ...]
    costs: tuple[int, ...] = ()
