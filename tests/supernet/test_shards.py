"""Models in several files: mapped, and otherwise as diffusers loads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from flow_pipelines import flux_transformer, sd3_transformer
from safetensors.torch import load_file, save_file
from tiny_denoisers import sana_transformer, two_level_unet, unet2d

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.files import weights_of
from dipgo_deploy.reference.mapped import mapped_files
from dipgo_deploy.supernet.load import load_denoiser


def _sharded(model: Any, folder: Path, dtype: torch.dtype) -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size="10KB")
    assert len(weights_of(folder, "diffusers").files) > 2
    return folder


def _mapped(model: torch.nn.Module) -> bool:
    files = mapped_files()
    return all(any(a <= value.data_ptr() < b for a, b in files) for value in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("make", [flux_transformer, sd3_transformer, sana_transformer, two_level_unet, unet2d])
def test_all_files_are_mapped_and_the_model_is_that_of_one_file(
    make: Callable[[], Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    own = make()
    folder = _sharded(own, tmp_path / "model", dtype)
    own.save_pretrained(tmp_path / "whole")
    expected, _, _ = load_denoiser(tmp_path / "whole", dtype)  # diffusers loads it
    model, family, _ = load_denoiser(folder, dtype)
    assert _mapped(model)
    assert not model.training
    assert type(model) is getattr(diffusers, family.diffusers_class)
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = dict(getattr(model, kind)()), dict(getattr(expected, kind)())
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert value.dtype == wanted[name].dtype, name
            assert torch.equal(value, wanted[name]), name


def test_another_dtype_than_the_files_is_converted(tmp_path: Path) -> None:
    folder = _sharded(unet2d(), tmp_path / "model", torch.float16)
    model, _, _ = load_denoiser(folder)
    stored = {name: value for file in weights_of(folder, "diffusers").files for name, value in load_file(file).items()}
    for name, value in model.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[name].float())


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    """Never a model with weights that nobody gave it."""
    folder = _sharded(unet2d(), tmp_path / "model", torch.float32)
    first = weights_of(folder, "diffusers").files[0]
    tensors = load_file(first)
    name = next(iter(tensors))
    spare = {key: value.clone() for key, value in tensors.items() if key != name}
    save_file(spare, first, {"format": "pt"})
    with pytest.raises(UserError, match=f"has other tensors than its index says .first: {name}."):
        load_denoiser(folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    document = json.loads(index.read_text())
    del document["weight_map"][name]
    index.write_text(json.dumps(document))
    with pytest.raises(UserError, match=f"not the weights of UNet2DModel .*: 1 weights are missing .{name}."):
        load_denoiser(folder)
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name}: is missing"):
        load_denoiser(folder)
