"""Names of the inputs and outputs of the denoiser's graphs: what is the same in all, and those of caches."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dipgo_deploy.schedule.kinds import CacheKind

HISTORY = "stack"
HISTORY_BEFORE = "stack_before"
COEFFICIENTS = "coefficients"
TIMESTEP = "timestep"
GUIDANCE_SCALE = "guidance_scale"
PREDICTION = "noise_pred"
# What a decoder of videos hands on from chunk to chunk: inputs and outputs, with a number behind.
STATE, NEXT = "state_", "next_"

_CACHE = re.compile(r"(?:new_)?(?P<prefix>cache|residual|value)\.(?P<block>.+)/out(?P<index>\d+)")


@dataclass(frozen=True)
class CacheName:
    """A cache by its graph input or output name: block, index in the order of ``supernet.cuts.flatten``, and kind."""

    block: str
    index: int
    kind: CacheKind


def cache_input(kind: CacheKind, value: str) -> str:
    """Input of a variant that reads the cache of ``value`` (``BLOCK/outN``)."""
    return f"{'cache' if kind == 'output' else 'residual'}.{value}"


def cache_output(kind: CacheKind, value: str) -> str:
    """Output of a variant that writes the cache of ``value``."""
    return f"new_{cache_input(kind, value)}"


def segment_input(value: str) -> str:
    """Input of a segment that reads the tensor ``value`` from the arena."""
    return f"value.{value}"


def segment_output(kind: CacheKind, value: str) -> str:
    """Output of a segment that writes the tensor ``value``, or its residual, to the arena."""
    return f"new_{segment_input(value)}" if kind == "output" else cache_output(kind, value)


def parse_cache(name: str) -> CacheName | None:
    """What one of the four functions above wrote of a block's output; None for any other name."""
    found = _CACHE.fullmatch(name)
    if found is None:
        return None
    return CacheName(found["block"], int(found["index"]), "residual" if found["prefix"] == "residual" else "output")
