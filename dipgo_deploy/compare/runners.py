"""polygraphy runners for one variant's graph on one of the runtime's backends."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.logger import G_LOGGER

from dipgo_deploy.backends.base import Backend
from dipgo_deploy.backends.onnxruntime_cuda import FATAL, PROVIDERS
from dipgo_deploy.backends.onnxruntime_pairs import suit_folder
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Graph, VariantEntry
from dipgo_deploy.compare.graphs import OpenGraph, Run
from dipgo_deploy.runtime.component import Component


def silenced() -> AbstractContextManager[Any]:
    """polygraphy's log, which goes to stdout, switched off; what is critical still raises."""
    return G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1)


class BackendRunner(BaseRunner):
    """Runs a graph through the runtime's own backend: for what polygraphy's runners cannot feed (bfloat16), and for
    engines, whose addresses, scratch and copies are then those of a run."""

    def __init__(self, engine_dir: Path, graph: Graph, backend: Backend, name: str | None = None) -> None:
        super().__init__(name=name, prefix="backend-runner")
        self._engine_dir = engine_dir
        self._graph = graph
        self._backend = backend
        self._component: Component | None = None

    def activate_impl(self) -> None:
        """Load and bind the graph."""
        self._component = Component(self._engine_dir, self._graph, self._backend)

    def get_input_metadata_impl(self) -> TensorMetadata:
        """The graph's inputs, floating point as float32."""
        return _metadata(self._graph)

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        """One run."""
        assert self._component is not None  # polygraphy activates a runner first
        start = time.perf_counter()
        outputs = OrderedDict(self._component(feed_dict))
        self.inference_time = time.perf_counter() - start
        return outputs

    def deactivate_impl(self) -> None:
        """Drop the graph and its memory."""
        self._component = None


def engine_runner(bundle: Bundle, entry: VariantEntry, backend: Backend, threads: int | None = None) -> BaseRunner:
    """The runner for a variant's graph: polygraphy's own for ONNX Runtime, else, and for bfloat16, the backend.

    threads: CPU threads of a run; None: ONNX Runtime's default.
    """
    if bundle.manifest.dtype == "bf16" or backend.name not in PROVIDERS:
        return BackendRunner(bundle.path, entry.graph, backend, name=backend.name)

    def session() -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = FATAL
        options.intra_op_num_threads = threads or 0
        file = bundle.path / entry.graph.file
        suit_folder(options, file.parent)
        return onnxruntime.InferenceSession(str(file), options, providers=PROVIDERS[backend.name])

    return OnnxrtRunner(session, name=f"onnxruntime-{backend.name}")


def graphs_on(backend: Backend, threads: int | None = None) -> OpenGraph:
    """How ``compare_engine`` runs a variant's graph by itself: with ``engine_runner``."""

    @contextmanager
    def open_graph(bundle: Bundle, entry: VariantEntry) -> Iterator[Run]:
        with silenced(), engine_runner(bundle, entry, backend, threads) as runner:
            yield lambda inputs: {name: np.array(array) for name, array in runner.infer(dict(inputs)).items()}

    return open_graph


def _metadata(graph: Graph) -> TensorMetadata:
    metadata = TensorMetadata()
    for spec in graph.inputs:
        metadata.add(spec.name, dtype=np.int64 if spec.dtype == "int64" else np.float32, shape=spec.shape)
    return metadata
