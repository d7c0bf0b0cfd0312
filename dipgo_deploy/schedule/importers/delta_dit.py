"""Delta-DiT (arXiv 2406.01125): residuals of the last blocks are kept early on, those of the first ones later.

Settings are the paper's: ``interval`` N (every N-th step computes all), ``blocks`` (how many are left out in between)
and ``gate_step`` b: steps before b leave out the last blocks, which draw details, steps from b on the first ones,
which draw outlines. What those blocks together added at the last full step is added again. The authors have released
no code; this follows the paper.
"""

from __future__ import annotations

from dipgo_deploy.schedule.importers.base import Imported, Importer, Source, check_steps_of
from dipgo_deploy.schedule.importers.settings import Settings
from dipgo_deploy.schedule.importers.stacks import stacks_of


def _read(data: bytes, source: Source) -> Imported:
    settings = Settings.from_json(data, "Delta-DiT")
    stacks_of(source.names)
    count = len(source.names)
    interval = settings.integer("interval", least=1)
    blocks = settings.integer("blocks", least=1, most=count)
    gate = settings.integer("gate_step")
    check_steps_of(settings, "num_steps", source)
    settings.done()

    def is_kept(step: int, place: int) -> bool:
        return step % interval == 0 or (place < count - blocks if step < gate else place >= blocks)

    gates = tuple(tuple(is_kept(step, place) for place in range(count)) for step in range(source.steps))
    return Imported(gates)


IMPORTER = Importer(
    kind="delta-dit",
    title="Read Delta-DiT's settings: which blocks are left out early and which later.",
    file='JSON such as {"interval": 2, "blocks": 14, "gate_step": 25}',
    read=_read,
    example="delta.json --model DiT-XL-2-256 --sampler ddim --steps 50 -o schedule.json",
    cache="residual",
)
