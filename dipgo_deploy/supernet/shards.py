"""Models whose weights are in several files, all of them mapped; diffusers maps the first and copies the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn


def load_shards(owner: Any, folder: Path, files: Sequence[Path], dtype: torch.dtype) -> nn.Module | None:
    """A diffusers model (class ``owner``) whose parameters are the tensors of safetensors files in ``dtype``, mapped.

    None where loading is more than that, which is diffusers' business: names or shapes in the files that are not the
    model's own (old checkpoints), quantized weights, modules that stay in float32, a file that cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = owner.load_config(folder)
    if getattr(owner, "_keep_in_fp32_modules", None) or "quantization_config" in config:
        return None
    tensors: dict[str, torch.Tensor] = {}
    try:
        for file in files:
            tensors.update(load_file(file))
    except (OSError, SafetensorError):
        return None
    model = without_weights(owner, config, dtype)
    own = model.state_dict()
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in tensors.items()}:
        return None
    parameters = dict(model.named_parameters())
    # A buffer keeps the dtype that the model made it in, as where diffusers loads it.
    kept = {name: value if name in parameters else value.to(own[name].dtype) for name, value in tensors.items()}
    model.load_state_dict(kept, assign=True)
    return model


def without_weights(owner: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """A diffusers model whose parameters have no memory; its buffers are as where diffusers loads it in ``dtype``."""
    with parameters_on_meta(), _default_dtype(dtype):
        model: nn.Module = owner.from_config(config)
    return model


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have no memory for their parameters; their buffers (position tables) are real."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to(torch.device("meta")), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", on_meta):
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As diffusers makes a model that it loads in ``dtype``: buffers that are not in its files get it too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
