"""Stable Diffusion with an IP-Adapter: against diffusers with the same file, and against the supernet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from family_checks import assert_pictures_equal_stock, plan_for, schedule_for
from PIL import Image
from sd_pipelines import PROMPT, relative, save_ip_adapter, save_sd15, save_sdxl, sdxl_unet, stock
from transformers import CLIPImageProcessor

from dipgo_deploy.cli.run import command as run_command
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import publish
from dipgo_deploy.integrations.diffusers import load_engines
from dipgo_deploy.models.location import denoiser_config, with_options
from dipgo_deploy.runtime.image import to_squares
from dipgo_deploy.runtime.pipeline import Pipeline

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    return save_ip_adapter(tmp_path_factory.mktemp("adapter"), unet)


def theirs(owner: Any, folder: Path, adapter: Path, scale: float, **call: Any) -> np.ndarray:
    pipeline = owner.from_pretrained(folder)
    pipeline.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name)
    pipeline.set_ip_adapter_scale(scale)
    return stock(pipeline, steps=STEPS, prompt=PROMPT, output_type="np", **call)


def test_pictures_are_diffusers(folder: Path, adapter: Path, picture: Image.Image, tmp_path: Path) -> None:
    """A random schedule against the supernet and the stock pipeline around it, a full one against diffusers."""
    model = with_options(str(folder), ip_adapter=str(adapter))
    schedule = schedule_for(model, steps=STEPS, ratio=0.4, sampler="ddim")
    publish(plan_for(model, schedule, check=False), tmp_path / "x")
    assert_pictures_equal_stock(tmp_path / "x", variants=True)
    ours = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)
    call: dict[str, Any] = {"seed": 3, "output_type": "latent"}
    found = ours(PROMPT, ip_adapter_image=picture, **call).latents
    other = ours(PROMPT, ip_adapter_image=np.zeros((40, 32, 3)), **call).latents
    assert relative(other, found) > 1e-3
    with pytest.raises(UserError, match="ip_adapter_image: missing; this engine directory draws from a picture"):
        ours(PROMPT)
    own = StableDiffusionPipeline.from_pretrained(folder)
    own.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name)
    own.set_ip_adapter_scale(0.3)
    own.set_progress_bar_config(disable=True)
    with load_engines(own, tmp_path / "x", "cpu", threads=1):
        asked = {"ip_adapter_image": picture, "num_inference_steps": STEPS, "output_type": "latent"}
        drawn = own(PROMPT, generator=torch.Generator().manual_seed(3), **asked).images.numpy()
        own.unet.attn_processors["mid_block.attentions.0.transformer_blocks.0.attn2.processor"].scale = [0.9]
        with pytest.raises(UserError, match="set_ip_adapter_scale: one scale for all layers"):
            own(PROMPT, **asked)
    scaled = ours(PROMPT, ip_adapter_image=picture, ip_adapter_scale=0.3, **call).latents
    assert relative(drawn, scaled) <= 1e-4 and relative(scaled, found) > 1e-3
    picture.save(tmp_path / "in.png")
    run = ["--engine-dir", str(tmp_path / "x"), "--prompt", PROMPT, "--backend", "cpu", "--threads", "1", "--seed", "3"]
    run += ["--ip-adapter-image", str(tmp_path / "in.png"), "--ip-adapter-scale", "1", "--output-type", "latent"]
    drawn = CliRunner().invoke(run_command, [*run, "-o", str(tmp_path / "out.npy")])
    assert drawn.exit_code == 0 and np.array_equal(np.load(tmp_path / "out.npy"), found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "plus", "sdxl"])
def test_full_schedules_are_diffusers(
    folder: Path, adapter: Path, picture: Image.Image, tmp_path: Path, name: str
) -> None:
    owner: Any = StableDiffusionPipeline
    if name == "plus":
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        adapter = save_ip_adapter(tmp_path / "adapter", unet, plus=True)
    if name == "sdxl":
        owner, folder = StableDiffusionXLPipeline, save_sdxl(tmp_path / "sdxl")
        adapter = save_ip_adapter(tmp_path / "adapter", sdxl_unet())
    model = with_options(str(folder), ip_adapter=str(adapter))
    publish(plan_for(model, schedule_for(model, steps=STEPS), check=False), tmp_path / "x")
    ours = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)
    for scale in (1.0, 0.4):
        wanted = theirs(owner, folder, adapter, scale, ip_adapter_image=picture)
        found = ours(PROMPT, ip_adapter_image=picture, ip_adapter_scale=scale, seed=3, output_type="np").images
        assert relative(np.asarray(found), wanted) <= 1e-4


def test_pictures_are_prepared_as_the_image_processor_does() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (45, 31, 3), dtype=np.uint8)
    processor = CLIPImageProcessor(size=24, crop_size=24)
    for picture in (Image.fromarray(pixels), Image.fromarray(pixels).rotate(90, expand=True)):
        wanted = processor(picture, return_tensors="np").pixel_values.transpose(0, 2, 3, 1)
        mean, deviation = np.array(processor.image_mean), np.array(processor.image_std)
        assert np.abs((to_squares(picture, 24) - mean) / deviation - wanted).max() <= 1e-5


def test_adapters_that_do_not_fit_are_refused(folder: Path, adapter: Path, tmp_path: Path) -> None:
    xl = save_ip_adapter(tmp_path / "xl", sdxl_unet())
    with pytest.raises(UserError, match="was made for a UNet whose text is 40 wide, here it is 16"):
        denoiser_config(with_options(str(folder), ip_adapter=str(xl)))
    with pytest.raises(UserError, match="--image-encoder: is that of an IP-Adapter"):
        denoiser_config(with_options(str(folder), image_encoder=str(adapter.parent)))
    with pytest.raises(UserError, match="config.json: no such file"):
        denoiser_config(with_options(str(folder), ip_adapter=str(adapter), image_encoder=str(folder)))
    with pytest.raises(UserError, match="is none of the kinds that are supported"):
        weights = folder / "unet/diffusion_pytorch_model.safetensors"
        denoiser_config(
            with_options(str(folder), ip_adapter=str(weights), image_encoder=str(adapter.parent / "image_encoder"))
        )
    with pytest.raises(UserError, match="no supported denoiser|is not supported"):
        denoiser_config(with_options("fashion-dit", ip_adapter=str(adapter)))
