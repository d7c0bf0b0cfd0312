"""HunyuanVideo in small: two streams, Llama in a template and CLIP without, a decoder in blended windows of frames."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from family_checks import build_with_tensorrt_rtx, loop_report, plan_for, random_weights, schedule_for, with_gates
from sd_pipelines import TOKENIZER, relative, text_config
from tiny_denoisers import hunyuan_transformer as transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast
from video_checks import (
    STEPS,
    check_blocks,
    check_half_precision,
    check_layers_in_both_layouts,
    check_random_blocks,
    check_samplers,
    check_whole_evaluations_skipped,
    ours,
    theirs,
)

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.models import family_for
from dipgo_deploy.models.hunyuan import CLASS_NAME

# Latents of 6 x 4 x 4: the decoder's windows are of 5 latent frames, 3 apart, so that there are two.
SIZE = {"height": 32, "width": 32, "num_frames": 21}
LATENT = (6, 4, 4)
PROMPT = "a red shoe"

ENTRY = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools/full_size/hunyuan.py"))["MODELS"][0]


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the template, some for prompts, and marks; as many as are cut off stand in front of a prompt."""
    template = DEFAULT_PROMPT_TEMPLATE["template"].partition("{}")[0]
    splitter = pre_tokenizers.Whitespace()
    words = [word for word, _ in splitter.pre_tokenize_str(template)]
    known = dict.fromkeys(["<unk>", "<pad>", *words, "a", "red", "shoe", "and", "bag"])
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    assert len(words) > DEFAULT_PROMPT_TEMPLATE["crop_start"] - 20
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", padding_side="right", model_max_length=512
    )


def llama() -> LlamaModel:
    """Three layers, of which the last two are not used."""
    config = LlamaConfig(
        vocab_size=len(llama_tokenizer()),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=1,
    )
    return random_weights(LlamaModel(config))


def vae() -> AutoencoderKLHunyuanVideo:
    """Four levels, scales of 8 and of 4 in time."""
    kinds = {f"{side}_block_types": (f"HunyuanVideo{side.title()}Block3D",) * 4 for side in ("down", "up")}
    model = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=0, norm_num_groups=2, **kinds
    )
    return random_weights(model)


@pytest.fixture(scope="module")
def stock() -> HunyuanVideoPipeline:
    torch.manual_seed(0)
    clip = random_weights(CLIPTextModel(text_config(8, hidden_act="quick_gelu", max_position_embeddings=77)))
    return HunyuanVideoPipeline(
        text_encoder=llama(),
        tokenizer=llama_tokenizer(),
        transformer=transformer(),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(**ENTRY["scheduler_config"]),
        text_encoder_2=clip,
        tokenizer_2=AutoTokenizer.from_pretrained(TOKENIZER),
    )


@pytest.fixture(scope="module")
def model(stock: HunyuanVideoPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hunyuan") / "model"
    stock.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def planned(model: Path) -> PlannedExport:
    return plan_for(model, schedule_for(model, steps=STEPS), check=False, **SIZE)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full schedule of the model's own sampler, with components."""
    return publish(planned, tmp_path_factory.mktemp("hunyuan-engine") / "x").path


def test_it_makes_what_diffusers_makes(stock: HunyuanVideoPipeline, engine: Path) -> None:
    manifest = Bundle.open(engine).manifest
    assert (manifest.latent.shape, manifest.latent.video_frames, manifest.guidance) == ((4, *LATENT), 21, False)
    assert [(chunk.graph, chunk.start) for chunk in manifest.components.vae_chunks] == [(0, 0), (1, 3)]
    for kind, shape in (("latent", (1, 4, *LATENT)), ("np", (1, 21, 32, 32, 3))):
        call: dict[str, Any] = {"prompt": PROMPT, "guidance_scale": 4.0, "output_type": kind}
        want, got = theirs(stock, **call, **SIZE), ours(engine, **call)
        assert got.shape == want.shape == shape
        assert relative(got, want) < 1e-4
        # Prompts and the scale do matter in this tiny model.
        assert relative(ours(engine, **{**call, "prompt": "bag"}), want) > 1e-3
        assert relative(ours(engine, **{**call, "guidance_scale": 6.0}), want) > 1e-3


def test_blocks_with_residuals(model: Path, planned: PlannedExport, engine: Path, tmp_path: Path) -> None:
    check_random_blocks(model, planned, engine, tmp_path / "half")


def test_other_samplers(stock: HunyuanVideoPipeline, model: Path, planned: PlannedExport, tmp_path: Path) -> None:
    with torch.no_grad():
        states, pooled, mask = (part.numpy() for part in stock.encode_prompt(PROMPT))
    names = ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask")
    embeds = {"prompt_embeds": dict(zip(names, (states, pooled, mask), strict=True))}
    check_samplers(stock, model, planned, tmp_path, ("flow-unipc",), embeds, {"prompt": PROMPT, **SIZE})
    # The stock pipeline gives every scheduler its sigmas, which this one does not take: the loop in torch does it.
    solver = schedule_for(model, steps=STEPS, sampler="flow-dpm++2m")
    bundle = with_gates(planned, solver, tmp_path / "dpm", components=False)
    assert loop_report(bundle.path, variants=False).first_failure() is None


def test_evaluations_that_skip_every_block(model: Path, planned: PlannedExport, tmp_path: Path) -> None:
    check_whole_evaluations_skipped(model, planned, tmp_path / "x")


def test_layers_are_the_supernet_in_both_layouts(model: Path, tmp_path: Path) -> None:
    check_layers_in_both_layouts(model, tmp_path, SIZE)


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_half_precision_is_close_and_builds(model: Path, tmp_path: Path, dtype: str) -> None:
    check_half_precision(model, tmp_path / "x", dtype, SIZE)


def test_tensorrt_rtx_builds_every_graph_in_fp32(engine: Path) -> None:
    # The full step, Llama and CLIP in one, the decoder's first window and its last.
    assert build_with_tensorrt_rtx(engine) == 4


def test_blocks_and_inputs_of_the_published_size() -> None:
    outside = ("x_embedder.", "context_embedder.", "time_text_embed.", "norm_out.", "proj_out.")
    check_blocks(ENTRY, HunyuanVideoTransformer3DModel, outside, block=60, layer=180)
    latent, timestep, states, mask, pooled, guidance = family_for(CLASS_NAME).inputs(
        ENTRY["config"], 1, 33, 90, 160, 256
    )
    assert (latent.shape, timestep.shape, states.shape) == ((1, 16, 33, 90, 160), (1,), (1, 256, 4096))
    assert (mask.shape, mask.dtype, pooled.shape, guidance.source) == ((1, 256), "int64", (1, 768), "guidance")


def test_refusals_are_one_line() -> None:
    family = family_for(CLASS_NAME)
    for config, size, words in (
        ({"image_condition_type": "token_replace"}, (33, 90, 160), "start from a picture"),
        ({}, (33, 91, 160), "latent of 33x91x160; give multiples of 1x2x2"),
    ):
        with pytest.raises(UserError) as error:
            family.inputs({**ENTRY["config"], **config}, 1, *size, 256)
        assert words in str(error.value) and "\n" not in str(error.value)
