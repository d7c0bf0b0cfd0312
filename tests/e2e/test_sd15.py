"""SD-1.5 in small: the full schedule makes what diffusers' own pipeline makes, with every sampler."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from family_checks import plan_for, schedule_for, with_gates
from lora_files import diffusers_keys, make_updates, merge_into, save_lora
from sd_pipelines import NEGATIVE, PROMPT, relative, save_sd15, stock

from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.integrations.diffusers import load_engines
from dipgo_deploy.reference.source import load_source
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.sampler import SAMPLERS

STEPS, SCALE = 6, 7.5
CALL = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": SCALE}
# A latent diffusion pipeline cannot use a flow's scheduler: it has no `scale_model_input`.
NAMES = [name for name in SAMPLERS if not name.startswith("flow-")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd15(tmp_path_factory.mktemp("sd15") / "model")


@pytest.fixture(scope="module")
def own(model: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(model, safety_checker=None)


@pytest.fixture(scope="module")
def traced(model: Path) -> PlannedExport:
    return plan_for(model, schedule_for(model, steps=STEPS))


@pytest.fixture(scope="module")
def text(own: Any) -> dict[str, np.ndarray]:
    with torch.no_grad():
        encoded = own.encode_prompt(PROMPT, torch.device("cpu"), 1, True, NEGATIVE)
    return dict(zip(("prompt_embeds", "negative_prompt_embeds"), (part.numpy() for part in encoded), strict=True))


@pytest.mark.parametrize("sampler", NAMES)
def test_latents_with_every_sampler(
    traced: PlannedExport, model: Path, own: Any, text: dict[str, np.ndarray], sampler: str, tmp_path: Path
) -> None:
    with_gates(traced, schedule_for(model, steps=STEPS, sampler=sampler), tmp_path / "x", components=False)
    pipeline = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)
    got = pipeline(seed=3, guidance_scale=SCALE, output_type="latent", **text).latents
    assert relative(got, stock(own, sampler=sampler, steps=STEPS, output_type="latent", **CALL)) <= 1e-4


def test_pictures_of_several_prompts(traced: PlannedExport, own: Any, tmp_path: Path) -> None:
    """Two prompts with two pictures each, drawn in batches of one here and at once there."""
    publish(traced, tmp_path / "x")
    pipeline = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)
    call = {"prompt": [PROMPT, ""], "num_images_per_prompt": 2, "guidance_scale": SCALE, "output_type": "np"}
    got = np.asarray(pipeline(seed=3, **call).images)
    assert relative(got, stock(own, steps=STEPS, **call)) <= 1e-4


def drawn(stock: Any, **call: Any) -> np.ndarray:
    """Latents of a stock pipeline, as it is."""
    generator = torch.Generator().manual_seed(3)
    return stock(num_inference_steps=STEPS, generator=generator, output_type="latent", **call).images.numpy()


@pytest.fixture(scope="module")
def full_and_half(traced: PlannedExport, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Engine directories: all blocks under a sampler that is not the model's, and half of them under one with noise."""
    folder = tmp_path_factory.mktemp("engines")
    with_gates(traced, schedule_for(model, steps=STEPS, sampler="dpm++2m"), folder / "full", components=False)
    schedule = schedule_for(model, steps=STEPS, sampler="euler-a", ratio=0.5)
    with_gates(traced, schedule, folder / "half", components=False)
    return folder / "full", folder / "half"


TWO = {"prompt": [PROMPT, ""], "negative_prompt": [NEGATIVE, ""], "guidance_scale": SCALE}


def test_engines_in_the_stock_pipeline(full_and_half: tuple[Path, Path], own: Any, model: Path) -> None:
    """Two prompts in batches of one; calls of two pipelines in turn; as it was after that."""
    full, half = full_and_half
    plain, scheduler = drawn(own, **TWO), own.scheduler
    wanted = stock(own, sampler="dpm++2m", steps=STEPS, output_type="latent", **TWO)
    other = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    other.set_progress_bar_config(disable=True)
    with torch.no_grad():
        encoded = own.encode_prompt(TWO["prompt"], torch.device("cpu"), 1, True, TWO["negative_prompt"])
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), (part.numpy() for part in encoded), strict=True))
    pipeline = Pipeline.from_engine_dir(half, "cpu", threads=1)
    call = {"seed": 3, "output_type": "latent", **embeds}
    expected = {scale: pipeline(guidance_scale=scale, **call).latents for scale in (SCALE, 1.0)}
    seen: list[np.ndarray] = []

    def between(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:  # a whole call of another pipeline, and one of the engines themselves, in the midst of this one
            seen.append(drawn(own, **TWO))
            engines.pipeline(guidance_scale=2.0, output_type="latent", **embeds)
        return tensors

    with load_engines(own, full, "cpu", threads=1), load_engines(other, half, "cpu", threads=1) as engines:
        assert relative(drawn(other, callback_on_step_end=between, **TWO), expected[SCALE]) <= 1e-4
        assert relative(seen[0], wanted) <= 1e-4
        assert relative(drawn(other, **{**TWO, "guidance_scale": 1.0}), expected[1.0]) <= 1e-4
    assert own.scheduler is scheduler and own.config.scheduler[1] == "PNDMScheduler"
    assert np.array_equal(drawn(own, **TWO), plain)


def test_a_lora_of_the_engines(full_and_half: tuple[Path, Path], own: Any, tmp_path: Path) -> None:
    updates = make_updates(
        own.unet, ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.resnets.0.conv1"]
    )
    file = save_lora(tmp_path / "lora.safetensors", updates, diffusers_keys("unet."))
    merge_into(own.unet, updates, 2.0)
    try:
        wanted = stock(own, sampler="dpm++2m", steps=STEPS, output_type="latent", **CALL)
    finally:
        merge_into(own.unet, updates, -2.0)

    def late(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        engines.pipeline.unload_lora_weights()
        return tensors

    with load_engines(own, full_and_half[0], "cpu", threads=1) as engines:
        before = drawn(own, **CALL)
        engines.pipeline.load_lora_weights(tmp_path, weight_name=file.name, scale=2.0)
        assert relative(drawn(own, **CALL), wanted) <= 1e-4 and relative(before, wanted) > 1e-3
        with pytest.raises(UserError, match="the engines' weights were changed, or the engines closed, during a call"):
            drawn(own, callback_on_step_end=late, **CALL)
        assert np.array_equal(drawn(own, **CALL), before)


def test_what_the_engines_do_not_do_is_refused_and_leaves_nothing(full_and_half: tuple[Path, Path], own: Any) -> None:
    half = full_and_half[1]

    def changed(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 1.01}

    def stopped(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return tensors

    def broken(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    def louder(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale += 1
        return tensors

    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"num_inference_steps": STEPS + 1}, f"num_inference_steps: {STEPS + 1}, .* give num_inference_steps={STEPS}"),
        ({"timesteps": [9, 5, 1]}, "timesteps: the engine directory has its own"),
        ({"height": 128, "width": 64}, "a latent of 16x8: .* 8x8, which is 64x64 pixels"),
        ({"guidance_rescale": 0.5}, "guidance_rescale"),
        ({"eta": 0.5}, "eta: 0.5"),
        ({"callback_on_step_end": changed}, "the latents were changed between two steps"),
        ({"callback_on_step_end": louder}, "guidance_scale: goes from 7.5 to 8.5"),
    )
    with load_engines(own, half, "cpu", threads=1) as engines:
        assert repr(engines).endswith("in StableDiffusionPipeline>")
        wanted = drawn(own, **CALL)
        for change, words in refused:
            with pytest.raises(UserError, match=words):
                own(**{**CALL, "num_inference_steps": STEPS, **change})
        own._denoising_end = 0.8  # as SDXL's pipelines do with their argument
        with pytest.raises(UserError, match="denoising_end: the engines run to the end"):
            drawn(own, **CALL)
        own._denoising_end = None
        with pytest.raises(KeyboardInterrupt):
            own(num_inference_steps=STEPS, callback_on_step_end=broken, **CALL)
        assert not np.array_equal(drawn(own, callback_on_step_end=stopped, **CALL), wanted)
        assert np.array_equal(drawn(own, **CALL), wanted)
        with pytest.raises(UserError, match="load_lora_adapter: .* Engines.pipeline.load_lora"):
            own.unet.load_lora_adapter({})
        with pytest.raises(UserError, match="has engines loaded already"):
            load_engines(own, half, "cpu")
        engines.pipeline.close()  # loads them again
        assert np.array_equal(drawn(own, **CALL), wanted)
    with pytest.raises(UserError, match=r"its unet is none, .* is of UNet2DConditionModel"):
        load_engines(SimpleNamespace(), half, "cpu")
    wider = copy.copy(own)
    wider.unet = UNet2DConditionModel.from_config(own.unet.config, cross_attention_dim=24)
    with pytest.raises(UserError, match="its denoiser has cross_attention_dim = 24, that of .* 16"):
        load_engines(wider, half, "cpu")


def test_a_text_encoder_that_hides_its_padding_is_refused(model: Path) -> None:
    source = load_source(str(model))
    source.pipeline.text_encoder.config.use_attention_mask = True
    with pytest.raises(UserError, match="text_encoder: use_attention_mask is not supported"):
        source.trace_shape(batch=1, guidance=True, height=None, width=None)
