"""DDPM's and DDIM's UNet on pixels: every granularity against the supernet, full schedules against diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from family_checks import (
    build_with_tensorrt_rtx,
    check_family,
    loop_report,
    plan_for,
    schedule_for,
    with_gates,
)
from sd_pipelines import psnr, relative
from tiny_denoisers import UNET2D_SAMPLE as SAMPLE
from tiny_denoisers import unet2d

from dipgo_deploy.cli.run import command as run_command
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, export_bundle, publish
from dipgo_deploy.integrations.diffusers import load_engines
from dipgo_deploy.models import family_for
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.sampler import make_scheduler, sampler_matrix
from dipgo_deploy.search.problem import Pair, ProblemOptions, load_problem
from dipgo_deploy.search.run import SearchOptions, search
from dipgo_deploy.search.train import TrainOptions

STEPS = 4

# As published, without what the loader adds (google/ddpm-cat-256 and google/ddpm-cifar10-32).
CAT_256 = {
    "_class_name": "UNet2DModel",
    "attention_head_dim": None,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "in_channels": 3,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
CIFAR_32 = {
    **CAT_256,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "sample_size": 32,
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


def save(folder: Path, pipeline: type = DDPMPipeline, **changes: Any) -> Path:
    """A pipeline's folder; its scheduler clips only where ``clip_sample`` says so."""
    clip = changes.pop("clip_sample", False)
    scheduler = (DDIMScheduler if pipeline is DDIMPipeline else DDPMScheduler)(clip_sample=clip)
    pipeline(unet=unet2d(**changes), scheduler=scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("ddpm"))


@pytest.fixture(scope="module")
def blocks(folder: Path) -> PlannedExport:
    """DDPM's own scheduler, every gate kept."""
    return plan_for(folder, schedule_for(folder, steps=STEPS))


@pytest.fixture(scope="module")
def layers(folder: Path) -> PlannedExport:
    return plan_for(folder, schedule_for(folder, steps=STEPS, granularity="layer"))


@pytest.fixture(scope="module")
def engine(blocks: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("engine") / "ddpm"
    publish(blocks, target)
    return target


@pytest.mark.parametrize(
    ("config", "whole", "pairs"), [(CAT_256, 13, 36), (CIFAR_32, 9, 24)], ids=["cat-256", "cifar10-32"]
)
def test_units_of_the_published_models(config: dict[str, Any], whole: int, pairs: int) -> None:
    family = family_for("UNet2DModel")
    assert len(family.blocks(config, "block")) == whole
    units = family.blocks(config, "layer")
    assert len(units) == pairs
    # Every module of the real model's blocks is in one unit, and no unit names one that is not there.
    model = UNet2DModel(**{**{k: v for k, v in config.items() if k[0] != "_"}, "block_out_channels": _narrow(config)})
    names = {name for name, _ in model.named_modules()}
    owned = [module for unit in units for module in unit.modules]
    assert set(owned) <= names and len(set(owned)) == len(owned)
    inside = [
        name for name, _ in model.named_parameters() if name.split(".")[0] in ("down_blocks", "mid_block", "up_blocks")
    ]
    assert all(any(name.startswith(f"{module}.") for module in owned) for name in inside)


def _narrow(config: dict[str, Any]) -> tuple[int, ...]:
    return tuple(32 * (1 + (width > 128)) for width in config["block_out_channels"])


@pytest.mark.parametrize(
    ("sampler", "granularity"),
    [
        ("ddim", "block"),
        ("ddpm", "layer"),
        ("dpm++2m", "block"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("ddim", "layer"), ("ddpm", "block"), ("dpm++2m", "layer")]
        ),
    ],
)
def test_random_schedules_are_the_supernets(
    folder: Path,
    blocks: PlannedExport,
    layers: PlannedExport,
    tmp_path: Path,
    granularity: Any,
    sampler: str,
) -> None:
    schedule = schedule_for(folder, sampler=sampler, steps=5, granularity=granularity, ratio=0.3, seed=1)
    traced = blocks if granularity == "block" else layers
    bundle = with_gates(traced, schedule, tmp_path / "x", components=False)
    report = loop_report(tmp_path / "x", pictures=True)
    assert bool(report.pictures) == (sampler != "dpm++2m") == (report.skipped == ())  # which DDPMPipeline cannot run
    assert report.first_failure() is None and report.results is not None
    for tensor in (*(tensor for step in report.loop for tensor in step.tensors), *report.results.tensors):
        assert tensor.relative <= 1e-4, f"{tensor.name}: {tensor.relative}"
    assert len(bundle.manifest.plan.variants) > 1
    assert bundle.manifest.plan.noises == (4 if sampler == "ddpm" else 0)


def test_resnet_samplers_and_classes_are_the_supernets(tmp_path: Path) -> None:
    model = save(
        tmp_path / "model", downsample_type="resnet", upsample_type="resnet", num_class_embeds=5, mid_block_type=None
    )
    bundle = check_family(model, tmp_path / "x", sampler="ddim", granularity="layer")
    assert [spec.name for spec in bundle.manifest.conditions] == ["class_labels"]


def test_other_blocks_and_learned_timesteps_are_the_supernets(tmp_path: Path) -> None:
    changes = {
        "down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D", "UpBlock2D"),
        "time_embedding_type": "learned",
        "num_train_timesteps": 1000,
    }
    model = save(tmp_path / "model", **changes)
    bundle = check_family(model, tmp_path / "x", sampler="ddim", ratio=0.3, seed=1)
    assert len(bundle.manifest.plan.variants) > 1
    with pytest.raises(UserError, match="ResnetDownsampleBlock2D, which granularity 'layer' does not know"):
        schedule_for(model, granularity="layer")


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_skip_blocks_are_refused(granularity: Any) -> None:
    config = {"down_block_types": ["SkipDownBlock2D"] * 2, "up_block_types": ["SkipUpBlock2D"] * 2}
    with pytest.raises(UserError, match="SkipDownBlock2D is not supported; use a model without skip blocks"):
        family_for("UNet2DModel").blocks(config, granularity)


@pytest.mark.parametrize("count", [1, 3])
def test_ddpm_pictures_are_diffusers(folder: Path, engine: Path, count: int) -> None:
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    wanted = pipeline(batch_size=count, generator=generator, num_inference_steps=STEPS, output_type="np").images
    found = Pipeline.from_engine_dir(engine, "cpu", threads=1)(num_images_per_prompt=count, seed=3, output_type="np")
    assert found.images.shape == (count, SAMPLE, SAMPLE, 3)
    assert relative(found.images, wanted) <= 1e-4
    assert relative(np.clip(found.latents / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1), wanted) <= 1e-4
    assert wanted.std() > 0.05
    with load_engines(pipeline, engine, "cpu", threads=1):  # three pictures in batches of one
        generator.manual_seed(3)
        dropped = pipeline(batch_size=count, generator=generator, num_inference_steps=STEPS, output_type="np").images
    assert relative(dropped, wanted) <= 1e-4


@pytest.mark.parametrize("channels", [3, 1])
def test_ddim_pictures_are_diffusers(folder: Path, blocks: PlannedExport, tmp_path: Path, channels: int) -> None:
    """In colour, and in grey and not square."""
    if channels == 3:
        pipeline = DDIMPipeline.from_pretrained(folder)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        with_gates(blocks, schedule_for(folder, sampler="ddim", steps=STEPS), tmp_path / "x")
    else:
        grey = save(tmp_path / "model", DDIMPipeline, in_channels=1, out_channels=1, sample_size=(24, 8))
        pipeline = DDIMPipeline.from_pretrained(grey)
        export_bundle(str(grey), schedule_for(grey, steps=STEPS), tmp_path / "x")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(4)
    wanted = pipeline(generator=generator, num_inference_steps=STEPS, output_type="np").images
    found = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)(seed=4, output_type="np").images
    assert isinstance(found, np.ndarray) and found.shape == (1, *wanted.shape[1:3], 3)
    assert relative(found, np.broadcast_to(wanted, found.shape)) <= 1e-4
    with load_engines(pipeline, tmp_path / "x", "cpu", threads=1):
        generator.manual_seed(4)
        dropped = pipeline(generator=generator, num_inference_steps=STEPS, output_type="np").images
        assert relative(dropped, wanted) <= 1e-4
        with pytest.raises(UserError, match="eta: 0.5: is not in the compiled sampler"):
            pipeline(eta=0.5, num_inference_steps=STEPS)


def test_run_needs_neither_prompt_nor_class(engine: Path, tmp_path: Path) -> None:
    arguments = ["--engine-dir", str(engine), "--backend", "cpu", "--threads", "1"]
    result = CliRunner().invoke(run_command, [*arguments, "-o", str(tmp_path / "x.png"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["shape"] == [1, 3, SAMPLE, SAMPLE]
    refused = CliRunner().invoke(run_command, [*arguments, "--prompt", "a cat", "-o", str(tmp_path / "y.png")])
    assert isinstance(refused.exception, UserError) and "takes no condition, not text" in str(refused.exception)


def test_compare_looks_at_the_pictures(engine: Path) -> None:
    report = loop_report(engine)
    assert report.first_failure() is None and report.results is not None
    errors = {tensor.name: tensor.relative for tensor in report.results.tensors}
    assert errors.keys() == {"latents", "images"} and max(errors.values()) <= 1e-4


def test_classes_are_diffusers_and_bounded(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", DDIMPipeline, num_class_embeds=5)
    export_bundle(str(folder), schedule_for(folder, steps=STEPS), tmp_path / "x")
    pipeline = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)
    found = pipeline(class_labels=[0, 4], seed=1, output_type="latent").latents
    model = UNet2DModel.from_pretrained(folder / "unet")
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    sample = torch.randn(2, 3, SAMPLE, SAMPLE, generator=torch.Generator("cpu").manual_seed(1))
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            prediction = model(sample, timestep, class_labels=torch.tensor([0, 4])).sample
            sample = scheduler.step(prediction, timestep, sample).prev_sample
    assert relative(found, sample.numpy()) <= 1e-4
    with pytest.raises(UserError, match=r"class_labels: id 5 is out of range \(0 to 4\)"):
        pipeline(class_labels=5)


@pytest.mark.parametrize("sampler", [None, "ddim"])
def test_clipping_is_refused_with_what_to_do(tmp_path: Path, sampler: str | None) -> None:
    folder = save(tmp_path / "model", clip_sample=True)
    with pytest.raises(UserError) as caught:
        plan_for(folder, schedule_for(folder, sampler=sampler))
    message = str(caught.value)
    assert message.startswith("sampler DD") and "\n" not in message
    assert "set clip_sample to false in the model's scheduler/scheduler_config.json" in message
    # What the message says to do.
    path = folder / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    for name, changes in ((sampler or config["_class_name"], {"clip_sample": False}), ("dpm++2m", {}), ("euler", {})):
        sampler_matrix(make_scheduler(name, {**config, **changes}), STEPS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 18}, "picture of 18x16; give multiples of 4"),
        ({"guidance": True}, "takes no prompt and has no null class; leave it out"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_for(folder, schedule_for(folder), **options)


@pytest.mark.parametrize(("dtype", "least"), [("fp16", 45.0), pytest.param("bf16", None, marks=pytest.mark.slow)])
def test_half_precision(folder: Path, engine: Path, tmp_path: Path, dtype: str, least: float | None) -> None:
    """fp16 against fp32: 11 bits through four steps of a tiny network; 45 dB is an error of 0.6 % of the range."""
    publish(plan_for(folder, schedule_for(folder, steps=STEPS), dtype=dtype), tmp_path / "x")
    assert build_with_tensorrt_rtx(tmp_path / "x") >= 2
    if least is not None:  # ONNX Runtime has no bf16 kernels on the CPU
        wanted = Pipeline.from_engine_dir(engine, "cpu", threads=1)(seed=5, output_type="np").images
        found = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)(seed=5, output_type="np").images
        assert isinstance(found, np.ndarray) and isinstance(wanted, np.ndarray)
        assert psnr(found, wanted) >= least


def test_engines_in_fp32_are_built(engine: Path) -> None:
    assert build_with_tensorrt_rtx(engine) == 2


def test_search_runs_on_pixels(folder: Path) -> None:
    problem = load_problem(ProblemOptions(str(folder), sampler="ddim", steps=STEPS))
    assert problem.guidance_scale is None and problem.names == ("",)
    batch = problem.batch([Pair(0, 1), Pair(0, 2)])
    assert batch.latents.shape == (2, 3, SAMPLE, SAMPLE) and not batch.conditions
    assert torch.equal(problem.decode(batch.latents), batch.latents / 2 + 0.5)
    for loss in ("latent-l2", "ssim"):
        options = SearchOptions(method="random", ratios=(0.3,), budget=4, images=2, train=TrainOptions(loss=loss))
        (found,) = search(problem, options)
        assert 0.2 <= found.ratio <= 0.4 and found.loss is not None and found.loss > 0
    with pytest.raises(UserError, match="--prompts: .* is guided by neither text nor classes"):
        load_problem(ProblemOptions(str(folder), sampler="ddim", prompts=str(_prompts(folder))))


def _prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("a cat\n")
    return path


def test_another_pipeline_is_refused(folder: Path) -> None:
    family = family_for("UNet2DModel")
    with pytest.raises(UserError, match="LDMPipeline is not supported; use a model of DDPMPipeline or DDIMPipeline"):
        family.text({}, type("LDMPipeline", (), {})())
