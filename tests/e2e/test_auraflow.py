"""AuraFlow in small: joint and single blocks, UMT5 with zeros for padding, against supernet and diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from family_checks import (
    assert_pictures_equal_stock,
    borrow_components,
    build_with_tensorrt_rtx,
    loop_report,
    plan_for,
    schedule_for,
    with_gates,
)
from flow_pipelines import t5_tokenizer, umt5, vae
from sd_pipelines import PROMPT, assert_equals_supernet, relative, stock
from tiny_denoisers import auraflow_transformer as transformer

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.shapes import Range
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.models import family_for
from dipgo_deploy.models.auraflow import CLASS_NAME
from dipgo_deploy.runtime.pipeline import Pipeline
from tools.full_size.auraflow import MODELS

FAMILY = family_for(CLASS_NAME)
STEPS, SCALE = 3, 2.5
SIZE = {"height": 16, "width": 24}  # pixels: 4 x 6 tokens of the tiny VAE's scale 2
NEGATIVE = "a bag"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auraflow") / "model"
    torch.manual_seed(0)
    decoder = vae(2)
    decoder.register_to_config(shift_factor=None)  # which AuraFlowPipeline does not take from it
    AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5(1),
        vae=decoder,
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own(model: Path) -> AuraFlowPipeline:
    return AuraFlowPipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def planned(model: Path) -> PlannedExport:
    return plan_for(model, schedule_for(model, steps=STEPS), **SIZE)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full schedule of the model's own sampler, with components."""
    return publish(planned, tmp_path_factory.mktemp("auraflow-engine") / "x").path


def ours(engine_dir: Path, **call: Any) -> np.ndarray:
    return np.asarray(Pipeline.from_engine_dir(engine_dir, "cpu", threads=1)(seed=3, **call).images)


def theirs(pipeline: Any, **call: Any) -> np.ndarray:
    return stock(pipeline, steps=STEPS, **{**SIZE, **call})


def test_it_draws_what_diffusers_draws(engine: Path, own: Any) -> None:
    manifest = Bundle.open(engine).manifest
    assert manifest.guidance and manifest.guidance_scale == 3.5
    call: dict[str, Any] = {"prompt": [PROMPT, "shoes"], "output_type": "np", "guidance_scale": SCALE}
    want = theirs(own, negative_prompt=[NEGATIVE] * 2, **call)
    assert relative(ours(engine, negative_prompt=NEGATIVE, **call), want) <= 1e-4
    assert relative(ours(engine, negative_prompt="red", **{**call, "prompt": ["and", "shoe"]}), want) > 1e-3
    call = {"prompt": PROMPT, "output_type": "latent"}
    assert relative(ours(engine, **call), theirs(own, **call)) <= 1e-4


@pytest.mark.parametrize("sampler", ["flow-heun", "flow-unipc"])
def test_it_does_so_with_other_samplers(
    planned: PlannedExport, model: Path, engine: Path, own: Any, sampler: str, tmp_path: Path
) -> None:
    with_gates(planned, schedule_for(model, steps=STEPS, sampler=sampler), tmp_path / "x", components=False)
    borrow_components(engine, tmp_path / "x")
    call = {"prompt": PROMPT, "output_type": "latent", "guidance_scale": SCALE}
    assert relative(ours(tmp_path / "x", **call), theirs(own, sampler=sampler, **call)) <= 1e-4


def test_random_schedule_of_blocks(planned: PlannedExport, model: Path, engine: Path, tmp_path: Path) -> None:
    with_gates(planned, schedule_for(model, steps=STEPS, ratio=0.5), tmp_path / "x", components=False)
    assert_equals_supernet(tmp_path / "x")
    assert_pictures_equal_stock(tmp_path / "x", engine)


@pytest.mark.parametrize(
    ("granularity", "cache", "layout"),
    [("layer", None, "segments"), pytest.param("block", "output", "variants", marks=pytest.mark.slow)],
)
def test_random_schedules_are_the_supernet(tmp_path: Path, granularity: Any, cache: Any, layout: Any) -> None:
    transformer(layers=1 if layout == "segments" else 2).save_pretrained(tmp_path / "model")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "model" / "scheduler")
    schedule = schedule_for(tmp_path / "model", ratio=0.5, sampler="flow-dpm++2m", granularity=granularity, cache=cache)
    bundle = publish(plan_for(tmp_path / "model", schedule, components=False, layout=layout), tmp_path / "x")
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
    side, batch = Range(min=8, opt=16, max=32, multiple=4), Range(min=1, opt=1, max=3)
    options: dict[str, Any] = {"height": side, "width": side, "batch": batch}
    publish(plan_for(model, schedule_for(model, steps=STEPS), **options), tmp_path / "x")
    call = {"output_type": "latent", "guidance_scale": SCALE, "height": 32, "width": 20}
    for prompts in ([PROMPT], ["shoes", PROMPT, "a bag"]):
        assert relative(ours(tmp_path / "x", prompt=prompts, **call), theirs(own, prompt=prompts, **call)) <= 1e-4


def test_units_of_the_published_size() -> None:
    (entry,) = MODELS
    config = entry["config"]
    with torch.device("meta"):
        denoiser = AuraFlowTransformer2DModel(**{key: value for key, value in config.items() if key[0] != "_"})
    for granularity, count in (("block", 36), ("layer", 76)):
        specs = FAMILY.blocks(config, granularity)  # type: ignore[arg-type]
        assert len(specs) == count
        assert all(denoiser.get_submodule(path) for spec in specs for path in spec.modules)
    containers = ("joint_transformer_blocks.", "single_transformer_blocks.")
    outside = {name.partition(".")[0] for name, _ in denoiser.named_parameters() if not name.startswith(containers)}
    assert outside == {"pos_embed", "context_embedder", "time_step_proj", "norm_out", "proj_out", "register_tokens"}
    latent, _, states = FAMILY.inputs(config, 2, 128, 128, 256)
    assert (latent.shape, states.shape) == ((2, 4, 128, 128), (2, 256, 2048))


def test_refusals_are_one_line() -> None:
    for height, words in ((9, "9x8; give multiples of 2"), (66, "position embeddings end at 64")):
        with pytest.raises(UserError) as error:
            FAMILY.inputs({}, 2, height, 8, 256)
        assert words in str(error.value) and "\n" not in str(error.value)
