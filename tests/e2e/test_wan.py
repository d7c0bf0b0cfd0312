"""Wan in small: text to video, guidance in two calls, UMT5, a decoder that goes through time frame by frame."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from family_checks import build_with_tensorrt_rtx, plan_for, random_weights, schedule_for
from flow_pipelines import t5_tokenizer, umt5
from sd_pipelines import relative
from tiny_denoisers import wan_transformer
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

from dipgo_deploy.bench import quality
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.cli import run
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.models import family_for
from dipgo_deploy.models.wan import CLASS_NAME
from dipgo_deploy.search.evaluate import sample
from dipgo_deploy.search.problem import Pair, ProblemOptions, load_problem

# Latents of 3 x 4 x 8: the tiny VAE halves each side and makes two frames of each latent one but the first.
SIZE = {"height": 16, "width": 16, "num_frames": 5}
PROMPT, NEGATIVE = "a red  &amp; shoe", "a and"
# The settings of the published folders.
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

FULL_SIZE = {
    model["name"]: model
    for model in runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools/full_size/wan.py"))["MODELS"]
}


def vae() -> AutoencoderKLWan:
    """Two levels, of which one lengthens time."""
    model = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=0,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    return random_weights(model)


@pytest.fixture(scope="module")
def stock() -> WanPipeline:
    torch.manual_seed(0)
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5(),
        vae=vae(),
        transformer=wan_transformer(),
        scheduler=UniPCMultistepScheduler(**UNIPC),
    )


@pytest.fixture(scope="module")
def model(stock: WanPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "model"
    stock.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def planned(model: Path) -> PlannedExport:
    return plan_for(model, schedule_for(model, steps=STEPS), check=False, **SIZE)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full schedule of the model's own sampler, with components."""
    return publish(planned, tmp_path_factory.mktemp("wan-engine") / "x").path


def test_it_makes_what_diffusers_makes(stock: WanPipeline, engine: Path) -> None:
    latent = Bundle.open(engine).manifest.latent
    assert (latent.shape, latent.video_frames, latent.scale, latent.fps) == ((4, 3, 8, 8), 5, 2, 16)
    call: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 3.0}
    for kind, shape in (("latent", (1, 4, 3, 8, 8)), ("np", (1, 5, 16, 16, 3))):
        want = theirs(stock, output_type=kind, **call, **SIZE)
        got = ours(engine, output_type=kind, **call)
        assert got.shape == want.shape == shape
        assert relative(got, want) < 1e-4
        # Prompts do matter in this tiny model, and what was escaped in them does not.
        assert relative(ours(engine, output_type=kind, **{**call, "prompt": "shoe"}), want) > 1e-3
        assert relative(ours(engine, output_type=kind, **{**call, "prompt": "a red & shoe"}), want) < 1e-4


def test_blocks_with_residuals(model: Path, planned: PlannedExport, engine: Path, tmp_path: Path) -> None:
    check_random_blocks(model, planned, engine, tmp_path / "half")


def test_other_samplers(stock: WanPipeline, model: Path, planned: PlannedExport, tmp_path: Path) -> None:
    with torch.no_grad():
        states, no_states = (host.numpy() for host in stock.encode_prompt(PROMPT, NEGATIVE, max_sequence_length=512))
    embeds = {"prompt_embeds": states, "negative_prompt_embeds": no_states}
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, **SIZE}
    check_samplers(stock, model, planned, tmp_path, ("flow-euler", "flow-heun"), embeds, call)


def test_evaluations_that_skip_every_block(model: Path, planned: PlannedExport, tmp_path: Path) -> None:
    check_whole_evaluations_skipped(model, planned, tmp_path / "x")


def test_layers_are_the_supernet_in_both_layouts(model: Path, tmp_path: Path) -> None:
    check_layers_in_both_layouts(model, tmp_path, SIZE)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_close_and_builds(model: Path, tmp_path: Path, dtype: str) -> None:
    check_half_precision(model, tmp_path / "x", dtype, SIZE)


def test_tensorrt_rtx_builds_every_graph_in_fp32(engine: Path) -> None:
    # The full step, UMT5, and the decoder of the first frame and of the others.
    assert build_with_tensorrt_rtx(engine) == 4


def test_a_video_is_written(engine: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    call = ["--engine-dir", str(engine), "--prompt", "shoe", "--prompt", "a", "--num-frames", "5", "-o", str(clip)]
    done = CliRunner().invoke(run.command, [*call, "--json"], catch_exceptions=False)
    facts = json.loads(done.stdout)
    assert (facts["images"], facts["shape"]) == (2, [2, 4, 3, 8, 8])
    with av.open(str(clip)) as video:
        stream = video.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate, len(list(video.decode(stream)))) == (32, 16, 16, 5)


@pytest.mark.parametrize(("name", "count"), [("wan-2.1-t2v-1.3b", 30), ("wan-2.1-t2v-14b", 40)])
def test_blocks_and_inputs_of_the_published_sizes(name: str, count: int) -> None:
    outside = ("patch_embedding.", "condition_embedder.", "proj_out.", "scale_shift_table")
    check_blocks(FULL_SIZE[name], WanTransformer3DModel, outside, block=count, layer=3 * count)
    latent, timestep, states = family_for(CLASS_NAME).inputs(FULL_SIZE[name]["config"], 2, 21, 60, 104, 512)
    assert (latent.shape, timestep.shape, states.shape) == ((2, 16, 21, 60, 104), (1,), (2, 512, 4096))


def test_it_is_searched_by_its_latents(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red shoe\n")
    problem = load_problem(ProblemOptions(model=str(model), steps=2, prompts=str(prompts), **SIZE))
    gates = [[True] * len(problem.target.blocks)] * problem.steps
    found = sample(problem, gates, [Pair(0, 1)])
    assert found.shape == (1, 4, 3, 8, 8) and bool(found.isfinite().all())
    problem.check_loss("latent-l2")
    with pytest.raises(UserError, match="--loss ssim: compares pictures, and .* makes videos; use latent-l2"):
        problem.check_loss("ssim")
    with pytest.raises(UserError, match="makes videos, and pictures are measured here"):
        quality.measure(problem, [], per_condition=2)


def test_refusals_are_one_line(model: Path, engine: Path) -> None:
    schedule = schedule_for(model, steps=STEPS)
    for options, words in (
        ({"num_frames": 4}, "--num-frames 4: give a multiple of 2 and 1"),
        ({"height": 15}, "--height 15: give a multiple of 2"),
        ({"height": 18}, "latent of 3x9x8; give multiples of 1x2x2"),
    ):
        with pytest.raises(UserError, match=words):
            plan_for(model, schedule, **{**SIZE, **options})
    family = family_for(CLASS_NAME)
    for config, words in (
        ({"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36}, "start from a picture"),
        ({"rope_max_seq_len": 8}, "positions for 8 patches"),
    ):
        with pytest.raises(UserError) as error:
            family.inputs({**FULL_SIZE["wan-2.1-t2v-1.3b"]["config"], **config}, 2, 21, 60, 104, 512)
        assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="num_frames 9: this engine directory makes videos of 5 frames"):
        ours(engine, prompt="a", num_frames=9)
    with pytest.raises(UserError, match=r"latents: shape \(1, 4, 8, 8\), needs \(1, 4, 3, 8, 8\)"):
        ours(engine, prompt="a", latents=np.zeros((1, 4, 8, 8), np.float32))
