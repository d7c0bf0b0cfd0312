"""Layout ``segments`` against the supernet: the launches of single evaluations, on inputs of the supernet's own loop.

A part of an evaluation has inputs that the supernet has no name for (a time embedding), so a segment is judged where it
stands: each evaluation gets the supernet's latent, its launches run in order with the arena on the host, and what they
write is compared where the supernet knows it. Caches are the graphs' own, from the evaluations before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dipgo_deploy.backends.storage import as_bytes, from_storage, to_storage
from dipgo_deploy.bundle.manifest import PlanEntry, VariantEntry
from dipgo_deploy.bundle.names import PREDICTION
from dipgo_deploy.compare.conditions import host
from dipgo_deploy.compare.recording import Recorder, cache_place, cache_tensor, evaluation_inputs

if TYPE_CHECKING:
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.supernet.loop import Evaluation

_POISON_BYTE = 0xFF  # all bits set is NaN in every floating type

Run = Callable[[int, dict[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class StepRecording:
    """One evaluation of the supernet.

    inputs: by graph input name, float32 or int64, all but the tensors in the arena. outputs: float32 by graph output
    name, all that a segment may write at this evaluation and the supernet knows.
    """

    step: int
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


class StepRecorder:
    """Records evaluations until every segment was launched twice, where it is; ``record`` of ``run_loop``."""

    def __init__(
        self,
        segments: Sequence[VariantEntry],
        launches: Sequence[tuple[int, int]],
        schedule: Schedule,
        guidance_scale: float | None,
        slots: int,
        *,
        again: bool = True,
    ) -> None:
        """launches: (step, segment) in order. schedule: after promotion. slots: entries of the stack. again: False
        until every segment was launched once."""
        first: dict[int, int] = {}
        second: dict[int, int] = {}
        for step, segment in launches:
            if segment in first:
                second.setdefault(segment, step)
            first.setdefault(segment, step)
        last = max((*first.values(), *(second.values() if again else ())))
        self._wanted = sorted({step for step, _ in launches if step <= last})
        self._writes = {name for segment in segments for name in segment.writes}
        self._kinds = schedule.cache_kinds
        self._kept = [{b for b, kept in zip(self._kinds, row, strict=True) if kept} for row in schedule.gates]
        self._guidance_scale = guidance_scale
        self._slots = slots
        self.recordings: list[StepRecording] = []

    @property
    def complete(self) -> bool:
        """Whether all evaluations that are wanted were seen."""
        return len(self.recordings) == len(self._wanted)

    def stored(self, step: int) -> set[str]:
        """Blocks whose caches are recorded after evaluation ``step``."""
        known = {stored_block(name, self._kinds) for name in self._writes}
        return {block for block in self._kept[step] if block in known}

    def __call__(self, evaluation: Evaluation) -> None:
        """Take one evaluation of the loop."""
        if self.complete or evaluation.step != self._wanted[len(self.recordings)]:
            return
        outputs = {PREDICTION: host(evaluation.prediction)}
        for name in self._writes:
            block = stored_block(name, self._kinds)
            if block in self._kept[evaluation.step]:
                outputs[name] = cache_tensor(name, evaluation.after)
        inputs = evaluation_inputs(evaluation, self._guidance_scale, self._slots)
        self.recordings.append(StepRecording(evaluation.step, inputs, outputs))


def stored_block(name: str, kinds: Mapping[str, str]) -> str | None:
    """The block whose store is the tensor of a graph's input or output; None for what the supernet does not store.

    kinds: cache kind by block.
    """
    try:
        block, _ = cache_place(name)
    except ValueError:
        return None
    stored = "residual" if name.removeprefix("new_").startswith("residual.") else "output"
    return block if kinds.get(block) == stored else None


def recorder_for(
    plan: PlanEntry, schedule: Schedule, guidance_scale: float | None, *, again: bool = True
) -> Recorder | StepRecorder:
    """The recorder of a plan's layout; ``schedule`` after promotion. again: record a second time."""
    launches = [(launch.step, launch.variant) for launch in plan.launches]
    if plan.layout == "variants":
        return Recorder(plan.variants, launches, guidance_scale, plan.slots, again=again)
    return StepRecorder(plan.variants, launches, schedule, guidance_scale, plan.slots, again=again)


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
            given = {
                spec.name: from_storage(self._arena[offsets[spec.name] :], spec)
                if spec.name in offsets
                else inputs[spec.name].astype(np.float32 if spec.dtype == "bfloat16" else spec.dtype)
                for spec in entry.graph.inputs
            }
            outputs = dict(self._run(launch.variant, given))
            specs = {spec.name: spec for spec in entry.graph.outputs}
            for name, offset in zip(entry.writes, launch.writes, strict=True):
                data = as_bytes(to_storage(outputs[name], specs[name].dtype))
                self._arena[offset : offset + data.nbytes] = data
            yield Launched(index, launch.variant, given, outputs)
