"""A VAE of videos that goes through time, one way: chunk after chunk, in memory for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dipgo_deploy.backends.base import Backend, Launchable, Memory
from dipgo_deploy.backends.storage import to_storage
from dipgo_deploy.bundle.manifest import Graph, VideoChunk
from dipgo_deploy.bundle.names import NEXT, STATE


class Chunked:
    """The graphs of a decoder or an encoder in chunks, bound to two sets of memory for the state between them.

    One is read while the other is written, and nothing is copied.

    Raises:
        UserError: a graph cannot be loaded.
    """

    def __init__(
        self, engine_dir: Path, graphs: Sequence[Graph], chunks: Sequence[VideoChunk], backend: Backend
    ) -> None:
        self._backend, self._chunks, self._graphs = backend, chunks, graphs
        specs = [(spec.name, spec.nbytes) for graph in self._graphs for spec in (*graph.inputs, *graph.outputs)]
        largest: dict[str, int] = {}
        for name, nbytes in specs:
            name = name.replace(NEXT, STATE, 1) if name.startswith(NEXT) else name
            largest[name] = max(largest.get(name, 0), nbytes)
        self._plain = {name: backend.allocate(size) for name, size in largest.items() if not name.startswith(STATE)}
        self._states = [
            {name: backend.allocate(size) for name, size in largest.items() if name.startswith(STATE)} for _ in range(2)
        ]
        loaded = [backend.load(engine_dir, graph) for graph in self._graphs]
        self._calls: list[tuple[Launchable, Launchable]] = [
            (executable.bind(self._bound(graph, 0)), executable.bind(self._bound(graph, 1)))
            for executable, graph in zip(loaded, self._graphs, strict=True)
        ]

    def _bound(self, graph: Graph, reads: int) -> dict[str, Memory]:
        """Memory of each tensor of a graph that reads the state of set ``reads`` and writes the other."""
        memory = {}
        for spec in (*graph.inputs, *graph.outputs):
            if spec.name.startswith(STATE):
                whole = self._states[reads][spec.name]
            elif spec.name.startswith(NEXT):
                whole = self._states[1 - reads][STATE + spec.name.removeprefix(NEXT)]
            else:
                whole = self._plain[spec.name]
            memory[spec.name] = whole.at(0, spec.nbytes)
        return memory

    def __call__(self, give: Callable[[int, tuple[int, ...]], np.ndarray]) -> dict[str, list[np.ndarray]]:
        """Each output by name, a part for every chunk.

        give: first frame and shape of a chunk -> what its graph takes of them.
        """
        backend = self._backend
        for state in self._states:
            for memory in state.values():
                backend.upload(memory, np.zeros(memory.nbytes, np.uint8))
        found: dict[str, list[np.ndarray]] = {}
        for place, chunk in enumerate(self._chunks):
            graph = self._graphs[chunk.graph]
            taken = graph.inputs[0]
            backend.upload(self._plain[taken.name], to_storage(give(chunk.start, taken.shape), taken.dtype))
            self._calls[chunk.graph][place % 2]()
            backend.synchronize()
            for made in graph.outputs:
                if made.name in self._plain:
                    found.setdefault(made.name, []).append(backend.download(self._plain[made.name], made))
        return found
