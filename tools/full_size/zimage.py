"""Z-Image-Turbo at 1024 pixels."""

from __future__ import annotations

from typing import Any

MODELS: tuple[dict[str, Any], ...] = (
    {
        "name": "z-image-turbo-1024",
        "class_name": "ZImageTransformer2DModel",
        "config": {
            "_class_name": "ZImageTransformer2DModel",
            "all_f_patch_size": [1],
            "all_patch_size": [2],
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "cap_feat_dim": 2560,
            "dim": 3840,
            "in_channels": 16,
            "n_heads": 30,
            "n_kv_heads": 30,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "norm_eps": 1e-05,
            "qk_norm": True,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
        },
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "scheduler_config": {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False},
        "pixels": 1024,
        "text_length": 512,
        # As FORA (arXiv 2407.01425) for DiT: attention and feed-forward at every second step.
        "published": {"rule": "interval", "interval": 2, "granularity": "layer"},
        # Leaves 2.6e9 of 6.2e9 parameters: of all, export and comparison fit into 22 GiB, building engines does not.
        # All blocks of one kind are alike.
        "depth": {"n_layers": 10},
    },
)
