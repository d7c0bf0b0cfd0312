"""Resolution-dependent shifting of flow-matching timesteps, as the pipelines of SD3 and FLUX set it up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def dynamic_shift(scheduler: Mapping[str, Any], tokens: int, *, max_shift: float) -> float:
    """``mu`` of ``set_timesteps``: linear in the number of picture tokens (``calculate_shift`` of the pipelines).

    scheduler: its configuration; what it leaves out has the pipelines' defaults, of which ``max_shift`` differs.
    Through (256 tokens, base_shift) and (4096 tokens, max_shift), unless the configuration says otherwise.
    """
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    base, top = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", max_shift)
    slope = (top - base) / (high - low)
    return float(tokens * slope + (base - slope * low))


def flow_options(scheduler: Mapping[str, Any], tokens: int, steps: int) -> dict[str, Any]:
    """``sigmas`` and, with dynamic shifting, ``mu``, as pipelines give them whatever the scheduler makes itself.

    DPM-Solver takes no ``sigmas``: diffusers' pipelines cannot be run with it.
    """
    options: dict[str, Any] = {}
    if "algorithm_type" not in scheduler:
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps).tolist()
    if scheduler.get("use_dynamic_shifting"):
        options["mu"] = dynamic_shift(scheduler, tokens, max_shift=1.15)
    return options
