"""What a report reads of an engine directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.engine.contents import contents
from dipgo_deploy.report.cells import Cells, cells_of, weights_by_variant
from dipgo_deploy.schedule.document import Schedule


@dataclass(frozen=True)
class Subject:
    """An engine directory.

    Attributes:
        schedule: what it runs, as the directory has it.
        facts: see ``engine.contents.contents``.
        cells: what becomes of each block at each evaluation.
    """

    bundle: Bundle
    schedule: Schedule
    facts: Mapping[str, Any]
    cells: Cells

    @property
    def name(self) -> str:
        """Of the directory, and of the schedule where it has several."""
        own = self.bundle.manifest.name
        return self.bundle.path.resolve().name + (f", {own}" if own else "")

    @property
    def full_evaluations(self) -> int:
        """Whole evaluations of the full run: of a schedule with a solver of its own those of the sampler that it stands
        for, one a step."""
        plan = self.bundle.manifest.plan
        return plan.evaluations if self.schedule.solver is None else self.schedule.sampler.num_inference_steps

    @property
    def macs_share(self) -> float | None:
        """Of the full run's multiply-accumulates what is launched; None where they are not known."""
        plan = self.bundle.manifest.plan
        full = plan.macs_full * self.full_evaluations
        return plan.macs_run / full if full else None


def read_subject(bundle: Bundle) -> Subject:
    """Read it; no graph is loaded.

    Raises:
        UserError: a schedule, a graph or an index of weights that cannot be read.
    """
    manifest, schedule = bundle.manifest, bundle.load_schedule()
    begin = manifest.sampler.begin or 0
    cells = cells_of(
        manifest,
        schedule.block_names,
        schedule.gates[begin:],
        schedule.runs[begin:],
        weights_by_variant(bundle.path, manifest.plan),
    )
    return Subject(bundle, schedule, contents(bundle), cells)
