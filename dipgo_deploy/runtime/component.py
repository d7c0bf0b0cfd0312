"""A graph that is run by itself: text encoder, VAE decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dipgo_deploy.backends.base import Backend, ChangedWeights
from dipgo_deploy.backends.storage import to_storage
from dipgo_deploy.bundle.manifest import Graph


class Component:
    """One graph, bound once to memory of its own; ``weights`` take the place of those that they change.

    Raises:
        UserError: the graph cannot be loaded.
    """

    def __init__(self, engine_dir: Path, graph: Graph, backend: Backend, weights: ChangedWeights | None = None) -> None:
        self.graph = graph
        self._backend = backend
        self._memory = {spec.name: backend.allocate(spec.nbytes) for spec in (*graph.inputs, *graph.outputs)}
        self._call = backend.load(engine_dir, graph, weights).bind(self._memory)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on host arrays of the graph's input shapes; returns its outputs (bfloat16 as float32).

        Raises:
            ValueError: an input has another shape.
            UserError: the run failed.
        """
        for spec in self.graph.inputs:
            array = inputs[spec.name]
            if array.shape != spec.shape:
                raise ValueError(f"{self.graph.file}: {spec.name} has shape {array.shape}, needs {spec.shape}")
            self._backend.upload(self._memory[spec.name], to_storage(array, spec.dtype))
        self._call()
        self._backend.synchronize()
        return {spec.name: self._backend.download(self._memory[spec.name], spec) for spec in self.graph.outputs}
