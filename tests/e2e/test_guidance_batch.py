"""Guidance in two launches of half the batch: one graph for both halves, against the supernet, the stock pipeline and
the export whose launches have both."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_checks import loop_report, plan_for, with_gates
from family_checks import schedule_for as full_schedule
from flow_pipelines import flux_transformer
from sd_pipelines import relative
from simulated_gpu import install
from tiny_engines import changed, corrupted, save_dit_pipeline, save_unet, schedule_for

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import HALVES_VERSION
from dipgo_deploy.bundle.prologue import run_row_bytes, run_specs
from dipgo_deploy.bundle.shapes import Range
from dipgo_deploy.bundle.weights import weights_of
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.again import options_of
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, in_layout, plan_export, publish
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.schedule.builders import with_guidance
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.forecast import RuleForecast

torch.set_num_threads(1)

# Guided, guided reading in both halves, conditional only that reads and stores, guided again, and a share.
SHARES = (1.0, 1.0, 0.0, 1.0, 0.0, 0.5)
GATES = [[True, True], [True, False], [False, True], [True, True], [True, False], [True, False]]


def guided(schedule: Schedule, gates: Sequence[Sequence[bool]] = GATES, shares: Sequence[float] = SHARES) -> Schedule:
    return with_guidance(schedule.with_gates(gates), shares, {})[0]


def random_guidance(schedule: Schedule, seed: int) -> Schedule:
    """Random gates and shares, with what guided evaluations need kept."""
    source = random.Random(seed)
    gates = [[step == 0 or source.random() < 0.5 for _ in schedule.blocks] for step in range(schedule.steps)]
    return guided(schedule, gates, [source.choice([1.0, 1.0, 1.4, 0.0]) for _ in range(schedule.steps)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit_pipeline(tmp_path_factory.mktemp("apart") / "model", layers=2)


@pytest.fixture(scope="module")
def planned(model: Path) -> PlannedExport:
    """With timestep tables and a prologue."""
    planned = plan_for(model, guided(schedule_for(model)), check=False, guidance_batch=1)
    assert planned.options.prologue and planned.traced.tables is not None
    return planned


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return publish(planned, tmp_path_factory.mktemp("apart") / "engine")


def check(engine_dir: Path, **options: Any) -> None:
    report = loop_report(engine_dir, **options)
    assert report.first_failure() is None, report.first_failure()
    assert all(tensor.relative <= 1e-4 for step in report.loop for tensor in step.tensors)


def latents(engine_dir: Path, backend: str = "cpu") -> np.ndarray:
    pipeline = Pipeline.from_engine_dir(engine_dir, backend=backend)
    return pipeline(class_labels=1, seed=1, guidance_scale=3.0, output_type="latent").latents


def test_each_launch_has_half_and_all_equals_the_supernet(engine: Bundle):
    """Also the stock pipeline's pictures."""
    check(engine.path, pictures=True)
    plan = engine.manifest.plan
    assert json.loads((engine.path / "manifest.json").read_text())["format_version"] == HALVES_VERSION
    first = [(launch.step, launch.half, plan.variants[launch.variant].name) for launch in plan.launches[:4]]
    assert first == [
        (0, "unconditional", "v00"),
        (0, "conditional", "v00"),
        (0, None, "guidance"),
        (1, "unconditional", "v01"),
    ]
    # A conditional-only evaluation has no graphs of its own.
    names = {launch.step: plan.variants[launch.variant].name for launch in plan.launches if launch.half}
    assert SHARES[4] == 0 and names[4] == names[1] == names[5]
    assert [variant.name for variant in plan.variants] == ["v00", "v01", "v02", "guidance"]
    assert not weights_of(engine.path / plan.variants[-1].graph.file)
    assert all(spec.shape[0] == 1 for variant in plan.variants for spec in variant.graph.outputs)
    assert all(spec.shape[0] == 2 for spec in engine.manifest.conditions)
    # Rows of the prologue are there for each half.
    assert plan.prologue is not None
    assert run_row_bytes(plan) == 2 * sum(spec.nbytes for spec in plan.prologue.outputs)


@pytest.mark.parametrize(
    ("seed", "layout"),
    [
        (2, "segments"),
        *[pytest.param(seed, layout, marks=pytest.mark.slow) for seed, layout in ((1, "variants"), (3, "segments"))],
    ],
)
def test_random_guidance_equals_the_supernet(planned: PlannedExport, tmp_path: Path, seed: int, layout: str):
    schedule = random_guidance(planned.schedule.with_guidance(None), seed)
    assert 0 < sum(schedule.conditional_only) < schedule.steps
    check(with_gates(planned, schedule, tmp_path / "engine", layout=layout).path)


@pytest.mark.parametrize("layout", ["variants", pytest.param("segments", marks=pytest.mark.slow)])
def test_a_forecast_goes_with_conditional_only_evaluations(planned: PlannedExport, tmp_path: Path, layout: str):
    """At a guided evaluation both halves are extrapolated from what guided ones stored since."""
    gates = [[True, True], [True, True], [False, True], [True, False], [True, True], [False, False]]
    schedule = guided(planned.schedule.with_guidance(None), gates, (1.0, 1.0, 0.0, 0.0, 1.0, 0.5))
    schedule = schedule.with_forecast(RuleForecast(kind="taylor", order=1))
    bundle = with_gates(planned, schedule, tmp_path / "engine", layout=layout)
    assert {2, 3} <= {launch.step for launch in bundle.manifest.plan.launches if launch.forecast}
    check(bundle.path)


@pytest.mark.slow  # a trace of its own
def test_latents_are_those_of_launches_with_both_halves(engine: Bundle, model: Path, tmp_path: Path):
    together = publish(plan_for(model, guided(schedule_for(model)), check=False), tmp_path / "engine")
    assert relative(latents(engine.path), latents(together.path)) < 1e-5
    assert together.manifest.plan.macs_run == pytest.approx(engine.manifest.plan.macs_run, rel=1e-3)
    assert [spec.shape for spec in together.manifest.conditions] == [s.shape for s in engine.manifest.conditions]
    rows, both = (len(run_specs(bundle.manifest.plan)) for bundle in (engine, together))
    assert rows < both  # conditional-only evaluations take no rows of their own


@pytest.mark.slow  # the plan is held to it by many random graphs
def test_fewer_variants(planned: PlannedExport, tmp_path: Path):
    """Re-enabled blocks are kept in both halves; what guides is no variant of the model."""
    schedule = random_guidance(planned.schedule.with_guidance(None), 4)
    bundle = with_gates(planned, schedule, tmp_path / "engine", max_variants=1)
    assert [variant.name for variant in bundle.manifest.plan.variants] == ["v00", "guidance"]
    assert bundle.manifest.promoted and options_of(bundle).max_variants == 1
    assert options_of(bundle).guidance_batch == 1
    check(bundle.path, variants=False)


def _other_half(manifest: Any) -> None:
    """The conditional half reads the unconditional one's cache."""
    launches = manifest["plan"]["launches"]
    first, reader = launches[0], next(launch for launch in launches[4:] if launch["reads"] and launch.get("half"))
    name = manifest["plan"]["variants"][reader["variant"]]["reads"][0]
    written = manifest["plan"]["variants"][first["variant"]]["writes"]
    reader["reads"][0] = first["writes"][written.index(f"new_{name}")]


def test_the_wrong_half_is_refused(engine: Bundle, tmp_path: Path):
    with pytest.raises(UserError, match="of the half conditional, written was that of unconditional"):
        Bundle.open(changed(engine.path, tmp_path / "wrong", _other_half))


def test_a_wrong_weight_is_found_in_the_half_it_shows_in(engine: Bundle, tmp_path: Path):
    file = engine.manifest.plan.variants[0].graph.file
    weight = next(name for name in weights_of(engine.path / file) if "ff" in name and name.endswith("weight"))
    report = loop_report(corrupted(engine.path, tmp_path / "wrong", Path(file).name, weight))
    assert "/unconditional" in str(report.loop[0].tensors) and report.first_failure() is not None


def test_a_simulated_gpu_draws_the_same(engine: Bundle, monkeypatch: pytest.MonkeyPatch):
    wanted = latents(engine.path)
    install(monkeypatch)
    from dipgo_deploy.engine.build import build_engines

    build_engines(engine.path, "tensorrt-rtx")
    assert relative(latents(engine.path, "tensorrt-rtx"), wanted) < 1e-4


def test_tables_of_classes_and_batches(tmp_path: Path):
    """Two images a launch, a sampler of several steps, and rows of classes for each half."""
    model = save_dit_pipeline(tmp_path / "model", layers=1)
    schedule = full_schedule(model, sampler="dpm++2m", steps=4).with_guidance([1, 0, 0.5, 1])
    planned = plan_for(model, schedule, check=False, class_labels=(2,), batch=2, guidance_batch=1)
    bundle = publish(planned, tmp_path / "engine")
    assert bundle.manifest.plan.table_classes == (2, 10)
    assert [variant.name for variant in bundle.manifest.plan.variants] == ["v00", "guidance"]
    check(bundle.path, label=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"guidance": False, "guidance_batch": 1},
            "--guidance-batch 1: .* has no guidance here, so there are no halves",
        ),
        ({"guidance_batch": 3}, "--guidance-batch 3: guidance has two halves; give 1 or 2"),
    ],
)
def test_what_does_not_go_together_is_refused(model: Path, options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        plan_export(str(model), schedule_for(model), ExportOptions(**options))


def test_a_model_distilled_from_guidance_is_refused(tmp_path: Path):
    flux_transformer(layers=1).save_pretrained(tmp_path / "flux")
    schedule = schedule_for(tmp_path / "flux", sampler="flow-euler", ratio=0)
    with pytest.raises(UserError, match="--guidance-batch 1: .* is distilled from guidance, so there are no halves"):
        plan_export(str(tmp_path / "flux"), schedule, ExportOptions(height=32, width=32, guidance_batch=1))


@pytest.mark.slow  # a trace of its own
def test_a_unet_by_its_blocks(tmp_path: Path):
    model = save_unet(tmp_path / "unet")
    planned = plan_for(model, random_guidance(schedule_for(model), 5), check=False, guidance_batch=1)
    for layout in ("variants", "segments"):
        check(publish(in_layout(planned, layout), tmp_path / layout).path)


@pytest.mark.slow  # a trace of its own
def test_ranges_go_with_conditional_only_evaluations(model: Path, tmp_path: Path):
    planned = plan_for(model, guided(schedule_for(model)), guidance_batch=1, batch=Range(min=1, opt=1, max=2))
    check(publish(planned, tmp_path / "engine").path)
