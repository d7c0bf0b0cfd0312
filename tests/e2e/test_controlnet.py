"""Stable Diffusion with a ControlNet: full schedules against diffusers, random ones against the supernet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from family_checks import assert_pictures_equal_stock, build_with_tensorrt_rtx, check_family, plan_for, schedule_for
from PIL import Image
from sd_pipelines import PROMPT, relative, save_sd15, save_sdxl, stock, with_controlnet

from dipgo_deploy.cli.compare import command as compare_command
from dipgo_deploy.cli.run import command as run_command
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.integrations.diffusers import load_engines
from dipgo_deploy.models import family_for
from dipgo_deploy.models.location import denoiser_config
from dipgo_deploy.runtime.pipeline import Pipeline

SIZE, STEPS = 64, 4
SD15 = {
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "layers_per_block": 2,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "controlnet": {"_class_name": "ControlNetModel"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = save_sd15(tmp_path_factory.mktemp("controlled"))
    path = target / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clip_sample": False}))
    return with_controlnet(target)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((100, 80), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def planned(folder: Path) -> PlannedExport:
    return plan_for(folder, schedule_for(folder, sampler="ddim", steps=STEPS))


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("engine") / "controlled"
    publish(planned, target)
    return target


def test_units_of_the_published_model() -> None:
    family = family_for("UNet2DConditionModel+ControlNetModel")
    assert [len(family.blocks(SD15, kind)) for kind in family.granularities] == [10, 25]
    assert [family.blocks(SD15, kind)[0].name for kind in family.granularities] == ["controlnet"] * 2


@pytest.mark.parametrize("scale", [None, 0.4])
def test_full_schedules_are_diffusers(folder: Path, engine: Path, picture: Image.Image, scale: float | None) -> None:
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(folder)
    resized = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    chosen = {} if scale is None else {"controlnet_conditioning_scale": scale}
    call = {"sampler": "ddim", "steps": STEPS, "prompt": PROMPT}
    wanted = stock(pipeline, image=resized, output_type="np", **call, **chosen)
    ours = Pipeline.from_engine_dir(engine, "cpu", threads=1)
    found = ours(PROMPT, control_image=picture, control_scale=scale, seed=3, output_type="np")
    assert relative(found.images, wanted) <= 1e-4
    latents = stock(pipeline, image=resized, output_type="latent", **call, **chosen)
    assert relative(found.latents, latents) <= 1e-4
    # The picture and the scale count.
    other = ours(PROMPT, control_image=np.zeros((SIZE, SIZE, 3)), control_scale=scale, seed=3, output_type="latent")
    assert relative(other.latents, latents) > 1e-2
    unscaled = ours(PROMPT, control_image=picture, control_scale=0.0, seed=3, output_type="latent")
    assert relative(unscaled.latents, latents) > 1e-2
    with load_engines(pipeline, engine, "cpu", threads=1):
        asked = {"image": resized, "num_inference_steps": STEPS, "output_type": "latent", **chosen}
        dropped = pipeline(PROMPT, generator=torch.Generator().manual_seed(3), **asked).images.numpy()
        assert relative(dropped, latents) <= 1e-4
        for change, words in (("control_guidance_end", "changes during the call"), ("guess_mode", "guess_mode: ")):
            with pytest.raises(UserError, match=words):
                pipeline(PROMPT, **{**asked, change: 0.5})


@pytest.mark.parametrize(
    ("granularity", "sampler"), [pytest.param("block", "pndm", marks=pytest.mark.slow), ("layer", "euler")]
)
def test_random_schedules_are_the_supernets(
    folder: Path, engine: Path, tmp_path: Path, granularity: Any, sampler: str
) -> None:
    """``block`` with one ControlNet, ``layer`` with two."""
    model = folder if granularity == "block" else with_controlnet(save_sd15(tmp_path / "two"), count=2)
    bundle = check_family(model, tmp_path / "x", sampler=sampler, granularity=granularity, ratio=0.4, steps=5, seed=1)
    reads = [name for variant in bundle.manifest.plan.variants for name in variant.reads]
    assert any(name.split(".")[1].startswith("controlnet") for name in reads)  # one is skipped somewhere
    assert_pictures_equal_stock(tmp_path / "x", engine)
    if model is folder:
        return
    ours = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)
    pictures: list[Any] = [np.zeros((SIZE, SIZE, 3)), np.ones((SIZE, SIZE, 3))]
    call: dict[str, Any] = {"output_type": "latent", "control_image": pictures}
    both = ours(PROMPT, control_scale=[0.4, 0.4], **call).latents
    assert np.array_equal(ours(PROMPT, control_scale=0.4, **call).latents, both)
    assert relative(ours(PROMPT, control_scale=[0.4, 0.0], **call).latents, both) > 1e-3
    assert relative(ours(PROMPT, control_scale=0.4, **{**call, "control_image": pictures[::-1]}).latents, both) > 1e-3
    with pytest.raises(
        UserError, match="control_image: 1 given; this engine directory takes 2, one for each ControlNet"
    ):
        ours(PROMPT, control_image=pictures[0])
    with pytest.raises(UserError, match="control_scale: 3 given for 2 ControlNets; give one, or one for each"):
        ours(PROMPT, control_scale=[1, 2, 3], **call)


@pytest.mark.slow
def test_sdxl_is_diffusers(tmp_path: Path, picture: Image.Image) -> None:
    model = with_controlnet(save_sdxl(tmp_path / "xl"), StableDiffusionXLPipeline, StableDiffusionXLControlNetPipeline)
    publish(plan_for(model, schedule_for(model, steps=STEPS), check=False), tmp_path / "x")
    pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(model, add_watermarker=False)
    resized = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    call = {"prompt": PROMPT, "guidance_scale": 5.0, "output_type": "latent"}
    wanted = stock(pipeline, steps=STEPS, image=resized, **call)
    call["seed"] = 3
    found = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)(control_image=picture, **call)
    assert relative(found.latents, wanted) <= 1e-4


def test_the_commands(engine: Path, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "in.png")
    out = ["--output-type", "latent", "-o", str(tmp_path / "out.npy"), "--json"]
    run = ["--engine-dir", str(engine), "--prompt", PROMPT, "--backend", "cpu", "--threads", "1", *out]
    control = ["--control-image", str(tmp_path / "in.png"), "--control-scale", "0.4"]
    assert CliRunner().invoke(run_command, [*run, *control]).exit_code == 0
    ours = Pipeline.from_engine_dir(engine, "cpu", threads=1)
    wanted = ours(PROMPT, control_image=picture, control_scale=0.4, output_type="latent").latents
    assert np.array_equal(np.load(tmp_path / "out.npy"), wanted)
    refused = CliRunner().invoke(run_command, run)
    assert isinstance(refused.exception, UserError) and "control_image: missing" in str(refused.exception)
    compared = CliRunner().invoke(compare_command, ["--engine-dir", str(engine), "--threads", "1", "--json"])
    assert compared.exit_code == 0, compared.output


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "control_image: missing; this engine directory draws from a picture"),
        ({"control_image": np.zeros((8, 8, 3))}, r"control_image: shape \(8, 8, 3\), needs \(64, 64, 3\)"),
        ({"control_image": [np.zeros((64, 64, 3))] * 3}, "control_image: 3 given for 1 prompts"),
        ({"control_image": np.zeros((64, 64, 3)), "control_scale": float("nan")}, "control_scale: nan, must be"),
        ({"image": np.zeros((64, 64, 3))}, "image: this engine directory starts from noise alone"),
    ],
)
def test_bad_calls_are_refused(engine: Path, call: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pipeline.from_engine_dir(engine, "cpu", load="lazy")(PROMPT, **call)


def test_other_engine_directories_take_no_control(tmp_path: Path) -> None:
    import toy_engine

    pipeline = Pipeline.from_engine_dir(toy_engine.build(tmp_path / "x", toy_engine.Toy()), "cpu", load="lazy")
    with pytest.raises(UserError, match="control_image: this engine directory takes none"):
        pipeline("a", control_image=np.zeros((8, 8, 3)))
    with pytest.raises(UserError, match="control_scale: this engine directory has no ControlNet"):
        pipeline("a", control_scale=0.5)


def test_other_kinds_are_refused(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["controlnet"] = ["diffusers", "ControlNetUnionModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="ControlNetUnionModel is not supported; use a pipeline with a Con"):
        denoiser_config(tmp_path)
    config = {**denoiser_config(folder)[1], "controlnet": {"global_pool_conditions": True}}
    with pytest.raises(UserError, match="global_pool_conditions = True is not supported"):
        family_for("UNet2DConditionModel+ControlNetModel").inputs(config, 2, 8, 8, 77)


def test_engines_are_built(engine: Path) -> None:
    assert build_with_tensorrt_rtx(engine) == 1 + 2


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "least"), [("fp16", 0.999), ("bf16", None)])
def test_half_precision(
    folder: Path, engine: Path, picture: Image.Image, tmp_path: Path, dtype: str, least: float | None
) -> None:
    """fp16 against fp32: rounding to 11 bits in two networks and four steps leaves the latents' direction."""
    planned = plan_for(folder, schedule_for(folder, sampler="ddim", steps=STEPS), dtype=dtype, check=False)
    publish(planned, tmp_path / "x")
    assert build_with_tensorrt_rtx(tmp_path / "x") == 1 + 2
    if least is not None:  # ONNX Runtime has no bf16 kernels on the CPU
        pipelines = [Pipeline.from_engine_dir(path, "cpu", threads=1) for path in (tmp_path / "x", engine)]
        call = {"control_image": picture, "output_type": "latent"}
        found, wanted = (ours(PROMPT, **call).latents.ravel() for ours in pipelines)
        assert found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) >= least
