"""OpenVINO GenAI's ``TaylorSeerCacheConfig``: three numbers, and a line through the last two predictions in between.

``cache_interval`` (3), ``disable_cache_before_step`` (6) and ``disable_cache_after_step`` (-2; negative: counted from
the end). What is extrapolated is what the whole transformer gives, which is a weighted sum of predictions: the
schedule gets a solver, whose rows are the sampler's with these predictions, and an evaluation for each launch.
"""

from __future__ import annotations

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.importers.base import Imported, Importer, Source
from dipgo_deploy.schedule.importers.linear import as_predictions
from dipgo_deploy.schedule.importers.settings import Settings
from dipgo_deploy.schedule.importers.taylorseer import reads

_LEAST = 2  # predictions that a line needs


def computed(steps: int, interval: int, before: int, after: int) -> tuple[bool, ...]:
    """Which of the T evaluations run."""
    end = after if after >= 0 else steps + after
    if before >= steps or end <= before:
        return (True,) * steps
    start = max(before, _LEAST)
    return tuple(step < start or step >= end or (step - start) % interval == interval - 1 for step in range(steps))


def _read(data: bytes, source: Source) -> Imported:
    settings = Settings.from_json(data, "OpenVINO's TaylorSeerCacheConfig")
    interval = settings.integer("cache_interval", 3, least=2)
    before = settings.integer("disable_cache_before_step", 6)
    after = settings.integer("disable_cache_after_step", -2, least=-10_000)
    settings.done()
    runs = computed(source.steps, interval, before, after)
    if all(runs):
        raise UserError(f"these settings leave nothing out of {source.steps} steps; give more steps or other settings")
    return Imported(predictions=as_predictions(runs, reads(runs, 1, 0)))


IMPORTER = Importer(
    kind="openvino-taylorseer",
    title="Read the three numbers of OpenVINO GenAI's TaylorSeer.",
    file='JSON such as {"cache_interval": 3, "disable_cache_before_step": 6, "disable_cache_after_step": -2}',
    read=_read,
    example="taylor.json --model ./flux --steps 28 -o schedule.json",
)
