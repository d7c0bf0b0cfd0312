"""What an export makes of a case, as text: graphs by what they compute, launches, coefficients, offsets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dipgo_deploy.bundle.manifest import Layout, PlanEntry
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, replan
from dipgo_deploy.export.writing import write_bundle
from dipgo_deploy.schedule.document import Schedule
from tools.replay.cases import Case, Units, cases_of
from tools.replay.computation import graph_digest

LAYOUTS: tuple[Layout, ...] = ("variants", "segments")


def replay(
    model: str, units: Units, cases: list[Case], dtype: str = "fp32", sizes: Mapping[str, Any] | None = None
) -> str:
    """The text of some of a model's cases for one trace."""
    options = ExportOptions(
        layout="variants", dtype=dtype, check=False, components=False, low_memory=False, **(sizes or {})
    )
    full = next(cases_of(model, units)).schedule
    assert isinstance(full, Schedule)
    traced = plan_export(model, full, options)
    lines = []
    for case in cases:
        for layout in LAYOUTS if case.max_variants is None else LAYOUTS[:1]:
            lines += [f"== {case.name}, {layout}", *_outcome(traced, case, layout), ""]
    return "\n".join(lines)


def _outcome(traced: PlannedExport, case: Case, layout: Layout) -> Iterator[str]:
    options = replace(traced.options, layout=layout, max_variants=case.max_variants, strength=case.strength)
    try:
        if isinstance(case.schedule, UserError):
            raise case.schedule
        planned = replan(replace(traced, options=options), case.schedule)
    except UserError as error:
        yield f"refused: {error}"
        return
    with tempfile.TemporaryDirectory() as folder:
        plan = write_bundle(planned, Path(folder)).plan
        digests = [graph_digest(Path(folder) / variant.graph.file) for variant in plan.variants]
    yield from describe(plan, digests)


def describe(plan: PlanEntry, digests: list[str]) -> Iterator[str]:
    """A plan line by line; its graphs are told by ``digests``."""
    yield f"slots {plan.slots} noises {plan.noises} image {plan.image_slot} evaluations {plan.evaluations}"
    yield f"arena {plan.arena_bytes} lower bound {plan.lower_bound_bytes}"
    yield f"macs full {plan.macs_full} schedule {plan.macs_schedule} run {plan.macs_run}"
    for place, (variant, digest) in enumerate(zip(plan.variants, digests, strict=True)):
        inputs, outputs = len(variant.graph.inputs), len(variant.graph.outputs)
        yield f"graph {place} {digest} inputs {inputs} outputs {outputs} macs {variant.macs}"
    for launch in plan.launches:
        yield (
            f"step {launch.step} graph {launch.variant} t {_number(launch.timestep)} slot {launch.slot} "
            f"reads {_numbers(launch.reads)} writes {_numbers(launch.writes)} row {_numbers(launch.coefficients)}"
        )
    yield f"final {_numbers(plan.final)}"


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(map(_number, values)) or "-"


def _number(value: float) -> str:
    return f"{value:.12g}"
