"""Names of the inputs and outputs of the denoiser's graphs: what is the same in all, and those of caches."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from dipgo_deploy.schedule.guidance import CONDITIONAL, UNCONDITIONAL, Half
from dipgo_deploy.schedule.kinds import CacheKind

HISTORY = "stack"
HISTORY_BEFORE = "stack_before"
COEFFICIENTS = "coefficients"
TIMESTEP = "timestep"
GUIDANCE_SCALES = ("guidance_scale", "guidance_scale_2")
"""Of a model's denoisers, in order."""
PREDICTION = "noise_pred"
FORECAST = "forecast"
"""Weights of the stored values that a graph sums, in the order of its reads that are weighted."""
# What a decoder of videos hands on from chunk to chunk: inputs and outputs, with a number behind.
STATE, NEXT = "state_", "next_"
# What an image encoder gives: embeddings of a picture, and of none.
EMBEDS, NO_EMBEDS = "embeds", "no_embeds"

_TABLE, _RUN = "table.", "run."
_NEW, _VALUE = "new_", "value."

_CACHE = re.compile(
    r"(?:new_)?(?P<prefix>cache|residual|value)\.(?P<block>.+)/out(?P<index>\d+)"
    rf"(?P<half>{CONDITIONAL}|{UNCONDITIONAL})?(?:@(?P<nth>\d+))?"
)


@dataclass(frozen=True)
class CacheName:
    """A cache by its graph input or output name: block, index in the order of ``supernet.cuts.flatten``, and kind; nth:
    0, or of a weighted sum the n-th last stored one; half: one half of guidance alone."""

    block: str
    index: int
    kind: CacheKind
    nth: int = 0
    half: Half | None = None


def cache_input(kind: CacheKind, value: str, nth: int = 0) -> str:
    """Input of a variant that reads the cache of ``value`` (``BLOCK/outN``, or with ``CONDITIONAL`` behind it), as it
    is or (nth) with a weight."""
    return f"{'cache' if kind == 'output' else 'residual'}.{value}" + (f"@{nth}" if nth else "")


def cache_output(kind: CacheKind, value: str) -> str:
    """Output of a variant that writes the cache of ``value``."""
    return f"{_NEW}{cache_input(kind, value)}"


def segment_input(value: str) -> str:
    """Input of a segment that reads the tensor ``value`` from the arena."""
    return f"{_VALUE}{value}"


def segment_output(kind: CacheKind, value: str) -> str:
    """Output of a segment that writes the tensor ``value``, or its residual, to the arena."""
    return f"{_NEW}{segment_input(value)}" if kind == "output" else cache_output(kind, value)


def stored_name(output: str, inputs: Iterable[str]) -> str:
    """What a value in the arena is called, for people: after the output that writes it, without ``new_``. The output of
    a sum has no name of its own: then after a segment's input that reads it.

    inputs: all that read it.
    """
    if output.startswith(_NEW):
        return output.removeprefix(_NEW)
    return next((name for name in inputs if name.startswith(_VALUE)), output)


def table_input(label: str) -> str:
    """Input of a graph that takes a row of a table of timesteps."""
    return f"{_TABLE}{label}"


def is_table(name: str) -> bool:
    """Whether an input of a graph takes a row of a table of timesteps."""
    return name.startswith(_TABLE)


def run_input(label: str) -> str:
    """Input of a graph that takes a row of what is made at the start of a run."""
    return f"{_RUN}{label}"


def is_run_row(name: str) -> bool:
    """Whether an input of a graph takes a row of what is made at the start of a run."""
    return name.startswith(_RUN)


def parse_cache(name: str) -> CacheName | None:
    """What one of the four functions above wrote of a block's output; None for any other name."""
    found = _CACHE.fullmatch(name)
    if found is None:
        return None
    kind: CacheKind = "residual" if found["prefix"] == "residual" else "output"
    half: Half | None = None
    if found["half"]:
        half = "conditional" if found["half"] == CONDITIONAL else "unconditional"
    return CacheName(found["block"], int(found["index"]), kind, int(found["nth"] or 0), half)


def of_half(name: str, half: Half | None) -> str:
    """The name of a cache, as a launch of one half has it, with the half in it; None: as it is."""
    value, at, nth = name.partition("@")
    return name if half is None or parse_cache(name) is None else f"{value}/{half}{at}{nth}"


def is_weighted(name: str) -> bool:
    """Whether an input of a variant is a stored value that is read with a weight."""
    cache = parse_cache(name)
    return cache is not None and cache.nth > 0
