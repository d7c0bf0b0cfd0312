"""model + schedule -> engine directory: what ``dipgo-export`` does, as one call."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from dipgo_deploy import arguments
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.staging import staged_directory
from dipgo_deploy.export.options import ExportOptions, check_options
from dipgo_deploy.export.planning import Notify, PlannedExport, in_layout, plan_export, replan
from dipgo_deploy.export.several import Schedules, plan_exports, read_schedules
from dipgo_deploy.export.writing import Agreed, publish, warn, write_bundle
from dipgo_deploy.reference.saved import is_pipeline, pipeline_name, saved_pipeline

__all__ = [
    "ExportOptions",
    "PlannedExport",
    "export_bundle",
    "in_layout",
    "plan_export",
    "plan_exports",
    "publish",
    "replan",
]


def export_bundle(
    model: str | os.PathLike[str] | Any,
    schedule: Schedules,
    engine_dir: str | os.PathLike[str],
    options: ExportOptions | None = None,
    notify: Notify = lambda stage: None,
    *,
    planned: Callable[[PlannedExport], None] = lambda export: None,
    agreed: Agreed = lambda agreement: None,
    note: Notify = warn,
) -> Bundle:
    """Export a model under a schedule into ``engine_dir``, which appears only when everything in it was checked.

    Args:
        model: a built-in name, a folder in diffusers' format, a hub id, a file as
            ``model.safetensors?config=FOLDER``, or a diffusers pipeline. A pipeline is saved to a temporary folder
            beside ``engine_dir`` first, so its weights are exported as they are now; the engine directory then names
            the model that the pipeline was loaded from.
        schedule: a schedule or its file; or several of the same blocks by name, which the directory then offers, the
            first where none is chosen.
        engine_dir: the folder to write.
        options: how; None for ``ExportOptions()``, the defaults of ``dipgo-export``.
        notify: told each stage when it begins.
        planned: told what is going to be written, before it is, once for each schedule.
        agreed: told how far the denoiser agrees with the supernet, where they were compared, once for each schedule.
        note: told what was not compared or not recorded, a line each; a warning in the log by default.

    Raises:
        UserError: bad input, an existing target, or a model that cannot be exported.
        ToleranceError: something differs from the model beyond the family's tolerance.
    """
    options = options or ExportOptions()
    if not is_pipeline(model):
        model = arguments.path_text("model", model)
    check_options(options)
    target = arguments.path("engine_dir", engine_dir)
    schedules = read_schedules(schedule)

    def write(name: str, recorded: str | None = None) -> None:
        exports = plan_exports(name, schedules, options, notify)
        for export in exports:
            planned(export)
        write_bundle(exports, stage, notify, agreed, note, model_name=recorded)

    with staged_directory(target, overwrite=options.overwrite) as stage:
        if isinstance(model, str):
            write(model)
        else:
            notify("saving the pipeline")
            with saved_pipeline(model, target) as folder:
                write(folder, pipeline_name(model))
    return Bundle.open(target)
