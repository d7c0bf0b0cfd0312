"""What the exporter cannot take is one line, whatever torch raises."""

from __future__ import annotations

import pytest
import torch

from dipgo_deploy.errors import UserError
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
