"""Qwen-Image at 1328 pixels, its first own size."""

from __future__ import annotations

from typing import Any

MODELS: tuple[dict[str, Any], ...] = (
    {
        "name": "qwen-image-1328",
        "class_name": "QwenImageTransformer2DModel",
        "config": {
            "_class_name": "QwenImageTransformer2DModel",
            "attention_head_dim": 128,
            "axes_dims_rope": [16, 56, 56],
            "guidance_embeds": False,
            "in_channels": 64,
            "joint_attention_dim": 3584,
            "num_attention_heads": 24,
            "num_layers": 60,
            "out_channels": 16,
            "patch_size": 2,
        },
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "scheduler_config": {
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "max_image_seq_len": 8192,
            "max_shift": 0.9,
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "shift_terminal": 0.02,
            "time_shift_type": "exponential",
            "use_dynamic_shifting": True,
        },
        "pixels": 1328,
        "text_length": 512,
        # As FORA (arXiv 2407.01425) for DiT: attention and feed-forward at every second step.
        "published": {"rule": "interval", "interval": 2, "granularity": "layer"},
        # Leaves 2.8e9 of 20.4e9 parameters, for a machine of 22 GB. All blocks are alike.
        "depth": {"num_layers": 8},
    },
)
