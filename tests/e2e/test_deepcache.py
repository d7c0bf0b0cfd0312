"""DeepCache itself (its released package, on the stock pipeline) against engines with the schedule of the same name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tiny_engines import tiny_unet

from dipgo_deploy.backends import create_backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, publish, replan
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.runtime.loop import DenoisingLoop
from dipgo_deploy.sampler import make_scheduler, step_positions
from dipgo_deploy.schedule import builders

deepcache = pytest.importorskip("DeepCache", reason="the package DeepCache is not installed")

# The stock pipeline puts steps_offset right by itself, so it is right here from the start.
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}
STEPS = 11
GUIDANCE = 5.0
# diffusers hands torch tensors to numpy in ways that numpy has announced to drop.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
OPTIONS = ExportOptions(layout="variants", check=False, components=False)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """SD-1.5's block types, small: 6 branches."""
    return tiny_unet(layers=2).requires_grad_(False)


@pytest.fixture(scope="module")
def folder(unet: UNet2DConditionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unet")
    unet.save_pretrained(path)
    make_scheduler("ddim", BETAS).save_pretrained(path / "scheduler")
    return path


@pytest.fixture(scope="module")
def traced(folder: Path) -> PlannedExport:
    """The one trace in layers."""
    return _trace(folder, OPTIONS)


def _trace(folder: Path, options: ExportOptions) -> PlannedExport:
    target = schedule_target(str(folder), "ddim", 2, "layer", None)
    full = target.schedule(builders.full(target.steps, len(target.blocks)), "full", {})
    return plan_export(str(folder), full, options)


def _inputs(unet: UNet2DConditionModel, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Initial latent, embeddings of the negative and of the positive prompt."""
    generator = torch.Generator().manual_seed(3)
    width = unet.config.cross_attention_dim
    shapes = ((1, 4, size, size), (1, 77, width), (1, 77, width))
    latent, negative, positive = (torch.randn(shape, generator=generator) for shape in shapes)
    return latent, negative, positive


def _by_the_package(
    unet: UNet2DConditionModel, scheduler: Any, steps: int, size: int, interval: int, branch: int | None
) -> np.ndarray:
    """Final latent of the stock pipeline with DeepCache's helper; without it for a branch of None."""
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    latent, negative, positive = _inputs(unet, size)
    arguments: dict[str, Any] = {"prompt_embeds": positive, "negative_prompt_embeds": negative, "latents": latent}
    arguments |= {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "latent"}
    if branch is None:
        return pipeline(**arguments).images.numpy()
    helper = deepcache.DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        return pipeline(**arguments).images.numpy()
    finally:
        helper.disable()


def _relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("sampler", "interval", "branch"),
    [
        ("ddim", 3, 0),
        ("ddim", 5, 4),
        ("pndm", 2, 1),  # evaluates one timestep twice, which DeepCache counts once
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *(("ddim", interval, branch) for branch in range(6) for interval in (3, 5) if branch not in (0, 4)),
                ("ddim", 5, 0),
                ("ddim", 3, 4),
                ("ddim", 2, 5),
                ("pndm", 3, 4),
                ("heun", 3, 1),
            ]
        ),
    ],
)
def test_same_latents_as_the_package(
    sampler: str,
    interval: int,
    branch: int,
    unet: UNet2DConditionModel,
    traced: PlannedExport,
    tmp_path: Path,
) -> None:
    _hold_to_the_package(unet, traced, sampler, STEPS, 8, interval, branch, tmp_path)


@pytest.mark.slow
def test_same_latents_as_the_package_at_full_size(tmp_path: Path) -> None:
    """Stable Diffusion 1.5's published UNet, random weights, 256 pixels; 4 GB of disk, 9 GB of memory."""
    from tools.full_size import find
    from tools.full_size.weights import write_model

    entry = find("sd-1.5-512")
    write_model(entry, entry["config"], "fp32", tmp_path / "unet")
    make_scheduler("ddim", BETAS).save_pretrained(tmp_path / "unet" / "scheduler")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval().requires_grad_(False)
    traced = _trace(tmp_path / "unet", replace(OPTIONS, height=256, width=256))
    _hold_to_the_package(unet, traced, "ddim", 5, 32, 3, 1, tmp_path)


def _hold_to_the_package(
    unet: UNet2DConditionModel,
    traced: PlannedExport,
    sampler: str,
    steps: int,
    size: int,
    interval: int,
    branch: int,
    tmp_path: Path,
) -> None:
    target = schedule_target(traced.source.name, sampler, steps, "layer", None)
    scheduler = make_scheduler(target.sampler.class_name, target.sampler.config)
    positions = step_positions(scheduler, steps)
    gates = builders.deepcache(target.steps, target.block_names, interval, branch, positions)
    planned = replan(traced, target.schedule(gates, "deepcache", {"interval": interval, "branch": branch}))
    publish(planned, tmp_path / "x")
    assert len(planned.plan.variants) == 2
    loop = DenoisingLoop(Bundle.open(tmp_path / "x"), create_backend("cpu", threads=1), poison=True)
    latent, negative, positive = _inputs(unet, size)
    conditions = {"encoder_hidden_states": torch.cat([negative, positive]).numpy()}
    engine = loop.run(latent.numpy(), conditions, guidance_scale=GUIDANCE)
    expected = _by_the_package(unet, scheduler, steps, size, interval, branch)
    assert _relative(engine, expected) < 1e-4
    # The caches matter: the stock pipeline without them comes out elsewhere.
    assert _relative(_by_the_package(unet, scheduler, steps, size, interval, None), expected) > 1e-3
