"""Models that are one file in their authors' layout, beside the folders that the same weights make."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from flow_pipelines import save_sd3
from original_layouts import flux_transformer, ldm_unet, ldm_vae, open_clip, prefixed, sd3_transformer, wan_transformer
from safetensors.torch import load_file, save_file
from sd_pipelines import save_sdxl
from tiny_denoisers import wan_transformer as tiny_wan

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.files import check_weights
from dipgo_deploy.models.location import with_options
from dipgo_deploy.reference.mapped import float32_files, mapped_files
from dipgo_deploy.supernet.load import load_denoiser, load_pipeline, stored_dtype

STEM = "diffusion_pytorch_model.safetensors"


def without_weights(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors")))


def write(tensors: dict[str, torch.Tensor], path: Path, dtype: torch.dtype = torch.float32) -> Path:
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder, and one file of CompVis' kind with all of it beside what training left there."""
    folder = save_sdxl(tmp_path_factory.mktemp("sdxl") / "folder")
    tensors = {
        **ldm_unet(load_file(folder / "unet" / STEM), 1),
        **ldm_vae(load_file(folder / "vae" / STEM), 4),
        **prefixed("conditioner.embedders.0.transformer.", load_file(folder / "text_encoder" / "model.safetensors")),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
        **open_clip(load_file(folder / "text_encoder_2" / "model.safetensors"), "conditioner.embedders.1.model."),
        "denoiser.sigmas": torch.ones(1000),
        "model_ema.decay": torch.ones(1),
    }
    file = write(tensors, folder.parent / "sdxl.safetensors")
    return folder, with_options(str(file), config=str(without_weights(folder, folder.parent / "config")))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder, and ComfyUI's file with all text encoders, whose first has no projection."""
    folder = save_sd3(tmp_path_factory.mktemp("sd3") / "folder", small=True)
    clip = folder / "text_encoder" / "model.safetensors"
    write({**load_file(clip), "text_projection.weight": torch.eye(8)}, clip)
    first = {name: tensor for name, tensor in load_file(clip).items() if name != "text_projection.weight"}
    tensors = {
        **prefixed("model.diffusion_model.", sd3_transformer(load_file(folder / "transformer" / STEM), 2)),
        **ldm_vae(load_file(folder / "vae" / STEM), 2),
        **prefixed("text_encoders.clip_l.transformer.", first),
        "text_encoders.clip_l.logit_scale": torch.ones(()),
        **prefixed("text_encoders.clip_g.transformer.", load_file(folder / "text_encoder_2" / "model.safetensors")),
        **prefixed("text_encoders.t5xxl.transformer.", load_file(folder / "text_encoder_3" / "model.safetensors")),
    }
    file = write(tensors, folder.parent / "sd3.safetensors")
    return folder, with_options(str(file), config=str(without_weights(folder, folder.parent / "config")))


def parts(model: str | Path) -> Iterator[tuple[str, torch.nn.Module]]:
    denoiser, family, _ = load_denoiser(model)
    yield family.component, denoiser
    pipeline = load_pipeline(model, **{family.component: denoiser})
    yield from ((name, part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    found, wanted = one.state_dict(), other.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("layout", ["sdxl", "sd3"])
def test_a_file_with_all_parts_is_the_folder(
    layout: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    folder, file = request.getfixturevalue(layout)
    assert all(weights.prefix for weights in check_weights(file).values())
    found, wanted = dict(parts(file)), dict(parts(folder))
    assert found.keys() == wanted.keys() and len(wanted) >= 4
    assert all(same(part, wanted[name]) and not part.training for name, part in found.items())
    assert [text for text in caplog.messages if "numbers are of nothing" in text] == []


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_of_a_denoiser_alone(prefix: str, tmp_path: Path) -> None:
    tiny_wan().save_pretrained(tmp_path / "folder")
    tensors = prefixed(prefix, wan_transformer(load_file(tmp_path / "folder" / STEM)))
    config = without_weights(tmp_path / "folder", tmp_path / "config")
    file = with_options(str(write(tensors, tmp_path / "wan.safetensors", torch.bfloat16)), config=str(config))
    wanted = load_denoiser(tmp_path / "folder", torch.bfloat16)[0]
    assert stored_dtype(file) == torch.bfloat16
    found = load_denoiser(file, torch.bfloat16)[0]
    assert found.state_dict().keys() == wanted.state_dict().keys()
    # Some stay in float32, of weights that the file has in bfloat16.
    for name, parameter in wanted.named_parameters():
        got = found.get_parameter(name)
        assert got.dtype == parameter.dtype and torch.equal(got.bfloat16(), parameter.bfloat16()), name
    with float32_files(file, tmp_path) as copy:
        in_float32, mapped = load_denoiser(copy)[0], mapped_files()
        for name, parameter in in_float32.named_parameters():
            assert torch.equal(parameter, wanted.get_parameter(name).bfloat16().float()), name
            assert any(first <= parameter.data_ptr() < last for first, last in mapped), name


@pytest.mark.slow
def test_a_file_of_black_forest_labs(tmp_path: Path) -> None:
    """One block of each kind, as wide as the published ones: diffusers' converter knows no other width."""
    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True
    )
    model.to(torch.bfloat16).save_pretrained(tmp_path / "folder")
    tensors = flux_transformer(dict(model.state_dict()))
    config = without_weights(tmp_path / "folder", tmp_path / "config")
    file = with_options(str(write(tensors, tmp_path / "flux.safetensors", torch.bfloat16)), config=str(config))
    assert same(load_denoiser(file, torch.bfloat16)[0], model)


def test_a_file_in_diffusers_own_names(tmp_path: Path) -> None:
    tiny_wan().save_pretrained(tmp_path / "folder")
    file = shutil.copy(tmp_path / "folder" / STEM, tmp_path / "wan.safetensors")
    found, wanted = (
        load_denoiser(model)[0]
        for model in (with_options(str(file), config=str(tmp_path / "folder")), tmp_path / "folder")
    )
    assert same(found, wanted)


def test_what_is_not_in_the_file_comes_from_the_folder(sdxl: tuple[Path, str], tmp_path: Path) -> None:
    folder, file = sdxl
    own = load_file(file.partition("?")[0])
    unet = {name: tensor for name, tensor in own.items() if name.startswith("model.")}
    alone = write(unet, tmp_path / "unet.safetensors")
    model = with_options(str(alone), config=str(folder))
    assert [name for name, weights in check_weights(model).items() if weights.prefix is not None] == ["unet"]
    with pytest.raises(UserError, match=r"unet.safetensors: has no text_encoder, and .*config/text_encoder: has no"):
        check_weights(with_options(str(alone), config=str(folder.parent / "config")))


def test_weights_that_are_not_the_configurations(sdxl: tuple[Path, str], tmp_path: Path) -> None:
    folder, file = sdxl
    own = load_file(file.partition("?")[0])
    for without, message in (
        ("model.diffusion_model.middle_block.1.norm.", r"2 weights are missing \(mid_block.attentions.0.norm.bias"),
        ("model.diffusion_model.out.2.bias", "1 weights are missing .conv_out.bias"),
    ):
        path = write({name: t for name, t in own.items() if not name.startswith(without)}, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=f"x.safetensors with .*unet/config.json: .*{message}"):
            load_denoiser(with_options(str(path), config=str(folder)))


def test_another_models_file(sd3: tuple[Path, str], sdxl: tuple[Path, str]) -> None:
    file = with_options(sd3[1], config=str(sdxl[0]))
    with pytest.raises(UserError, match="unet/config.json: .*UNet2DConditionModel"):
        load_denoiser(file)
    file = with_options(sdxl[1], config=str(sd3[0]))
    with pytest.raises(UserError, match="cannot be read as SD3Transformer2DModel .* may be another model's"):
        load_denoiser(file)
