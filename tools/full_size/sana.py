"""Sana 1.6B at 1024 pixels, version 1.0 and 1.5 (which normalises queries and keys)."""

from __future__ import annotations

from typing import Any

_SCHEDULER: dict[str, Any] = {
    "algorithm_type": "dpmsolver++",
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "midpoint",
    "use_flow_sigmas": True,
}

_1600M: dict[str, Any] = {
    "_class_name": "SanaTransformer2DModel",
    "attention_bias": False,
    "attention_head_dim": 32,
    "caption_channels": 2304,
    "cross_attention_dim": 2240,
    "cross_attention_head_dim": 112,
    "dropout": 0.0,
    "guidance_embeds": False,
    "in_channels": 32,
    "interpolation_scale": None,
    "mlp_ratio": 2.5,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "num_attention_heads": 70,
    "num_cross_attention_heads": 20,
    "num_layers": 20,
    "out_channels": 32,
    "patch_size": 1,
    "sample_size": 32,
}

MODELS: tuple[dict[str, Any], ...] = (
    {
        "name": "sana-1600m-1024",
        "class_name": "SanaTransformer2DModel",
        "config": _1600M,
        "scheduler": "DPMSolverMultistepScheduler",
        "scheduler_config": _SCHEDULER,
        "depth": {},
        "pixels": 1024,
        "latent_scale": 32,
        "text_length": 300,
        # As FORA (arXiv 2407.01425) for DiT: attention and feed-forward at every second step.
        "published": {"rule": "interval", "interval": 2, "granularity": "layer"},
    },
    {
        "name": "sana-1.5-1600m-1024",
        "class_name": "SanaTransformer2DModel",
        "config": {**_1600M, "qk_norm": "rms_norm_across_heads"},
        "scheduler": "DPMSolverMultistepScheduler",
        "scheduler_config": _SCHEDULER,
        "depth": {},
        "pixels": 1024,
        "latent_scale": 32,
        "text_length": 300,
        # As FORA (arXiv 2407.01425) for DiT: attention and feed-forward at every second step.
        "published": {"rule": "interval", "interval": 2, "granularity": "layer"},
    },
)
