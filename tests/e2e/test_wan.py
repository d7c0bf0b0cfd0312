"""Wan in small: text to video, guidance in two calls, UMT5, a decoder that goes through time frame by frame; image to
video with the first frame's latents, a mask and CLIP's states of it."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from family_checks import build_with_tensorrt_rtx, plan_for, random_weights, schedule_for
from flow_pipelines import t5_tokenizer, umt5
from PIL import Image
from sd_pipelines import relative
from shared_traces import shared_parts
from tiny_denoisers import wan_transformer
from transformers import CLIPVisionConfig, CLIPVisionModel
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
    wan_vae,
)

from dipgo_deploy.bench import quality
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.cli import run
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.models import family_for
from dipgo_deploy.models.wan import CLASS_NAME
from dipgo_deploy.schedule.builders import uniform
from dipgo_deploy.search.evaluate import images_of, sample
from dipgo_deploy.search.losses import ssim
from dipgo_deploy.search.problem import Pair, ProblemOptions, load_problem
from dipgo_deploy.search.samples import held_out
from dipgo_deploy.supernet.load import image_processor

# Latents of 3 x 4 x 8: the tiny VAE halves each side and makes two frames of each latent one but the first.
SIZE = {"height": 16, "width": 16, "num_frames": 5}
PROMPT, NEGATIVE = "a red  &amp; shoe", "a and"
# The settings of the published folders.
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

# Pixels of the image encoder's side.
SIDE = 16

FULL_SIZE = {
    model["name"]: model
    for model in runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools/full_size/wan.py"))["MODELS"]
}


@pytest.fixture(scope="module", autouse=True)
def one_export_of_each_part(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_parts(tmp_path_factory.mktemp("wan-parts")):
        yield


@pytest.fixture(scope="module")
def stock() -> WanPipeline:
    torch.manual_seed(0)
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5(),
        vae=wan_vae(),
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
    half = uniform(problem.steps, len(gates[0]), 2)
    row, same = quality.measure(
        problem, [quality.Case("half", half), quality.Case("full", tuple(map(tuple, gates)))], 2
    )
    found = row.frames["ssim"]
    pairs = held_out(1, 2, 0)
    videos = [images_of(problem, sample(problem, rows, pairs)) for rows in (half, gates)]
    for frame in range(5):
        np.testing.assert_allclose(found.values[:, frame], ssim(*(one[:, :, frame] for one in videos)), atol=1e-6)
    assert found.values.shape == (2, 5) and row.ssim.value == pytest.approx(found.values.mean())
    plain = row.as_json()["frames"]["ssim"]
    assert plain["worst_of_all"]["value"] == found.values.min() < row.ssim.value < same.ssim.value
    assert plain["worst"]["value"] == pytest.approx(found.values.min(axis=1).mean())
    assert same.frames["ssim"].values.min() == pytest.approx(1, abs=1e-4)


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
        ({"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36}, "starts from a picture"),
        ({"rope_max_seq_len": 8}, "positions for 8 patches"),
    ):
        with pytest.raises(UserError) as error:
            family.inputs({**FULL_SIZE["wan-2.1-t2v-1.3b"]["config"], **config}, 2, 21, 60, 104, 512)
        assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="num_frames 9: this engine directory makes videos of 5 frames"):
        ours(engine, prompt="a", num_frames=9)
    with pytest.raises(UserError, match=r"latents: shape \(1, 4, 8, 8\), needs \(1, 4, 3, 8, 8\)"):
        ours(engine, prompt="a", latents=np.zeros((1, 4, 8, 8), np.float32))


def image_encoder() -> CLIPVisionModel:
    torch.manual_seed(0)
    settings = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return random_weights(CLIPVisionModel(CLIPVisionConfig(image_size=SIDE, patch_size=8, **settings)), scale=0.2)


@pytest.fixture(scope="module")
def from_picture(stock: WanPipeline) -> WanImageToVideoPipeline:
    shared = {name: getattr(stock, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    return WanImageToVideoPipeline(
        **shared,
        transformer=wan_transformer(in_channels=10, image_dim=8, added_kv_proj_dim=24),
        image_encoder=image_encoder(),
        image_processor=image_processor(SIDE),
    )


@pytest.fixture(scope="module")
def video(from_picture: WanImageToVideoPipeline, engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """engine: made first, so that its parts are shared."""
    folder = tmp_path_factory.mktemp("wan-image")
    from_picture.save_pretrained(folder / "model")
    return exported(folder / "model", folder / "x", SIZE)


def test_image_to_video_is_diffusers(
    from_picture: WanImageToVideoPipeline, video: Exported, picture: Image.Image
) -> None:
    call: dict[str, Any] = {"prompt": "a red shoe", "negative_prompt": "a and", "guidance_scale": 3.0, "image": picture}
    for kind in ("latent", "np"):
        want = theirs(from_picture, output_type=kind, **call, **SIZE)
        got = ours(video.engine, output_type=kind, **call)
        assert got.shape == want.shape
        assert relative(got, want) < 1e-4
        # The picture does matter in this tiny model.
        assert relative(ours(video.engine, output_type=kind, **{**call, "image": picture.rotate(90)}), want) > 1e-3


def test_image_to_video_in_blocks_with_residuals(video: Exported, tmp_path: Path) -> None:
    check_random_blocks(video.model, video.planned, video.engine, tmp_path / "half")


def test_image_to_video_is_written(video: Exported, picture: Image.Image, tmp_path: Path) -> None:
    clip, shown = tmp_path / "clip.mp4", tmp_path / "in.png"
    picture.save(shown)
    call = ["--engine-dir", str(video.engine), "--prompt", "shoe", "--image", str(shown), "-o", str(clip), "--json"]
    done = CliRunner().invoke(run.command, call, catch_exceptions=False)
    assert json.loads(done.stdout)["shape"] == [1, 4, 3, 8, 8]
    with av.open(str(clip)) as shot:
        assert len(list(shot.decode(shot.streams.video[0]))) == 5
    with pytest.raises(UserError, match="image: missing; this engine directory draws from a picture"):
        ours(video.engine, prompt="shoe")


def test_image_to_video_refusals_are_one_line(video: Exported, tmp_path: Path) -> None:
    schedule = schedule_for(video.model, steps=STEPS)
    config, processor = "transformer/config.json", "image_processor/preprocessor_config.json"
    for number, (file, changes, words) in enumerate(
        (
            (config, {"in_channels": 12}, "a mask of 4 channels, its VAE makes 2 frames of one of the latent"),
            (config, {"in_channels": 4}, "only models work whose input is the latent with mask and image_latents"),
            (config, {"pos_embed_seq_len": 10}, "models that are given the last frame, too, are not supported"),
            (config, {"image_dim": 16}, "image_dim 16, its image_encoder makes states of 8; use its own"),
            (processor, {"crop_size": 32}, "crop_size = 32, its image encoder takes 16 pixels"),
            (processor, {"do_center_crop": False}, "do_center_crop = False: pictures are prepared with True only"),
            ("model_index.json", {"image_encoder": [None, None]}, "image_dim 8, but its pipeline has no image_encoder"),
            ("model_index.json", {"_class_name": "WanPipeline"}, "starts from a picture; give the folder of its pipe"),
        )
    ):
        folder = shutil.copytree(video.model, tmp_path / str(number))
        document = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**document, **changes}))
        with pytest.raises(UserError, match=words):
            plan_for(folder, schedule, allow_other_config=True, **SIZE)
