"""Graphs of an engine directory that are loaded: each once, whoever launches it."""

from __future__ import annotations

from collections import Counter

from dipgo_deploy.backends.base import Backend, ChangedWeights, Executable
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Graph


class Graphs:
    """Loaded graphs by file, for the loops of all schedules of an engine directory.

    backend: what runs them. weights: take the place of the weights that they change.

    Attributes:
        loads: how often each file was loaded, since all were let go.
    """

    def __init__(self, backend: Backend, weights: ChangedWeights | None = None) -> None:
        self.loads: Counter[str] = Counter()
        self._backend, self._weights = backend, weights
        self._executables: dict[str, Executable] = {}

    @property
    def files(self) -> frozenset[str]:
        """Of the graphs that are loaded now."""
        return frozenset(self._executables)

    def get(self, bundle: Bundle, graph: Graph) -> Executable:
        """A graph of ``bundle``, loaded where it is not yet. Raises UserError where that fails."""
        found = self._executables.get(graph.file)
        if found is None:
            found = self._backend.load(bundle.path, graph, self._weights)
            bundle.check_unchanged()
            self._executables[graph.file] = found
            self.loads[graph.file] += 1
        return found

    def release(self, graph: Graph) -> None:
        """Let go of one graph, where it is loaded: what was bound of it is not launched again."""
        executable = self._executables.pop(graph.file, None)
        if executable is not None:
            self._backend.release(executable)

    def release_all(self) -> None:
        """Let go of all of them."""
        while self._executables:
            self._backend.release(self._executables.popitem()[1])
        self.loads.clear()
