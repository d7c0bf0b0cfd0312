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
from dipgo_deploy.export.mapped import mapped_files
from dipgo_deploy.supernet.load import load_denoiser, weight_files


def _sharded(model: Any, folder: Path, dtype: torch.dtype) -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size="10KB")
    assert len(weight_files(folder)) > 2
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
    stored = {name: value for file in weight_files(folder) for name, value in load_file(file).items()}
    for name, value in model.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[name].float())


def test_what_is_not_the_models_own_is_left_to_diffusers(tmp_path: Path) -> None:
    """A missing weight, an unreadable file: never a model with weights that nobody gave it."""
    folder = _sharded(unet2d(), tmp_path / "model", torch.float32)
    first = weight_files(folder)[0]
    tensors = load_file(first)
    name = next(iter(tensors))
    spare = {key: value.clone() for key, value in tensors.items() if key != name}
    save_file(spare, first, {"format": "pt"})
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    document = json.loads(index.read_text())
    del document["weight_map"][name]
    index.write_text(json.dumps(document))
    model, _, _ = load_denoiser(folder)  # as diffusers has it: a warning, and its own initial values
    assert not _mapped(model)
    assert all(not value.is_meta for value in model.parameters())
    first.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_denoiser(folder)
