"""Chroma1 at 1024 pixels."""

from __future__ import annotations

from typing import Any

MODELS: tuple[dict[str, Any], ...] = (
    {
        "name": "chroma1-1024",
        "class_name": "ChromaTransformer2DModel",
        "config": {
            "_class_name": "ChromaTransformer2DModel",
            "approximator_hidden_dim": 5120,
            "approximator_layers": 5,
            "approximator_num_channels": 64,
            "attention_head_dim": 128,
            "axes_dims_rope": [16, 56, 56],
            "in_channels": 64,
            "joint_attention_dim": 4096,
            "num_attention_heads": 24,
            "num_layers": 19,
            "num_single_layers": 38,
            "patch_size": 1,
        },
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "scheduler_config": {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False},
        "pixels": 1024,
        "text_length": 512,
        # As FORA (arXiv 2407.01425) for DiT: attention and feed-forward at every second step.
        "published": {"rule": "interval", "interval": 2, "granularity": "layer"},
        # Leaves 2.4e9 of 8.9e9 parameters, for a machine of 22 GB. All blocks of one kind are alike.
        "depth": {"num_layers": 4, "num_single_layers": 10},
    },
)
