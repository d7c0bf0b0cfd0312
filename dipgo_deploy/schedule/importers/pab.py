"""Pyramid Attention Broadcast (arXiv 2408.12588) as diffusers has it: attentions computed at every N-th evaluation.

Settings are those of ``PyramidAttentionBroadcastConfig``: ``spatial_attention_block_skip_range`` and
``cross_attention_block_skip_range``, N for self-attention (a joint attention too) and for attention to the text, and
for both the range of timesteps, its ends left out, within which they are skipped (100 to 800). Evaluations are
counted from 0; the first one computes.
"""

from __future__ import annotations

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.importers.base import Imported, Importer, Source
from dipgo_deploy.schedule.importers.settings import Settings

_CROSS, _SELF = frozenset({"attn2"}), frozenset({"attn", "attn1", "attention"})
_RANGE = [100, 800]


def _read(data: bytes, source: Source) -> Imported:
    settings = Settings.from_json(data, "PAB")
    ranges: dict[frozenset[str], tuple[int, tuple[float, ...]]] = {}
    for kind, parts in (("spatial", _SELF), ("cross", _CROSS)):
        between = settings.numbers(f"{kind}_attention_timestep_skip_range", _RANGE)
        if len(between) != 2:
            raise UserError(f"{kind}_attention_timestep_skip_range: give two timesteps")
        every = f"{kind}_attention_block_skip_range"
        if every in settings:
            ranges[parts] = (settings.integer(every, least=1), between)
        settings.ignore(every)
    if "temporal_attention_block_skip_range" in settings:
        raise UserError(
            "temporal_attention_block_skip_range: no model here has attention over time alone; leave it out"
        )
    settings.ignore("temporal_attention_block_skip_range", "temporal_attention_timestep_skip_range")
    settings.done()
    rules = [
        next((rule for parts, rule in ranges.items() if name.rpartition(".")[2] in parts), None)
        for name in source.names
    ]
    if not any(rules):
        raise UserError("no layer of this model is an attention that these settings skip; give another model")
    timesteps = source.target.timesteps
    gates = tuple(
        tuple(rule is None or step % rule[0] == 0 or not rule[1][0] < timestep < rule[1][1] for rule in rules)
        for step, timestep in enumerate(timesteps)
    )
    return Imported(gates)


IMPORTER = Importer(
    kind="pab",
    title="Read the settings of Pyramid Attention Broadcast.",
    file="JSON with the settings of diffusers' PyramidAttentionBroadcastConfig",
    read=_read,
    example="pab.json --model ./pixart --sampler ddim --steps 50 -o schedule.json",
    granularity="layer",
    cache="output",
)
