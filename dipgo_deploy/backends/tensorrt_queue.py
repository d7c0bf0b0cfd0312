"""When launches are enqueued one by one, and when as a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Literal, Protocol

GraphMode = Literal["off", "step", "loop"]
GRAPH_MODES: tuple[GraphMode, ...] = ("off", "step", "loop")


class Run(Protocol):
    """A launch with fixed addresses. ``context``: the execution context it runs in."""

    @property
    def context(self) -> Hashable:
        """Runs with equal contexts must not be part of two captured graphs."""

    def __call__(self) -> None:
        """Enqueue it."""


class LaunchQueue:
    """Launches in the order of ``submit``, with captured graphs in between.

    ``off`` enqueues at once. ``step`` makes each launch a graph of its own. ``loop`` holds launches back until
    ``flush`` and makes the whole sequence one graph. Either way a sequence is first run without a graph (the first run
    of a context may allocate, which must not be captured), captured at its second run and replayed from then on. A
    context belongs to one captured graph at most: running it anywhere else drops that graph.

    Whoever reads or writes memory from outside calls ``flush`` first.

    Args:
        mode: see above.
        capture: makes one callable of a sequence of runs, without running them.
    """

    def __init__(self, mode: GraphMode, capture: Callable[[Sequence[Run]], Callable[[], None]]) -> None:
        self._mode = mode
        self._capture = capture
        self._pending: list[Run] = []
        self._warm: set[tuple[Run, ...]] = set()
        self._graphs: dict[tuple[Run, ...], Callable[[], None]] = {}

    def submit(self, run: Run) -> None:
        """Enqueue a launch, at once or with the next ``flush``."""
        if self._mode == "off":
            run()
        elif self._mode == "step":
            self._go((run,))
        else:
            self._pending.append(run)

    def flush(self) -> None:
        """Enqueue what was held back."""
        if self._pending:
            sequence = tuple(self._pending)
            self._pending.clear()
            self._go(sequence)

    def forget(self, contexts: Collection[Hashable]) -> None:
        """Forget all sequences with one of these contexts: they are not run again."""
        for known in (self._graphs, self._warm):
            for sequence in [key for key in known if any(run.context in contexts for run in key)]:
                self._drop(sequence)

    def _drop(self, sequence: tuple[Run, ...]) -> None:
        self._graphs.pop(sequence, None)
        self._warm.discard(sequence)

    def invalidate(self) -> None:
        """Forget all graphs: something they refer to has moved."""
        self._graphs.clear()
        self._warm.clear()

    def _go(self, sequence: tuple[Run, ...]) -> None:
        graph = self._graphs.get(sequence)
        if graph is None:
            self._drop_graphs_with({run.context for run in sequence})
            if sequence not in self._warm:
                for run in sequence:
                    run()
                self._warm.add(sequence)
                return
            graph = self._graphs[sequence] = self._capture(sequence)
        graph()

    def _drop_graphs_with(self, contexts: set[Hashable]) -> None:
        shared = [key for key in self._graphs if any(run.context in contexts for run in key)]
        for key in shared:
            del self._graphs[key]
