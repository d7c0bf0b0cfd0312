"""Open batch, height and width of every family that has them: the supernet at sizes inside the ranges, and engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from family_checks import assert_pictures_equal_stock, build_with_tensorrt_rtx, plan_for, schedule_for
from flow_pipelines import (
    save_flux,
    save_flux_controlnet,
    save_flux_variant,
    save_sd3,
    save_sd3_controlnet,
    sd35_transformer,
)
from pixart_pipelines import transformer as pixart_transformer
from sd_pipelines import assert_equals_supernet, save_inpainting, save_ip_adapter, save_sd15, with_controlnet
from tiny_denoisers import sana_transformer, two_level_unet, unet2d

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.shapes import Range, Sizes
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import publish
from dipgo_deploy.models import families
from dipgo_deploy.models.location import with_options
from dipgo_deploy.runtime.pipeline import Pipeline

STEPS = 3


@dataclass(frozen=True)
class Case:
    """A tiny denoiser; its sides in latent pixels: the smallest, the usual, the largest, and the step between."""

    make: Callable[[], Any]
    sampler: str
    sides: tuple[int, int, int]
    step: int
    scale: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranges(self) -> dict[str, Range]:
        least, usual, most = (side * self.scale for side in self.sides)
        side = Range(min=least, opt=usual, max=most)
        return {"batch": Range(min=1, opt=1, max=4), "height": side, "width": side}

    def export(self, folder: Path, **options: Any) -> Path:
        torch.manual_seed(0)
        self.make().save_pretrained(folder / "model")
        schedule = schedule_for(folder / "model", sampler=self.sampler, steps=STEPS, ratio=0.4, seed=1)
        planned = plan_for(folder / "model", schedule, components=False, **self.ranges, **self.options, **options)
        return publish(planned, folder / "x").path


# The native sizes lie inside the ranges: what a model keeps ready for them alone must not decide a trace.
CASES = {
    "sd3": Case(sd35_transformer, "flow-euler", (4, 8, 12), 2, options={"prologue": True}),
    "pixart": Case(lambda: pixart_transformer(sample_size=8, use_additional_conditions=True), "euler", (4, 6, 12), 2),
    "sana": Case(lambda: sana_transformer(sample_size=8, interpolation_scale=2.0), "flow-euler", (4, 6, 12), 1),
    "unet2d": Case(unet2d, "euler", (8, 12, 24), 4, scale=1),
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each exported once, when it is first asked for; the exporter compares it at the corners of its ranges."""
    made: dict[str, Path] = {}

    def engine(name: str) -> Path:
        if name not in made:
            made[name] = CASES[name].export(tmp_path_factory.mktemp(name))
        return made[name]

    return engine


# PixArt and Sana are drawn at many sizes in each run of all tests (tests/e2e).
every = pytest.mark.parametrize(
    "name", ["sd3", "unet2d", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pixart", "sana"))]
)


@every
def test_sizes_between_the_corners_are_the_supernets(engines: Callable[[str], Path], name: str) -> None:
    case = CASES[name]
    native = 16 if name == "unet2d" else 8
    for sizes in (Sizes(3, native, native), Sizes(2, case.sides[0] + case.step, case.sides[2] - case.step)):
        assert_equals_supernet(engines(name), sizes=sizes)


@every
def test_other_sizes_are_refused_before_anything_runs(engines: Callable[[str], Path], name: str) -> None:
    case = CASES[name]
    pipeline = Pipeline.from_engine_dir(engines(name), "cpu", threads=1, load="lazy")
    manifest = pipeline.bundle.manifest
    ones = {
        spec.name: np.ones((1, *spec.shape[1:]), np.int64 if spec.dtype == "int64" else np.float32)
        for spec in manifest.conditions
        if spec.source == "text"
    }
    text: dict[str, Any] = {}
    if ones:
        text = {"prompt_embeds": ones, "negative_prompt_embeds": ones, "guidance_scale": 2.0}
    least, _, most = (side * case.scale for side in case.sides)
    step = case.step * case.scale
    takes = f"this engine directory takes {least} to {most}" + (f" in steps of {step}" if step > 1 else "")
    channels, usual = manifest.latent.channels, case.sides[1]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"height": most + step}, f"height {most + step}: {takes}"),
        ({"width": least - step}, f"width {least - step}: {takes}"),
        ({"latents": np.zeros((1, channels, case.sides[2] + case.step, usual), np.float32)}, "latents: height"),
        ({"latents": np.zeros((1, channels + 1, usual, usual), np.float32)}, "latents: shape"),
        ({"latents": np.zeros((2, channels, usual, usual), np.float32)}, "latents: shape"),
    ]
    if step > 1:
        wrong.append(({"width": least + 1}, f"width {least + 1}: {takes}"))
    for call, message in wrong:
        with pytest.raises(UserError, match=message) as caught:
            pipeline(**text, **call, output_type="latent")
        assert "\n" not in str(caught.value) and not pipeline.memory()["graphs_loaded"]
    drawn = pipeline(**text, height=most, width=least, num_images_per_prompt=2, output_type="latent").latents
    assert drawn.shape == (2, channels, case.sides[2], case.sides[0]) and np.isfinite(drawn).all()


def test_what_is_made_before_the_launches_has_a_row_for_each_image(engines: Callable[[str], Path]) -> None:
    plan = Bundle.open(engines("sd3")).manifest.plan
    assert plan.prologue is not None and plan.prologue.sizes is not None
    specs = {spec.name: spec.dims for spec in plan.prologue.outputs}
    count = len(plan.table_timesteps)
    assert specs["run.norm_out.linear"] is not None and specs["run.norm_out.linear"][:2] == (count, "2*batch")
    taken = {spec.name: spec.dims for variant in plan.variants for spec in variant.graph.inputs}
    assert taken["run.norm_out.linear"] == specs["run.norm_out.linear"][1:]


@every
def test_engines_are_built(engines: Callable[[str], Path], name: str) -> None:
    engine = engines(name)
    assert build_with_tensorrt_rtx(engine) == len(Bundle.open(engine).manifest.plan.variants)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("case", [Case(two_level_unet, "euler", (4, 8, 12), 2), *CASES.values()], ids=["unet", *CASES])
def test_engines_are_built_in_half_precision(case: Case, dtype: str, tmp_path: Path) -> None:
    engine = case.export(tmp_path, dtype=dtype)
    assert build_with_tensorrt_rtx(engine) == len(Bundle.open(engine).manifest.plan.variants)


def test_position_embeddings_have_an_end(tmp_path: Path) -> None:
    case = CASES["sd3"]
    case.make().save_pretrained(tmp_path)
    height = Range(min=32, opt=64, max=208)
    with pytest.raises(UserError, match="SD3.*: latent of 26x8: position embeddings end at 24") as caught:
        plan_for(tmp_path, schedule_for(tmp_path, sampler=case.sampler, steps=STEPS), height=height, width=64)
    assert "\n" not in str(caught.value)


def test_a_condition_of_a_picture_has_the_size_of_the_call(tmp_path: Path) -> None:
    plain = save_flux(tmp_path / "plain", guidance=False, small=True)
    model = save_flux_variant(tmp_path / "model", plain, FluxKontextPipeline)
    side = Range(min=16, opt=16, max=24)
    schedule = schedule_for(model, steps=2, ratio=0.4)
    planned = plan_for(model, schedule, check=False, components=False, height=side, width=side)
    manifest = publish(planned, tmp_path / "x").manifest
    assert {spec.name: spec.dims for spec in manifest.conditions}["image_latents"] == (1, 4, "height", "width")
    assert_equals_supernet(tmp_path / "x", sizes=Sizes(1, 12, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["controlnet", "adapter", "inpaint", "sd3", "flux", "kontext", "fill", "control"])
def test_models_that_need_pictures(name: str, tmp_path: Path) -> None:
    """With the VAE's encoder, and what a call makes of its pictures, at two sizes; as the stock pipelines."""
    flux = {
        "kontext": (FluxKontextPipeline, 0),
        "fill": (FluxFillPipeline, 68),
        "control": (FluxControlPipeline, 4),
    }
    model = tmp_path / "model"
    if name == "sd3":
        save_sd3_controlnet(model, save_sd3(tmp_path / "plain"))
    elif name == "flux":
        save_flux_controlnet(model, save_flux(tmp_path / "plain", guidance=False))
    elif name in flux:
        pipeline, joined = flux[name]
        plain = save_flux(tmp_path / "plain", guidance=False)
        save_flux_variant(model, plain, pipeline, joined=joined)
    else:
        save_sd15(tmp_path / "plain")
        unet = UNet2DConditionModel.from_pretrained(tmp_path / "plain", subfolder="unet")
        if name == "controlnet":
            model = with_controlnet(tmp_path / "plain")
        elif name == "adapter":
            adapter = save_ip_adapter(tmp_path / "adapter", unet)
        else:
            save_inpainting(model, tmp_path / "plain", StableDiffusionPipeline, StableDiffusionInpaintPipeline, unet)
    chosen = with_options(str(tmp_path / "plain"), ip_adapter=str(adapter)) if name == "adapter" else str(model)
    sampler = "ddim" if name in ("controlnet", "adapter", "inpaint") else None
    side = Range(min=32, opt=64, max=96)
    schedule = schedule_for(chosen, sampler=sampler, steps=2, ratio=0.4)
    planned = plan_for(chosen, schedule, check=False, height=side, width=side, batch=Range(min=1, opt=1, max=2))
    publish(planned, tmp_path / "x")
    for sizes in (Sizes(1, 8, 8), Sizes(2, 4, 12)):
        assert_pictures_equal_stock(tmp_path / "x", sizes=sizes, variants=True)


def test_families_of_one_size_only() -> None:
    """DiT cuts its tokens into a square of the size that it was made for; the rotations of FLUX.2, of Qwen-Image and of
    videos are constants of the export's; SDXL's refiner starts from a picture, which has that size."""
    of_pictures = {name: family for name, family in families().items() if not family.frames_per_latent}
    fixed = {name for name, family in of_pictures.items() if family.size_multiple is None}
    qwen = "QwenImageTransformer2DModel"
    refiner = "UNet2DConditionModel+Refiner"
    assert fixed == {"DiTTransformer2DModel", "Flux2Transformer2DModel", qwen, f"{qwen}+Edit", refiner}
    assert all(family.size_multiple is None for family in families().values() if family.frames_per_latent)
