"""LTX-Video 0.9, 2B, at 704 x 512, 161 frames."""

from __future__ import annotations

from typing import Any

MODELS: tuple[dict[str, Any], ...] = (
    {
        "name": "ltx-video-2b",
        "class_name": "LTXVideoTransformer3DModel",
        "config": {
            "_class_name": "LTXVideoTransformer3DModel",
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "attention_head_dim": 64,
            "attention_out_bias": True,
            "caption_channels": 4096,
            "cross_attention_dim": 2048,
            "in_channels": 128,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-06,
            "num_attention_heads": 32,
            "num_layers": 28,
            "out_channels": 128,
            "patch_size": 1,
            "patch_size_t": 1,
            "qk_norm": "rms_norm_across_heads",
        },
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "scheduler_config": {
            "base_image_seq_len": 1024,
            "base_shift": 0.95,
            "max_image_seq_len": 4096,
            "max_shift": 2.05,
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "shift_terminal": 0.1,
            "use_dynamic_shifting": True,
        },
        "depth": {},
        "pixels": 512,
        "frames": 161,
        "latent_scale": 32,
        "text_length": 128,
        # As FORA (arXiv 2407.01425) for DiT: attention and feed-forward at every second step.
        "published": {"rule": "interval", "interval": 2, "granularity": "layer"},
    },
)
