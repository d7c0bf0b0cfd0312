"""DeepCache (arXiv 2312.00858) with the grid of its authors' pipelines: full evaluations that are not evenly spread.

Settings are those of the pipelines: ``cache_interval``, ``cache_layer_id`` (the pair of a down and an up block, 0 the
outermost) and ``cache_block_id`` (the layer in it), or the package's ``cache_branch_id``; ``uniform`` (true), and if
it is false ``center`` and ``pow``: the grid is even in the power 1 / ``pow`` of the distance to the step ``center``.
"""

from __future__ import annotations

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.builders import shallow_between
from dipgo_deploy.schedule.importers.base import Imported, Importer, Source, check_steps_of
from dipgo_deploy.schedule.importers.settings import Settings

_LAYERS = 3  # a pair has in the UNets of Stable Diffusion, which DeepCache's branches count
_SMALLER = 0.02


def grid(steps: int, count: int, center: int, power: float) -> tuple[int, ...]:
    """``count`` steps that run in full. ``power`` is lowered until that many different ones come out, as theirs is.

    Raises UserError where none does.
    """
    import numpy as np

    while power > 1:
        # A root of the negative distance is complex; the integer part of the real part is taken, as NumPy's cast does.
        ends = complex(-center) ** (1 / power), complex(steps - center) ** (1 / power)
        places = np.unique(np.trunc((np.linspace(*ends, count + 1) ** power).real).astype(int))[1:-1]
        found = [0, *(int(place) + center for place in places)]
        if len(found) == count:
            return tuple(found)
        power -= _SMALLER
    raise UserError(f"pow: no grid of {count} of {steps} steps around {center} exists; give another center or interval")


def _read(data: bytes, source: Source) -> Imported:
    settings = Settings.from_json(data, "DeepCache")
    interval = settings.integer("cache_interval", least=1)
    if "cache_branch_id" in settings:
        branch = settings.integer("cache_branch_id")
    else:
        branch = _LAYERS * settings.integer("cache_layer_id", 0) + settings.integer("cache_block_id", 0)
    steps = source.steps
    if interval == 1 or settings.flag("uniform", True):
        full = frozenset(range(0, steps, interval))
    else:
        center, power = settings.integer("center", most=steps - 1), settings.number("pow", least=1, most=10)
        full = frozenset(grid(steps, -(-steps // interval), center, power))
    settings.ignore("center", "pow", "uniform", "cache_layer_id", "cache_block_id", "skip_mode")
    check_steps_of(settings, "num_inference_steps", source)
    settings.done()
    return Imported(shallow_between([step in full for step in range(steps)], source.names, branch))


IMPORTER = Importer(
    kind="deepcache",
    title="Read the settings of DeepCache's pipelines, with a grid of full evaluations that is not even.",
    file='JSON such as {"cache_interval": 5, "cache_layer_id": 0, "cache_block_id": 0, "uniform": false, "pow": 1.4, '
    '"center": 15}',
    read=_read,
    example="deepcache.json --model ./sd15 --sampler ddim --steps 50 -o schedule.json",
    granularity="layer",
    cache="output",
)
