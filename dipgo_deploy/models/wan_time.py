"""Wan's embedding of the timestep by itself, from the few weights that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dipgo_deploy.errors import UserError

_LAYERS = {
    name: f"condition_embedder.{name}" for name in ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj")
}


def time_embeddings(
    files: Sequence[Path], config: Mapping[str, Any], timesteps: Sequence[float]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the model makes of timesteps: the embedding (T, D) and its projection for the blocks' modulation (T, 6 D).

    files: safetensors in diffusers' format. Raises UserError for files without these weights.
    """
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    weights = _weights(files)

    def linear(name: str, values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(values, weights[f"{name}.weight"], weights[f"{name}.bias"])

    with torch.no_grad():
        times = torch.tensor(timesteps, dtype=torch.float32)
        waves = get_timestep_embedding(times, int(config["freq_dim"]), flip_sin_to_cos=True, downscale_freq_shift=0)
        hidden = torch.nn.functional.silu(linear("time_embedder.linear_1", waves))
        embedding = linear("time_embedder.linear_2", hidden)
        projection = linear("time_proj", torch.nn.functional.silu(embedding))
    return embedding.numpy(), projection.numpy()


def _weights(files: Sequence[Path]) -> dict[str, Any]:
    """The weights and biases of the three layers, in float32."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for path in files:
        with safe_open(path, framework="pt") as stored:
            names = set(stored.keys())
            for layer, prefix in _LAYERS.items():
                for part in ("weight", "bias"):
                    if f"{prefix}.{part}" in names:
                        found[f"{layer}.{part}"] = stored.get_tensor(f"{prefix}.{part}").float()
    wanted = (f"{layer}.{part}" for layer in _LAYERS for part in ("weight", "bias"))
    missing = next((name for name in wanted if name not in found), None)
    if missing is not None:
        raise UserError(
            f"its files have no condition_embedder.{missing}; give a folder in diffusers' format with its weights"
        )
    return found
