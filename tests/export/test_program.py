"""What the exporter cannot take is one line, whatever torch raises."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from dipgo_deploy.errors import UserError
from dipgo_deploy.export.components import _scaling_and_shift
from dipgo_deploy.export.program import to_onnx


class Fits(torch.nn.Module):
    """A layer of four inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any error of torch's own for other inputs."""
        return self.layer(x)


class Asks(torch.nn.Module):
    """Its way depends on the values of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Not traceable."""
        return x if bool(x.sum() > 0) else -x


@pytest.mark.parametrize(("module", "width"), [(Fits(), 5), (Asks(), 4)])
def test_modules_that_cannot_be_traced(module: torch.nn.Module, width: int) -> None:
    with pytest.raises(UserError, match="^vae decoder: torch.export cannot trace it: .") as error:
        to_onnx(module, [torch.ones(1, width)], ["x"], lambda: ["y"], dtype="fp32", prefix="", label="vae decoder")
    assert "\n" not in str(error.value)


def test_latents_are_scaled_by_the_vaes_factor() -> None:
    plain = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, scaling_factor=0.5, shift_factor=0.25)
    assert _scaling_and_shift(plain) == (0.5, 0.25)
    quantized = VQModel(block_out_channels=(4,), norm_num_groups=2)
    quantized.register_to_config(scaling_factor=None)
    with pytest.raises(UserError, match="vae: VQModel has no scaling_factor"):
        _scaling_and_shift(quantized)
