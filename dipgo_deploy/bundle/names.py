"""Names of the graphs' inputs and outputs that mean the same in every graph of the denoiser."""

from __future__ import annotations

STACK = "stack"
STACK_BEFORE = "stack_before"
COEFFICIENTS = "coefficients"
TIMESTEP = "timestep"
GUIDANCE_SCALE = "guidance_scale"
PREDICTION = "noise_pred"
