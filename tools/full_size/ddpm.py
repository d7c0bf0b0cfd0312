"""DDPM on pixels at 256: ``google/ddpm-celebahq-256`` and its sisters."""

from __future__ import annotations

from typing import Any

MODELS: tuple[dict[str, Any], ...] = (
    {
        "name": "ddpm-celebahq-256",
        "class_name": "UNet2DModel",
        "config": {
            "_class_name": "UNet2DModel",
            "act_fn": "silu",
            "attention_head_dim": None,
            "block_out_channels": [128, 128, 256, 256, 512, 512],
            "center_input_sample": False,
            "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "in_channels": 3,
            "layers_per_block": 2,
            "mid_block_scale_factor": 1,
            "norm_eps": 1e-06,
            "norm_num_groups": 32,
            "out_channels": 3,
            "sample_size": 256,
            "time_embedding_type": "positional",
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
        },
        # The published DDPMScheduler with `clip_sample` is not linear, so no sampler here can be it.
        "scheduler": "DDIMScheduler",
        "scheduler_config": {
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "beta_start": 0.0001,
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "trained_betas": None,
        },
        "pixels": 256,
        "latent_scale": 1,
        "text_length": 0,
        # DeepCache (Ma et al., CVPR 2024) with its most shallow branch.
        "published": {"rule": "deepcache", "interval": 3, "branch": 0, "granularity": "layer"},
    },
)
