"""What is recorded of the supernet's loop where an evaluation is several launches: whole evaluations.

A part of an evaluation has inputs that the supernet has no name for (a time embedding), so a segment is judged where it
stands: each evaluation gets the supernet's latent, its launches run in order (``compare.step_runner``), and what they
write is compared where the supernet knows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dipgo_deploy.bundle.names import PREDICTION, parse_cache
from dipgo_deploy.reference.conditions import host
from dipgo_deploy.reference.recording import Recorder, cache_tensor, evaluation_inputs

if TYPE_CHECKING:
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.bundle.manifest import VariantEntry
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.supernet.loop import Evaluation


@dataclass(frozen=True)
class StepRecording:
    """One evaluation of the supernet.

    inputs: by graph input name, float32 or int64, all but the tensors in the arena and rows of tables.
    outputs: float32 by graph output name, all that a segment may write at this evaluation and the supernet knows.
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
        slots: int,
        *,
        again: bool = True,
    ) -> None:
        """launches: (step, segment) in order. schedule: after promotion. slots: entries of the history. again: False
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
        inputs = evaluation_inputs(evaluation, self._slots)
        self.recordings.append(StepRecording(evaluation.step, inputs, outputs))


def stored_block(name: str, kinds: Mapping[str, str]) -> str | None:
    """The block whose store is the tensor of a graph's input or output; None for what the supernet does not store.

    kinds: cache kind by block.
    """
    cache = parse_cache(name)
    return cache.block if cache is not None and kinds.get(cache.block) == cache.kind else None


def recorder_for(bundle: Bundle, schedule: Schedule, *, again: bool = True) -> Recorder | StepRecorder:
    """The recorder for a plan; ``schedule`` after promotion. again: record a second time."""
    plan = bundle.manifest.plan
    launches = [(launch.step, launch.variant) for launch in plan.launches]
    if plan.one_launch_each:
        forecasts = {launch.step: launch.forecast for launch in plan.launches}
        return Recorder(plan.variants, launches, plan.slots, again=again, forecasts=forecasts)
    return StepRecorder(plan.variants, launches, schedule, plan.slots, again=again)
