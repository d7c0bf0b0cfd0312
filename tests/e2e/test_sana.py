"""Sana in small, a family of one file: linear attention, a language model for the text, DC-AE, flow matching."""

from __future__ import annotations

import runpy
import string
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from family_checks import (
    assert_pictures_equal_stock,
    build_with_tensorrt_rtx,
    check_family,
    plan_for,
    random_weights,
    schedule_for,
    with_gates,
)
from sd_pipelines import assert_equals_supernet, psnr, relative, stock
from tiny_denoisers import sana_transformer
from tokenizers.processors import TemplateProcessing
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.shapes import Range, Sizes
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.models import family_for
from dipgo_deploy.models.sana import CLASS_NAME
from dipgo_deploy.runtime.pipeline import Pipeline

STEPS, SCALE = 4, 4.5
SIZE = {"height": 16, "width": 24}  # pixels: the tiny autoencoder's scale is 2
PROMPTS, NEGATIVE = [" A red SHOE ", "shoes"], "a Bag"
# The settings of the published folders.
FLOW_DPM = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

FULL_SIZE = {
    model["name"]: model
    for model in runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools/full_size/sana.py"))["MODELS"]
}


def gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's own class with a small vocabulary: `<bos>` in front, bytes for unknown characters, padding on the left
    (which SanaPipeline changes)."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    tokens += [f"<0x{value:02X}>" for value in range(256)] + list(string.ascii_lowercase) + ["▁s", "▁sh"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[("▁", "s"), ("▁s", "h")])
    assert tokenizer.padding_side == "left"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


def gemma() -> Gemma2Model:
    """Two layers, one of them with a sliding window that is shorter than the text."""
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=16,
    )
    return random_weights(Gemma2Model(config))


def autoencoder() -> AutoencoderDC:
    """One level of each kind of block that DC-AE has."""
    settings: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        settings[f"{side}_block_types"] = ("ResBlock", "EfficientViTBlock")
        settings[f"{side}_block_out_channels"] = (8, 8)
        settings[f"{side}_layers_per_block"] = (1, 1)
        settings[f"{side}_qkv_multiscales"] = ((), (5,))
    model = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
        **settings,
    )
    return random_weights(model)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sana") / "model"
    torch.manual_seed(0)
    SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma(),
        vae=autoencoder(),
        transformer=sana_transformer(timestep_scale=0.5),
        scheduler=DPMSolverMultistepScheduler(**FLOW_DPM),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def planned(model: Path) -> PlannedExport:
    """One trace for many sizes."""
    side = Range(min=16, opt=24, max=32, multiple=2)
    batch = Range(min=1, opt=1, max=2)
    return plan_for(model, schedule_for(model, steps=STEPS), height=side, width=side, batch=batch)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full schedule of the model's own sampler, with components."""
    return publish(planned, tmp_path_factory.mktemp("sana-engine") / "x").path


def theirs(model: Path, **call: Any) -> np.ndarray:
    options = {
        "clean_caption": False,
        "use_resolution_binning": False,
        "guidance_scale": SCALE,
        **SIZE,
    }
    pipeline = SanaPipeline.from_pretrained(model)
    pipeline.check_inputs = lambda *args: None  # its multiples of 32 are those of the real autoencoder
    return stock(pipeline, steps=STEPS, **{**options, **call})


def ours(engine_dir: Path, **call: Any) -> np.ndarray:
    pipeline = Pipeline.from_engine_dir(engine_dir, "cpu", threads=1)
    return np.asarray(pipeline(seed=3, guidance_scale=SCALE, **call).images)


def test_it_draws_what_diffusers_draws(model: Path, engine: Path) -> None:
    # Both with the long instruction that SanaPipeline puts before a prompt by default.
    entry = Bundle.open(engine).manifest.components.text_encoder
    assert entry is not None and entry.prefix.startswith("Given a user prompt") and entry.tokenizers[0].length > 1000
    assert [spec.shape for spec in entry.graph.outputs] == [(1, 300, 24), (1, 300)]
    for kind, size in (("latent", {"height": 32, "width": 20}), ("np", SIZE)):
        call = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "output_type": kind, **size}
        want = theirs(model, **call)
        assert relative(ours(engine, **call), want) < 1e-4
        # Prompts do matter in this tiny model.
        assert relative(ours(engine, **{**call, "prompt": ["a red shoe", "shoe"]}), want) > 1e-2
    assert relative(theirs(model, **call, complex_human_instruction=None), want) > 1e-2


def test_blocks_with_residuals_and_another_sampler(
    model: Path, planned: PlannedExport, engine: Path, tmp_path: Path
) -> None:
    half = with_gates(planned, schedule_for(model, ratio=0.5, steps=STEPS), tmp_path / "half", components=False)
    assert_equals_supernet(half.path)
    # In pixels 32x32 and 32x64 only are multiples of 32, as SanaPipeline wants them.
    assert_pictures_equal_stock(half.path, engine, Sizes(1, 16, 16))
    assert {block.cache for block in planned.schedule.blocks} == {"residual"}
    assert len(half.manifest.plan.variants) > 1
    build_with_tensorrt_rtx(half.path)

    flow = schedule_for(model, steps=STEPS, sampler="flow-euler")
    euler = with_gates(planned, flow, tmp_path / "euler", components=False)
    with torch.no_grad():
        pipeline = SanaPipeline.from_pretrained(model)
        states, mask, no_states, no_mask = pipeline.encode_prompt(PROMPTS[0], negative_prompt=NEGATIVE)
    names = ("encoder_hidden_states", "encoder_attention_mask")
    got = ours(
        euler.path,
        prompt_embeds=dict(zip(names, (states.numpy(), mask.numpy()), strict=True)),
        negative_prompt_embeds=dict(zip(names, (no_states.numpy(), no_mask.numpy()), strict=True)),
        output_type="latent",
        **SIZE,
    )
    call = {"prompt": PROMPTS[0], "negative_prompt": NEGATIVE, "complex_human_instruction": None}
    assert relative(got, theirs(model, sampler="flow-euler", **call, output_type="latent")) < 1e-4


@pytest.mark.parametrize(
    ("granularity", "cache"), [pytest.param("block", "output", marks=pytest.mark.slow), ("layer", None)]
)
def test_random_schedules_are_the_supernet(tmp_path: Path, granularity: Any, cache: Any) -> None:
    torch.manual_seed(1)
    # As Sana 1.5 normalises, and with the position embedding of the 2K and 4K models.
    denoiser = sana_transformer(qk_norm="rms_norm_across_heads", interpolation_scale=1.0)
    denoiser.save_pretrained(tmp_path / "model")
    DPMSolverMultistepScheduler(**FLOW_DPM).save_pretrained(tmp_path / "model" / "scheduler")
    bundle = check_family(tmp_path / "model", tmp_path / "x", granularity=granularity, cache=cache)
    assert len(bundle.manifest.plan.variants) > 1


def test_fp16_is_close(model: Path, tmp_path: Path) -> None:
    bundle = publish(plan_for(model, schedule_for(model, steps=STEPS), dtype="fp16", **SIZE), tmp_path / "x")
    call = {"prompt": PROMPTS[0], "negative_prompt": NEGATIVE}
    latents = ours(bundle.path, **call, output_type="latent")
    # 11 bits through four steps of guidance 4.5; the family allows 2e-2.
    tolerance = family_for(CLASS_NAME).tolerances["fp16"]
    assert relative(latents, theirs(model, **call, output_type="latent")) < tolerance
    assert psnr(ours(bundle.path, **call, output_type="np"), theirs(model, **call, output_type="np")) > 45
    components = bundle.manifest.components
    assert components.vae_decoder is not None and components.text_encoder is not None
    for graph in (components.vae_decoder, components.text_encoder.graph):  # both overflow in float16
        weights = onnx.load(bundle.path / graph.file, load_external_data=False).graph.initializer
        assert onnx.TensorProto.FLOAT16 not in {tensor.data_type for tensor in weights}
    assert build_with_tensorrt_rtx(bundle.path) == 3


def test_tensorrt_rtx_builds_every_graph_in_fp32(engine: Path) -> None:
    assert build_with_tensorrt_rtx(engine) == 3  # the full step, Gemma, DC-AE


@pytest.mark.slow
def test_tensorrt_rtx_builds_bf16(model: Path, tmp_path: Path) -> None:
    schedule = schedule_for(model, ratio=0.5, steps=3, granularity="layer")
    bundle = publish(plan_for(model, schedule, dtype="bf16", **SIZE), tmp_path / "x")
    assert build_with_tensorrt_rtx(bundle.path) == len(bundle.manifest.plan.variants) + 2


@pytest.mark.parametrize("name", FULL_SIZE)
def test_blocks_and_inputs_of_the_published_sizes(name: str) -> None:
    config = FULL_SIZE[name]["config"]
    family = family_for(CLASS_NAME)
    with torch.device("meta"):
        denoiser = SanaTransformer2DModel(**{key: value for key, value in config.items() if not key.startswith("_")})
    for granularity, count in (("block", 20), ("layer", 60)):
        specs = family.blocks(config, granularity)  # type: ignore[arg-type]
        assert len(specs) == count == len({spec.name for spec in specs})
        assert specs == family.blocks(dict(denoiser.config), granularity)  # type: ignore[arg-type]
        assert all(denoiser.get_submodule(path) for spec in specs for path in spec.modules)
    outside = [name for name, _ in denoiser.named_parameters() if not name.startswith("transformer_blocks.")]
    heads = ("patch_embed.", "time_embed.", "caption_projection.", "caption_norm.", "proj_out.", "scale_shift_table")
    assert all(name.startswith(heads) for name in outside)
    length = family.text(config, None).length  # type: ignore[union-attr]
    latent, timestep, states, mask = family.inputs(config, 2, 32, 40, length)
    assert (latent.shape, timestep.shape) == ((2, 32, 32, 40), (1,))
    assert (states.shape, mask.shape, mask.dtype) == ((2, 300, 2304), (2, 300), "int64")
    assert length == FULL_SIZE[name]["text_length"]


def test_refusals_are_one_line(model: Path) -> None:
    with pytest.raises(UserError, match="--height 15: give a multiple of 2"):
        plan_for(model, schedule_for(model, steps=STEPS), height=15)
    family = family_for(CLASS_NAME)
    for config, height, words in (
        ({"guidance_embeds": True}, 32, "Sana-Sprint"),
        ({"patch_size": 2}, 33, "33x32; give multiples of 2"),
    ):
        with pytest.raises(UserError) as error:
            family.inputs(config, 2, height, 32, 300)
        assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="granularity 'node'"):
        family.blocks({}, "node")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="text_length"):
        family.inputs({}, 2, 8, 8)
