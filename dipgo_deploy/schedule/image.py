"""Image-to-image: the later part of a schedule's run, started from a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Schedule, gate_rows
from dipgo_deploy.schedule.forecast import FittedForecast
from dipgo_deploy.schedule.validation import missing_halves


@dataclass(frozen=True)
class ImageRun:
    """What an export for image-to-image runs of a schedule's evaluations.

    Attributes:
        strength: as asked for.
        begin: evaluation of the full run that comes first.
        full: the schedule as given.
        raised: the gates (evaluation of the full run, block) that have to be kept: nothing was cached before the first
            evaluation, and where that is conditional only, guided ones after it lack the other half of what it caches.
    """

    strength: float
    begin: int
    full: Schedule
    raised: tuple[tuple[int, str], ...]

    def whole(self, keep: Sequence[Sequence[bool]]) -> tuple[tuple[bool, ...], ...]:
        """All rows of the schedule, with ``keep`` for those that are run."""
        return (*self.full.gates[: self.begin], *(tuple(row) for row in keep))

    def in_full(self, promoted: Sequence[tuple[int, str]]) -> tuple[tuple[int, str], ...]:
        """Gates re-enabled by the plan, and those that the start re-enabled, by evaluation of the full run."""
        return (*self.raised, *((step + self.begin, block) for step, block in promoted))


def image_run(schedule: Schedule, strength: float, begin: int) -> tuple[Schedule, ImageRun]:
    """The schedule of the evaluations from ``begin`` on, the first of them whole, and what was done to it.

    Raises:
        UserError: weights of a forecast that were fitted to the whole run.
    """
    if isinstance(schedule.forecast, FittedForecast):
        raise UserError(
            "--strength: the weights of the schedule's forecast were fitted to whole runs, and a part of one has fewer "
            "stored values; leave it out, or export a schedule with another forecast"
        )
    first, *rest = schedule.gates[begin:]
    there = schedule.runs[begin]
    names = schedule.block_names
    cells = zip(names, first, there, strict=True)
    raised = [(begin, name) for name, kept, runs in cells if runs and not kept]
    gates = [list(there), *map(list, rest)]
    lacking = missing_halves(gates, schedule.runs[begin:], schedule.conditional_only[begin:])
    for step, block, _ in lacking:
        gates[step][block] = True
        raised.append((begin + step, names[block]))
    return _with_rows(schedule, gates), ImageRun(strength, begin, schedule, tuple(raised))


def run_from(schedule: Schedule, begin: int) -> Schedule:
    """The schedule of the evaluations from ``begin`` on; its sampler stays that of the whole."""
    return _with_rows(schedule, schedule.gates[begin:])


def _with_rows(schedule: Schedule, gates: Sequence[Sequence[bool]]) -> Schedule:
    fields = {name: getattr(schedule, name) for name in Schedule.model_fields}
    own = range(schedule.steps - len(gates), schedule.steps)
    forecast = None if schedule.forecast is None else schedule.forecast.at(own)
    rows: dict[str, object] = {"keep": gate_rows(gates), "steps": len(gates), "forecast": forecast}
    for name in ("denoisers", "guidance"):
        whole = getattr(schedule, name)
        rows[name] = None if whole is None else whole[own.start :]
    return Schedule.model_validate({**fields, **rows})
