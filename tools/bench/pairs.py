"""The full loop and the pruned loop of one model, exported from one trace."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dipgo_deploy.bundle.staging import staged_directory
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, replan
from dipgo_deploy.export.writing import write_bundle
from dipgo_deploy.sampler import evaluations, make_scheduler
from dipgo_deploy.schedule import builders
from dipgo_deploy.schedule.document import Schedule

ASSETS = Path(__file__).resolve().parents[2] / "dipgo_deploy" / "assets"
SCHEDULES = ASSETS / "schedules"

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Pair:
    """Two engine directories of one model, and the seconds that went into them.

    trace_seconds: loading, tracing and planning, shared by both. full_seconds, pruned_seconds: cutting, checking and
    writing of each, its text encoder and VAE decoder included.
    """

    full: Path
    pruned: Path
    trace_seconds: float
    full_seconds: float
    pruned_seconds: float


def full_schedule(schedule: Schedule) -> Schedule:
    """The full run that it stands for: every gate kept, its sampler in place of a fitted solver."""
    steps, sampler = schedule.steps, schedule.sampler
    if schedule.solver is not None:
        steps = evaluations(make_scheduler(sampler.class_name, sampler.config), sampler.num_inference_steps)
    gates = builders.full(steps, len(schedule.blocks))
    return schedule.with_solver(None, gates).with_gates(gates, provenance={"method": "full", "parameters": {}})


def write_engine(planned: PlannedExport, engine_dir: Path, notify: Notify = lambda stage: None) -> float:
    """Write an engine directory, replacing an older one; returns the seconds it took."""
    start = time.perf_counter()
    with staged_directory(engine_dir, overwrite=True) as stage:
        write_bundle(planned, stage, notify)
    return time.perf_counter() - start


def export_pair(
    model: str, schedule: Schedule, folder: Path, options: ExportOptions, notify: Notify = lambda stage: None
) -> Pair:
    """Export ``schedule`` into ``folder/pruned`` and the full loop of the same sampler into ``folder/full``."""
    start = time.perf_counter()
    planned = plan_export(model, schedule, options, notify)
    traced = time.perf_counter() - start
    pruned_seconds = write_engine(planned, folder / "pruned", notify)
    full_seconds = write_engine(replan(planned, full_schedule(schedule)), folder / "full", notify)
    return Pair(folder / "full", folder / "pruned", traced, full_seconds, pruned_seconds)
