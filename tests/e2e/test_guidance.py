"""Guidance known at export: conditional-only evaluations and shares of it, against the supernet and diffusers."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import family_checks
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMScheduler, StableDiffusionPipeline
from family_checks import assert_engines_in_stock_draw, loop_report, plan_for, with_gates
from flow_pipelines import flux_transformer
from sd_pipelines import BETAS, relative, save_sd15
from simulated_gpu import install
from tiny_engines import changed, save_dit_pipeline, save_unet, schedule_for

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import GUIDANCE_VERSION, RUN_ROWS_VERSION
from dipgo_deploy.bundle.shapes import Range
from dipgo_deploy.bundle.weights import weights_of
from dipgo_deploy.cli import inspect
from dipgo_deploy.compare.pictures import cases
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, in_layout, plan_export, publish, replan
from dipgo_deploy.models.family import BlockSpec
from dipgo_deploy.models.registry import family_for
from dipgo_deploy.reference.load import load_reference
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.schedule.builders import with_guidance
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.forecast import RuleForecast
from dipgo_deploy.supernet.gated import Supernet
from dipgo_deploy.supernet.loop import run_loop

torch.set_num_threads(1)

# Guided, conditional only reading second halves, conditional only that stores, guided again, and a share.
SHARES = (1.0, 0.0, 1.0, 0.0, 0.5, 0.0)
GATES = [[True, True], [True, False], [False, True], [False, True], [True, True], [True, False]]


def guided(schedule: Schedule, gates: Sequence[Sequence[bool]] = GATES, shares: Sequence[float] = SHARES) -> Schedule:
    return with_guidance(schedule.with_gates(gates), shares, {})[0]


def random_guidance(schedule: Schedule, seed: int) -> Schedule:
    """Random gates and shares, with what guided evaluations need kept."""
    source = random.Random(seed)
    gates = [[step == 0 or source.random() < 0.5 for _ in schedule.blocks] for step in range(schedule.steps)]
    return guided(schedule, gates, [source.choice([1.0, 1.4, 0.0, 0.0]) for _ in range(schedule.steps)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit_pipeline(tmp_path_factory.mktemp("guidance") / "model", layers=2)


@pytest.fixture(scope="module")
def planned(model: Path) -> PlannedExport:
    """With timestep tables and a prologue."""
    planned = plan_for(model, guided(schedule_for(model)), check=False)
    assert planned.options.prologue and planned.traced.tables is not None
    return planned


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return publish(planned, tmp_path_factory.mktemp("guided") / "engine")


def check(engine_dir: Path, **options: Any) -> None:
    report = loop_report(engine_dir, **options)
    assert report.first_failure() is None, report.first_failure()
    assert all(tensor.relative <= 1e-4 for step in report.loop for tensor in step.tensors)


def test_conditional_only_launches_are_half_and_equal_the_supernet(engine: Bundle):
    """Every launch, every graph by itself, and pictures of the stock pipeline."""
    check(engine.path, pictures=True)
    for case in cases(engine.manifest, guidance_scale=3.0):
        assert_engines_in_stock_draw(engine, load_reference(engine), case)
    plan = engine.manifest.plan
    assert [launch.guidance for launch in plan.launches] == list(SHARES)
    assert json.loads((engine.path / "manifest.json").read_text())["format_version"] == GUIDANCE_VERSION
    by_step = {launch.step: plan.variants[launch.variant] for launch in plan.launches}
    assert by_step[1].macs * 2 == plan.macs_full - (by_step[0].macs - 2 * by_step[1].macs)
    for step, share in enumerate(SHARES):
        names = {spec.name for spec in by_step[step].graph.inputs}
        assert ("guidance_scale" in names) == (share != 0)
        sizes = {spec.shape[0] for spec in by_step[step].graph.outputs if spec.name.startswith("new_")}
        assert sizes <= {2 if share else 1}
    second = plan.launches[1]
    wrote = dict(zip(by_step[0].writes, plan.launches[0].writes, strict=True))
    (read,), (name,) = second.reads, by_step[1].reads
    (spec,) = (spec for spec in by_step[1].graph.inputs if spec.name == name)
    assert read == wrote[f"new_{name.removesuffix('/conditional')}"] + spec.nbytes  # the second half, where it lies


def test_the_weights_are_those_of_guided_graphs(engine: Bundle):
    """A weight that both kinds of graph take is in the file once."""
    plan = engine.manifest.plan
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for launch in plan.launches:
        kinds[launch.guidance == 0] |= set(weights_of(engine.path / plan.variants[launch.variant].graph.file))
    assert kinds[True] and kinds[True] <= kinds[False]


@pytest.mark.parametrize(("seed", "layout"), [(1, "variants"), (2, "segments")])
def test_random_guidance_equals_the_supernet(planned: PlannedExport, tmp_path: Path, seed: int, layout: str):
    schedule = random_guidance(planned.schedule.with_guidance(None), seed)
    assert 0 < sum(schedule.conditional_only) < schedule.steps
    bundle = with_gates(planned, schedule, tmp_path / "engine", layout=layout)
    check(bundle.path)


def forecast(schedule: Schedule) -> Schedule:
    """A removed block is extrapolated: conditional only from halves of guided values and its own, and guided from what
    was stored since."""
    gates = [[True, True], [True, True], [False, True], [True, False], [True, True], [False, False]]
    shares = (1.0, 1.0, 0.0, 0.0, 1.0, 0.5)
    return guided(schedule, gates, shares).with_forecast(RuleForecast(kind="taylor", order=1))


@pytest.mark.parametrize("layout", ["segments", pytest.param("variants", marks=pytest.mark.slow)])
def test_a_forecast_goes_with_conditional_only_evaluations(planned: PlannedExport, tmp_path: Path, layout: str):
    schedule = forecast(planned.schedule.with_guidance(None))
    bundle = with_gates(planned, schedule, tmp_path / "engine", layout=layout)
    weights = {launch.step: launch.forecast for launch in bundle.manifest.plan.launches if launch.forecast}
    assert {2, 3} <= weights.keys() and any(weight not in (0, 1) for weight in weights[3])
    check(bundle.path)


def _share(manifest: Any) -> None:
    """One that the schedule does not have."""
    manifest["plan"]["launches"][0]["guidance"] = 0.9


def _first_half(manifest: Any) -> None:
    """The conditional-only launch reads where the unconditional half lies."""
    first, second, *_ = manifest["plan"]["launches"]
    second["reads"] = [max(offset for offset in first["writes"] if offset < second["reads"][0])]


def test_a_wrong_share_is_found_and_named(engine: Bundle, tmp_path: Path):
    report = loop_report(changed(engine.path, tmp_path / "wrong", _share), variants=False)
    assert "launch list, launch 0" in str(report.first_failure())
    assert "has 0.9 of the guidance, the schedule 1 at evaluation 0" in str(report.first_failure())


def test_the_wrong_half_is_refused(engine: Bundle, tmp_path: Path):
    with pytest.raises(UserError, match=r"launch 1 \(v01\): reads .*/conditional as .*, written was"):
        Bundle.open(changed(engine.path, tmp_path / "wrong", _first_half))


def test_all_guided_is_what_it_was(planned: PlannedExport, tmp_path: Path):
    """Also of a trace that knows conditional-only evaluations."""
    whole = planned.schedule.with_guidance(None)
    bundle = with_gates(planned, whole, tmp_path / "engine", check=True)
    document = json.loads((bundle.path / "manifest.json").read_text())
    assert document["format_version"] == RUN_ROWS_VERSION and "conditional" not in json.dumps(document["plan"])
    assert not any("guidance" in launch for launch in document["plan"]["launches"])
    assert json.loads(whole.to_json())["format_version"] == 1


def test_a_simulated_gpu_draws_the_same(engine: Bundle, monkeypatch: pytest.MonkeyPatch):
    def draw(backend: str) -> np.ndarray:
        pipeline = Pipeline.from_engine_dir(engine.path, backend=backend)
        return pipeline(class_labels=1, seed=1, guidance_scale=3.0, output_type="latent").latents

    wanted = draw("cpu")
    install(monkeypatch)
    from dipgo_deploy.engine.build import build_engines

    build_engines(engine.path, "tensorrt-rtx")
    assert relative(draw("tensorrt-rtx"), wanted) < 1e-4


def test_tables_of_classes_have_rows_for_the_conditional_half(tmp_path: Path):
    model = save_dit_pipeline(tmp_path / "model", layers=1)
    schedule = family_checks.schedule_for(model, sampler="ddim", steps=3).with_guidance([1, 0, 0.5])
    bundle = publish(plan_for(model, schedule, check=False, class_labels=(2,), batch=2), tmp_path / "engine")
    assert bundle.manifest.plan.table_classes == (2, 10)
    check(bundle.path, label=2)


def test_inspect_says_it(engine: Bundle):
    result = CliRunner().invoke(inspect.command, [str(engine.path)])
    assert "all 0, conditional only 1, all 2, conditional only 3, 0.5 4, conditional only 5" in result.output


def test_diffusers_without_guidance_at_those_steps_is_the_same(tmp_path: Path):
    """As diffusers' documentation switches guidance off in a callback; a share is another scale in the same place."""
    pipeline = StableDiffusionPipeline.from_pretrained(save_sd15(tmp_path / "sd"), safety_checker=None)
    pipeline.scheduler = DDIMScheduler(**BETAS, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    shares, scale = (1.0, 0.5, 0.0, 0.0), 6.0
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def before_next(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        share = shares[step + 1] if step + 1 < len(shares) else 1.0
        pipe._guidance_scale = 1 + share * (scale - 1)
        if share == 0:
            given["prompt_embeds"] = given["prompt_embeds"][-1:]
        return given

    options = {"latents": latents.clone(), "output_type": "latent", "num_inference_steps": 4, "guidance_scale": scale}
    wanted = pipeline(
        "a red shoe",
        callback_on_step_end=before_next,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
        **options,
    ).images
    family = family_for("UNet2DConditionModel")
    specs: tuple[BlockSpec, ...] = family.blocks(pipeline.unet.config, "block")
    supernet = Supernet(pipeline.unet, specs, None, family.call, family.guide)
    supernet.guidance = shares
    prompt, empty = pipeline.encode_prompt("a red shoe", "cpu", 1, True)
    with torch.no_grad():
        found = run_loop(
            supernet,
            pipeline.scheduler,
            [[True] * len(specs)] * 4,
            latents,
            {"encoder_hidden_states": torch.cat([empty, prompt])},
            num_inference_steps=4,
            guidance_scale=scale,
        )
    assert relative(found.numpy(), wanted.numpy()) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": False}, "guidance: the export has none; give --guidance"),
        ({"batch": Range(min=1, opt=1, max=2)}, "--batch: a range does not go with conditional-only evaluations"),
    ],
)
def test_what_does_not_go_together_is_refused(model: Path, options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        plan_export(str(model), guided(schedule_for(model)), ExportOptions(**options))


def test_a_model_distilled_from_guidance_is_refused(tmp_path: Path):
    flux_transformer(layers=1).save_pretrained(tmp_path / "flux")
    schedule = schedule_for(tmp_path / "flux", sampler="flow-euler", ratio=0).with_guidance([1, 1, 1, 1, 0, 0])
    with pytest.raises(UserError, match="distilled from guidance: its scale is an input"):
        plan_export(str(tmp_path / "flux"), schedule, ExportOptions(height=32, width=32))


def test_a_trace_without_conditional_halves_is_refused(planned: PlannedExport):
    graph = replace(planned.traced.graph, halves={})
    with pytest.raises(UserError, match="for which the model was not traced"):
        replan(replace(planned, traced=replace(planned.traced, graph=graph)), planned.schedule)


@pytest.mark.slow  # a trace of its own
def test_a_unet_by_its_blocks(tmp_path: Path):
    model = save_unet(tmp_path / "unet")
    planned = plan_for(model, random_guidance(schedule_for(model), 5), check=False)
    for layout in ("variants", "segments"):
        check(publish(in_layout(planned, layout), tmp_path / layout).path)
