from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dipgo_deploy.errors import UserError
from dipgo_deploy.models import location
from dipgo_deploy.schedule.identity import accepted_hashes, config_hash, file_hash


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
    with pytest.raises(UserError, match="is a file; give the model's folder"):
        location.resolve_model(tmp_path / "file.json")


def test_one_file_takes_its_configuration_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipeline_folder(tmp_path / "config")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    with pytest.raises(UserError, match="give --config FOLDER with that model's .* .nothing is downloaded.$"):
        location.resolve_model(file)
    name = location.with_options(str(file), config=str(folder), variant="fp16")
    assert name == f"{file}?variant=fp16&config={folder}"
    assert (location.single_file(name), location.single_file(folder)) == (file, None)
    assert location.config_folder(name) == folder
    assert location.denoiser_config(name) == location.denoiser_config(folder)
    assert location.resolve_model(f"{file}?config=fashion-sd") == location.resolve_model("fashion-sd")
    monkeypatch.chdir(tmp_path)
    assert location.lasting_name("model.safetensors?config=config") == f"{file}?config={folder}"
    assert location.lasting_name("model.safetensors?config=fashion-sd") == f"{file}?config=fashion-sd"
    for wrong, message in (
        (f"{file}?config=owner/name", "--config owner/name: no such folder"),
        (f"{file}?config={file}", "no such folder; give one in diffusers' format"),
        (f"{folder}?config={folder}", "--config is for a model that is one .safetensors file"),
        ("owner/name?config=fashion-sd", "owner/name: --config is for a model that is one"),
    ):
        with pytest.raises(UserError, match=message):
            location.denoiser_config(wrong)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.bin", b"x", ".bin files are pickled and never read; save it as .safetensors"),
        ("model.ckpt", b"x", ".ckpt files are pickled and never read; save it as .safetensors"),
        ("flux-Q4_K.gguf", b"GGUF....", "its weights are quantised .GGUF.; give the model's own files, of 16 bits"),
        ("model.safetensors", b"GGUF....", "its weights are quantised .GGUF."),
    ],
)
def test_files_that_are_not_read_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        location.denoiser_config(f"{tmp_path / name}?config=fashion-sd")


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
    with pytest.raises(UserError, match="unet/config.json: no such file"):
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
    ("pipeline", "norm", "class_name"),
    [
        ("DiTPipeline", "ada_norm_zero", "DiTTransformer2DModel"),
        ("PixArtAlphaPipeline", "ada_norm_single", "PixArtTransformer2DModel"),
    ],
)
def test_published_folders_name_the_class_that_was_split(
    tmp_path: Path, pipeline: str, norm: str, class_name: str
) -> None:
    index = {"_class_name": pipeline, "transformer": ["diffusers", "Transformer2DModel"]}
    write(tmp_path / "model_index.json", index)
    write(tmp_path / "transformer" / "config.json", {"_class_name": "Transformer2DModel", "norm_type": norm})
    for folder in (tmp_path, tmp_path / "transformer"):
        assert location.denoiser_config(folder)[0].class_name == class_name
    write(tmp_path / "transformer" / "config.json", {"_class_name": "Transformer2DModel", "norm_type": "layer_norm"})
    with pytest.raises(UserError, match="has no supported denoiser"):
        location.denoiser_config(tmp_path)


def test_a_name_says_how_a_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = location.with_options("./sd", variant="fp16", pipeline="StableDiffusionPipeline")
    assert location.read_options(name) == location.ReadOptions("fp16", "StableDiffusionPipeline")
    assert location.read_options(location.with_options(name, variant="ema")).variant == "ema"
    assert location.with_options("fashion-sd") == "fashion-sd"
    for wrong in ("fashion-sd?", "fashion-sd?variant", "fashion-sd?variant=", "fashion-sd?colour=red"):
        with pytest.raises(
            UserError, match="after the . there may be variant=NAME, pipeline=CLASS, config=FOLDER, ip_adapter=FILE and"
        ):
            location.read_options(wrong)
    odd = tmp_path / "what?variant=x"  # a folder may be called anything
    odd.mkdir()
    assert location.resolve_model(odd) == str(odd)
    assert location.read_options(odd) == location.ReadOptions()


def test_lasting_names_hold_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert location.lasting_name("model?variant=fp16") == f"{tmp_path / 'model'}?variant=fp16"
    assert location.lasting_name("fashion-sd") == "fashion-sd"
    assert location.lasting_name("owner/name") == "owner/name"


def test_defaults_written_or_left_out_are_one_configuration(tmp_path: Path) -> None:
    short, long = pipeline_folder(tmp_path / "short"), pipeline_folder(tmp_path / "long")
    file = long / "unet" / "config.json"
    written = {**json.loads(file.read_text()), "layers_per_block": 2, "mid_block_scale_factor": 1.0, "later": None}
    write(file, written)
    one, other = (location.denoiser_config(folder)[1] for folder in (short, long))
    assert config_hash(one) == config_hash(other)
    # What schedules of version 0.1 recorded stays accepted, for the file that it was recorded of.
    assert accepted_hashes(other) == (config_hash(other), file_hash(written))
    write(file, {**written, "layers_per_block": 3})
    assert config_hash(location.denoiser_config(long)[1]) != config_hash(one)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_channels": 9}, "in_channels 9, out_channels 4: only models whose input is the latent work"),
        ({"in_channels": 7, "num_class_embeds": 1000}, "in_channels 7"),
        ({"encoder_hid_dim": 256}, "encoder_hid_dim = 256 needs an input that is not supported"),
        ({"encoder_hid_dim": 768}, "encoder_hid_dim = 768 needs an input"),
        ({"addition_embed_type": "text_time", "addition_time_embed_dim": 256}, "leave no room for a text embedding"),
        ({"down_block_types": 4}, "unet: a setting of its config.json has another type"),
        ({"layers_per_block": 10**9}, "layers_per_block = 1000000000: is at most 65536"),
        ({"layers_per_block": 1e308}, r"layers_per_block = 1e\+308: is at most 65536"),
    ],
)
def test_settings_that_no_family_has_are_refused_by_the_configuration(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = pipeline_folder(tmp_path)
    write(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **settings})
    for place in (folder, folder / "unet"):
        with pytest.raises(UserError, match=message.replace("unet: ", "")):
            location.denoiser_config(place)


def test_a_pipeline_that_does_more_is_named_with_what_is_offered(tmp_path: Path) -> None:
    folder = pipeline_folder(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    adapter = {**index, "_class_name": "StableDiffusionAdapterPipeline", "adapter": ["diffusers", "T2IAdapter"]}
    write(folder / "model_index.json", adapter)
    offered = (
        "StableDiffusionAdapterPipeline is not supported, only StableDiffusionPipeline or StableDiffusionXLPipeline"
    )
    with pytest.raises(UserError, match=f"{offered}; --pipeline StableDiffusionPipeline .or the model as"):
        location.denoiser_config(folder)
    chosen = location.with_options(str(folder), pipeline="StableDiffusionPipeline")
    assert location.denoiser_config(chosen)[0].class_name == "UNet2DConditionModel"
    assert location.pipeline_index(chosen)["_class_name"] == "StableDiffusionPipeline"
    with pytest.raises(
        UserError, match="--pipeline NoPipeline: is not supported; use one of .*DDIMPipeline, DDPMPipeline"
    ):
        location.denoiser_config(f"{folder}?pipeline=NoPipeline")
    with pytest.raises(UserError, match="StableDiffusionControlNetPipeline has no supported denoiser"):
        location.denoiser_config(f"{folder}?pipeline=StableDiffusionControlNetPipeline")
    write(folder / "model_index.json", {**index, "controlnet": ["diffusers", "MultiControlNetModel"]})
    with pytest.raises(UserError, match="controlnet/config.json: no such file"):
        location.denoiser_config(folder)
    write(folder / "model_index.json", {**index, "controlnet": ["diffusers", "ControlNetUnionModel"]})
    with pytest.raises(UserError, match="ControlNetUnionModel is not supported"):
        location.denoiser_config(folder)
    assert location.denoiser_config(chosen)[0].class_name == "UNet2DConditionModel"


@pytest.mark.parametrize("length", [None, 10**30, "77"])
def test_a_tokenizer_says_how_long_its_texts_are(tmp_path: Path, length: Any) -> None:
    folder = pipeline_folder(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    write(folder / "model_index.json", {**index, "tokenizer": ["transformers", "CLIPTokenizer"]})
    write(folder / "tokenizer" / "tokenizer_config.json", {} if length is None else {"model_max_length": length})
    with pytest.raises(UserError, match="tokenizer_config.json: model_max_length is .*; write the number of tokens"):
        location.denoiser_config(folder)
    write(folder / "tokenizer" / "tokenizer_config.json", {"model_max_length": 77})
    location.denoiser_config(folder)


def test_folders_that_cannot_be_looked_at_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipeline_folder(tmp_path)

    def refused(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(UserError, match="model_index.json: cannot be read: Permission denied"):
        location.denoiser_config(folder)


def test_a_vae_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = pipeline_folder(tmp_path)
    write(folder / "vae" / "config.json", {"latent_channels": 16})
    with pytest.raises(UserError, match="its VAE makes latents of 16 channels, its denoiser takes 4"):
        location.denoiser_config(folder)
    write(folder / "vae" / "config.json", {"latent_channels": 4})
    location.denoiser_config(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"num_layers": 1e400}', "not JSON .1e400 is too large a number"),
        ('{"num_layers": NaN}', "not JSON .NaN is no JSON number"),
        ('{"num_layers": 1, "num_layers": 2}', "not JSON .the key 'num_layers' stands twice"),
        ("[" * 100_000, "not JSON"),
        (None, "not a regular file"),
    ],
)
def test_configurations_that_are_no_plain_json_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    folder = pipeline_folder(tmp_path)
    path = folder / "unet" / "config.json"
    path.unlink()
    if text is None:
        os.mkfifo(path)  # what opened it would wait for ever
    else:
        path.write_text(text)
    with pytest.raises(UserError, match=f"unet/config.json: {message}"):
        location.denoiser_config(folder)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize(("key", "method"), [("quant_method", "bitsandbytes"), ("quant_type", "torchao")])
def test_a_configuration_of_quantised_weights_is_refused(tmp_path: Path, part: str, key: str, method: str) -> None:
    folder = pipeline_folder(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    write(folder / "model_index.json", {**index, "text_encoder": ["transformers", "CLIPTextModel"]})
    write(folder / part / "config.json", {"_class_name": "UNet2DConditionModel", "quantization_config": {key: method}})
    with pytest.raises(UserError, match=f"{part}/config.json: says that its weights are quantised .{method}."):
        location.denoiser_config(folder)


def test_schedulers_have_infinite_settings(tmp_path: Path) -> None:
    folder = pipeline_folder(tmp_path)
    write(folder / "scheduler" / "scheduler_config.json", '{"lambda_min_clipped": -Infinity}')
    assert location.scheduler_config(folder) == {"lambda_min_clipped": float("-inf")}


def test_the_refiner_of_sdxl_is_read_as_itself_only(tmp_path: Path) -> None:
    folder = pipeline_folder(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    refiner = {**index, "_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    write(folder / "model_index.json", refiner)
    with pytest.raises(
        UserError, match="requires_aesthetics_score = True: only StableDiffusionXLImg2ImgPipeline has an"
    ):
        location.denoiser_config(f"{folder}?pipeline=StableDiffusionXLPipeline")
    with pytest.raises(UserError, match="no addition_embed_type text_time: only SDXL has a refiner"):
        location.denoiser_config(folder)
    write(folder / "model_index.json", {**refiner, "requires_aesthetics_score": False})
    with pytest.raises(UserError, match="--pipeline StableDiffusionXLPipeline .or the model as"):
        location.denoiser_config(folder)
