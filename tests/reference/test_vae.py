from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, VQModel

from dipgo_deploy.errors import UserError
from dipgo_deploy.reference.vae import decoded, from_vae, scaling_and_shift, to_vae


def test_latents_are_scaled_by_the_vaes_factor() -> None:
    plain = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, scaling_factor=0.5, shift_factor=0.25)
    assert scaling_and_shift(plain) == (0.5, 0.25)
    latents = torch.tensor([1.0, -3.0])
    assert to_vae(plain, latents).tolist() == [2.25, -5.75]
    assert torch.equal(from_vae(plain, to_vae(plain, latents)), latents)
    quantized = VQModel(block_out_channels=(4,), norm_num_groups=2)
    quantized.register_to_config(scaling_factor=None)
    with pytest.raises(UserError, match="vae: VQModel has no scaling_factor"):
        scaling_and_shift(quantized)


def test_latents_that_hold_patches_and_statistics_of_channels() -> None:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=2,
    ).eval()
    vae.bn.running_mean.copy_(torch.arange(8.0))
    vae.bn.running_var.copy_(torch.arange(1.0, 9.0))
    latents = torch.randn(1, 8, 3, 4)
    given = to_vae(vae, latents)
    assert given.shape == (1, 2, 6, 8)
    # Of the first channel of the VAE's latent, the pixel right of the first is the second of ours.
    assert given[0, 0, 0, 1] == pytest.approx(float(latents[0, 1, 0, 0] * (2 + 1e-4) ** 0.5 + 1))
    torch.testing.assert_close(from_vae(vae, given), latents)
    assert decoded(vae, latents).shape == (1, 3, 6, 8)


def test_a_picture_is_one_frame_of_a_vae_for_videos() -> None:
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=2,
        dim_mult=[1],
        num_res_blocks=1,
        temperal_downsample=[],
        latents_mean=[1, 2],
        latents_std=[3, 4],
    ).eval()
    latents = torch.randn(1, 2, 3, 4)
    given = to_vae(vae, latents)
    assert given.shape == (1, 2, 1, 3, 4)
    torch.testing.assert_close(given[0, 1, 0], latents[0, 1] * 4 + 2)
    torch.testing.assert_close(from_vae(vae, given), latents)
    assert decoded(vae, latents).shape == (1, 3, 3, 4)
