"""PixArt-alpha and PixArt-Sigma in small, against the supernet and diffusers' own pipelines."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
from diffusers.pipelines.sana import pipeline_sana
from family_checks import (
    assert_pictures_equal_stock,
    build_with_tensorrt_rtx,
    check_family,
    plan_for,
    schedule_for,
    with_gates,
)
from pixart_pipelines import save_alpha, save_sigma, t5_tokenizer, transformer
from sd_pipelines import assert_equals_supernet, psnr, relative, stock
from transformers import T5EncoderModel

from dipgo_deploy.backends import create_backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.shapes import Range
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.models import family_for
from dipgo_deploy.models.pixart import CLASS_NAME
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.runtime.text import TextEncoder

STEPS, SCALE = 4, 4.5
HEIGHT, WIDTH = 64, 96  # neither a square nor the model's native size: its position embedding is another
SIZE = {"height": HEIGHT, "width": WIDTH}
PROMPTS, NEGATIVE = [" A red SHOE ", "shoes"], "a Bag"

FULL_SIZE = {
    model["name"]: model
    for model in runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools/full_size/pixart.py"))["MODELS"]
}


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_alpha(tmp_path_factory.mktemp("pixart") / "alpha")


@pytest.fixture(scope="module")
def sigma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sigma(tmp_path_factory.mktemp("pixart") / "sigma")


@pytest.fixture(scope="module")
def planned(alpha: Path) -> PlannedExport:
    return plan_for(alpha, schedule_for(alpha, steps=STEPS), **SIZE)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PixArt-alpha, the full schedule of its own sampler, with components."""
    return publish(planned, tmp_path_factory.mktemp("pixart-engine") / "x").path


def theirs(pipeline: Any, **call: Any) -> np.ndarray:
    options = {"clean_caption": False, "use_resolution_binning": False, "guidance_scale": SCALE, **SIZE}
    return stock(pipeline, **{"steps": STEPS, **options, **call})


def ours(engine_dir: Path, **call: Any) -> np.ndarray:
    pipeline = Pipeline.from_engine_dir(engine_dir, "cpu", threads=1)
    return np.asarray(pipeline(seed=3, guidance_scale=SCALE, **call).images)


def test_alpha_draws_what_diffusers_draws(alpha: Path, engine: Path) -> None:
    pipeline = PixArtAlphaPipeline.from_pretrained(alpha)
    for kind in ("latent", "np"):
        call = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "output_type": kind}
        want = theirs(pipeline, **call)
        assert relative(ours(engine, **call), want) < 1e-4
        # Prompts and the picture's size do matter in this tiny model.
        assert relative(ours(engine, **{**call, "prompt": ["a red shoe", "shoe"]}), want) > 1e-2
    narrow = ours(engine, **call, conditions={"resolution": np.array([[1024.0, 256.0]])})
    assert relative(narrow, want) > 1e-2


def test_one_engine_for_many_sizes(alpha: Path, tmp_path: Path) -> None:
    # Position embedding, squeezed token dimension, resolution and the batch of mask and text all depend on the size.
    side = Range(min=64, opt=64, max=96, multiple=16)
    ranges = {"height": side, "width": side, "batch": Range(min=1, opt=1, max=2)}
    planned = plan_for(alpha, schedule_for(alpha, steps=3), components=False, **ranges)
    folder = publish(planned, tmp_path / "x").path
    engine = Pipeline.from_engine_dir(folder, "cpu", threads=1)
    pipeline = PixArtAlphaPipeline.from_pretrained(alpha)
    embeds = _embeds(pipeline, PROMPTS)
    for height, width in ((64, 64), (96, 80)):
        size = {"height": height, "width": width}
        got = engine(**embeds, **size, seed=3, guidance_scale=SCALE, output_type="latent").latents
        want = theirs(pipeline, prompt=PROMPTS, negative_prompt=NEGATIVE, **size, output_type="latent", steps=3)
        assert relative(got, want) < 1e-4
    build_with_tensorrt_rtx(folder)


def test_diffusers_default_call_is_ours_at_the_binned_size(tmp_path: Path) -> None:
    """Asked for 200x312, a pipeline draws 208x304, the nearest of its sizes by aspect ratio, and then resizes."""
    folder = save_sigma(tmp_path / "model", sample_size=32)
    call: dict[str, Any] = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "output_type": "latent"}
    pipeline = PixArtSigmaPipeline.from_pretrained(folder)
    want = stock(pipeline, steps=3, height=200, width=312, guidance_scale=SCALE, **call)
    assert want.shape == (2, 4, 26, 38)
    planned = plan_for(folder, schedule_for(folder, steps=3), height=208, width=304, check=False)
    assert relative(ours(publish(planned, tmp_path / "x").path, **call), want) < 1e-4


@pytest.mark.parametrize("module", [pipeline_pixart_alpha, pipeline_pixart_sigma, pipeline_sana])
def test_a_binned_size_stays_what_it_is(module: Any) -> None:
    """So that the default call at one of these sizes is an engine directory's for that size."""
    for name in (name for name in dir(module) if name.startswith("ASPECT_RATIO")):
        sizes = getattr(module, name)
        for size in sizes.values():
            height, width = (int(extent) for extent in size)
            assert PixArtImageProcessor.classify_height_width_bin(height, width, sizes) == (height, width)


def _embeds(pipeline: Any, prompts: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """What diffusers makes of prompts, as an engine without components takes it."""
    with torch.no_grad():
        states, mask, no_states, no_mask = pipeline.encode_prompt(prompts, negative_prompt=NEGATIVE)
    names = ("encoder_hidden_states", "encoder_attention_mask")
    return {
        "prompt_embeds": dict(zip(names, (states.numpy(), mask.numpy()), strict=True)),
        "negative_prompt_embeds": dict(zip(names, (no_states.numpy(), no_mask.numpy()), strict=True)),
    }


def test_blocks_with_residuals_and_another_sampler(
    alpha: Path, planned: PlannedExport, engine: Path, tmp_path: Path
) -> None:
    half = with_gates(planned, schedule_for(alpha, ratio=0.5, steps=STEPS), tmp_path / "half", components=False)
    assert_equals_supernet(half.path)
    assert_pictures_equal_stock(half.path, engine)
    assert {block.cache for block in planned.schedule.blocks} == {"residual"}
    assert len(half.manifest.plan.variants) > 1
    build_with_tensorrt_rtx(half.path)

    euler = with_gates(planned, schedule_for(alpha, steps=STEPS, sampler="euler"), tmp_path / "euler", components=False)
    pipeline = PixArtAlphaPipeline.from_pretrained(alpha)
    got = ours(euler.path, **_embeds(pipeline, PROMPTS[:1]), output_type="latent")
    want = theirs(pipeline, sampler="euler", prompt=PROMPTS[0], negative_prompt=NEGATIVE, output_type="latent")
    assert relative(got, want) < 1e-4


@pytest.mark.parametrize(
    ("granularity", "cache"), [pytest.param("block", "output", marks=pytest.mark.slow), ("layer", None)]
)
def test_random_schedules_are_the_supernet(tmp_path: Path, granularity: Any, cache: Any) -> None:
    transformer(sample_size=8, use_additional_conditions=True).save_pretrained(tmp_path / "model")
    bundle = check_family(tmp_path / "model", tmp_path / "x", sampler="euler", granularity=granularity, cache=cache)
    assert len(bundle.manifest.plan.variants) > 1


def test_fp16_is_close_and_t5_keeps_its_range(sigma: Path, tmp_path: Path) -> None:
    bundle = publish(plan_for(sigma, schedule_for(sigma, steps=STEPS), dtype="fp16", **SIZE), tmp_path / "x")
    pipeline = PixArtSigmaPipeline.from_pretrained(sigma)
    call = {"prompt": PROMPTS[0], "negative_prompt": NEGATIVE}
    want = theirs(pipeline, **call, output_type="latent")
    # 11 bits through four steps of guidance 4.5; the family allows 2e-2.
    assert relative(ours(bundle.path, **call, output_type="latent"), want) < family_for(CLASS_NAME).tolerances["fp16"]
    assert psnr(ours(bundle.path, **call, output_type="np"), theirs(pipeline, **call, output_type="np")) > 45

    entry = bundle.manifest.components.text_encoder
    assert entry is not None and [spec.shape for spec in entry.graph.outputs] == [(1, 300, 24), (1, 300)]
    weights = onnx.load(bundle.path / entry.graph.file, load_external_data=False).graph.initializer
    kinds = {tensor.name: tensor.data_type for tensor in weights if tensor.name.endswith(".weight")}
    wide = {name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT}
    assert wide == {f"encoder.block.{layer}.layer.1.DenseReluDense.wo.weight" for layer in range(2)}
    assert {kind for name, kind in kinds.items() if name not in wide} == {onnx.TensorProto.FLOAT16}
    # transformers' own half precision, which keeps `wo` in float32 too.
    half = T5EncoderModel.from_pretrained(sigma / "text_encoder", dtype=torch.float16)
    assert half.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    got = TextEncoder(bundle.path, entry, create_backend("cpu", threads=1))(["a red shoe"])
    assert relative(got["encoder_hidden_states"].astype(np.float32), _encoded(half, "a red shoe", 300)) < 5e-3

    build_with_tensorrt_rtx(bundle.path)


def _encoded(encoder: Any, prompt: str, length: int) -> np.ndarray:
    batch = t5_tokenizer()(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = encoder(batch.input_ids, attention_mask=batch.attention_mask)[0]
    return np.asarray(states.float())


def test_t5_component_is_transformers_own(alpha: Path, engine: Path) -> None:
    own = T5EncoderModel.from_pretrained(alpha / "text_encoder")
    entry = Bundle.open(engine).manifest.components.text_encoder
    assert entry is not None
    encoder = TextEncoder(engine, entry, create_backend("cpu", threads=1))
    # Empty, with unknown characters, and cut to 120 tokens with `</s>` at the end.
    prompts = ["", "a red shoe", "the 3rd Ünknown", "a red shoe " * 60]
    got = encoder(prompts)
    for row, prompt in enumerate(prompts):
        text = prompt.lower().strip()
        assert relative(got["encoder_hidden_states"][row : row + 1], _encoded(own, text, 120)) < 1e-5
        batch = t5_tokenizer()(text, padding="max_length", max_length=120, truncation=True)
        assert got["encoder_attention_mask"][row].tolist() == batch.attention_mask
    assert got["encoder_attention_mask"].sum(1).tolist()[::3] == [1, 120]
    assert got["encoder_attention_mask"].dtype == np.int64


def test_prompt_to_picture_without_torch_and_transformers(engine: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules.update(torch=None, transformers=None, diffusers=None)\n"
        "import numpy as np; from dipgo_deploy.runtime.pipeline import Pipeline\n"
        "pipeline = Pipeline.from_engine_dir(sys.argv[1], 'cpu', threads=1)\n"
        "np.save(sys.argv[2], pipeline('a red shoe', seed=3, guidance_scale=4.5, output_type='np').images)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(engine), str(tmp_path / "image.npy")], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "image.npy"), ours(engine, prompt="a red shoe", output_type="np"))


def test_tensorrt_rtx_builds_every_graph_in_fp32(engine: Path) -> None:
    assert build_with_tensorrt_rtx(engine) == 3  # the full step, T5, VAE


@pytest.mark.slow
def test_tensorrt_rtx_builds_bf16(sigma: Path, tmp_path: Path) -> None:
    schedule = schedule_for(sigma, ratio=0.5, steps=3, granularity="layer")
    planned = plan_for(sigma, schedule, dtype="bf16", height=64, width=64)
    assert planned.source.pipeline is not None
    planned.source.pipeline.vae = None  # Stable Diffusion's
    bundle = publish(planned, tmp_path / "x")
    assert build_with_tensorrt_rtx(bundle.path) == len(bundle.manifest.plan.variants) + 1


@pytest.mark.parametrize("name", FULL_SIZE)
def test_blocks_of_the_published_sizes(name: str) -> None:
    config = FULL_SIZE[name]["config"]
    family = family_for(CLASS_NAME)
    with torch.device("meta"):
        model = PixArtTransformer2DModel(**{key: value for key, value in config.items() if not key.startswith("_")})
    for granularity, count in (("block", 28), ("layer", 84)):
        specs = family.blocks(config, granularity)  # type: ignore[arg-type]
        assert len(specs) == count == len({spec.name for spec in specs})
        assert specs == family.blocks(dict(model.config), granularity)  # type: ignore[arg-type]
        assert all(model.get_submodule(path) for spec in specs for path in spec.modules)
    outside = [name for name, _ in model.named_parameters() if not name.startswith("transformer_blocks.")]
    heads = ("pos_embed.", "adaln_single.", "caption_projection.", "proj_out.", "scale_shift_table")
    assert all(name.startswith(heads) for name in outside)


def test_inputs_of_the_published_sizes() -> None:
    family = family_for(CLASS_NAME)
    alpha, sigma = (FULL_SIZE[f"pixart-{kind}-xl-2-1024"] for kind in ("alpha", "sigma"))
    assert family.text(alpha["config"], None).length == alpha["text_length"] == 120  # type: ignore[union-attr]
    assert family.text(sigma["config"], None).length == sigma["text_length"] == 300  # type: ignore[union-attr]
    specs = {spec.name: spec for spec in family.inputs(alpha["config"], 2, 96, 128, 120)}
    assert specs["encoder_hidden_states"].shape == (2, 120, 4096)
    assert (specs["encoder_attention_mask"].shape, specs["encoder_attention_mask"].dtype) == ((2, 120), "int64")
    assert specs["resolution"].values == (768.0, 1024.0)
    assert "resolution" not in {spec.name for spec in family.inputs(sigma["config"], 2, 96, 128, 300)}
    assert family.latent_channels(alpha["config"]) == 4  # of eight outputs: noise and variance


def test_refusals_are_one_line(alpha: Path) -> None:
    schedule = schedule_for(alpha, steps=STEPS)
    for size, words in (({"height": 60}, "--height 60: give a multiple of 8"), ({"width": 72}, "128x9; give mul")):
        with pytest.raises(UserError) as error:
            plan_for(alpha, schedule, **size)
        assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="granularity 'node'"):
        family_for(CLASS_NAME).blocks({}, "node")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="text_length"):
        family_for(CLASS_NAME).inputs({}, 2, 8, 8)
