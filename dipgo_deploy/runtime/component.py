"""A graph that is run by itself: text encoder, VAE decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dipgo_deploy.backends.base import Backend, ChangedWeights, Launchable
from dipgo_deploy.backends.storage import to_storage
from dipgo_deploy.bundle.manifest import Graph
from dipgo_deploy.bundle.shapes import Sizes

# Bindings are kept for so many of the sizes that were run last.
MOST_SIZES = 8


class Component:
    """One graph, bound to memory of its own, once for each of the sizes that it is run at; ``weights`` take the place
    of those that they change.

    Raises:
        UserError: the graph cannot be loaded.
    """

    def __init__(self, engine_dir: Path, graph: Graph, backend: Backend, weights: ChangedWeights | None = None) -> None:
        self.graph = graph
        self._backend = backend
        self._memory = {spec.name: backend.allocate(spec.nbytes) for spec in (*graph.inputs, *graph.outputs)}
        self._executable = backend.load(engine_dir, graph, weights)
        self._calls: dict[Sizes | None, tuple[Graph, Launchable]] = {}
        if graph.sizes is None:
            self._at(None)

    def __call__(self, inputs: Mapping[str, np.ndarray], sizes: Sizes | None = None) -> dict[str, np.ndarray]:
        """Run on host arrays of the graph's input shapes; returns its outputs (bfloat16 as float32).

        sizes: of this run, for a graph that leaves them open; None: those of the graph's own shapes.

        Raises:
            ValueError: an input has another shape.
            UserError: the run failed.
        """
        graph, call = self._at(sizes)
        for spec in graph.inputs:
            array = inputs[spec.name]
            if array.shape != spec.shape:
                raise ValueError(f"{self.graph.file}: {spec.name} has shape {array.shape}, needs {spec.shape}")
            self._backend.upload(self._memory[spec.name], to_storage(array, spec.dtype))
        call()
        self._backend.synchronize()
        return {spec.name: self._backend.download(self._memory[spec.name], spec) for spec in graph.outputs}

    def _at(self, sizes: Sizes | None) -> tuple[Graph, Launchable]:
        bound = self._calls.get(sizes)
        if bound is None:
            graph = self.graph
            if sizes is not None and graph.sizes is not None:
                graph.sizes.check(sizes)
                graph = graph.at(sizes)
            while len(self._calls) >= MOST_SIZES:
                del self._calls[next(iter(self._calls))]
            bind = self._executable.bind
            call = bind(self._memory) if graph.sizes is None else bind(self._memory, graph)
            self._calls[sizes] = bound = graph, call
        return bound
