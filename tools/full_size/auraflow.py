"""AuraFlow 0.3 at 1024 pixels."""

from __future__ import annotations

from typing import Any

MODELS: tuple[dict[str, Any], ...] = (
    {
        "name": "auraflow-1024",
        "class_name": "AuraFlowTransformer2DModel",
        "config": {
            "_class_name": "AuraFlowTransformer2DModel",
            "attention_head_dim": 256,
            "caption_projection_dim": 3072,
            "in_channels": 4,
            "joint_attention_dim": 2048,
            "num_attention_heads": 12,
            "num_mmdit_layers": 4,
            "num_single_dit_layers": 32,
            "out_channels": 4,
            "patch_size": 2,
            "pos_embed_max_size": 9216,
            "sample_size": 64,
        },
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "scheduler_config": {"num_train_timesteps": 1000, "shift": 1.73, "use_dynamic_shifting": False},
        "pixels": 1024,
        "text_length": 256,
        # As FORA (arXiv 2407.01425) for DiT: attention and feed-forward at every second step.
        "published": {"rule": "interval", "interval": 2, "granularity": "layer"},
        # Leaves 2.5e9 of 6.8e9 parameters, for a machine of 22 GB. All blocks of one kind are alike.
        "depth": {"num_mmdit_layers": 2, "num_single_dit_layers": 11},
    },
)
