"""FORA (arXiv 2407.01425) as its authors' code counts: steps downwards, from T - 1 to 0.

Settings are those of ``sample.py``: a layer is computed at the first step (T - 1) and at those that
``cache-threshold`` divides; in between its last output is used. ``dipgo-schedule uniform`` counts upwards: unless the
interval divides T - 1, other evaluations are computed there.
"""

from __future__ import annotations

from dipgo_deploy.schedule.importers.base import Imported, Importer, Source, check_steps_of, whole_steps
from dipgo_deploy.schedule.importers.settings import Settings


def computed(steps: int, interval: int) -> tuple[bool, ...]:
    """Which of the T evaluations compute."""
    return tuple(step == steps - 1 or step % interval == 0 for step in reversed(range(steps)))


def _read(data: bytes, source: Source) -> Imported:
    settings = Settings.from_json(data, "FORA")
    interval = settings.integer("cache_threshold", least=1)
    check_steps_of(settings, "num_sampling_steps", source)
    settings.ignore("save_cache", "cache_subtype", "cfg_scale", "seed", "image_size", "num_cache", "model")
    settings.done()
    return Imported(whole_steps(computed(source.steps, interval), len(source.names)))


IMPORTER = Importer(
    kind="fora",
    title="Read FORA's interval, with the phase that its authors' code has.",
    file='JSON with the settings of their sample.py, such as {"cache-threshold": 3}',
    read=_read,
    example="fora.json --model DiT-XL-2-256 --sampler ddim --steps 250 -o schedule.json",
    granularity="layer",
)
