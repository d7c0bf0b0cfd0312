"""Wan text to video, 81 frames: 2.1 with 1.3B at 480 and 14B at 720 pixels, 2.2 with two experts of 14B."""

from __future__ import annotations

from typing import Any

_SCHEDULER: dict[str, Any] = {
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "bh2",
    "use_flow_sigmas": True,
}

_SAME: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}

_14B: dict[str, Any] = {
    "class_name": "WanTransformer3DModel",
    "config": {**_SAME, "ffn_dim": 13824, "num_attention_heads": 40, "num_layers": 40},
    "scheduler": "UniPCMultistepScheduler",
    "pixels": 720,
    "frames": 81,
    "latent_scale": 8,
    "text_length": 512,
    "published": {"rule": "interval", "interval": 2, "granularity": "layer"},
}

MODELS: tuple[dict[str, Any], ...] = (
    {
        "name": "wan-2.1-t2v-1.3b",
        "class_name": "WanTransformer3DModel",
        "config": {**_SAME, "ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30},
        "scheduler": "UniPCMultistepScheduler",
        "scheduler_config": _SCHEDULER,
        "depth": {},
        "pixels": 480,
        "frames": 81,
        "latent_scale": 8,
        "text_length": 512,
        # As FORA (arXiv 2407.01425) for DiT: attention and feed-forward at every second step.
        "published": {"rule": "interval", "interval": 2, "granularity": "layer"},
    },
    {
        **_14B,
        "name": "wan-2.1-t2v-14b",
        "scheduler_config": {**_SCHEDULER, "flow_shift": 5.0},
        "depth": {"num_layers": 5},
    },
    {
        **_14B,
        "name": "wan-2.2-t2v-a14b",
        "scheduler_config": _SCHEDULER,
        "pipeline": {
            "denoisers": ("transformer", "transformer_2"),
            "index": {
                "_class_name": "WanPipeline",
                "boundary_ratio": 0.875,
                **dict.fromkeys(("text_encoder", "tokenizer", "vae"), (None, None)),
            },
        },
        # Of each expert; leaves 3.6e9 of 28.6e9 parameters, for a machine of 22 GB.
        "depth": {"num_layers": 5},
    },
)
