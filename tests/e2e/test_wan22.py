"""Wan 2.2 in small: two experts, one for high and one for low noise, each with its own guidance scale."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from family_checks import (
    borrow_components,
    check_guidance,
    loop_report,
    plan_for,
    random_weights,
    schedule_for,
    with_gates,
)
from flow_pipelines import t5_tokenizer, umt5
from lora_files import diffusers_keys, make_updates, merge_into, save_lora
from PIL import Image
from sd_pipelines import relative
from tiny_denoisers import wan_transformer
from video_checks import (
    STEPS,
    check_half_precision,
    check_layers_in_both_layouts,
    check_random_blocks,
    check_samplers,
    exported,
    ours,
    theirs,
    wan_vae,
)

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.weights import WeightsIndex, weights_of
from dipgo_deploy.cli import inspect, run
from dipgo_deploy.cli import schedule as schedule_command
from dipgo_deploy.errors import UserError
from dipgo_deploy.export import planning
from dipgo_deploy.export.exporter import PlannedExport, in_layout, publish, replan
from dipgo_deploy.models.denoisers import below_boundary
from dipgo_deploy.models.location import with_options
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.search.problem import ProblemOptions, load_problem

SIZE = {"height": 16, "width": 16, "num_frames": 5}
PROMPT, NEGATIVE = "a red shoe", "a and"
HIGH, LOW = "transformer", "transformer_2"
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.fixture(scope="module")
def stock() -> WanPipeline:
    torch.manual_seed(0)
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5(),
        vae=wan_vae(),
        transformer=wan_transformer(),
        transformer_2=random_weights(wan_transformer(), seed=1),
        scheduler=UniPCMultistepScheduler(**UNIPC),
        boundary_ratio=0.875,
    )


@pytest.fixture(scope="module")
def model(stock: WanPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan22") / "model"
    stock.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def planned(model: Path) -> PlannedExport:
    return plan_for(model, schedule_for(model, steps=STEPS), check=False, **SIZE)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full schedule of the model's own sampler, with components."""
    return publish(planned, tmp_path_factory.mktemp("wan22-engine") / "x").path


def test_it_makes_what_diffusers_makes(stock: WanPipeline, engine: Path) -> None:
    call: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 3.0}
    for kind, scale in (("latent", None), ("latent", 1.5), ("np", 1.5)):
        asked = {**call, "output_type": kind, "guidance_scale_2": scale}
        want = theirs(stock, **asked, **SIZE)
        got = ours(engine, **asked)
        assert got.shape == want.shape and relative(got, want) < 1e-4
        # What a swap of the two scales, or one scale for both, would give is another video.
        assert relative(ours(engine, **{**asked, "guidance_scale_2": 4.0}), want) > 1e-3


def test_each_launch_has_the_weights_of_one_expert(planned: PlannedExport, engine: Path) -> None:
    bundle = Bundle.open(engine)
    schedule, plan = bundle.load_schedule(), bundle.manifest.plan
    assert schedule.denoisers == (HIGH, HIGH, LOW, LOW)
    index = WeightsIndex.load(engine / "graphs")
    for launch in plan.launches:
        graph = engine / plan.variants[launch.variant].graph.file
        owners = {(stored.parameter or "").partition(".")[0] for stored in weights_of(graph, index).values()} - {""}
        name = bundle.manifest.model.denoisers[launch.denoiser]
        assert owners == {name} == {schedule.denoisers[launch.step]}  # type: ignore[index]


def test_blocks_with_residuals(model: Path, planned: PlannedExport, engine: Path, tmp_path: Path) -> None:
    check_random_blocks(model, planned, engine, tmp_path / "half")


def test_other_samplers(stock: WanPipeline, model: Path, planned: PlannedExport, tmp_path: Path) -> None:
    with torch.no_grad():
        states, no_states = (host.numpy() for host in stock.encode_prompt(PROMPT, NEGATIVE, max_sequence_length=512))
    embeds = {"prompt_embeds": states, "negative_prompt_embeds": no_states, "guidance_scale_2": 2.0}
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale_2": 2.0, **SIZE}
    check_samplers(stock, model, planned, tmp_path, ("flow-euler", "flow-heun"), embeds, call)


def test_segments_are_the_supernet(model: Path, planned: PlannedExport, tmp_path: Path) -> None:
    schedule = schedule_for(model, ratio=0.5, steps=STEPS)
    bundle = with_gates(in_layout(planned, "segments"), schedule, tmp_path / "x", components=False)
    assert bundle.manifest.plan.layout == "segments"
    report = loop_report(bundle.path)
    assert report.first_failure() is None and report.results is not None
    for tensor in (*(tensor for step in report.loop for tensor in step.tensors), *report.results.tensors):
        assert tensor.relative <= 1e-4, f"{tensor.name}: {tensor.relative}"


@pytest.mark.slow  # a trace of its own
@pytest.mark.parametrize("guidance_batch", [2, 1])
def test_each_expert_has_conditional_only_launches(model: Path, tmp_path: Path, guidance_batch: int) -> None:
    bundle = check_guidance(model, tmp_path, guidance_batch=guidance_batch, steps=STEPS, pictures=True, **SIZE)
    launches = [launch for launch in bundle.manifest.plan.launches if not launch.guidance]
    assert {launch.denoiser for launch in launches} == {0, 1}


@pytest.mark.slow  # a trace of its own; tests/e2e/test_wan.py has the same layers
def test_layers_are_the_supernet_in_both_layouts(model: Path, tmp_path: Path) -> None:
    check_layers_in_both_layouts(model, tmp_path, SIZE)


@pytest.mark.slow  # tests/e2e/test_wan.py has the same blocks in half precision
def test_half_precision_is_close_and_builds(model: Path, tmp_path: Path) -> None:
    check_half_precision(model, tmp_path / "x", "fp16", SIZE, STEPS)


def test_a_schedule_may_name_other_evaluations(
    model: Path, planned: PlannedExport, engine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the supernet has it, whose pipeline would do otherwise, which is said."""
    target = schedule_target(str(model), None, STEPS)
    turns = (HIGH, LOW, HIGH, LOW)
    rows = [["1" if name.startswith(f"{turn}.") else "0" for name in target.block_names] for turn in turns]
    rows[2][1] = rows[3][3] = "0"  # a block of each that was computed before
    given = json.loads(target.schedule([[True] * len(target.blocks)] * STEPS, "hand", {}).to_json())
    schedule = Schedule.from_json(json.dumps({**given, "denoisers": turns, "keep": ["".join(row) for row in rows]}))
    bundle = with_gates(planned, schedule, tmp_path / "x", components=False)
    assert [launch.denoiser for launch in bundle.manifest.plan.launches] == [0, 1, 0, 1]
    borrow_components(engine, bundle.path)
    report = loop_report(bundle.path, pictures=True)
    assert report.first_failure() is None
    assert any("runs transformer at evaluation 1, the schedule transformer_2" in line for line in report.skipped)
    with caplog.at_level(logging.WARNING, "dipgo_deploy"):
        planning._say_denoisers(str(model), schedule, planning._nominal_sampling(str(model), schedule, None))
    assert "denoisers are transformer 0, transformer_2 1, transformer 2, transformer_2 3, those of" in caplog.text


def test_a_lora_is_for_one_of_them(stock: WanPipeline, engine: Path, tmp_path: Path) -> None:
    updates = make_updates(stock.transformer, ["blocks.0.attn1.to_q", "blocks.1.ffn.net.2"])
    file = save_lora(tmp_path / "lora.safetensors", updates, diffusers_keys("transformer."))
    call: dict[str, Any] = {"prompt": PROMPT, "output_type": "latent"}
    for name, choice in ((HIGH, (file, 0.5)), (LOW, (file, 0.5, LOW))):
        changed = copy.copy(stock)
        merged = copy.deepcopy(getattr(stock, name))
        merge_into(merged, updates, 0.5)
        changed.register_modules(**{name: merged})
        try:
            want = theirs(changed, **call, **SIZE)
        finally:
            stock.register_modules(**{name: getattr(stock, name)})
        pipeline = Pipeline.from_engine_dir(engine, "cpu", threads=1, lora=[choice])
        assert relative(pipeline(seed=3, **call).images, want) < 1e-4
        assert relative(ours(engine, **call), want) > 1e-3
        assert pipeline.loras[0].denoiser == name
    with pytest.raises(UserError, match="--lora transformer_3=: this model has transformer and transformer_2"):
        Pipeline.from_engine_dir(engine, "cpu", lora=[(file, 1.0, "transformer_3")])


def test_commands_name_the_expert(model: Path, engine: Path, tmp_path: Path) -> None:
    def output(command: Any, *words: Any) -> str:
        done = CliRunner().invoke(command, list(map(str, words)), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    file = tmp_path / "uniform.json"
    output(schedule_command.command, "uniform", "--model", model, "--steps", "6", "--interval", "2", "-o", file)
    schedule = Schedule.load(file)
    assert schedule.denoisers == (HIGH,) * 2 + (LOW,) * 4
    assert schedule.keep == ("1100", "0000", "0011", "0000", "0011", "0000")  # each counts from its own first
    assert schedule.kept_share == 0.5
    assert "denoisers transformer 0-1, transformer_2 2-5" in output(schedule_command.command, "show", file)
    assert "0 999 transformer v00" in (shown := output(inspect.command, engine))
    assert "2 750 transformer_2 v01" in shown and "denoisers transformer 0-1, transformer_2 2-3" in shown
    clip = ("--prompt", "a", "--guidance-scale-2", "2", "--engine-dir", engine, "-o", tmp_path / "clip.mp4")
    output(run.command, *clip)


def test_refusals_are_one_line(model: Path, planned: PlannedExport) -> None:
    schedule = schedule_for(model, steps=STEPS)
    document = json.loads(schedule.to_json())
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        (
            {"keep": ["1100", "1100", "0010", "0011"]},
            r"evaluation 2, block transformer_2.blocks.1: its cache .* at evaluation 2",
        ),
        (
            {"keep": ["1100", "1110", "0011", "0011"]},
            "evaluation 1, block transformer_2.blocks.0: is kept, but .* runs transformer;",
        ),
        ({"denoisers": [HIGH] * 3}, "denoisers: 3 for 4 evaluations"),
        ({"denoisers": ["transformer_3"] * 4}, "no block's name begins with transformer_3"),
        ({"format_version": 3}, "format_version: 3 has no denoisers"),
    )
    for change, words in changes:
        with pytest.raises(UserError, match=words) as error:
            Schedule.from_json(json.dumps({**document, **change}))
        assert "\n" not in str(error.value)
    del document["denoisers"]
    alone = Schedule.from_json(json.dumps({**document, "keep": ["1111"] * 4, "format_version": 1}))
    refused: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: plan_for(model, alone, **SIZE), "denoisers: missing; this model runs transformer and transformer_2"),
        (lambda: with_limit(planned, schedule, 1), "at most 1 variants: 2 denoisers are run"),
        (lambda: load_problem(ProblemOptions(str(model), prompts="x")), "runs transformer and transformer_2 in turn"),
        (lambda: below_boundary("0.9", {}, [1.0]), "boundary_ratio '0.9': is no number from 0 to 1"),
    )
    for act, words in refused:
        with pytest.raises(UserError, match=words):
            act()


def with_limit(planned: PlannedExport, schedule: Schedule, limit: int) -> PlannedExport:
    from dataclasses import replace

    return replan(replace(planned, options=replace(planned.options, max_variants=limit)), schedule)


def test_without_a_boundary_the_first_runs_everywhere() -> None:
    assert below_boundary(None, {}, [999.0, 0.0]) == [False, False]
    # As torch compares: 0.9 * 1000 is 900.0 in float32, and so is the timestep.
    assert below_boundary(0.9, {"num_train_timesteps": 1000}, [900.0, 899.9999, 899.99999]) == [False, True, False]


@pytest.mark.slow  # a trace of its own; tests/e2e/test_wan.py starts from pictures, and two experts are above
def test_from_a_picture(stock: WanPipeline, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = {name: getattr(stock, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    from_picture = WanImageToVideoPipeline(
        **shared,
        transformer=wan_transformer(in_channels=10),
        transformer_2=random_weights(wan_transformer(in_channels=10), seed=1),
        image_encoder=None,
        image_processor=None,
        boundary_ratio=0.9,
    )
    from_picture.save_pretrained(tmp_path / "model")
    video = exported(tmp_path / "model", tmp_path / "x", SIZE)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    call: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "image": Image.fromarray(noise)}
    for kind in ("latent", "np"):
        asked = {**call, "guidance_scale": 3.0, "guidance_scale_2": 2.0, "output_type": kind}
        assert relative(ours(video.engine, **asked), theirs(from_picture, **asked, **SIZE)) < 1e-4
    check_random_blocks(video.model, video.planned, video.engine, tmp_path / "half")


@pytest.fixture(scope="module")
def of_5b() -> WanPipeline:
    """Its VAE packs pixels two by two."""
    torch.manual_seed(0)
    settings = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "temperal_downsample": [True]}
    packed = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "num_res_blocks": 1}
    scales = {"latents_mean": [0.1] * 4, "latents_std": [1.5] * 4, "scale_factor_temporal": 2}
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5(),
        vae=random_weights(AutoencoderKLWan(**settings, **packed, **scales, scale_factor_spatial=4)),
        transformer=wan_transformer(),
        scheduler=UniPCMultistepScheduler(**UNIPC),
        expand_timesteps=True,
    )


@pytest.mark.slow  # a trace and a decoder of its own
def test_the_model_of_5b_is_told_the_timestep_of_each_token(of_5b: WanPipeline, tmp_path: Path) -> None:
    """They are all the same where nothing is given, so one timestep is as good."""
    of_5b.save_pretrained(tmp_path / "model")
    size = {"height": 32, "width": 32, "num_frames": 5}
    video = exported(tmp_path / "model", tmp_path / "x", size)
    for kind in ("latent", "np"):
        call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 3.0, "output_type": kind}
        assert relative(ours(video.engine, **call), theirs(of_5b, **call, **size)) < 1e-4
    check_random_blocks(video.model, video.planned, video.engine, tmp_path / "half")


@pytest.mark.slow  # the same; LTX-Video starts from a first frame in each run of all tests
def test_the_model_of_5b_starts_from_a_first_frame(of_5b: WanPipeline, tmp_path: Path) -> None:
    of_5b.save_pretrained(tmp_path / "model")
    from_picture = WanImageToVideoPipeline(
        **of_5b.components, image_encoder=None, image_processor=None, expand_timesteps=True
    )
    size = {"height": 32, "width": 32, "num_frames": 5}
    name = with_options(str(tmp_path / "model"), pipeline="WanImageToVideoPipeline")
    video = exported(name, tmp_path / "x", size)
    assert video.planned.source.family.class_name == "WanTransformer3DModel+FirstFrame"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for kind in ("latent", "np"):
        call: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "output_type": kind}
        call |= {"guidance_scale": 3.0, "image": Image.fromarray(noise)}
        want = theirs(from_picture, **call, **size)
        assert relative(ours(video.engine, **call), want) < 1e-4
        assert relative(ours(video.engine, **{**call, "image": Image.fromarray(255 - noise)}), want) > 1e-3
    check_random_blocks(video.model, video.planned, video.engine, tmp_path / "half")
