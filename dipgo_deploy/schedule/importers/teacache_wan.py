"""TeaCache (arXiv 2411.19108) for Wan: its decision looks at the embedding of the timestep alone.

Settings are those of the authors' ``teacache_generate.py``: ``teacache_thresh``, ``use_ret_steps`` (false) and
``coefficients`` (those of Wan 2.1 text to video of 30 and 40 blocks are known). Between the first and the last steps
(1 and 1; with ``use_ret_steps`` 5 and none) the relative L1 change of the embedding (with ``use_ret_steps``: of its
projection) goes through a polynomial and is summed; a step runs where the sum reaches the threshold. A step that does
not run adds what all blocks together added at the last one that did. The embeddings are made from the model's own
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.importers.base import Imported, Importer, Source, check_steps_of, whole_steps
from dipgo_deploy.schedule.importers.settings import Settings

# (blocks of Wan 2.1, use_ret_steps) -> coefficients for text to video, the highest power first.
_KNOWN = {
    (30, True): (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
    (40, True): (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
    (30, False): (2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01),
    (40, False): (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
}
_EDGES = {False: (1, 1), True: (5, 0)}


def computed(
    embeddings: Any, coefficients: Sequence[float], threshold: float, first: int, last: int
) -> tuple[bool, ...]:
    """Which of the T evaluations run. embeddings: (T, any). first, last: how many at both ends run in any case."""
    import numpy as np

    steps, total = len(embeddings), 0.0
    runs = []
    for step in range(steps):
        run = step < max(first, 1) or step >= steps - last
        if not run:
            before = embeddings[step - 1]
            change = float(np.abs(embeddings[step] - before).mean() / np.abs(before).mean())
            total += float(np.polyval(coefficients, change))
            run = not total < threshold
        total = 0.0 if run else total
        runs.append(run)
    return tuple(runs)


def _read(data: bytes, source: Source) -> Imported:
    settings = Settings.from_json(data, "TeaCache for Wan")
    threshold = settings.number("teacache_thresh", least=0)
    retained = settings.flag("use_ret_steps", False)
    given = settings.numbers("coefficients", _KNOWN.get((len(source.names), retained), []))
    check_steps_of(settings, "sample_steps", source)
    settings.done()
    if not 0 < len(given) <= 10:
        raise UserError(
            f"coefficients: none are known for {len(source.names)} blocks; give up to 10, highest power first"
        )
    embeddings = source.target.embeddings
    if embeddings is None:
        raise UserError("only Wan's embedding of the timestep is known here; give a Wan model, or use magcache")
    runs = computed(embeddings()[1 if retained else 0], given, threshold, *_EDGES[retained])
    return Imported(whole_steps(runs, len(source.names)))


IMPORTER = Importer(
    kind="teacache-wan",
    title="Read TeaCache's settings for Wan, where the embedding of the timestep decides.",
    file='JSON such as {"teacache_thresh": 0.2, "use_ret_steps": true}',
    read=_read,
    example="teacache.json --model ./wan --steps 50 -o schedule.json",
    cache="residual",
)
