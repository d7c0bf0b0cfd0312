"""FLUX.2 in small, klein and dev: a latent packed in its VAE's statistics, language models for the text, against the
supernet and diffusers' own pipelines."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from family_checks import (
    assert_pictures_equal_stock,
    borrow_components,
    build_with_tensorrt_rtx,
    loop_report,
    plan_for,
    random_weights,
    schedule_for,
    with_gates,
)
from language_models import mistral3, mistral_tokenizer, qwen3, qwen_tokenizer
from lora_files import assert_lora_is_merged
from sd_pipelines import PROMPT, assert_equals_supernet, relative, stock
from tiny_denoisers import flux2_transformer as transformer

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.models import family_for
from dipgo_deploy.models.flux2 import CLASS_NAME
from dipgo_deploy.reference.vae import from_vae
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.supernet.load import load_pipeline
from tools.full_size.flux2 import MODELS

FAMILY = family_for(CLASS_NAME)
STEPS, SCALE = 3, 2.5
FULL_SIZE = {entry["name"]: entry for entry in MODELS}
SIZE64 = {"height": 64, "width": 64}  # of a denoiser alone, whose VAE is taken to have scale 8
SIZE = {"height": 16, "width": 24}  # pixels: 4 x 6 tokens of the tiny VAE's 2x2 latents of scale 2
CLOSING = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
LAYERS = (1, 2)  # of the language model, in the place of the published ones


@pytest.fixture(scope="module", autouse=True)
def fewer_layers() -> Any:
    """The pipeline takes the states of few layers by default, as the tiny language models have few."""
    patch = pytest.MonkeyPatch()
    for owner, published in ((Flux2KleinPipeline, (9, 18, 27)), (Flux2Pipeline, (10, 20, 30))):
        function = inspect.unwrap(owner.__call__)
        assert published in function.__defaults__
        defaults = tuple(LAYERS if value == published else value for value in function.__defaults__)
        patch.setattr(function, "__defaults__", defaults)
    yield
    patch.undo()


def vae() -> AutoencoderKLFlux2:
    """Scale 2, statistics of channels that are no default ones."""
    torch.manual_seed(0)
    model = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=2,
        sample_size=32,
    )
    random_weights(model)
    model.bn.running_mean.copy_(torch.randn(8) / 4)
    model.bn.running_var.copy_(torch.rand(8) + 0.5)
    return model


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux2") / "klein"
    torch.manual_seed(2)
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae(),
        text_encoder=qwen3(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer(guidance=False),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own(klein: Path) -> Flux2KleinPipeline:
    return Flux2KleinPipeline.from_pretrained(klein)


@pytest.fixture(scope="module")
def planned(klein: Path) -> PlannedExport:
    return plan_for(klein, schedule_for(klein, steps=STEPS), **SIZE)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full schedule of the model's own sampler, with components."""
    return publish(planned, tmp_path_factory.mktemp("flux2-engine") / "x").path


def ours(engine_dir: Path, **call: Any) -> np.ndarray:
    return np.asarray(Pipeline.from_engine_dir(engine_dir, "cpu", threads=1)(seed=3, **call).images)


def theirs(pipeline: Any, *, sampler: str | None = None, **call: Any) -> np.ndarray:
    """The stock pipeline's pictures, or its latents as the denoiser's; klein's are the VAE's, dev's are tokens."""
    found = stock(pipeline, sampler=sampler, steps=STEPS, **SIZE, **call)
    if call["output_type"] != "latent":
        return found
    if isinstance(pipeline, Flux2KleinPipeline):
        return np.asarray(from_vae(pipeline.vae, torch.from_numpy(found)))
    return found.transpose(0, 2, 1).reshape(len(found), -1, SIZE["height"] // 4, SIZE["width"] // 4)


def test_it_draws_what_diffusers_draws(engine: Path, own: Any) -> None:
    manifest = Bundle.open(engine).manifest
    assert manifest.guidance and manifest.guidance_scale == 4.0  # the pipeline's own default
    assert (manifest.latent.channels, manifest.latent.height, manifest.latent.scale) == (8, 4, 4)
    entry = manifest.components.text_encoder
    assert entry is not None
    assert entry.around == ("<|im_start|>user\n", CLOSING)
    call = {"prompt": [PROMPT, "shoes"], "output_type": "np", "guidance_scale": SCALE}
    want = theirs(own, **call)
    assert relative(ours(engine, **call), want) <= 1e-4
    assert relative(ours(engine, **{**call, "prompt": ["boots", "shoes"]}), want) > 1e-3  # prompts matter
    call = {"prompt": PROMPT, "output_type": "latent"}
    assert relative(ours(engine, **call), theirs(own, **call)) <= 1e-4


@pytest.mark.parametrize("sampler", ["flow-unipc", "flow-dpm++2m"])
def test_it_does_so_with_other_samplers(
    planned: PlannedExport, klein: Path, engine: Path, own: Any, sampler: str, tmp_path: Path
) -> None:
    with_gates(planned, schedule_for(klein, steps=STEPS, sampler=sampler), tmp_path / "x", components=False)
    borrow_components(engine, tmp_path / "x")
    call = {"prompt": PROMPT, "output_type": "latent", "guidance_scale": SCALE}
    assert relative(ours(tmp_path / "x", **call), theirs(own, sampler=sampler, **call)) <= 1e-4


def test_a_lora_is_merged(engine: Path, own: Any, tmp_path: Path) -> None:
    modules = [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.ff.linear_out",
        "single_transformer_blocks.0.attn.to_out",
    ]
    call = {"prompt": PROMPT, "output_type": "latent", "guidance_scale": SCALE}
    assert_lora_is_merged(engine, own.transformer, modules, lambda: theirs(own, **call), tmp_path, **call)


def test_random_schedule_of_blocks(planned: PlannedExport, klein: Path, engine: Path, tmp_path: Path) -> None:
    with_gates(planned, schedule_for(klein, steps=STEPS, ratio=0.5), tmp_path / "x", components=False)
    assert_equals_supernet(tmp_path / "x")
    # klein evaluates its two halves one after the other, and takes no negative prompt.
    assert_pictures_equal_stock(tmp_path / "x", engine)
    assert build_with_tensorrt_rtx(tmp_path / "x") == len(Bundle.open(tmp_path / "x").manifest.plan.variants) + 2


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux2") / "dev"
    torch.manual_seed(3)
    Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae(),
        text_encoder=mistral3(),
        tokenizer=mistral_tokenizer(),
        transformer=transformer(guidance=True),
    ).save_pretrained(folder)
    return folder


def test_dev_takes_the_scale_as_an_input_and_a_system_message(dev: Path, tmp_path: Path) -> None:
    """In half precision; the published processor, which takes pictures too, is not needed for its tokenizer."""
    index = dev / "model_index.json"
    index.write_text(index.read_text().replace(type(mistral_tokenizer()).__name__, "PixtralProcessor"))
    schedule = schedule_for(dev, steps=STEPS, ratio=0.5, granularity="layer")
    bundle = publish(plan_for(dev, schedule, dtype="fp16", **SIZE), tmp_path / "x")
    manifest = bundle.manifest
    assert [(spec.name, spec.source) for spec in manifest.conditions] == [
        ("encoder_hidden_states", "text"),
        ("guidance", "guidance"),
    ]
    assert not manifest.guidance and manifest.guidance_scale == 4.0
    entry = manifest.components.text_encoder
    assert entry is not None
    assert entry.around[0].startswith("<s>[SYSTEM_PROMPT]You are an AI") and entry.removed == ("[IMG]",)
    assert (entry.tokenizers[0].padding, entry.tokenizers[0].special) == ("left", False)
    report = loop_report(bundle.path, pictures=True)
    assert report.first_failure() is None and report.pictures


@pytest.mark.slow
def test_dev_draws_what_diffusers_draws(dev: Path, tmp_path: Path) -> None:
    publish(plan_for(dev, schedule_for(dev, steps=STEPS), **SIZE), tmp_path / "x")
    pipeline = load_pipeline(str(dev))
    call = {"prompt": [PROMPT, "[IMG] shoes"], "guidance_scale": SCALE, "output_type": "np"}
    assert relative(ours(tmp_path / "x", **call), theirs(pipeline, **call)) <= 1e-4
    assert build_with_tensorrt_rtx(tmp_path / "x") == 3


@pytest.mark.parametrize(
    ("granularity", "cache", "layout"),
    [("layer", None, "segments"), pytest.param("block", "output", "variants", marks=pytest.mark.slow)],
)
def test_random_schedules_are_the_supernet(tmp_path: Path, granularity: Any, cache: Any, layout: Any) -> None:
    denoiser = transformer(guidance=True, layers=1 if layout == "segments" else 2)
    denoiser.save_pretrained(tmp_path / "model")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "model" / "scheduler")
    schedule = schedule_for(tmp_path / "model", ratio=0.5, granularity=granularity, cache=cache)
    bundle = publish(plan_for(tmp_path / "model", schedule, components=False, layout=layout, **SIZE64), tmp_path / "x")
    assert bundle.manifest.plan.layout == layout
    assert_equals_supernet(tmp_path / "x")
    if layout == "variants":
        assert build_with_tensorrt_rtx(tmp_path / "x") == len(bundle.manifest.plan.variants)


def test_timesteps_are_the_pipelines() -> None:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    for tokens, steps in ((64 * 64, 50), (32 * 40, 4), (80 * 64, 28)):
        side = tokens // 32
        found = FAMILY.set_timesteps({}, {"use_dynamic_shifting": True}, 32, side, steps)
        assert found["mu"] == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)
        assert len(found["sigmas"]) == steps
    assert FAMILY.set_timesteps({}, {"use_flow_sigmas": True}, 32, 32, 4) == {}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_units_and_guidance_of_the_published_sizes(name: str) -> None:
    config, counts = FULL_SIZE[name]["config"], {"flux.2-dev": (56, 72), "flux.2-klein-4b": (25, 35)}
    with torch.device("meta"):
        denoiser = Flux2Transformer2DModel(**{key: value for key, value in config.items() if key[0] != "_"})
    for granularity, count in zip(("block", "layer"), counts[name.rpartition("-")[0]], strict=True):
        specs = FAMILY.blocks(config, granularity)
        assert len(specs) == count
        assert all(denoiser.get_submodule(path) for spec in specs for path in spec.modules)
    latent = FAMILY.inputs(config, 1, 64, 64, 512)[0]
    assert latent.shape == (1, 128, 64, 64)
    guided = name != "flux.2-dev-1024"
    assert FAMILY.is_guided(config, {}) == guided and not FAMILY.is_guided(config, {"is_distilled": True})


def test_refusals_are_one_line() -> None:
    for config, words in (({"out_channels": 64}, "out_channels 64"), ({"axes_dims_rope": [32, 32, 64]}, "four axes")):
        with pytest.raises(UserError) as error:
            FAMILY.inputs(config, 1, 8, 8, 512)
        assert words in str(error.value) and "\n" not in str(error.value)
