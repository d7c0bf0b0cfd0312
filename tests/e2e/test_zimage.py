"""Z-Image in small: texts of any length as one of 512 tokens with a mask, guidance from the conditional prediction,
against the supernet and diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from family_checks import (
    assert_pictures_equal_stock,
    borrow_components,
    build_with_tensorrt_rtx,
    loop_report,
    plan_for,
    schedule_for,
    with_gates,
)
from flow_pipelines import vae
from language_models import qwen3, qwen_tokenizer
from lora_files import assert_lora_is_merged
from sd_pipelines import PROMPT, assert_equals_supernet, relative, stock
from tiny_denoisers import zimage_transformer as transformer

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.shapes import Range, Sizes
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.models import family_for
from dipgo_deploy.models.zimage import CLASS_NAME
from dipgo_deploy.runtime.pipeline import Pipeline
from tools.full_size.zimage import MODELS

FAMILY = family_for(CLASS_NAME)
STEPS, SCALE = 3, 1.5
SIZE = {"height": 16, "width": 24}  # pixels: 4 x 6 tokens, filled up to 32, of the tiny VAE's scale 2
NEGATIVE = "a coat"
LONG = "a red shoe beside another one, and then some more of them"
SCHEDULER = {"shift": 3.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zimage") / "model"
    torch.manual_seed(0)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae(2),
        text_encoder=qwen3(2).model,
        tokenizer=qwen_tokenizer(),
        transformer=transformer(),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own(model: Path) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def planned(model: Path) -> PlannedExport:
    return plan_for(model, schedule_for(model, steps=STEPS), **SIZE)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full schedule of the model's own sampler, with components."""
    return publish(planned, tmp_path_factory.mktemp("zimage-engine") / "x").path


def ours(engine_dir: Path, **call: Any) -> np.ndarray:
    return np.asarray(Pipeline.from_engine_dir(engine_dir, "cpu", threads=1)(seed=3, **call).images)


def theirs(pipeline: Any, *, sampler: str | None = None, **call: Any) -> np.ndarray:
    # Its pipeline writes into the lists that it is given.
    copied = {name: list(value) if isinstance(value, list) else value for name, value in call.items()}
    return stock(pipeline, sampler=sampler, steps=STEPS, **{**SIZE, **copied})


def test_it_draws_what_diffusers_draws(engine: Path, own: Any) -> None:
    manifest = Bundle.open(engine).manifest
    assert (manifest.guidance_scale, manifest.guidance_off) == (5.0, 0.0)
    call: dict[str, Any] = {"prompt": [PROMPT, LONG], "output_type": "np", "guidance_scale": SCALE}
    want = theirs(own, negative_prompt=[NEGATIVE] * 2, **call)
    assert relative(ours(engine, negative_prompt=NEGATIVE, **call), want) <= 1e-4
    assert relative(ours(engine, negative_prompt="shoes", **call), want) > 1e-3
    call = {"prompt": PROMPT, "output_type": "latent"}
    for scale in (0.0, 5.0):  # without guidance, as Turbo is used, and the default
        assert relative(ours(engine, guidance_scale=scale, **call), theirs(own, guidance_scale=scale, **call)) <= 1e-4
    with pytest.raises(UserError, match=r"must be 0 \(no guidance\) or more"):
        ours(engine, guidance_scale=-1.0, **call)


def test_it_does_so_with_another_sampler(
    planned: PlannedExport, model: Path, engine: Path, own: Any, tmp_path: Path
) -> None:
    sampler = "flow-unipc"
    with_gates(planned, schedule_for(model, steps=STEPS, sampler=sampler), tmp_path / "x", components=False)
    borrow_components(engine, tmp_path / "x")
    call = {"prompt": PROMPT, "output_type": "latent", "guidance_scale": SCALE}
    # Its pipeline makes a list of them, with which this sampler of diffusers cannot calculate.
    sigmas = np.linspace(1.0, 1 / STEPS, STEPS)
    assert relative(ours(tmp_path / "x", **call), theirs(own, sampler=sampler, sigmas=sigmas, **call)) <= 1e-4


def test_a_lora_is_merged(engine: Path, own: Any, tmp_path: Path) -> None:
    modules = ["layers.0.attention.to_q", "layers.0.feed_forward.w2", "noise_refiner.0.attention.to_out.0"]
    call = {"prompt": PROMPT, "output_type": "latent", "guidance_scale": SCALE}
    assert_lora_is_merged(engine, own.transformer, modules, lambda: theirs(own, **call), tmp_path, **call)


def test_random_schedule_of_blocks(planned: PlannedExport, model: Path, engine: Path, tmp_path: Path) -> None:
    with_gates(planned, schedule_for(model, steps=STEPS, ratio=0.5), tmp_path / "x", components=False)
    assert_equals_supernet(tmp_path / "x")
    assert_pictures_equal_stock(tmp_path / "x", engine)


@pytest.mark.parametrize(
    ("granularity", "cache", "layout"),
    [("layer", None, "segments"), pytest.param("block", "output", "variants", marks=pytest.mark.slow)],
)
def test_random_schedules_are_the_supernet(tmp_path: Path, granularity: Any, cache: Any, layout: Any) -> None:
    """With a sampler that the pipeline does not take: it has no ``sigmas``."""
    transformer(layers=1 if layout == "segments" else 2).save_pretrained(tmp_path / "model")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(tmp_path / "model" / "scheduler")
    schedule = schedule_for(tmp_path / "model", ratio=0.5, sampler="flow-dpm++2m", granularity=granularity, cache=cache)
    size = {"height": 64, "width": 32}
    bundle = publish(plan_for(tmp_path / "model", schedule, components=False, layout=layout, **size), tmp_path / "x")
    assert bundle.manifest.plan.layout == layout
    assert_equals_supernet(tmp_path / "x")
    if layout == "variants":
        assert build_with_tensorrt_rtx(tmp_path / "x") == len(bundle.manifest.plan.variants)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_close(model: Path, dtype: str, tmp_path: Path) -> None:
    schedule = schedule_for(model, steps=STEPS, ratio=0.5, granularity="layer")
    bundle = publish(plan_for(model, schedule, dtype=dtype, **SIZE), tmp_path / "x")
    if dtype == "fp16":  # the CPU has no kernels for bf16
        report = loop_report(bundle.path, pictures=True)
        assert report.first_failure() is None and report.pictures
    assert build_with_tensorrt_rtx(bundle.path) == len(bundle.manifest.plan.variants) + 2


@pytest.mark.slow
def test_one_engine_for_many_sizes(model: Path, own: Any, tmp_path: Path) -> None:
    """Sides of multiples of 16 latent pixels."""
    side = Range(min=32, opt=32, max=96)
    options: dict[str, Any] = {"height": side, "width": side, "batch": Range(min=1, opt=1, max=2)}
    publish(plan_for(model, schedule_for(model, steps=STEPS), **options), tmp_path / "x")
    call = {"prompt": [PROMPT, LONG], "output_type": "latent", "guidance_scale": SCALE, "height": 64, "width": 96}
    assert relative(ours(tmp_path / "x", **call), theirs(own, **call)) <= 1e-4
    assert_equals_supernet(tmp_path / "x", sizes=Sizes(1, 16, 48))
    assert build_with_tensorrt_rtx(tmp_path / "x") == len(Bundle.open(tmp_path / "x").manifest.plan.variants) + 2


def test_units_of_the_published_size() -> None:
    (entry,) = MODELS
    config = entry["config"]
    with torch.device("meta"):
        denoiser = ZImageTransformer2DModel(**{key: value for key, value in config.items() if key[0] != "_"})
    for granularity, count in (("block", 34), ("layer", 68)):
        specs = FAMILY.blocks(config, granularity)  # type: ignore[arg-type]
        assert len(specs) == count
        assert all(denoiser.get_submodule(path) for spec in specs for path in spec.modules)
    latent, _, states, mask = FAMILY.inputs(config, 2, 128, 128, 512)
    assert latent.shape == (2, 16, 128, 128)
    assert (states.shape, mask.shape, mask.dtype) == ((2, 512, 2560), (2, 512), "int64")


def test_refusals_are_one_line() -> None:
    for config, height, words in (
        ({"all_patch_size": [2, 4]}, 8, "all_patch_size [2, 4]"),
        ({"siglip_feat_dim": 8}, 8, "Z-Image-Omni"),
        ({}, 9, "9x8; give"),
        ({}, 2048, "position embeddings end at"),
    ):
        with pytest.raises(UserError) as error:
            FAMILY.inputs(config, 2, height, 8, 512)
        assert words in str(error.value) and "\n" not in str(error.value)
