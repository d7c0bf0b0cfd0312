"""Further schedules for an engine directory that is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.bundle.quantized import ACTIVATIONS
from dipgo_deploy.bundle.staging import keep_plans, staged_directory
from dipgo_deploy.bundle.tables import Tables
from dipgo_deploy.bundle.weights import WEIGHTS_NAME, different_weight
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.again import options_of
from dipgo_deploy.export.options import LayoutChoice
from dipgo_deploy.export.planning import Notify, PlannedExport
from dipgo_deploy.export.several import ScheduleLike, plan_exports, read_schedules
from dipgo_deploy.export.writing import Agreed, warn, write_bundle

# What the schedule of a directory that had one is called, when it gets others.
DEFAULT = "default"


def add_schedules(
    engine_dir: str | os.PathLike[str],
    schedules: Mapping[str, ScheduleLike],
    *,
    model: str | os.PathLike[str] | None = None,
    layout: LayoutChoice = "auto",
    check: bool = True,
    notify: Notify = lambda stage: None,
    planned: Callable[[PlannedExport], None] = lambda export: None,
    agreed: Agreed = lambda agreement: None,
    note: Notify = warn,
) -> Bundle:
    """Give an engine directory further schedules of its model, with all else as it is.

    The model is traced again. Weights, components and engines are those that are there; so are the graphs, unless a
    new schedule has more predictions than any before: then all of them get the room for it. A prologue gets rows for
    its timesteps. Ranges of activations in 8 bits are recorded again, of all schedules together.

    Args:
        engine_dir: made by ``dipgo-export``. One with a single schedule calls that ``default`` from now on.
        schedules: by name.
        model: where the model is, if not where the manifest says.
        layout: of the new schedules.
        check, notify, planned, agreed, note: as ``export_bundle`` has them; of all schedules.

    Raises:
        UserError: as ``export_bundle``; a name that is there already; or another model than was exported.
    """
    bundle = Bundle.open(engine_dir)
    every = {one.manifest.name or DEFAULT: one for one in bundle.with_each()}
    new = read_schedules(schedules, several=True)
    taken = next((name for name in new if name in every), None)
    if taken is not None:
        raise UserError(f"{bundle.path}: has a schedule {taken} already; give the new one another name")
    together = {**{name: one.load_schedule() for name, one in every.items()}, **new}
    options = replace(
        options_of(bundle),
        layout=layout,
        check=check,
        components=bool(bundle.manifest.components.graphs),
        max_variants=None,
        allow_other_config=False,
        self_test=None,
    )
    with staged_directory(bundle.path, overwrite=True) as stage:
        there = {name: one.manifest.plan.layout for name, one in every.items()}
        exports = plan_exports(model or bundle.manifest.model.name, together, options, notify, there=there)
        for export in exports:
            planned(export)
        written = write_bundle(exports, stage, notify, agreed, note, model_name=bundle.manifest.model.name)
        _check_same_model(bundle, written, stage)
        known = bundle.manifest.files
        changed = [name for name in written.graph_files() if name in known and written.files[name] != known[name]]
        if changed:
            why = "a longer history, or rows for more timesteps in the prologue"
            if written.quantized in ACTIVATIONS:
                why += ", or ranges of activations, which are recorded of all schedules together"
            note(f"{len(changed)} graphs changed ({why}); dipgo-build builds their engines again")
        bundle.check_unchanged()
        keep_plans(bundle.path, stage)
    return Bundle.open(bundle.path)


def _check_same_model(bundle: Bundle, written: Manifest, stage: Path) -> None:
    """Refuse (UserError) a model whose configuration or weights are not those that were exported."""
    again = (
        "is not the model that was exported, or an earlier version exported it; export all schedules together to "
        "another --engine-dir"
    )
    if written.model.config_hash != bundle.manifest.model.config_hash:
        raise UserError(f"{bundle.path}: {written.model.name} {again} (its configuration differs)")
    for folder in sorted({Path(name).parent for name in written.graph_files()}):
        if not (bundle.path / folder / WEIGHTS_NAME).is_file():
            continue
        other = different_weight(bundle.path / folder, stage / folder)
        if other is not None:
            raise UserError(f"{bundle.path}: {written.model.name} {again} ({other} differs)")
    before, after = Tables(bundle), Tables(Bundle(stage, written))
    for timestep in bundle.manifest.plan.table_timesteps:
        for name in before.rows.keys() & after.rows.keys():
            old, new = before.rows[name][before.row(timestep)], after.rows[name][after.row(timestep)]
            if not np.array_equal(old, new):
                raise UserError(f"{bundle.path}: {written.model.name} {again} (table {name} differs)")
