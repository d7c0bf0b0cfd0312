"""Image-to-image: runs that start from a picture, against diffusers and against the supernet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_engine
from click.testing import CliRunner
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from family_checks import (
    assert_pictures_equal_stock,
    borrow_components,
    build_with_tensorrt_rtx,
    plan_for,
    schedule_for,
    with_gates,
    with_strength,
)
from PIL import Image
from sd_pipelines import (
    PROMPT,
    assert_equals_supernet,
    relative,
    save_inpainting,
    save_refiner,
    save_sd15,
    save_sdxl,
    sdxl_unet,
    stock,
)

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.cli.compare import command as compare_command
from dipgo_deploy.cli.export import command as export_command
from dipgo_deploy.cli.run import command as run_command
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.models.image_start import rounded_up
from dipgo_deploy.models.location import denoiser_config
from dipgo_deploy.runtime.image import to_pictures
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.sampler import begin_of, make_scheduler

STEPS, SIZE = 10, 64
STRENGTHS = (0.3, 0.6, 1.0)
SAMPLERS = ("ddim", "pndm", "dpm++2m", "euler", "heun", "euler-a", "unipc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _without_clipping(save_sd15(tmp_path_factory.mktemp("sd15")))


def _without_clipping(folder: Path) -> Path:
    """As in the published folders, where DDIM is made of PNDM's settings."""
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clip_sample": False}))
    return folder


@pytest.fixture(scope="module")
def planned(folder: Path) -> PlannedExport:
    return plan_for(folder, schedule_for(folder, sampler="ddim", steps=STEPS), strength=0.6)


@pytest.fixture(scope="module")
def diffusers_pipeline(folder: Path) -> Any:
    return StableDiffusionImg2ImgPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DDIM, every gate kept, strength 0.6, with components."""
    target = tmp_path_factory.mktemp("engine") / "img2img"
    with_gates(planned, schedule_for(folder, sampler="ddim", steps=STEPS), target)
    return target


def theirs(pipeline: Any, picture: Image.Image, **call: Any) -> np.ndarray:
    """diffusers takes the picture's own size; ours resizes to what was exported."""
    resized = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return stock(pipeline, steps=STEPS, prompt=PROMPT, image=resized, output_type="latent", **call)


def test_the_engines_own_test_starts_from_a_picture(engine: Path) -> None:
    report = Pipeline.from_engine_dir(engine, "cpu", threads=1, load="lazy").self_test()
    assert report.passed and report.parts[-1].name == "loop"


@pytest.mark.parametrize(
    ("sampler", "strength"),
    [
        *(("ddim", strength) for strength in STRENGTHS),
        *((sampler, 0.6) for sampler in SAMPLERS[1:]),
        *(
            pytest.param(sampler, strength, marks=pytest.mark.slow)
            for sampler in SAMPLERS[1:]
            for strength in STRENGTHS
            if strength != 0.6
        ),
    ],
)
def test_full_schedules_are_diffusers(
    planned: PlannedExport,
    folder: Path,
    diffusers_pipeline: Any,
    engine: Path,
    picture: Image.Image,
    tmp_path: Path,
    sampler: str,
    strength: float,
) -> None:
    schedule = schedule_for(folder, sampler=sampler, steps=STEPS)
    with_gates(with_strength(planned, strength), schedule, tmp_path / "x", check=False, components=False)
    borrow_components(engine, tmp_path / "x")
    ours = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1, load="lazy")
    found = ours(PROMPT, image=picture, seed=3, output_type="latent")
    wanted = theirs(diffusers_pipeline, picture, sampler=sampler, strength=strength)
    assert relative(found.latents, wanted) <= 1e-4
    manifest = ours.bundle.manifest
    assert manifest.sampler.strength == strength and manifest.sampler.begin is not None
    assert manifest.plan.evaluations == len(schedule.gates) - manifest.sampler.begin
    assert (manifest.sampler.begin == 0) == (strength == 1.0)


@pytest.mark.parametrize(
    ("sampler", "strength", "ratio", "layout"),
    [
        ("ddim", 0.6, 0.5, "variants"),
        ("pndm", 0.3, 0.4, "segments"),
        ("euler-a", 0.7, 0.4, "variants"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("ddim", 0.6, 0.5, "segments"),
                ("pndm", 0.3, 0.4, "variants"),
                ("euler-a", 0.7, 0.4, "segments"),
            ]
        ),
    ],
)
def test_random_schedules_are_the_supernets(
    planned: PlannedExport,
    folder: Path,
    engine: Path,
    tmp_path: Path,
    sampler: str,
    strength: float,
    ratio: float,
    layout: Any,
) -> None:
    schedule = schedule_for(folder, sampler=sampler, steps=STEPS, ratio=ratio, seed=5)
    options = replace(planned.options, strength=strength, layout=layout)
    bundle = with_gates(replace(planned, options=options), schedule, tmp_path / "x", components=False)
    assert_equals_supernet(tmp_path / "x")
    assert_pictures_equal_stock(tmp_path / "x", engine)
    # The first row that is run is whole, and what that raised is reported; all other rows are as given.
    manifest, recorded = bundle.manifest, bundle.load_schedule()
    begin = manifest.sampler.begin
    assert begin == begin_of(make_scheduler(sampler, schedule.sampler.config), STEPS, strength, rounded_up)
    raised = {(begin, name) for name, kept in zip(schedule.block_names, schedule.gates[begin], strict=True) if not kept}
    assert raised and set(manifest.promoted) == raised
    assert [tuple(gate) for gate in recorded.provenance["promoted"]] == list(manifest.promoted)
    assert all(recorded.gates[begin])
    assert [row for step, row in enumerate(recorded.gates) if step != begin] == [
        row for step, row in enumerate(schedule.gates) if step != begin
    ]
    assert manifest.plan.macs_run < manifest.plan.evaluations * manifest.plan.macs_full


def test_pictures_of_several_prompts_are_diffusers(engine: Path, diffusers_pipeline: Any, picture: Image.Image) -> None:
    """One picture for all prompts: its latents are drawn once. A picture for each: each has its own draw."""
    ours = Pipeline.from_engine_dir(engine, "cpu", threads=1)
    prompts, pictures = [PROMPT, "a boot"], [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    resized = [item.resize((SIZE, SIZE), Image.Resampling.LANCZOS) for item in pictures]
    call = {"sampler": "ddim", "steps": STEPS, "strength": 0.6, "output_type": "np", "prompt": prompts}
    for given, theirs_given in ((picture, resized[0]), (pictures, resized)):
        found = ours(prompts, image=given, seed=3, output_type="np").images
        assert relative(found, stock(diffusers_pipeline, image=theirs_given, **call)) <= 1e-4
    each = ours(prompts, image=pictures, num_images_per_prompt=2, seed=3, output_type="latent")
    assert each.latents.shape == (4, 4, 8, 8)


@pytest.mark.slow
def test_sdxl_is_diffusers(tmp_path: Path, picture: Image.Image) -> None:
    folder = save_sdxl(tmp_path / "sdxl")
    planned = plan_for(folder, schedule_for(folder, steps=STEPS), strength=0.5, check=False)
    publish(planned, tmp_path / "x")
    found = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)(
        PROMPT, image=picture, seed=3, output_type="latent", guidance_scale=5.0
    )
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, add_watermarker=False)
    wanted = theirs(pipeline, picture, strength=0.5, guidance_scale=5.0)
    assert relative(found.latents, wanted) <= 1e-4


def test_the_picture_and_the_seed_count(engine: Path, picture: Image.Image) -> None:
    ours = Pipeline.from_engine_dir(engine, "cpu", threads=1)

    def draw(image: Any, seed: int = 0) -> np.ndarray:
        return ours(PROMPT, image=image, seed=seed, output_type="latent").latents

    first = draw(picture)
    assert np.array_equal(first, draw(picture))
    array = to_pictures(picture, SIZE, SIZE)
    assert np.array_equal(first, draw(array)) and np.array_equal(first, draw(array[0]))
    assert np.array_equal(first, draw((array * 255).round().astype(np.uint8)))
    assert relative(first, draw(picture, seed=1)) > 0.01
    assert relative(first, draw(1 - array)) > 0.01


def test_pictures_are_prepared_as_diffusers_does() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (31, 50, 4), dtype=np.uint8)
    processor = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True)
    for mode in ("RGB", "RGBA", "L"):
        picture = Image.fromarray(pixels).convert(mode)
        wanted = processor.preprocess(picture, height=40, width=24).permute(0, 2, 3, 1).numpy()
        assert np.abs(2 * to_pictures(picture, 40, 24) - 1 - wanted).max() <= 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, r"image: missing; this engine directory starts from a picture \(strength 0.6\)"),
        ({"image": np.zeros((8, 8, 3), np.float32)}, r"image: shape \(8, 8, 3\), needs \(64, 64, 3\)"),
        ({"image": np.full((64, 64, 3), 2.0)}, "image: float64 array, needs floats from 0 to 1, or uint8"),
        ({"image": np.full((64, 64, 3), np.nan)}, "needs floats from 0 to 1"),
        ({"image": "cat.png"}, "image: str, needs a PIL picture or a numpy array"),
        ({"image": []}, "image: an empty list"),
        ({"image": np.zeros((3, 64, 64, 3), np.uint8)}, "image: 3 given for 1 prompts"),
        ({"image": np.zeros((64, 64, 3)), "strength": 0.5}, "strength: 0.5, but .* was exported for 0.6"),
        ({"image": np.zeros((64, 64, 3)), "image_latents": np.zeros((1, 4, 8, 8))}, "give one of them, not both"),
        ({"image_latents": np.zeros((1, 4, 8, 9))}, r"image_latents: shape .* needs \(1 or 1, 4, 8, 8\)"),
    ],
)
def test_bad_calls_are_refused_before_anything_runs(engine: Path, call: dict[str, Any], message: str) -> None:
    pipeline = Pipeline.from_engine_dir(engine, "cpu", load="lazy")
    with pytest.raises(UserError, match=message) as caught:
        pipeline(PROMPT, **call)
    assert "\n" not in str(caught.value) and not pipeline.memory()["graphs_loaded"]


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (0.0, "--strength 0: give a number above 0 and up to 1"),
        (1.1, "--strength 1.1: give a number above 0 and up to 1"),
        (float("nan"), "strength: nan, must be a finite number"),
        (0.05, "--strength 0.05: leaves none of 10 steps; give at least 0.1"),
    ],
)
def test_bad_strengths_are_refused(folder: Path, strength: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_for(folder, schedule_for(folder, sampler="ddim", steps=STEPS), strength=strength)


def test_a_model_that_cannot_is_refused() -> None:
    with pytest.raises(UserError, match="--strength: DiTTransformer2DModel cannot start from a picture here"):
        plan_for("fashion-dit", schedule_for("fashion-dit"), strength=0.5)


def test_a_bundle_from_noise_refuses_a_picture(tmp_path: Path) -> None:
    pipeline = Pipeline.from_engine_dir(toy_engine.build(tmp_path / "x", toy_engine.Toy()), "cpu", load="lazy")
    given: dict[str, Any]
    for given in ({"image": np.zeros((8, 8, 3))}, {"image_latents": np.zeros((1, 4, 8, 8))}, {"strength": 0.6}):
        (name,) = given
        with pytest.raises(
            UserError, match=f"{name}: this engine directory starts from noise alone; export it with --s"
        ):
            pipeline("a", **given)


def test_the_commands(engine: Path, folder: Path, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "in.png")
    run = ["--engine-dir", str(engine), "--prompt", PROMPT, "--backend", "cpu", "--threads", "1", "--json"]
    start = ["--image", str(tmp_path / "in.png")]
    out = ["--output-type", "latent", "-o", str(tmp_path / "out.npy")]
    assert CliRunner().invoke(run_command, [*run, *start, "--strength", "0.6", *out]).exit_code == 0
    wanted = Pipeline.from_engine_dir(engine, "cpu", threads=1)(PROMPT, image=picture, output_type="latent").latents
    assert np.array_equal(np.load(tmp_path / "out.npy"), wanted)
    for arguments, message in (
        ([], "image: missing"),
        (["--image", str(tmp_path / "none.png")], "none.png: no such file"),
        (["--image", str(tmp_path / "out.npy")], "out.npy: not a picture that can be read"),
        ([*start, "--strength", "0.7"], "strength: 0.7, but"),
    ):
        refused = CliRunner().invoke(run_command, [*run, *arguments, *out])
        assert isinstance(refused.exception, UserError) and message in str(refused.exception), refused.output
    compared = CliRunner().invoke(compare_command, ["--engine-dir", str(engine), "--threads", "1", "--json"])
    assert compared.exit_code == 0, compared.output
    result = json.loads(compared.stdout)["results"]
    assert {tensor["name"] for tensor in result["tensors"]} == {"latents", "images"}


def test_the_plan_says_what_was_raised(folder: Path, tmp_path: Path) -> None:
    schedule = schedule_for(folder, sampler="ddim", steps=STEPS, ratio=0.5, seed=5)
    schedule.save(tmp_path / "s.json")
    planning = ["--model", str(folder), "--schedule", str(tmp_path / "s.json"), "--plan-only", "--strength", "0.6"]
    shown = CliRunner().invoke(export_command, [*planning, "--json"])
    assert shown.exit_code == 0, shown.output
    image = json.loads(shown.stdout)["image"]
    missing = [name for name, kept in zip(schedule.block_names, schedule.gates[4], strict=True) if not kept]
    assert image == {"strength": 0.6, "begin": 4, "raised": missing} and missing
    assert f"at evaluation 4 of the schedule (strength 0.6), where {len(missing)} skipped blocks" in " ".join(
        shown.stderr.split()
    )


@pytest.fixture(scope="module")
def inpainting(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PlannedExport]:
    """A folder with a UNet of 9 channels, and its trace."""
    target = tmp_path_factory.mktemp("inpainting") / "model"
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    save_inpainting(target, folder, StableDiffusionPipeline, StableDiffusionInpaintPipeline, unet)
    schedule = schedule_for(target, sampler="ddim", steps=4, ratio=0.4)
    return target, plan_for(target, schedule, components=False, check=False)


def test_inpainting_is_diffusers(
    inpainting: tuple[Path, PlannedExport], engine: Path, picture: Image.Image, tmp_path: Path
) -> None:
    """A random schedule against the supernet, and its pictures against diffusers with the supernet for its denoiser."""
    publish(inpainting[1], tmp_path / "x")
    assert_pictures_equal_stock(tmp_path / "x", engine, variants=True)
    picture.save(tmp_path / "in.png")
    Image.fromarray(np.arange(256, dtype=np.uint8).repeat(8).reshape(32, 64)).save(tmp_path / "mask.png")
    run = ["--engine-dir", str(tmp_path / "x"), "--prompt", PROMPT, "--backend", "cpu", "--threads", "1", "--json"]
    run += ["--image", str(tmp_path / "in.png"), "--output-type", "latent", "-o", str(tmp_path / "out.npy")]
    refused = CliRunner().invoke(run_command, run)
    assert isinstance(refused.exception, UserError) and "mask_image: missing" in str(refused.exception)
    drawn = CliRunner().invoke(run_command, [*run, "--mask-image", str(tmp_path / "mask.png")])
    assert drawn.exit_code == 0, drawn.output
    ours = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)
    mask = np.asarray(Image.open(tmp_path / "mask.png").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    call: dict[str, Any] = {"image": picture, "output_type": "latent"}
    assert np.array_equal(np.load(tmp_path / "out.npy"), ours(PROMPT, mask_image=mask, **call).latents)
    # What is white in the mask is not seen of the picture.
    white = np.full((SIZE, SIZE), 255, np.uint8)
    whole = ours(PROMPT, mask_image=white, **call).latents
    call["image"] = np.zeros((SIZE, SIZE, 3))
    assert np.array_equal(ours(PROMPT, mask_image=white, **call).latents, whole)
    assert relative(ours(PROMPT, mask_image=mask, **call).latents, np.load(tmp_path / "out.npy")) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("strength", [None, 0.6])
@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler-a"])
def test_full_inpainting_is_diffusers(
    inpainting: tuple[Path, PlannedExport],
    engine: Path,
    picture: Image.Image,
    tmp_path: Path,
    sampler: str,
    strength: Any,
) -> None:
    folder, planned = inpainting
    schedule = schedule_for(folder, sampler=sampler, steps=4)
    with_gates(with_strength(planned, strength) if strength else planned, schedule, tmp_path / "x")
    borrow_components(engine, tmp_path / "x")
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder)
    given = {"image": picture.resize((SIZE, SIZE)), "mask_image": picture.resize((SIZE, SIZE)).convert("L")}
    call: dict[str, Any] = {"prompt": PROMPT, "output_type": "np", **given}
    chosen = {"strength": 1.0 if strength is None else strength}
    wanted = stock(pipeline, sampler=sampler, steps=4, height=SIZE, width=SIZE, **call, **chosen)
    found = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)(seed=3, **call).images
    assert relative(np.asarray(found), wanted) <= 1e-4


@pytest.mark.slow
def test_sdxl_inpainting_is_diffusers(tmp_path: Path, picture: Image.Image) -> None:
    plain = save_sdxl(tmp_path / "sdxl")
    owners = StableDiffusionXLPipeline, StableDiffusionXLInpaintPipeline
    folder = save_inpainting(tmp_path / "model", plain, *owners, sdxl_unet())
    publish(plan_for(folder, schedule_for(folder, steps=4, ratio=0.4), check=False), tmp_path / "x")
    assert_pictures_equal_stock(tmp_path / "x", variants=True)


@pytest.mark.slow
def test_the_refiner_is_diffusers(tmp_path: Path) -> None:
    plain = save_sdxl(tmp_path / "sdxl")
    folder = save_refiner(tmp_path / "refiner", plain)
    schedule = schedule_for(folder, steps=6, ratio=0.4)
    with pytest.raises(UserError, match="--strength: missing; .*Refiner works from a picture"):
        plan_for(folder, schedule)
    publish(plan_for(folder, schedule, strength=0.7, check=False), tmp_path / "x")
    assert_pictures_equal_stock(tmp_path / "x", variants=True)
    (times,) = [spec for spec in Bundle.open(tmp_path / "x").manifest.conditions if spec.name == "time_ids"]
    assert times.values == (64, 64, 0, 0, 6) and times.null_values == (64, 64, 0, 0, 2.5)


def test_inpainting_with_another_unet_is_refused(folder: Path, inpainting: tuple[Path, PlannedExport]) -> None:
    with pytest.raises(
        UserError, match="for StableDiffusionInpaintPipeline only models work whose input is the latent"
    ):
        denoiser_config(f"{folder}?pipeline=StableDiffusionInpaintPipeline")
    with pytest.raises(UserError, match="in_channels 9, out_channels 4"):
        denoiser_config(f"{inpainting[0]}?pipeline=StableDiffusionPipeline")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "least"), [("fp16", 0.999), ("bf16", None)])
def test_half_precision(
    folder: Path, engine: Path, picture: Image.Image, tmp_path: Path, dtype: str, least: Any
) -> None:
    """fp16 against fp32: rounding to 11 bits in the encoder and six steps leaves the latents' direction."""
    schedule = schedule_for(folder, sampler="ddim", steps=STEPS)
    publish(plan_for(folder, schedule, strength=0.6, dtype=dtype, check=False), tmp_path / "x")
    assert build_with_tensorrt_rtx(tmp_path / "x") == 1 + 3
    if least is not None:  # ONNX Runtime has no bf16 kernels on the CPU
        found, wanted = (
            Pipeline.from_engine_dir(path, "cpu", threads=1)(
                PROMPT, image=picture, output_type="latent"
            ).latents.ravel()
            for path in (tmp_path / "x", engine)
        )
        assert found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) >= least


def test_engines_in_fp32_are_built(engine: Path) -> None:
    assert build_with_tensorrt_rtx(engine) == 1 + 3
