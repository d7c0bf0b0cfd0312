"""MeanCache (arXiv 2601.19961) under Euler's method for flow matching: average velocities from cached differences.

The authors' code has tables: ``calc``, the steps that run, and ``edges``, for each of these but the last how the
steps up to the next one are estimated: ``v_diff_mean`` or ``v_diff_mean_jvp1_sK`` with K up to 6 (``chain`` where
there are none). With v the last velocity, used or estimated, and u the average velocity of the last K steps (K = 1
for ``v_diff_mean``), the next is v - (v' - u) / S * ds: v' the velocity at the first of these steps, S the noise
levels that they cross, ds the one ahead. All of it is linear in the velocities that were computed, so the schedule
gets a solver.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.importers.base import Imported, Importer, Source, check_steps_of, flow_sigmas
from dipgo_deploy.schedule.importers.linear import Value, as_predictions, total
from dipgo_deploy.schedule.importers.settings import Settings

_EDGE = re.compile(r"v_diff_mean(?:_jvp1_s([1-6]))?")


def velocities(runs: Sequence[bool], lengths: Sequence[int], sigmas: Sequence[float]) -> list[Value]:
    """The velocity that each of the T steps takes.

    lengths: for each step that does not run, K. sigmas: T + 1 noise levels.
    """
    taken: list[Value] = []
    steps = [after - before for before, after in zip(sigmas, sigmas[1:], strict=False)]
    for step, run in enumerate(runs):
        if run:
            taken.append({step: 1.0})
            continue
        first = step - min(lengths[step], step)
        span = sum(steps[first:step])
        average = total(*((steps[other] / span, taken[other]) for other in range(first, step)))
        slope = total((1 / span, taken[first]), (-1 / span, average))
        taken.append(total((1, taken[step - 1]), (-steps[step], slope)))
    return taken


def _read(data: bytes, source: Source) -> Imported:
    settings = Settings.from_json(data, "MeanCache")
    calc = settings.integers("calc")
    edges = settings.value("edges")
    check_steps_of(settings, "steps", source)
    settings.done()
    steps = source.steps
    if list(calc) != sorted(set(calc)) or not calc or calc[0] != 0 or calc[-1] >= steps:
        raise UserError(f"calc: must rise from step 0 to at most {steps - 1}, the last of this sampler")
    if not isinstance(edges, list) or len(edges) != len(calc) - 1:
        raise UserError(f"edges: give {len(calc) - 1}, one for each step that runs but the last")
    lengths = [0] * steps
    for place, (edge, start) in enumerate(zip(edges, calc, strict=False)):
        found = _EDGE.fullmatch(edge) if isinstance(edge, str) else None
        if found is None and (edge != "chain" or calc[place + 1] != start + 1):
            raise UserError(f"edges: entry {place} is {repr(edge)[:40]}, not v_diff_mean or v_diff_mean_jvp1_s2 to _s6")
        for step in range(start + 1, calc[place + 1]):
            lengths[step] = int((found and found[1]) or 1)
    for step in range(calc[-1] + 1, steps):
        raise UserError(f"calc: the last step, {step}, has to run")
    runs = [step in set(calc) for step in range(steps)]
    return Imported(predictions=as_predictions(runs, velocities(runs, lengths, flow_sigmas(source.target))))


IMPORTER = Importer(
    kind="meancache",
    title="Read MeanCache's path: the steps that run, and how velocities in between are estimated.",
    file='JSON with the tables of their code: {"calc": [0, 1, ...], "edges": ["chain", "v_diff_mean_jvp1_s2", ...]}',
    read=_read,
    example="meancache.json --model ./z-image --steps 50 -o schedule.json",
)
