"""A diffusers scheduler as a matrix over the initial latent, the predictions and the noises."""

from __future__ import annotations

from dipgo_deploy.sampler.matrix import SamplerMatrix, check_linear, prediction_used, sampler_matrix
from dipgo_deploy.sampler.schedulers import (
    SAMPLERS,
    evaluations,
    make_scheduler,
    plain_config,
    scheduler_from_folder,
    scheduler_of,
    step_positions,
)
from dipgo_deploy.sampler.start import ImageStart, begin_of

__all__ = [
    "SAMPLERS",
    "ImageStart",
    "SamplerMatrix",
    "begin_of",
    "check_linear",
    "evaluations",
    "make_scheduler",
    "plain_config",
    "prediction_used",
    "sampler_matrix",
    "scheduler_from_folder",
    "scheduler_of",
    "step_positions",
]
