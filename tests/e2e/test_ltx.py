"""LTX-Video in small: text to video, tokens of one latent pixel, positions in seconds and pixels, T5."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from family_checks import build_with_tensorrt_rtx, loop_report, plan_for, random_weights, schedule_for, with_gates
from flow_pipelines import t5, t5_tokenizer
from PIL import Image
from sd_pipelines import relative
from shared_traces import shared_parts
from tiny_denoisers import ltx_transformer as transformer
from video_checks import (
    STEPS,
    Exported,
    check_blocks,
    check_half_precision,
    check_layers_in_both_layouts,
    check_random_blocks,
    check_samplers,
    check_whole_evaluations_skipped,
    exported,
    ours,
    theirs,
)

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.shapes import Range
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.models import family_for
from dipgo_deploy.models.location import with_options
from dipgo_deploy.models.ltx import CLASS_NAME
from dipgo_deploy.reference.vae import scaling_and_shift

# Latents of 2 x 2 x 3: the scales of the VAE are the real ones, 8 in time and 32 in space.
SIZE = {"height": 64, "width": 96, "num_frames": 9}
LATENT = (2, 2, 3)
PROMPT, NEGATIVE = "a red shoe", "a and"

ENTRY = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools/full_size/ltx.py"))["MODELS"][0]


def vae(**changes: Any) -> AutoencoderKLLTXVideo:
    """Three levels that lengthen time and double the sides of patches of 4 x 4; with statistics of each channel."""
    few: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": (1, 1, 1, 1, 1)}
    decoder = {f"decoder_{name}": value for name, value in few.items()}
    model = random_weights(AutoencoderKLLTXVideo(latent_channels=4, **few, **decoder, **changes))
    model.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    model.latents_std.copy_(torch.tensor([1.5, 0.7, 1.0, 2.0]))
    return model


@pytest.fixture(scope="module", autouse=True)
def one_export_of_each_part(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_parts(tmp_path_factory.mktemp("ltx-parts")):
        yield


@pytest.fixture(scope="module")
def stock() -> LTXPipeline:
    torch.manual_seed(0)
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**ENTRY["scheduler_config"]),
        vae=vae(),
        text_encoder=t5(layers=1),
        tokenizer=t5_tokenizer(),
        transformer=transformer(),
    )


@pytest.fixture(scope="module")
def model(stock: LTXPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ltx") / "model"
    stock.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def planned(model: Path) -> PlannedExport:
    return plan_for(model, schedule_for(model, steps=STEPS), check=False, **SIZE)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full schedule of the model's own sampler, with components."""
    return publish(planned, tmp_path_factory.mktemp("ltx-engine") / "x").path


def unpacked(latents: np.ndarray) -> np.ndarray:
    """Tokens (n, f*h*w, C) as (n, C, f, h, w)."""
    return latents.transpose(0, 2, 1).reshape(len(latents), -1, *LATENT)


def test_it_makes_what_diffusers_makes(stock: LTXPipeline, engine: Path) -> None:
    latent = Bundle.open(engine).manifest.latent
    assert (latent.shape, latent.video_frames, latent.scale, latent.fps) == ((4, *LATENT), 9, 32, 25)
    call: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 4.0}
    for kind in ("latent", "np"):
        want = theirs(stock, output_type=kind, **call, **SIZE)
        want = unpacked(want) if kind == "latent" else want
        got = ours(engine, output_type=kind, **call)
        assert got.shape == want.shape
        assert relative(got, want) < 1e-4
        # Prompts do matter in this tiny model.
        assert relative(ours(engine, output_type=kind, **{**call, "prompt": "shoe"}), want) > 1e-3


def test_blocks_with_residuals(model: Path, planned: PlannedExport, engine: Path, tmp_path: Path) -> None:
    check_random_blocks(model, planned, engine, tmp_path / "half")


def test_other_samplers(stock: LTXPipeline, model: Path, planned: PlannedExport, tmp_path: Path) -> None:
    with torch.no_grad():
        states, mask, no_states, no_mask = (part.numpy() for part in stock.encode_prompt(PROMPT, NEGATIVE))
    names = ("encoder_hidden_states", "encoder_attention_mask")
    embeds = {
        "prompt_embeds": dict(zip(names, (states, mask), strict=True)),
        "negative_prompt_embeds": dict(zip(names, (no_states, no_mask), strict=True)),
    }
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, **SIZE}
    check_samplers(stock, model, planned, tmp_path, ("flow-unipc",), embeds, call, unpacked)
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
    assert build_with_tensorrt_rtx(engine) == 3  # the full step, T5, the VAE


def test_blocks_and_inputs_of_the_published_size() -> None:
    outside = ("proj_in.", "time_embed.", "caption_projection.", "proj_out.", "scale_shift_table")
    check_blocks(ENTRY, LTXVideoTransformer3DModel, outside, block=28, layer=84)
    latent, timestep, states, mask = family_for(CLASS_NAME).inputs(ENTRY["config"], 2, 21, 16, 22, 128)
    assert (latent.shape, timestep.shape) == ((2, 128, 21, 16, 22), (1,))
    assert (states.shape, mask.shape, mask.dtype) == ((2, 128, 4096), (2, 128), "int64")


@pytest.fixture(scope="module")
def from_picture(stock: LTXPipeline) -> LTXImageToVideoPipeline:
    return LTXImageToVideoPipeline(**stock.components)


@pytest.fixture(scope="module")
def video(model: Path, engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The same folder, read as another pipeline. engine: made first, so that its parts are shared."""
    name = with_options(str(model), pipeline="LTXImageToVideoPipeline")
    return exported(name, tmp_path_factory.mktemp("ltx-image") / "x", SIZE)


def test_image_to_video_is_diffusers(
    from_picture: LTXImageToVideoPipeline, video: Exported, picture: Image.Image
) -> None:
    call: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 4.0, "image": picture}
    for kind in ("latent", "np"):
        want = theirs(from_picture, output_type=kind, **call, **SIZE)
        want = unpacked(want) if kind == "latent" else want
        got = ours(video.engine, output_type=kind, **call)
        assert got.shape == want.shape
        assert relative(got, want) < 1e-4
        # The picture is the first frame, and matters for the others.
        other = ours(video.engine, output_type=kind, **{**call, "image": picture.rotate(90)})
        later = np.s_[:, :, 1:] if kind == "latent" else np.s_[:, 1:]
        assert relative(other[later], want[later]) > 1e-3


def test_image_to_video_in_blocks_with_residuals(video: Exported, tmp_path: Path) -> None:
    check_random_blocks(video.model, video.planned, video.engine, tmp_path / "half")


def test_refusals_are_one_line(stock: LTXPipeline, model: Path, tmp_path: Path) -> None:
    schedule = schedule_for(model, steps=STEPS)
    for options, words in (
        ({"num_frames": 16}, "--num-frames 16: give a multiple of 8 and 1"),
        ({"height": 80}, "--height 80: give a multiple of 32"),
        ({"batch": Range(min=1, opt=1, max=2)}, "videos are exported for one size and batch"),
    ):
        with pytest.raises(UserError, match=words):
            plan_for(model, schedule, **{**SIZE, **options})
    with pytest.raises(UserError, match="patch_size 2, patch_size_t 1: only models whose tokens"):
        family_for(CLASS_NAME).inputs({**ENTRY["config"], "patch_size": 2}, 2, 21, 16, 22, 128)
    with pytest.raises(UserError, match="frame_rate 30: LTXVideoTransformer3DModel is told 25; leave it out"):
        family_for(CLASS_NAME).given(
            (), {"hidden_states": 0, "timestep": 0, "rope_interpolation_scale": (8 / 30, 32, 32)}
        )
    other = tmp_path / "scaled"
    LTXImageToVideoPipeline(**{**stock.components, "vae": vae(scaling_factor=0.5)}).save_pretrained(other)
    with pytest.raises(UserError, match="its VAE has scaling_factor = 0.5, LTXImageToVideoPipeline is for 1.0 only"):
        plan_for(other, schedule, **SIZE)
    # Positions are told in pixels and seconds, as the VAE has them.
    other = LTXPipeline(**{**stock.components, "vae": vae(patch_size=2)})
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="makes 16 pixels and 8 frames of one of the latent, .* is for 32 and 8"):
        plan_for(tmp_path / "other", schedule, **SIZE)
    noisy = vae(timestep_conditioning=True, decoder_inject_noise=(True, False, False, False, False))
    with pytest.raises(UserError, match="timestep_conditioning draws noise as it decodes"):
        scaling_and_shift(noisy)
