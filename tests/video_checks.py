"""What every family of videos has to show beside ``family_checks``: files, frames, decoders in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.sampler import make_scheduler

SEED = 3


def ours(engine_dir: Path, **call: Any) -> np.ndarray:
    """Latents (n, C, f, h, w) or frames (n, F, H, W, 3) of an engine directory."""
    pipeline = Pipeline.from_engine_dir(engine_dir, "cpu", threads=1)
    return np.asarray(pipeline(seed=SEED, **call).images)


def theirs(pipeline: Any, *, steps: int, sampler: str | None = None, **call: Any) -> np.ndarray:
    """The same of a stock pipeline."""
    own = pipeline.scheduler
    if sampler is not None:
        pipeline.scheduler = make_scheduler(sampler, own.config)
    pipeline.set_progress_bar_config(disable=True)
    try:
        with torch.no_grad():
            frames = pipeline(num_inference_steps=steps, generator=torch.Generator().manual_seed(SEED), **call).frames
    finally:
        pipeline.scheduler = own
    return np.asarray(frames, np.float32)
