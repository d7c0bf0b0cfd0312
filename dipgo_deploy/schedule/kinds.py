"""Words that schedule, plan and model families share."""

from __future__ import annotations

from typing import Literal

Granularity = Literal["block", "layer"]
CacheKind = Literal["output", "residual"]
