"""FLUX.1-dev and FLUX.1-schnell at 1024 pixels."""

from __future__ import annotations

from typing import Any

_DEV: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}

_SCHEDULER: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
}

_COMMON: dict[str, Any] = {
    "class_name": "FluxTransformer2DModel",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "pixels": 1024,
    "text_length": 512,
    # As FORA (arXiv 2407.01425) for DiT: attention and feed-forward at every second step.
    "published": {"rule": "interval", "interval": 2, "granularity": "layer"},
    # Changes of the configuration that leave at most 2.6e9 of 11.9e9 parameters (10.4 GB in float32, 5.2 GB in half
    # precision beside them), for a machine of 22 GB. All blocks of one kind are alike, so nothing else changes.
    "depth": {"num_layers": 4, "num_single_layers": 8},
}

MODELS: tuple[dict[str, Any], ...] = (
    {
        **_COMMON,
        "name": "flux.1-dev-1024",
        "config": _DEV,
        "scheduler_config": {**_SCHEDULER, "shift": 3.0, "use_dynamic_shifting": True},
    },
    {
        **_COMMON,
        "name": "flux.1-schnell-1024",
        "config": {**_DEV, "guidance_embeds": False},
        "scheduler_config": {**_SCHEDULER, "shift": 1.0, "use_dynamic_shifting": False},
    },
)
