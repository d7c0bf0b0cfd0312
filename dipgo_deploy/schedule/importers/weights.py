"""Weights of your own for what is not computed, as L2P (arXiv 2604.26365) learns them: one list a step.

``compute_step`` lists the steps that run. ``weights`` has, for each other step by its number, weights of the values
that were computed last, the latest first. ``of`` says of what: ``blocks`` (each block's value, at most 32) or
``prediction`` (what the whole denoiser gives, any number of them; the schedule gets a solver). L2P's authors have not
released files; this layout is this project's.
"""

from __future__ import annotations

from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.importers.base import Imported, Importer, Source, check_steps_of, whole_steps
from dipgo_deploy.schedule.importers.linear import Value, as_forecast, as_predictions
from dipgo_deploy.schedule.importers.settings import Settings
from dipgo_deploy.schedule.importers.step_list import computed


def _read(data: bytes, source: Source) -> Imported:
    settings = Settings.from_json(data, "learned weights")
    of = settings.value("of", "blocks")
    if of not in ("blocks", "prediction"):
        raise UserError(f"of: {repr(of)[:40]} is not blocks or prediction")
    check_steps_of(settings, "steps", source)
    given: Any = settings.value("weights")
    if not isinstance(given, dict) or len(given) > source.most:
        raise UserError("weights: is no object with a list for each step that is not computed")
    rows = Settings(given, "weights")
    runs = computed(settings, source.steps)
    settings.ignore("compute_step", "cache_step", "mask")
    settings.done()
    reads: list[Value] = []
    known: list[int] = []
    for step, run in enumerate(runs):
        if run:
            known.insert(0, step)
            reads.append({step: 1.0})
            continue
        row = rows.numbers(str(step))
        if not 0 < len(row) <= len(known):
            raise UserError(f"weights: step {step} has {len(row)}, and {len(known)} values were computed before it")
        reads.append(dict(zip(known, row, strict=False)))
    rows.done()
    if of == "prediction":
        return Imported(predictions=as_predictions(runs, reads))
    blocks = len(source.names)
    return Imported(whole_steps(runs, blocks), as_forecast(runs, reads, (True,) * blocks))


IMPORTER = Importer(
    kind="weights",
    title="Read learned weights of past values, such as L2P's, for each step that is not computed.",
    file='JSON: {"compute_step": [0, 1, 4], "weights": {"2": [1.8, -0.8], "3": [2.5, -1.5]}, "of": "blocks"}',
    read=_read,
    example="l2p.json --model ./flux --steps 50 -o schedule.json",
)
