"""T-GATE (arXiv 2404.02747) on a transformer with attention to the text (PixArt, Sana): ``gate_step`` and three more.

Before ``gate_step`` (10) attention to the text is computed, from then on its output is kept. Self-attention computes
up to ``warm_up`` (2), then at every ``sp_interval``-th step (5), at the last one before the gate, and from the gate
on at every ``fi_interval``-th (1). With guidance T-GATE does two more things at the gate, which a schedule does not
say: it goes on without guidance, and what it keeps is the mean of both halves. So the numbers are its own without
guidance only, as for the distilled models it has pipelines for.
"""

from __future__ import annotations

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.importers.base import Imported, Importer, Source, check_steps_of
from dipgo_deploy.schedule.importers.settings import Settings

_NOTE = (
    "with guidance T-GATE drops it at gate_step and keeps the mean of both halves; this schedule keeps guidance, so "
    "the numbers are T-GATE's without guidance only"
)


def _read(data: bytes, source: Source) -> Imported:
    settings = Settings.from_json(data, "T-GATE")
    gate = settings.integer("gate_step", 10, least=1)
    before, after = settings.integer("sp_interval", 5, least=1), settings.integer("fi_interval", 1, least=1)
    warm = settings.integer("warm_up", 2)
    check_steps_of(settings, "num_inference_steps", source)
    settings.done()
    parts = [name.rpartition(".")[2] for name in source.names]
    if "attn2" not in parts:
        raise UserError("T-GATE is about attention to the text, and no layer of this model is that alone (attn2)")

    def is_kept(step: int, part: str) -> bool:
        if part == "attn2":
            return step < gate
        if part != "attn1" or step <= min(warm, gate - 1) or step == gate - 1:
            return True
        return step % (before if step < gate else after) == 0

    gates = tuple(tuple(is_kept(step, part) for part in parts) for step in range(source.steps))
    return Imported(gates, notes=(_NOTE,))


IMPORTER = Importer(
    kind="tgate",
    title="Read T-GATE's settings: from one step on, attention to the text is kept.",
    file='JSON such as {"gate_step": 10, "sp_interval": 5, "fi_interval": 1, "warm_up": 2}',
    read=_read,
    example="tgate.json --model ./pixart --sampler ddim --steps 25 -o schedule.json",
    granularity="layer",
    cache="output",
)
