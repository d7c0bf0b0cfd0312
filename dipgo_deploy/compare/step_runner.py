"""The launches of single evaluations, in order, on inputs of the supernet's own loop: how evaluations of several
launches are compared. Caches are the graphs' own, from the evaluations before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from dipgo_deploy.backends.storage import as_bytes, from_storage, to_storage
from dipgo_deploy.bundle.manifest import PlanEntry
from dipgo_deploy.bundle.names import FORECAST, PREDICTION
from dipgo_deploy.reference.recording import as_read

_POISON_BYTE = 0xFF  # all bits set is NaN in every floating type

Run = Callable[[int, dict[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Launched:
    """One launch as it ran: inputs and outputs of its graph by name, in the types of the graph (bfloat16: float32)."""

    index: int
    segment: int
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


class StepRunner:
    """Runs the launches of one evaluation after the other; the arena lies on the host, NaN where nothing was written.

    run: one launch of a segment, given by its place in the plan: graph inputs -> graph outputs.
    """

    def __init__(self, plan: PlanEntry, run: Run) -> None:
        self._plan = plan
        self._run = run
        self._arena = np.full(plan.arena_bytes, _POISON_BYTE, np.uint8)

    def __call__(self, step: int, inputs: Mapping[str, np.ndarray]) -> Iterator[Launched]:
        """The launches of evaluation ``step``, each when it is done; ``inputs`` as ``StepRecording`` has them."""
        for index, launch in enumerate(self._plan.launches):
            if launch.step != step:
                continue
            entry = self._plan.variants[launch.variant]
            offsets = dict(zip(entry.reads, launch.reads, strict=True))
            given = {**inputs, FORECAST: np.array(launch.forecast, np.float32)}
            bound = {
                spec.name: from_storage(self._arena[offsets[spec.name] :], spec)
                if spec.name in offsets
                else as_read(given[spec.name], spec.shape, launch.half).astype(
                    np.float32 if spec.dtype == "bfloat16" else spec.dtype
                )
                for spec in entry.graph.inputs
            }
            outputs = dict(self._run(launch.variant, bound))
            specs = {spec.name: spec for spec in entry.graph.outputs}
            written = [*zip(entry.writes, launch.writes, strict=True)]
            written += [] if launch.passes is None else [(PREDICTION, launch.passes)]
            for name, offset in written:
                data = as_bytes(to_storage(outputs[name], specs[name].dtype))
                self._arena[offset : offset + data.nbytes] = data
            yield Launched(index, launch.variant, bound, outputs)
