"""What a backend is: load a graph, allocate memory, bind by name once, launch, copy out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dipgo_deploy.bundle.manifest import Graph, Manifest, TensorSpec
from dipgo_deploy.plan.buffers import ALIGNMENT as ALIGNMENT


@dataclass(frozen=True)
class Memory:
    """A range of the backend's memory: address and size in bytes; ``owner`` keeps it alive."""

    address: int
    nbytes: int
    owner: Any

    def at(self, offset: int, nbytes: int) -> Memory:
        """The part that starts ``offset`` bytes in.

        Raises:
            ValueError: the part is not inside this memory.
        """
        if offset < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"bytes {offset}..{offset + nbytes} are outside a memory of {self.nbytes} bytes")
        return Memory(self.address + offset, nbytes, self.owner)


class Launchable(Protocol):
    """A graph with every input and output bound to an address."""

    def __call__(self) -> None:
        """Enqueue one run; ``Backend.synchronize`` waits for it."""


class Executable(Protocol):
    """A loaded graph."""

    graph: Graph

    def bind(self, tensors: Mapping[str, Memory], graph: Graph | None = None) -> Launchable:
        """Bind all inputs and outputs by name, with the shapes of ``graph`` where the loaded one leaves them open.

        Raises KeyError for a name that is missing.
        """


class ChangedWeights(Protocol):
    """Weights that differ from those in an engine directory's files."""

    def identity_of(self, onnx_file: Path) -> tuple[tuple[str, float], ...]:
        """What changed a graph's weights, as (sha256 of a LoRA file, scale); empty where none are changed."""

    def of(self, onnx_file: Path) -> Mapping[str, np.ndarray]:
        """The changed weights of a graph, whole, by initializer, in its dtype (bfloat16 as uint16) and layout."""


class Backend(Protocol):
    """A runtime that can run an engine directory's graphs."""

    name: str

    def check(self, manifest: Manifest) -> None:
        """Refuse an engine directory it cannot run (UserError), before anything is loaded."""

    def allocate(self, nbytes: int) -> Memory:
        """Zero-filled memory, aligned to at least ``ALIGNMENT``."""

    def upload(self, memory: Memory, array: np.ndarray) -> None:
        """Copy a host array (C order, as stored: see ``storage.to_storage``) to the start of ``memory``."""

    def download(self, memory: Memory, spec: TensorSpec, *, copy: bool = True) -> np.ndarray:
        """Copy a tensor to the host (waits for pending launches); bfloat16 comes as float32.

        Without ``copy`` it may be the memory itself, which holds only until the next launch or upload.
        """

    def load(self, engine_dir: Path, graph: Graph, weights: ChangedWeights | None = None) -> Executable:
        """Load one graph of the engine directory, with ``weights`` in the place of those that they change."""

    def release(self, executable: Any) -> None:
        """Let go of a loaded graph, after all its launches: none of them is called again."""

    def memory(self) -> dict[str, int]:
        """Bytes on the device by what they are for, as far as the backend knows; empty on the CPU."""

    def synchronize(self) -> None:
        """Wait for all launches."""
