"""Open sizes from end to end: whole pipelines at sizes that the model was not traced at, against diffusers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionXLPipeline
from family_checks import build_with_tensorrt_rtx, loop_report, schedule_for
from sd_pipelines import NEGATIVE, PROMPT, relative, save_sdxl, stock
from tiny_engines import save_dit_pipeline

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.shapes import Range, Sizes
from dipgo_deploy.cli.compare import command as compare
from dipgo_deploy.cli.export import command as export
from dipgo_deploy.cli.run import command as run
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, plan_export, publish
from dipgo_deploy.runtime.pipeline import Pipeline

STEPS, SCALE = 3, 5.0


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model, and its full schedule exported by the command for 1 to 3 pictures of 32 to 96 pixels a side."""
    folder = tmp_path_factory.mktemp("sdxl")
    model, schedule, engine = save_sdxl(folder / "model"), folder / "schedule.json", folder / "engine"
    schedule_for(model, steps=STEPS).save(schedule)
    arguments = ["--model", str(model), "--schedule", str(schedule), "--engine-dir", str(engine), "--no-check"]
    ranges = ["--batch", "1:3", "--height", "32:64:96", "--width", "32:64:96"]
    result = CliRunner().invoke(export, [*arguments, *ranges], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return model, engine


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (96, 64)])
def test_sdxl_equals_diffusers_own_pipeline_at_every_size(sdxl: tuple[Path, Path], size: tuple[int, int]) -> None:
    """The sizes that SDXL is told, the VAE and the batch follow the size that is asked for."""
    model, engine = sdxl
    own = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    prompts = [PROMPT, "a bag"]
    call: dict[str, Any] = {
        "prompt": prompts,
        "negative_prompt": [NEGATIVE] * 2,
        "height": size[0],
        "width": size[1],
        "guidance_scale": SCALE,
        "output_type": "np",
    }
    want = stock(own, steps=STEPS, **call)
    got = np.asarray(Pipeline.from_engine_dir(engine, "cpu", threads=1)(seed=3, **call).images)
    assert got.shape == (2, *size, 3)
    assert relative(got, want) <= 1e-4


def test_sdxls_sizes_are_expressions(sdxl: tuple[Path, Path]) -> None:
    manifest = Bundle.open(sdxl[1]).manifest
    (spec,) = (spec for spec in manifest.conditions if spec.name == "time_ids")
    assert spec.expressions == ("8*height", "8*width", 0.0, 0.0, "8*height", "8*width")
    assert manifest.at(Sizes(2, 4, 12)).conditions[-1].values == (32, 96, 0, 0, 32, 96)
    decoder = manifest.components.vae_decoder
    assert decoder is not None and decoder.outputs[0].dims == ("batch", "8*height", "8*width", 3)
    encoder = manifest.components.text_encoder
    assert encoder is not None and encoder.graph.sizes is None


def test_the_commands_take_sizes(sdxl: tuple[Path, Path], tmp_path: Path) -> None:
    engine = ["--engine-dir", str(sdxl[1])]
    picture = tmp_path / "x.npy"
    arguments = ["--prompt", PROMPT, "--output-type", "np", "--height", "32", "--width", "96", "-o", str(picture)]
    result = CliRunner().invoke(run, [*engine, *arguments, "--backend", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert np.load(picture).shape == (1, 32, 96, 3)
    sizes = ["--batch", "2", "--height", "96", "--width", "32", "--loop-only", "--json"]
    result = CliRunner().invoke(compare, [*engine, *sizes], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["passed"]
    with pytest.raises(UserError, match="--height 72: this engine directory takes 32 to 96 in steps of 16"):
        CliRunner().invoke(compare, [*engine, "--height", "72"], catch_exceptions=False)


@pytest.mark.slow
def test_sdxl_builds_with_tensorrt_rtx(sdxl: tuple[Path, Path]) -> None:
    """Variant, VAE and text encoder, the last with static shapes."""
    assert build_with_tensorrt_rtx(sdxl[1]) == 3


def test_dit_leaves_its_batch_open(tmp_path: Path) -> None:
    model = save_dit_pipeline(tmp_path / "model", layers=2)
    schedule = schedule_for(model, steps=STEPS, ratio=0.4)
    engine = tmp_path / "engine"
    publish(
        plan_export(str(model), schedule, ExportOptions(layout="variants", batch=Range(min=1, opt=1, max=3))), engine
    )
    assert loop_report(engine).first_failure() is None  # at the largest batch
    pipeline = Pipeline.from_engine_dir(engine, "cpu", threads=1)

    def draw(labels: list[int], latents: np.ndarray) -> np.ndarray:
        result = pipeline(class_labels=labels, latents=latents, guidance_scale=3.0, output_type="np")
        return np.asarray(result.images)

    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(5)).numpy()
    together = draw([0, 1, 2, 1], latents)  # three and one
    for place, label in enumerate([0, 1, 2, 1]):
        np.testing.assert_allclose(draw([label], latents[place : place + 1])[0], together[place], atol=2e-5)
    assert build_with_tensorrt_rtx(engine) >= 2


@pytest.mark.parametrize("size", [{"height": Range(min=16, opt=16, max=32)}, {"width": Range(min=16, opt=16, max=32)}])
def test_dit_refuses_an_open_size_by_name(tmp_path: Path, size: Any) -> None:
    model = save_dit_pipeline(tmp_path / "model", layers=1)
    with pytest.raises(UserError, match=r"DiTTransformer2DModel is exported for one size at a time") as caught:
        plan_export(str(model), schedule_for(model, steps=STEPS), ExportOptions(**size))
    assert "\n" not in str(caught.value)
