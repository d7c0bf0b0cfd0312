"""FLUX.2-dev and FLUX.2-klein (4B) at 1024 pixels."""

from __future__ import annotations

from typing import Any

_DEV: dict[str, Any] = {
    "_class_name": "Flux2Transformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "guidance_embeds": True,
    "in_channels": 128,
    "joint_attention_dim": 15360,
    "mlp_ratio": 3.0,
    "num_attention_heads": 48,
    "num_layers": 8,
    "num_single_layers": 48,
    "patch_size": 1,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}

_COMMON: dict[str, Any] = {
    "class_name": "Flux2Transformer2DModel",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "scheduler_config": {
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
    },
    "pixels": 1024,
    "latent_scale": 16,
    "text_length": 512,
    # As FORA (arXiv 2407.01425) for DiT: attention and feed-forward at every second step.
    "published": {"rule": "interval", "interval": 2, "granularity": "layer"},
}

MODELS: tuple[dict[str, Any], ...] = (
    {
        **_COMMON,
        "name": "flux.2-dev-1024",
        "config": _DEV,
        # Leaves 2.6e9 of 32e9 parameters, for a machine of 22 GB. All blocks of one kind are alike.
        "depth": {"num_layers": 1, "num_single_layers": 2},
    },
    {
        **_COMMON,
        "name": "flux.2-klein-4b-1024",
        "config": {
            **_DEV,
            "guidance_embeds": False,
            "joint_attention_dim": 7680,
            "num_attention_heads": 24,
            "num_layers": 5,
            "num_single_layers": 20,
        },
        "depth": {"num_layers": 3, "num_single_layers": 12},
    },
)
