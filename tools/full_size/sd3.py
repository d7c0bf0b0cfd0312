"""Stable Diffusion 3 and 3.5 at 1024 pixels."""

from __future__ import annotations

from typing import Any

_SCHEDULER: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 3.0}

_MEDIUM: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}

_COMMON: dict[str, Any] = {
    "class_name": "SD3Transformer2DModel",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "scheduler_config": _SCHEDULER,
    "pixels": 1024,
    "text_length": 77 + 256,
    # As FORA (arXiv 2407.01425) for DiT: attention and feed-forward at every second step.
    "published": {"rule": "interval", "interval": 2, "granularity": "layer"},
}

# depth: changes of the configuration that leave at most 2.6e9 parameters (10.4 GB in float32, 5.2 GB in half
# precision beside them), for a machine of 22 GB. All blocks of one kind are alike, so nothing else changes.
MODELS: tuple[dict[str, Any], ...] = (
    {**_COMMON, "name": "sd3-medium-1024", "config": _MEDIUM, "depth": {}},
    {
        **_COMMON,
        "name": "sd3.5-medium-1024",
        "config": {
            **_MEDIUM,
            "dual_attention_layers": list(range(13)),
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
        },
        "depth": {},
    },
    {
        **_COMMON,
        "name": "sd3.5-large-1024",
        "config": {
            **_MEDIUM,
            "caption_projection_dim": 2432,
            "num_attention_heads": 38,
            "num_layers": 38,
            "qk_norm": "rms_norm",
        },
        "depth": {"num_layers": 11},
    },
)
