"""Loading denoisers and pipelines from folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.location import resolve_model
from dipgo_deploy.supernet import Supernet, load_denoiser, load_pipeline, run_loop


@pytest.fixture
def dit_folder(tmp_path, dit) -> Path:
    """A pipeline folder around the tiny DiT (its index, the denoiser; no VAE)."""
    folder = tmp_path / "pipeline"
    dit.save_pretrained(folder / "transformer")
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_bare_and_pipeline_folders_give_the_same_model(dit_folder, dit) -> None:
    labels, latent, timestep = torch.tensor([1]), torch.randn(1, 4, 8, 8), torch.tensor([9])
    with torch.no_grad():
        expected = dit(latent, timestep, labels).sample
        for folder in (dit_folder, dit_folder / "transformer"):
            model, family, config = load_denoiser(folder)
            assert family.class_name == "DiTTransformer2DModel" and not model.training
            assert torch.equal(model(latent, timestep, labels).sample, expected)
            written = json.loads((dit_folder / "transformer" / "config.json").read_text())
            assert {**config, **written} == config
    half, _, _ = load_denoiser(dit_folder, torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}


def test_refusals_name_the_folder(dit_folder, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_denoiser(tmp_path / "nowhere")
    with pytest.raises(UserError, match="empty: no model_index.json or config.json"):
        load_denoiser(tmp_path / "empty")
    with pytest.raises(UserError, match="empty: no model_index.json"):
        load_pipeline(tmp_path / "empty")
    index = {"_class_name": "OtherPipeline", "transformer": ["diffusers", "OtherModel"]}
    (tmp_path / "empty" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="empty: OtherPipeline has no supported denoiser"):
        load_denoiser(tmp_path / "empty")
    weights = dit_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="safetensors: is not a whole safetensors file") as error:
        load_denoiser(dit_folder)
    assert "\n" not in str(error.value)
    (dit_folder / "transformer" / "config.json").write_text("{")
    with pytest.raises(UserError, match="transformer/config.json"):
        load_denoiser(dit_folder)


def test_pickled_weights_are_not_read(dit_folder, dit) -> None:
    folder = dit_folder / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(dit.state_dict(), folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="its .bin files are pickled and never read"):
        load_denoiser(dit_folder)


def test_default_text_model_full_schedule_is_its_stock_pipeline() -> None:
    model, family, config = load_denoiser("fashion-sd")
    specs = family.blocks(config, "block")
    assert len(specs) == 9 and len(family.blocks(config, "layer")) == 24
    pipeline = load_pipeline("fashion-sd")
    pipeline.set_progress_bar_config(disable=True)
    side = config["sample_size"]
    latents = torch.randn(1, 4, side, side)
    with torch.no_grad():
        positive, negative = pipeline.encode_prompt("a sneaker", "cpu", 1, True)
        scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.scheduler = scheduler
        expected = pipeline("a sneaker", latents=latents, num_inference_steps=4, output_type="latent").images
        conditions = {"encoder_hidden_states": torch.cat([negative, positive])}
        gates = [[True] * 9] * 4
        got = run_loop(
            Supernet(model, specs),
            scheduler,
            gates,
            latents,
            conditions,
            num_inference_steps=4,
            guidance_scale=7.5,
        )
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_default_class_model_full_schedule_is_its_stock_pipeline() -> None:
    model, family, config = load_denoiser("fashion-dit")
    specs = family.blocks(config, "block")
    assert len(specs) == config["num_layers"] >= 8
    pipeline = load_pipeline("fashion-dit")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        [7], guidance_scale=4.0, generator=torch.Generator().manual_seed(3), num_inference_steps=4, output_type="np"
    ).images
    side = config["sample_size"]
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(3))
    labels = {"class_labels": torch.tensor([config["num_embeds_ada_norm"], 7])}
    common = (pipeline.scheduler, [[True] * len(specs)] * 4, latents, labels)
    with torch.no_grad():
        final = run_loop(Supernet(model, specs), *common, num_inference_steps=4, guidance_scale=4.0)
        decoded = pipeline.vae.decode(final / pipeline.vae.config.scaling_factor).sample
    got = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    # The stock pipeline has the conditional half first, which only changes the rounding.
    assert abs(got - images).max() < 1e-3


@pytest.fixture
def text_model(tmp_path: Path) -> Path:
    """A copy of the built-in text model."""
    return Path(shutil.copytree(resolve_model("fashion-sd"), tmp_path / "model"))


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(edit(load_file(path)), path, {"format": "pt"})


@pytest.mark.parametrize(
    ("part", "file", "edit", "message"),
    [
        (
            "text_encoder",
            "model.safetensors",
            lambda tensors: {key: value for key, value in tensors.items() if "layers.1." not in key},
            r"text_encoder: not the weights of CLIPTextModel .*: 16 weights are missing \(.*layers.1.layer_norm1.bias",
        ),
        (
            "text_encoder",
            "model.safetensors",
            lambda tensors: {f"_orig_mod.{key}": value for key, value in tensors.items()},
            "text_encoder: .*_orig_mod",
        ),
        (
            "vae",
            "diffusion_pytorch_model.safetensors",
            lambda tensors: {**tensors, "stray.weight": torch.zeros(1)},
            r"vae: not the weights of AutoencoderKL .*: 1 weights are not the model's \(stray.weight\)",
        ),
        (
            "vae",
            "diffusion_pytorch_model.safetensors",
            lambda tensors: {**tensors, "decoder.conv_in.bias": torch.zeros(1)},
            r"vae: .*: 1 weights have another shape \(decoder.conv_in.bias\)",
        ),
    ],
)
def test_weights_of_every_part_are_its_own(
    text_model: Path, part: str, file: str, edit: Callable[..., Any], message: str
) -> None:
    change(text_model / part / file, edit)
    with pytest.raises(UserError, match=message) as error:
        load_pipeline(text_model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: {f"_orig_mod.{key}": value for key, value in tensors.items()}, "begin with _orig_mod. "),
        (lambda tensors: {key: value for key, value in tensors.items() if "blocks.1." not in key}, "are missing"),
    ],
)
def test_weights_of_the_denoiser_are_its_own(dit_folder: Path, edit: Callable[..., Any], message: str) -> None:
    change(dit_folder / "transformer" / "diffusion_pytorch_model.safetensors", edit)
    with pytest.raises(UserError, match=f"transformer: .*{message}"):
        load_denoiser(dit_folder)


def test_parts_that_are_not_exported_are_not_loaded(text_model: Path) -> None:
    """A safety checker without files, half precision under another name: neither stops a pipeline."""
    index = json.loads((text_model / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    (text_model / "model_index.json").write_text(json.dumps(index))
    for path in text_model.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    pipeline = load_pipeline(text_model)
    assert (pipeline.safety_checker, pipeline.feature_extractor, pipeline.image_encoder) == (None, None, None)
    own = load_pipeline("fashion-sd")
    for name in ("unet", "vae", "text_encoder"):
        expected, found = getattr(own, name).state_dict(), getattr(pipeline, name).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_buffers_that_old_files_have_are_no_foreign_weights(text_model: Path) -> None:
    """Published text encoders have the numbers of their positions in their files."""
    numbers = torch.arange(16).expand(1, -1).contiguous()
    path = text_model / "text_encoder" / "model.safetensors"
    change(path, lambda tensors: {**tensors, "text_model.embeddings.position_ids": numbers})
    assert load_pipeline(text_model).text_encoder is not None
