"""Measurements as the commands write them, of the stored engine directory ``tests/bundle/format-4/engine``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SECONDS = (0.02, 0.004, 0.022, 0.006)

PROFILE: dict[str, Any] = {
    "engine_dir": "engines/stored",
    "loop_seconds": 0.054,
    "host_seconds": 0.002,
    "launches": [
        {"step": step, "variant": ("v00", "v01")[step % 2], "seconds": seconds} for step, seconds in enumerate(_SECONDS)
    ],
    "kernel_seconds": 0.05,
    "copy_seconds": 0.01,
    "blocks": {"transformer_blocks.0.ff": 0.03, "(outside the blocks)": 0.02},
    "operators": {"MatMul": 0.04, "Transpose": 0.01},
}


def _interval(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def _case(name: str, ssim: float, *, baseline: bool = False) -> dict[str, Any]:
    return {
        "name": name,
        "guidance_scale": None,
        "baseline": baseline,
        "macs": 2e9,
        "ratio": 0.5,
        "launches": 2,
        "milliseconds": 3.0,
        "ssim": _interval(ssim, 0.004),
        "psnr": _interval(30.0, 1.0),
        "against": None if baseline else "ddim, 2 steps",
        "difference": None if baseline else _interval(0.05, 0.01),
        "differences": {},
        "accuracy": None,
        "frechet": None,
    }


LIMIT: dict[str, Any] = {
    "ceiling": {"macs_per_second": 5e10, "bytes_per_second": 1e10},
    "graphs": [
        {"name": name, "launches": 2, "macs": 1, "bytes": 1, "least_seconds": least, "times_least": {}}
        | {"seconds": {"cpu": {"median": 2 * least, "q1": least, "q3": 3 * least}}}
        for name, least in (("v00", 0.008), ("v01", 0.001))
    ],
}

QUALITY: dict[str, Any] = {
    "model": "tiny-dit",
    "reference": {"sampler": "DDIMScheduler", "steps": 4},
    "images": 40,
    "cases": [_case("schedules/ours.json", 0.99), _case("ddim, 2 steps", 0.94, baseline=True)],
}


def _tensor(relative: float | None) -> dict[str, Any]:
    return {"name": "noise_pred", "max_absolute": 0.0, "relative": relative, "cosine": 1.0, "psnr": None} | {
        "passed": True,
        "limit": 1e-4,
        "made": None,
        "carried": None,
    }


COMPARISON: dict[str, Any] = {
    "passed": False,
    "first_failure": "loop, evaluation 2",
    "reference": "the supernet",
    "tolerance": {"relative": 1e-4, "absolute": 0.0},
    "skipped": ["no prompt"],
    "loop": [
        {"step": step, "variant": "v00", "passed": True, "tensors": [_tensor(relative)]}
        for step, relative in enumerate((1e-6, 2e-6, None, 3e-6))
    ],
}


def written(folder: Path, document: dict[str, Any]) -> Path:
    """A file of it, with a name that is free."""
    path = folder / f"measured-{len(list(folder.glob('measured-*')))}.json"
    path.write_text(json.dumps(document))
    return path
