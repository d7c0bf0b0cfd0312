"""The torch reference: the gated forward and the denoising loop that define what a schedule means."""

from __future__ import annotations

from dipgo_deploy.supernet.cuts import Cuts, collect
from dipgo_deploy.supernet.gated import CacheState, Gate, Supernet
from dipgo_deploy.supernet.load import load_denoiser, load_pipeline
from dipgo_deploy.supernet.loop import Evaluation, run_loop

__all__ = [
    "CacheState",
    "Cuts",
    "Evaluation",
    "Gate",
    "Supernet",
    "collect",
    "load_denoiser",
    "load_pipeline",
    "run_loop",
]
