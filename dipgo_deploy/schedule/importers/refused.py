"""Methods that look at data to decide what to compute, and what comes nearest to each that can be compiled."""

from __future__ import annotations

from collections.abc import Mapping

_MASK = "cache-dit with a static steps_computation_mask"
_STEPS = "step-list with the steps that ran in a recorded run"

REFUSED: Mapping[str, tuple[str, str]] = {
    "teacache": (
        "compares the modulated input of the first block with the last one's",
        "teacache-wan, where the time embedding alone decides, magcache, whose ratios do, or " + _STEPS,
    ),
    "first-block-cache": ("compares the first block's residual with the last one's", f"{_MASK}, Fn 1 and Bn 0"),
    "dbcache": ("compares the first blocks' residual with the last one's", _MASK),
    "dbprune": ("compares each block's residual with the last one's", f"{_MASK}, or npy with a mask of blocks"),
    "fastercache": (
        "mixes the last two values by the step, and estimates the unconditional half from its frequencies",
        "pab with the same skip ranges, and a forecast (--forecast taylor)",
    ),
    "easycache": ("sums the change of the model's input and output", _STEPS),
    "adacache": ("takes the number of steps to skip from the change of a block's output", _STEPS),
    "seacache": ("compares filtered inputs of the first block", f"magcache, or {_STEPS}"),
    "dicache": ("compares the first blocks' outputs", _MASK),
    "sencache": ("takes the sensitivity of the sample at hand", _STEPS),
    "speca": ("checks a forecast against one layer, and computes where it fails", "taylorseer"),
    "ucache": ("compares the model's inputs", _STEPS),
    "dmd": ("fits exponentials to the sample's own past", "taylorseer, or weights"),
}
"""Method -> what it decides on, and the nearest kind of file."""


def refusal(name: str) -> str:
    """The line that refuses one of them."""
    decides, nearest = REFUSED[name]
    return f"{name}: {decides}, so what runs is not known before a run; give {nearest}"
