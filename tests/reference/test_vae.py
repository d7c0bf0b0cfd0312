from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from dipgo_deploy.errors import UserError
from dipgo_deploy.reference.vae import from_vae, scaling_and_shift, to_vae


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
