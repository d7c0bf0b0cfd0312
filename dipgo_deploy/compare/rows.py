"""Rows that graphs take of tables and of the prologue, for recordings of the supernet. Torch-free, as ``graphs``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.prologue import class_name, prologue_entry, run_specs
from dipgo_deploy.bundle.tables import Tables
from dipgo_deploy.compare.graphs import OpenGraph, failures_named
from dipgo_deploy.reference.recording import Recording, as_read
from dipgo_deploy.reference.steps import StepRecording

if TYPE_CHECKING:
    from dipgo_deploy.bundle.manifest import Graph, PlanEntry
    from dipgo_deploy.schedule.guidance import Half

Recorded = TypeVar("Recorded", Recording, StepRecording)


def with_rows(bundle: Bundle, recordings: Iterable[Recorded], open_graph: OpenGraph) -> Iterator[Recorded]:
    """The recordings, of one run, with the rows that their launches take among their inputs, float32.

    Raises:
        UserError: tables or the prologue's graph cannot be loaded or run, or a class that has no rows.
    """
    plan, tables = bundle.manifest.plan, Tables(bundle)
    place = {launch.step: tables.row(launch.timestep) for launch in plan.launches if tables.has(launch.timestep)}
    made: list[dict[str, np.ndarray]] | None = None
    for recording in recordings:
        if made is None:
            made = _of_run(bundle, tables, recording.inputs, open_graph)
        every = [_at(plan, of_half, place.get(recording.step, 0)) for of_half in made]
        # Those of both halves of guidance as conditions have them.
        own = {name: np.concatenate([rows[name] for rows in every]) for name in every[0]} if every[1:] else every[0]
        rows = {**tables.at_evaluation(recording.step), **own}
        yield replace(recording, inputs={**recording.inputs, **rows}) if rows else recording


def _of_run(
    bundle: Bundle, tables: Tables, inputs: Mapping[str, np.ndarray], open_graph: OpenGraph
) -> list[dict[str, np.ndarray]]:
    """What is made at the start of a run, (timesteps, *row) or of all timesteps alike, for each of ``plan.halves``."""
    plan = bundle.manifest.plan
    made: list[dict[str, np.ndarray]] = [{} for _ in plan.halves]
    label = class_name(bundle.manifest)
    if tables.of_classes and label is not None:
        for rows, classes in zip(made, np.split(inputs[label], len(made)), strict=True):
            rows |= tables.for_classes(classes)
    if plan.prologue is not None:
        entry = prologue_entry(plan)
        with failures_named(bundle, entry), open_graph(bundle, entry) as run:
            for rows, half in zip(made, plan.halves, strict=True):
                given = prologue_inputs(plan.prologue, inputs, half)
                rows |= {name: np.array(values, np.float32) for name, values in run(given).items()}
    return made


def prologue_inputs(prologue: Graph, inputs: Mapping[str, np.ndarray], half: Half | None) -> dict[str, np.ndarray]:
    """What the prologue takes of recorded inputs; half: of guidance, where it makes the rows of one."""
    return {spec.name: as_read(inputs[spec.name], spec.shape, half) for spec in prologue.inputs}


def _at(plan: PlanEntry, made: Mapping[str, np.ndarray], place: int) -> dict[str, np.ndarray]:
    return {
        name: made[name][place] if made[name].shape != spec.shape else made[name]
        for name, spec in run_specs(plan).items()
    }
