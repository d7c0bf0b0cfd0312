from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dipgo_deploy.errors import UserError
from dipgo_deploy.models import location


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def pipeline_folder(folder: Path) -> Path:
    write(
        folder / "model_index.json",
        {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": None},
    )
    write(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", "sample_size": 8})
    write(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler"})
    return folder


def test_folders_and_hub_ids(tmp_path: Path) -> None:
    assert location.resolve_model(tmp_path) == str(tmp_path)
    assert location.resolve_model("stabilityai/stable-diffusion-2-1") == "stabilityai/stable-diffusion-2-1"
    for nothing in ("no-such-model", "./no/folder", "/no/such/folder", "a/b/c", ""):
        with pytest.raises(UserError, match="no such folder, nor one of the built-in models fashion-sd, fashion-dit"):
            location.resolve_model(nothing)
    write(tmp_path / "file.json", {})
    with pytest.raises(UserError, match="is a file: give the model's folder"):
        location.resolve_model(tmp_path / "file.json")


def test_built_in_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in location.BUILT_IN:
        folder = Path(location.resolve_model(name))
        assert (folder / "model_index.json").is_file()
        family, config = location.denoiser_config(folder)
        assert config["_class_name"] == family.class_name
        assert location.scheduler_config(folder) is not None
    monkeypatch.setattr(location, "_ASSETS", tmp_path)
    with pytest.raises(UserError, match="missing from this installation"):
        location.resolve_model("fashion-sd")


def test_pipeline_and_denoiser_folders(tmp_path: Path) -> None:
    folder = pipeline_folder(tmp_path)
    family, config = location.denoiser_config(folder)
    assert (family.class_name, config["sample_size"]) == ("UNet2DConditionModel", 8)
    assert location.scheduler_config(folder) == {"_class_name": "DDIMScheduler"}
    assert location.denoiser_config(folder / "unet") == (family, config)
    assert location.scheduler_config(folder / "unet") is None


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model_index.json or config.json"):
        location.denoiser_config(tmp_path)
    folder = pipeline_folder(tmp_path)
    write(folder / "unet" / "config.json", "{")
    with pytest.raises(UserError, match="unet/config.json: not JSON"):
        location.denoiser_config(folder)
    write(folder / "unet" / "config.json", [1])
    with pytest.raises(UserError, match="unet/config.json: not a JSON object"):
        location.denoiser_config(folder)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(UserError, match="unet/config.json: cannot be read: No such file"):
        location.denoiser_config(folder)
    write(folder / "model_index.json", {"_class_name": "OtherPipeline", "unet": ["diffusers", "OtherModel"]})
    with pytest.raises(UserError, match="OtherPipeline has no supported denoiser"):
        location.denoiser_config(folder)


def test_a_hub_id_gets_configurations_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "owner/gone":
            raise OSError("404: not found\nmore lines")
        return str(tmp_path)

    hub = ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert location.config_folder("owner/name") == tmp_path
    assert asked == [("owner/name", ["*.json"])]
    with pytest.raises(
        UserError, match="owner/gone: no folder of that name, and the hub does not give it: 404: not found$"
    ):
        location.config_folder("owner/gone")


@pytest.mark.parametrize(
    ("norm", "class_name"),
    [("ada_norm_zero", "DiTTransformer2DModel"), ("ada_norm_single", "PixArtTransformer2DModel")],
)
def test_published_folders_name_the_class_that_was_split(tmp_path: Path, norm: str, class_name: str) -> None:
    index = {"_class_name": "SomePipeline", "transformer": ["diffusers", "Transformer2DModel"]}
    write(tmp_path / "model_index.json", index)
    write(tmp_path / "transformer" / "config.json", {"_class_name": "Transformer2DModel", "norm_type": norm})
    for folder in (tmp_path, tmp_path / "transformer"):
        assert location.denoiser_config(folder)[0].class_name == class_name
    write(tmp_path / "transformer" / "config.json", {"_class_name": "Transformer2DModel", "norm_type": "layer_norm"})
    with pytest.raises(UserError, match="has no supported denoiser"):
        location.denoiser_config(tmp_path)
