"""Several schedules of one model in one engine directory: one trace, one file of weights, and every graph that two
schedules need is there once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import cast

from dipgo_deploy import arguments
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.options import ExportOptions, LayoutChoice
from dipgo_deploy.export.planning import (
    Notify,
    PlannedExport,
    compiled_like,
    in_layout,
    plan_export,
    read_schedule,
    replan,
)
from dipgo_deploy.schedule.document import Schedule

ScheduleLike = Schedule | str | os.PathLike[str]
Schedules = ScheduleLike | Mapping[str, ScheduleLike]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def read_schedules(schedules: object, *, several: bool = False) -> dict[str, Schedule]:
    """Schedules by name, the usual one first; one alone has the name ``""``, unless it joins ``several``.

    Raises:
        UserError: a file that is no schedule, an empty mapping, or a name that is no name of a file.
    """
    if not isinstance(schedules, Mapping):
        if several:
            raise arguments.wrong("schedules", schedules, "schedules or their files by name")
        return {"": read_schedule(schedules)}
    if not schedules:
        raise UserError("schedule: there is none; give a schedule, its file, or several by name")
    for name in schedules:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(
                f"schedule name {name!r}: give letters, digits, dots, dashes and underscores, 64 at most, the first a "
                "letter or a digit"
            )
    found = {cast("str", name): read_schedule(schedule) for name, schedule in schedules.items()}
    return {"": next(iter(found.values()))} if len(found) == 1 and not several else found


def plan_exports(
    model: str | os.PathLike[str],
    schedules: Mapping[str, Schedule],
    options: ExportOptions | None = None,
    notify: Notify = lambda stage: None,
    *,
    there: Mapping[str, LayoutChoice] = MappingProxyType({}),
) -> tuple[PlannedExport, ...]:
    """Load the model, trace it once and compile its schedules, ready to be written together.

    Args:
        model, options, notify: as for ``plan_export``.
        schedules: as ``read_schedules`` gives them.
        there: of schedules that were exported before, their layouts; their graphs do not change for the others' sake,
            but for the length of the history.

    Raises:
        UserError: as ``plan_export``, or a schedule that needs a trace of its own; it names the schedule.
    """
    conditional = any(step for schedule in schedules.values() for step in schedule.conditional_only)
    first = plan_export(model, next(iter(schedules.values())), options, notify, conditional=conditional)
    found = [first]
    for name, schedule in [*schedules.items()][1:]:
        try:
            found.append(replan(first, schedule))
        except UserError as error:
            raise UserError(f"schedule {name}: {error}") from None
    exports = {
        name: in_layout(export, there.get(name, export.options.layout))
        for name, export in zip(schedules, found, strict=True)
    }
    return joined(exports, tuple(there))


def joined(exports: Mapping[str, PlannedExport], there: Sequence[str] = ()) -> tuple[PlannedExport, ...]:
    """Exports of one trace as they are written into one directory, under their names.

    Variants that compute and read the same write the same, so that they are one graph; their histories are equally
    long, where they have as many entries behind the predictions; and the tables have rows for all of them. there: see
    ``plan_exports``.
    """
    if len(exports) == 1:
        return tuple(exports.values())
    variants = {name: export.plan.variants if export.segments is None else () for name, export in exports.items()}
    alike = {
        name: [one for other in exports if name not in there or other in there for one in variants[other]]
        for name in exports
    }
    rows = dict.fromkeys(timestep for export in exports.values() for timestep in export.table_timesteps)
    room = max(export.chain for export in exports.values())
    names = tuple(exports)
    return tuple(
        in_layout(
            replace(
                export,
                plan=compiled_like(export, alike[name]),
                name=name,
                others=names[1:] if name == names[0] else (),
                room=room,
                table_rows=tuple(rows),
            ),
            export.options.layout,
        )
        for name, export in exports.items()
    )


def shared_graphs(exports: Sequence[PlannedExport]) -> int:
    """How many graphs the directory has fewer than its schedules would have one by one."""
    units = [export.alike(unit) for export in exports for unit in export.units]
    return len(units) - len(set(units))
