"""PixArt-alpha and PixArt-Sigma XL/2 at 1024 pixels: the configurations that diffusers' conversion scripts write."""

from __future__ import annotations

from typing import Any

# diffusers' defaults, which both published folders keep.
_SCHEDULER: dict[str, Any] = {
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "solver_order": 2,
    "solver_type": "midpoint",
}

_XL: dict[str, Any] = {
    "_class_name": "PixArtTransformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 128,
}

MODELS: tuple[dict[str, Any], ...] = (
    {
        "name": "pixart-alpha-xl-2-1024",
        "class_name": "PixArtTransformer2DModel",
        "config": _XL,
        "scheduler": "DPMSolverMultistepScheduler",
        "scheduler_config": _SCHEDULER,
        "depth": {},
        "pixels": 1024,
        "text_length": 120,
        # FORA (arXiv 2407.01425): attention and feed-forward at every second step.
        "published": {"rule": "interval", "interval": 2, "granularity": "layer"},
    },
    {
        "name": "pixart-sigma-xl-2-1024",
        "class_name": "PixArtTransformer2DModel",
        "config": {**_XL, "interpolation_scale": 2, "use_additional_conditions": False},
        "scheduler": "DPMSolverMultistepScheduler",
        "scheduler_config": _SCHEDULER,
        "depth": {},
        "pixels": 1024,
        "text_length": 300,
        # FORA (arXiv 2407.01425): attention and feed-forward at every second step.
        "published": {"rule": "interval", "interval": 2, "granularity": "layer"},
    },
)
