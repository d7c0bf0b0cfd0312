"""OpenVINO beside the others: its GenAI package's UNet, converted from the same PyTorch model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipgo_deploy.backends.openvino import import_openvino
from dipgo_deploy.errors import UserError

# As the backend has it: one launch at a time, float32.
CPU: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}


class _Plain(torch.nn.Module):
    """A UNet with the inputs that GenAI's class knows, and one output."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class GenAiUNet:
    """``openvino_genai.UNet2DConditionModel``, called as diffusers' model is.

    model: diffusers' UNet. latents: an example (B, C, h, w), for both halves of the guidance. conditions: its
    ``encoder_hidden_states``. folder: a new one, for the converted model.

    Raises:
        UserError: a model that the package has no class for.
        ImportError: the package is not installed.
    """

    def __init__(
        self, model: Any, latents: torch.Tensor, hidden_states: torch.Tensor, folder: Path, threads: int
    ) -> None:
        if type(model).__name__ != "UNet2DConditionModel":
            raise UserError(f"OpenVINO GenAI has no class for {type(model).__name__}")
        ov = import_openvino()
        import openvino_genai

        with torch.no_grad():
            example = {"sample": latents, "timestep": torch.tensor(1), "encoder_hidden_states": hidden_states}
            converted = ov.convert_model(_Plain(model), example_input=example)
        converted.reshape({name: list(value.shape) for name, value in example.items()})
        unet, vae = folder / "unet", folder / "vae_decoder"
        for part, config in (
            (unet, dict(model.config)),
            (vae, {"block_out_channels": [1] * 4}),
        ):  # its scale is asked for
            part.mkdir(parents=True)
            (part / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
        ov.save_model(converted, unet / "openvino_model.xml", compress_to_fp16=False)
        del converted
        self._ov = ov
        self._unet = openvino_genai.UNet2DConditionModel(unet)
        self._unet.compile("CPU", INFERENCE_NUM_THREADS=threads, **CPU)
        self._unet.set_hidden_states("encoder_hidden_states", ov.Tensor(np.ascontiguousarray(hidden_states.numpy())))

    def __call__(self, sample: torch.Tensor, timestep: Any, **_: Any) -> tuple[torch.Tensor]:
        """The prediction for both halves."""
        given = self._ov.Tensor(np.ascontiguousarray(sample.numpy()))
        time = self._ov.Tensor(np.array(int(timestep), np.int64))
        return (torch.from_numpy(np.array(self._unet.infer(given, time).data)),)


def stable_diffusion_cpp() -> Any:
    """What stands in the table where stable-diffusion.cpp would: it is not run.

    Raises:
        UserError: why.
    """
    try:
        import stable_diffusion_cpp  # noqa: F401
    except ImportError:
        raise UserError(
            "stable-diffusion-cpp-python is not installed: there is no wheel, only a source that builds with cmake"
        ) from None
    raise UserError("it takes a whole published pipeline in one file, not a denoiser with random weights")


sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # GenAI imports OpenVINO's tools, too
