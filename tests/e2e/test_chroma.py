"""Chroma in small: FLUX.1's blocks, guided, T5 alone and a mask, against the supernet and diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from family_checks import (
    assert_pictures_equal_stock,
    borrow_components,
    build_with_tensorrt_rtx,
    loop_report,
    plan_for,
    schedule_for,
    with_gates,
)
from flow_pipelines import t5, t5_tokenizer, vae
from lora_files import assert_lora_is_merged
from sd_pipelines import PROMPT, assert_equals_supernet, relative, stock
from tiny_denoisers import chroma_transformer as transformer

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.shapes import Range
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.models import family_for
from dipgo_deploy.models.chroma import CLASS_NAME
from dipgo_deploy.runtime.pipeline import Pipeline
from tools.full_size.chroma import MODELS

FAMILY = family_for(CLASS_NAME)
STEPS, SCALE = 3, 2.5
SIZE = {"height": 16, "width": 24}  # pixels: 4 x 6 tokens of the tiny VAE's scale 2
NEGATIVE = "a bag"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chroma") / "model"
    torch.manual_seed(0)
    ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(2),
        text_encoder=t5(1),
        tokenizer=t5_tokenizer(),
        transformer=transformer(),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own(model: Path) -> ChromaPipeline:
    return ChromaPipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def planned(model: Path) -> PlannedExport:
    return plan_for(model, schedule_for(model, steps=STEPS), **SIZE)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full schedule of the model's own sampler, with components."""
    return publish(planned, tmp_path_factory.mktemp("chroma-engine") / "x").path


def ours(engine_dir: Path, **call: Any) -> np.ndarray:
    return np.asarray(Pipeline.from_engine_dir(engine_dir, "cpu", threads=1)(seed=3, **call).images)


def theirs(pipeline: Any, *, sampler: str | None = None, **call: Any) -> np.ndarray:
    """The stock pipeline's pictures, or its latents unpacked."""
    size = {**SIZE, **{name: call.pop(name) for name in SIZE if name in call}}
    found = stock(pipeline, sampler=sampler, steps=STEPS, **size, **call)
    if call["output_type"] != "latent":
        return found
    return np.asarray(pipeline._unpack_latents(torch.from_numpy(found), *size.values(), 2))


def test_it_draws_what_diffusers_draws(engine: Path, own: Any) -> None:
    manifest = Bundle.open(engine).manifest
    assert manifest.guidance and manifest.guidance_scale == 5.0
    call: dict[str, Any] = {"prompt": [PROMPT, "shoes"], "output_type": "np", "guidance_scale": SCALE}
    want = theirs(own, negative_prompt=[NEGATIVE] * 2, **call)
    assert relative(ours(engine, negative_prompt=NEGATIVE, **call), want) <= 1e-4
    assert relative(ours(engine, negative_prompt="red", **{**call, "prompt": ["and", "shoe"]}), want) > 1e-3
    call = {"prompt": PROMPT, "output_type": "latent"}
    assert relative(ours(engine, **call), theirs(own, **call)) <= 1e-4


def test_it_does_so_with_another_sampler(
    planned: PlannedExport, model: Path, engine: Path, own: Any, tmp_path: Path
) -> None:
    sampler = "flow-unipc"
    with_gates(planned, schedule_for(model, steps=STEPS, sampler=sampler), tmp_path / "x", components=False)
    borrow_components(engine, tmp_path / "x")
    call = {"prompt": PROMPT, "output_type": "latent", "guidance_scale": SCALE}
    assert relative(ours(tmp_path / "x", **call), theirs(own, sampler=sampler, **call)) <= 1e-4


def test_a_lora_is_merged(engine: Path, own: Any, tmp_path: Path) -> None:
    modules = [
        "transformer_blocks.0.attn.to_q",
        "distilled_guidance_layer.in_proj",
        "single_transformer_blocks.0.proj_out",
    ]
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
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "model" / "scheduler")
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
    side, batch = Range(min=16, opt=16, max=64), Range(min=1, opt=1, max=3)
    options: dict[str, Any] = {"height": side, "width": side, "batch": batch}
    publish(plan_for(model, schedule_for(model, steps=STEPS), **options), tmp_path / "x")
    call = {"output_type": "latent", "guidance_scale": SCALE, "height": 32, "width": 20}
    for prompts in ([PROMPT], ["shoes", PROMPT, "a bag"]):
        assert relative(ours(tmp_path / "x", prompt=prompts, **call), theirs(own, prompt=prompts, **call)) <= 1e-4


def test_units_of_the_published_size() -> None:
    (entry,) = MODELS
    config = entry["config"]
    with torch.device("meta"):
        denoiser = ChromaTransformer2DModel(**{key: value for key, value in config.items() if key[0] != "_"})
    for granularity, count in (("block", 57), ("layer", 171)):
        specs = FAMILY.blocks(config, granularity)  # type: ignore[arg-type]
        assert len(specs) == count
        assert all(denoiser.get_submodule(path) for spec in specs for path in spec.modules)
    latent, _, states, mask = FAMILY.inputs(config, 2, 128, 128, 512)
    assert (latent.shape, states.shape, mask.shape) == ((2, 16, 128, 128), (2, 512, 4096), (2, 512))


def test_refusals_are_one_line() -> None:
    for config, height, words in (({"out_channels": 32}, 8, "out_channels 32"), ({}, 9, "9x8; give")):
        with pytest.raises(UserError) as error:
            FAMILY.inputs(config, 2, height, 8, 512)
        assert words in str(error.value) and "\n" not in str(error.value)
