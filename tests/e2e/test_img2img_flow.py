"""Image-to-image of SD3 and FLUX, against diffusers and against the supernet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from family_checks import (
    assert_pictures_equal_stock,
    borrow_components,
    build_with_tensorrt_rtx,
    plan_for,
    schedule_for,
    with_gates,
    with_strength,
)
from flow_pipelines import save_flux, save_flux_controlnet, save_flux_variant, save_sd3, save_sd3_controlnet
from PIL import Image
from sd_pipelines import PROMPT, assert_equals_supernet, relative, stock

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.models import families
from dipgo_deploy.models.location import denoiser_config
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.sampler import make_scheduler

STEPS, SCALE = 6, 3.0
SCALE_OF_VAE = 2
SIZE = {"height": 16, "width": 24}  # pixels
STRENGTH = 0.75  # 4.5 of the steps: the pipelines of flow models run the broken one


@dataclass(frozen=True)
class Model:
    """A family's small pipeline, its trace and an engine directory with components."""

    folder: Path
    own: Any
    planned: PlannedExport
    engine: Path

    def theirs(self, picture: Any, *, sampler: str | None = None, **call: Any) -> np.ndarray:
        """diffusers' result; its latents as the VAE takes them."""
        if isinstance(picture, Image.Image):
            picture = picture.resize((SIZE["width"], SIZE["height"]), Image.Resampling.LANCZOS)
        call = {"prompt": PROMPT, "output_type": "latent", "guidance_scale": SCALE, **call}
        found = stock(self.own, sampler=sampler, steps=STEPS, image=picture, **SIZE, **call)
        if call["output_type"] == "latent" and found.ndim == 3:  # FLUX's are packed
            found = np.asarray(self.own._unpack_latents(torch.from_numpy(found), *SIZE.values(), 2))
        return found


def _prepared(folder: Path, pipeline: Any, target: Path) -> Model:
    planned = plan_for(folder, schedule_for(folder, steps=STEPS), strength=STRENGTH, **SIZE)
    own = pipeline.from_pretrained(folder)
    return Model(folder, own, planned, publish(planned, target).path)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("sd3")
    return _prepared(save_sd3(folder / "model", small=True), StableDiffusion3Img2ImgPipeline, folder / "x")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """FLUX.1-dev: timesteps that depend on the size, and a distilled guidance."""
    folder = tmp_path_factory.mktemp("flux")
    return _prepared(save_flux(folder / "model", small=True), FluxImg2ImgPipeline, folder / "x")


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Model:
    found: Model = request.getfixturevalue(request.param)
    return found


both = pytest.mark.parametrize("model", ["sd3", "flux"], indirect=True)


def ours(engine_dir: Path, **call: Any) -> np.ndarray:
    pipeline = Pipeline.from_engine_dir(engine_dir, "cpu", threads=1, load="lazy")
    call = {"prompt": PROMPT, "output_type": "latent", "guidance_scale": SCALE, **call}
    return np.asarray(pipeline(seed=3, **call).images)


@both
@pytest.mark.parametrize("output", ["latent", "np"])
def test_a_full_schedule_is_diffusers(model: Model, picture: Image.Image, output: str) -> None:
    want = model.theirs(picture, strength=STRENGTH, output_type=output)
    assert relative(ours(model.engine, image=picture, output_type=output), want) <= 1e-4
    sampler = Bundle.open(model.engine).manifest.sampler
    assert (sampler.strength, sampler.begin) == (STRENGTH, 1)


@pytest.mark.parametrize(
    ("model", "sampler", "strength"),
    [
        ("sd3", "flow-euler", 0.3),
        ("sd3", "flow-euler", 1.0),
        ("sd3", "flow-heun", 0.75),
        ("flux", "flow-euler", 0.3),
        ("flux", "flow-euler", 1.0),
    ],
    indirect=["model"],
)
def test_so_are_other_strengths_and_samplers(
    model: Model, picture: Image.Image, sampler: str, strength: float, tmp_path: Path
) -> None:
    schedule = schedule_for(model.folder, sampler=sampler, steps=STEPS)
    with_gates(with_strength(model.planned, strength), schedule, tmp_path / "x", check=False, components=False)
    borrow_components(model.engine, tmp_path / "x")
    want = model.theirs(picture, sampler=sampler, strength=strength)
    assert relative(ours(tmp_path / "x", image=picture), want) <= 1e-4


@pytest.mark.parametrize(
    ("model", "sampler"), [("sd3", "flow-unipc"), ("sd3", "flow-dpm++2m"), ("flux", "flow-unipc")], indirect=["model"]
)
def test_samplers_that_diffusers_pipelines_cannot_start_from_a_picture(
    model: Model, picture: Image.Image, sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have ``add_noise`` where the pipelines call ``scale_noise``; given that name, diffusers' result is ours.

    FluxImg2ImgPipeline gives them its own sigmas, FluxPipeline leaves them theirs: so do we, and the test.
    """
    flux = isinstance(model.own, FluxImg2ImgPipeline)
    given = {"sigmas": np.linspace(1, 1 / 1000, STEPS + 1)[:-1]} if flux else {}
    schedule = schedule_for(model.folder, sampler=sampler, steps=STEPS)
    with_gates(model.planned, schedule, tmp_path / "x", check=False, components=False)
    borrow_components(model.engine, tmp_path / "x")
    kind = type(make_scheduler(sampler, model.own.scheduler.config))
    monkeypatch.setattr(
        kind, "scale_noise", lambda self, sample, at, noise: self.add_noise(sample, noise, at), raising=False
    )
    want = model.theirs(picture, sampler=sampler, strength=STRENGTH, **given)
    monkeypatch.undo()
    assert relative(ours(tmp_path / "x", image=picture), want) <= 1e-4


@both
def test_several_prompts_and_pictures_are_diffusers(model: Model, picture: Image.Image) -> None:
    pictures = [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    sized = [item.resize((SIZE["width"], SIZE["height"]), Image.Resampling.LANCZOS) for item in pictures]
    want = model.theirs(sized, strength=STRENGTH, prompt=[PROMPT, "a boot"])
    assert relative(ours(model.engine, prompt=[PROMPT, "a boot"], image=pictures), want) <= 1e-4


@both
def test_latents_of_a_picture_are_taken_as_they_are(model: Model) -> None:
    latents = np.random.default_rng(4).standard_normal((1, 4, 8, 12)).astype(np.float32)
    want = model.theirs(torch.from_numpy(latents), strength=STRENGTH)
    assert relative(ours(model.engine, image_latents=latents), want) <= 1e-4


@both
@pytest.mark.parametrize("layout", ["variants", "segments"])
def test_random_schedules_are_the_supernets(model: Model, tmp_path: Path, layout: Any) -> None:
    schedule = schedule_for(model.folder, steps=STEPS, ratio=0.5, seed=3)
    planned = replace(model.planned, options=replace(model.planned.options, layout=layout))
    bundle = with_gates(planned, schedule, tmp_path / "x", components=False)
    begin = bundle.manifest.sampler.begin
    missing = {(begin, name) for name, kept in zip(schedule.block_names, schedule.gates[1], strict=True) if not kept}
    assert begin == 1 and missing and set(bundle.manifest.promoted) == missing
    assert_equals_supernet(tmp_path / "x")
    assert_pictures_equal_stock(tmp_path / "x", model.engine)


@pytest.mark.parametrize(("model", "components"), [("sd3", 3), ("flux", 3)], indirect=["model"])
def test_engines_are_built(model: Model, components: int) -> None:
    assert build_with_tensorrt_rtx(model.engine) == 1 + components


@pytest.mark.slow
@both
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(model: Model, picture: Image.Image, dtype: str, tmp_path: Path) -> None:
    """fp16 against fp32: rounding to 11 bits in encoders, VAE and five steps leaves the latents' direction."""
    schedule = schedule_for(model.folder, steps=STEPS)
    publish(plan_for(model.folder, schedule, strength=STRENGTH, dtype=dtype, check=False, **SIZE), tmp_path / "x")
    assert build_with_tensorrt_rtx(tmp_path / "x") == 1 + 3
    if dtype == "fp16":  # ONNX Runtime has no bf16 kernels on the CPU
        found, want = (ours(path, image=picture).ravel() for path in (tmp_path / "x", model.engine))
        assert found @ want / np.linalg.norm(found) / np.linalg.norm(want) >= 0.999


def test_families_without_an_image_to_image_pipeline_in_diffusers() -> None:
    """Theirs are refused by name; PixArt and DiT have none there, and Sana has one for its distilled Sprint only."""
    able = {family.diffusers_class for family in families().values() if family.image_to_image is not None}
    assert able == {"UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"}


def test_a_strength_out_of_range_is_refused(sd3: Model) -> None:
    with pytest.raises(UserError, match="--strength 1.2: give a number above 0 and up to 1"):
        plan_for(sd3.folder, schedule_for(sd3.folder, steps=STEPS), strength=1.2, **SIZE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "save", "owner"),
    [
        ("flux", save_flux_controlnet, FluxControlNetPipeline),
        ("sd3", save_sd3_controlnet, StableDiffusion3ControlNetPipeline),
    ],
    indirect=["model"],
)
def test_controlnets(model: Model, picture: Image.Image, tmp_path: Path, save: Any, owner: Any) -> None:
    """As the next one; what SD3's pipeline draws without its generator comes from torch's global one."""
    folder = save(tmp_path / "model", model.folder)
    schedule = schedule_for(folder, ratio=0.4, steps=3, granularity="layer", seed=2)
    planned = plan_for(folder, schedule, components=False, check=False, **SIZE)
    publish(planned, tmp_path / "x")
    offset = next(
        spec.picture.offset
        for spec in Bundle.open(tmp_path / "x").manifest.conditions
        if spec.picture.form == "latents"
    )
    assert (offset == 0) == (owner is FluxControlNetPipeline)
    assert_pictures_equal_stock(tmp_path / "x", model.engine, variants=True, guidance_scale=SCALE)
    call: dict[str, Any] = {"output_type": "latent", "control_image": picture}
    pipeline = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)
    found = pipeline(PROMPT, control_scale=0.4, **call).latents
    assert relative(pipeline(PROMPT, control_scale=1.0, **call).latents, found) > 1e-3


VARIANTS: dict[str, tuple[Any, int, tuple[str, ...]]] = {
    "Fill": (FluxFillPipeline, 4 + SCALE_OF_VAE**2, ("image", "mask_image")),
    "Control": (FluxControlPipeline, 4, ("control_image",)),
    "Kontext": (FluxKontextPipeline, 0, ("image",)),
}
# What joins channels is seen in small with Stable Diffusion's inpainting.
each_variant = pytest.mark.parametrize(
    "kind", ["Kontext", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("Fill", "Control"))]
)


@pytest.fixture(scope="module")
def variants(flux: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("variants")
    return {
        kind: save_flux_variant(root / kind, flux.folder, pipeline, joined=joined)
        for kind, (pipeline, joined, _) in VARIANTS.items()
    }


@each_variant
def test_pictures_beside_the_latent(
    flux: Model, variants: dict[str, Path], picture: Image.Image, tmp_path: Path, kind: str
) -> None:
    """A random schedule against the supernet, and its pictures against diffusers with the supernet for its denoiser."""
    schedule = schedule_for(variants[kind], ratio=0.4, steps=3, granularity="layer")
    publish(plan_for(variants[kind], schedule, components=False, check=False, **SIZE), tmp_path / "x")
    # Fill's default scale is 30: of 30000 radians float32 knows three digits.
    assert_pictures_equal_stock(tmp_path / "x", flux.engine, variants=True, guidance_scale=SCALE)
    pipeline = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)
    given = {argument: picture for argument in VARIANTS[kind][2]}
    found = pipeline(PROMPT, seed=3, output_type="latent", **given).latents
    for argument in given:
        other = pipeline(PROMPT, seed=3, output_type="latent", **{**given, argument: np.zeros((*SIZE.values(), 3))})
        assert relative(other.latents, found) > 1e-3
        with pytest.raises(UserError, match=f"{argument}: missing; this engine directory draws from a picture"):
            pipeline(PROMPT, **{**given, argument: None})
    with pytest.raises(UserError, match="takes none|starts from noise alone"):
        pipeline(PROMPT, **{"image": picture, "mask_image": picture, "control_image": picture})


@pytest.mark.slow
@each_variant
def test_full_schedules_with_pictures_are_diffusers(
    flux: Model, variants: dict[str, Path], picture: Image.Image, tmp_path: Path, kind: str
) -> None:
    planned = plan_for(variants[kind], schedule_for(variants[kind], steps=3), components=False, check=False, **SIZE)
    pipeline = VARIANTS[kind][0].from_pretrained(variants[kind])
    sized = {
        **SIZE,
        **({"_auto_resize": False, "max_area": SIZE["height"] * SIZE["width"]} if kind == "Kontext" else {}),
    }
    given = {name: picture.resize((SIZE["width"], SIZE["height"])) for name in VARIANTS[kind][2]}
    for place, strength in enumerate((None, 0.7) if kind == "Fill" else (None,)):
        schedule = schedule_for(variants[kind], steps=3)
        engine = tmp_path / str(place)
        with_gates(planned if strength is None else with_strength(planned, strength), schedule, engine)
        borrow_components(flux.engine, engine)
        call: dict[str, Any] = {"prompt": PROMPT, "guidance_scale": SCALE, "output_type": "np", **given}
        chosen = {} if strength is None else {"strength": strength}
        wanted = stock(pipeline, steps=3, **call, **sized, **chosen)
        found = Pipeline.from_engine_dir(engine, "cpu", threads=1)(seed=3, **call).images
        assert relative(np.asarray(found), wanted) <= 1e-4


def test_variants_are_told_by_their_pipelines(flux: Model, variants: dict[str, Path]) -> None:
    for kind, folder in variants.items():
        family, config = denoiser_config(folder)
        assert family.class_name == f"FluxTransformer2DModel+{kind}" and family.latent_channels(config) == 4
        assert family.pipelines == (VARIANTS[kind][0].__name__,)
    with pytest.raises(UserError, match="in_channels 48, out_channels 16"):
        denoiser_config(f"{variants['Fill']}?pipeline=FluxPipeline")
    with pytest.raises(UserError, match="for FluxFillPipeline only models work whose input is the latent with"):
        denoiser_config(f"{variants['Control']}?pipeline=FluxFillPipeline")
    assert denoiser_config(f"{variants['Kontext']}?pipeline=FluxPipeline")[0].pipelines == ("FluxPipeline",)
    with pytest.raises(UserError, match="--strength 1: .*Fill draws from noise alone then"):
        plan_for(variants["Fill"], schedule_for(variants["Fill"], steps=3), strength=1.0, **SIZE)
    with pytest.raises(UserError, match="--strength: FluxTransformer2DModel.Kontext cannot start from a picture"):
        plan_for(variants["Kontext"], schedule_for(variants["Kontext"], steps=3), strength=0.5, **SIZE)
