"""Decoders of videos in chunks: the same frames as all at once, in memory for one chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from video_checks import wan_vae

from dipgo_deploy.backends import create_backend
from dipgo_deploy.bundle.manifest import Components, LatentSpec
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.chunks import encoder_chunks_of
from dipgo_deploy.export.components import export_components
from dipgo_deploy.reference.vae import decoded, from_vae, to_images, to_vae
from dipgo_deploy.runtime.image import Decoder


class Parts:
    """A pipeline of nothing but a VAE."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae


def exported(vae: Any, folder: Path, frames: int) -> Components:
    latent = LatentSpec(channels=4, frames=frames, height=4, width=6)
    return export_components(Parts(vae), None, [], folder, latent, batch=1, dtype="fp32")


# Wan 2.1's kind of decoder, and Wan 2.2's of its model of 5B, which decodes patches and has shortcuts around a level.
@pytest.mark.parametrize(
    ("changes", "frames"),
    [
        # Seen at work in the tests of Wan.
        pytest.param({}, 3, marks=pytest.mark.slow),
        ({"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}, 3),
    ],
)
def test_frames_are_those_of_the_whole(tmp_path: Path, changes: dict[str, Any], frames: int) -> None:
    vae = wan_vae(num_res_blocks=1, **changes)
    latents = torch.randn(2, 4, frames, 4, 6)
    with torch.no_grad():
        expected = to_images(decoded(vae, latents)).numpy()
    components = exported(vae, tmp_path, frames)
    assert [(chunk.graph, chunk.start) for chunk in components.vae_chunks] == [(min(k, 1), k) for k in range(frames)]
    decoder = Decoder(tmp_path, components, create_backend("cpu", threads=1))
    for _ in range(2):  # nothing of one video is left for the next
        np.testing.assert_allclose(decoder(latents.numpy()), expected, atol=1e-5)
    # A longer video takes more launches of the same graphs.
    assert len(components.decoders) == min(frames, 2)
    assert all(graph.inputs[0].shape[2] == 1 for graph in components.decoders)


def test_encoders_take_whole_chunks_only() -> None:
    chunks = encoder_chunks_of(wan_vae(), 9)
    assert chunks is not None and chunks.order == ((0, 0), (1, 1), (1, 5))
    with pytest.raises(UserError, match="--num-frames 7: AutoencoderKLWan encodes 4 frames at a time behind the first"):
        encoder_chunks_of(wan_vae(), 7)


def test_latents_are_scaled_by_channel() -> None:
    vae, latents = wan_vae(), torch.randn(1, 4, 2, 3, 3)
    scaled = to_vae(vae, latents)
    assert torch.allclose(scaled[:, 3], latents[:, 3] * 2.0) and torch.allclose(scaled[:, 0], latents[:, 0] * 1.5 + 0.1)
    assert torch.allclose(from_vae(vae, scaled), latents, atol=1e-6)
