"""HunyuanVideo, 13B, at 1280 x 720, 129 frames."""

from __future__ import annotations

from typing import Any

MODELS: tuple[dict[str, Any], ...] = (
    {
        "name": "hunyuan-video",
        "class_name": "HunyuanVideoTransformer3DModel",
        "config": {
            "_class_name": "HunyuanVideoTransformer3DModel",
            "attention_head_dim": 128,
            "guidance_embeds": True,
            "in_channels": 16,
            "mlp_ratio": 4.0,
            "num_attention_heads": 24,
            "num_layers": 20,
            "num_refiner_layers": 2,
            "num_single_layers": 40,
            "out_channels": 16,
            "patch_size": 2,
            "patch_size_t": 1,
            "pooled_projection_dim": 768,
            "qk_norm": "rms_norm",
            "rope_axes_dim": [16, 56, 56],
            "rope_theta": 256.0,
            "text_embed_dim": 4096,
        },
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "scheduler_config": {"num_train_timesteps": 1000, "shift": 7.0, "use_dynamic_shifting": False},
        # As FLUX.1, for a machine of 22 GB. All blocks of one kind are alike, so nothing else changes.
        "depth": {"num_layers": 4, "num_single_layers": 8},
        "pixels": 720,
        "frames": 129,
        "text_length": 256,
        # As FORA (arXiv 2407.01425) for DiT: attention and feed-forward at every second step.
        "published": {"rule": "interval", "interval": 2, "granularity": "layer"},
    },
)
