"""Two sides of a loop, each on its own way and crosswise: engine directories, the model, the stock pipeline."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from node_defects import behind
from seeded_defects import replaced
from tiny_engines import changed, schedule_for, write

from dipgo_deploy.backends.base import Backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.cli.compare import main
from dipgo_deploy.compare.cross import compare_sides
from dipgo_deploy.compare.metrics import Tolerance
from dipgo_deploy.compare.report import Report
from dipgo_deploy.compare.sides import EngineSide, Side, given_to
from dipgo_deploy.compare.stock import Case, StockRun, _steps_seen
from dipgo_deploy.compare.torch_sides import ModelSide, StockSide
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, in_layout, plan_export, replan
from dipgo_deploy.reference.load import load_reference
from dipgo_deploy.schedule.forecast import RuleForecast

TOLERANCE = Tolerance(1e-4)


@pytest.fixture(scope="module")
def planned(dit_folder: Path) -> PlannedExport:
    options = ExportOptions(timestep_tables=False, layout="variants")
    return plan_export(str(dit_folder), schedule_for(dit_folder, seed=1), options)


@pytest.fixture(scope="module")
def engines(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Directories of one trace: ``variants`` or ``segments``, ``full`` where nothing is skipped, with a forecast."""
    made: dict[str, Bundle] = {}
    folder = tmp_path_factory.mktemp("sides")

    def get(name: str) -> Bundle:
        if name not in made:
            schedule = planned.schedule
            if "forecast" in name:
                schedule = schedule.with_forecast(RuleForecast(kind="taylor", order=1))
            if "full" in name:
                schedule = schedule.with_gates(tuple((True,) * len(row) for row in schedule.gates))
            layout = "segments" if "segments" in name else "variants"
            export = in_layout(replan(planned, schedule), layout)
            if name != "full":  # a VAE is enough in one
                export = replace(export, options=replace(export.options, components=False))
            made[name] = Bundle.open(write(export, folder / name))
        return made[name]

    return get


def compared(bundle: Bundle, reference: Side, backend: Backend, *, cross: bool = False) -> Report:
    given = given_to(bundle, backend, guidance_scale=3.0)
    return compare_sides(EngineSide(bundle, backend), reference, given, TOLERANCE, cross=cross)


@pytest.mark.parametrize("name", ["variants", "segments", "variants-forecast", "segments-forecast"])
def test_an_engine_directory_is_the_model_s_loop_straight_and_crosswise(
    name: str, engines: Callable[[str], Bundle], backend: Backend
) -> None:
    bundle = engines(name)
    report = compared(bundle, ModelSide(load_reference(bundle)), backend, cross=True)
    assert report.first_failure() is None
    assert len(report.loop) == len(bundle.manifest.plan.launches) or "segments" in name
    tensors = [tensor for checked in report.loop for tensor in checked.tensors]
    assert any(tensor.name.startswith("new_residual.") for tensor in tensors)
    for tensor in tensors:
        # The whole difference is at most what is made and what is inherited together.
        assert tensor.made is not None and tensor.carried is not None
        assert tensor.relative <= 1.01 * (tensor.made + tensor.carried) + 1e-7


def test_a_directory_beside_itself_and_in_another_layout(engines: Callable[[str], Bundle], backend: Backend) -> None:
    bundle = engines("variants")
    report = compared(bundle, EngineSide(bundle, backend), backend, cross=True)
    assert report.passed and all(t.relative == t.made == t.carried == 0 for c in report.loop for t in c.tensors)
    report = compared(bundle, EngineSide(engines("segments"), backend, "the segments"), backend, cross=True)
    assert report.passed and report.reference == "the segments"


def test_what_an_evaluation_makes_is_told_from_what_it_inherits(
    engines: Callable[[str], Bundle], backend: Backend, tmp_path: Path
) -> None:
    """One graph of several is wrong: later evaluations of the others inherit it, and make nothing."""
    sound = engines("variants")
    plan = sound.manifest.plan
    first = plan.launches[1]
    wrong = {launch.step for launch in plan.launches if launch.variant == first.variant}
    later = {launch.step for launch in plan.launches if launch.step > first.step} - wrong
    assert later
    bad = replaced(tmp_path / "bad", sound.path)
    path = bad / plan.variants[first.variant].graph.file
    model = onnx.load(path, load_external_data=False)
    behind("Softmax", [("Mul", [1.2], {})])(model.graph, path.parent)
    path.unlink()
    path.write_bytes(model.SerializeToString())
    for reference in (EngineSide(sound, backend), ModelSide(load_reference(sound))):
        report = compared(Bundle(bad, sound.manifest), reference, backend, cross=True)
        failing = {checked.step for checked in report.loop if not checked.passed}
        assert failing == wrong
        for checked in report.loop:
            prediction = checked.tensors[-1]
            assert (prediction.made > 1e-4) == (checked.step in wrong), prediction
            assert (prediction.carried > 1e-4) == (checked.step > first.step), prediction
        # The results are judged by the whole of it.
        assert list(report.failures())[-1].startswith("loop, after the last evaluation, ")
    straight = compared(Bundle(bad, sound.manifest), EngineSide(sound, backend), backend)
    assert later <= {checked.step for checked in straight.loop if not checked.passed}


def test_the_stock_pipeline_shows_what_a_schedule_leaves_out(
    engines: Callable[[str], Bundle], backend: Backend
) -> None:
    full, pruned = engines("full"), engines("variants")
    reference = load_reference(full)
    case = Case("class", labels=(0,), guidance_scale=3.0)
    stock = StockSide(full.manifest, reference, case)
    report = compared(full, stock, backend)
    assert report.first_failure() is None and report.reference == "the stock pipeline"
    assert report.results is not None
    assert [tensor.name for tensor in report.results.tensors] == ["latents", "images"]
    assert [tensor.name for tensor in report.loop[-1].tensors] == ["latent", "noise_pred"]
    report = compared(pruned, stock, backend, cross=True)
    first, *rest = report.loop
    assert first.passed and not all(checked.passed for checked in rest)
    # Crosswise the model itself runs on the engine's latent, so an evaluation that skips nothing makes no error.
    gates = pruned.load_schedule().gates
    for checked in report.loop:
        assert checked.step is not None
        if all(gates[checked.step]):
            assert checked.tensors[-1].made < 1e-4


def test_a_stock_pipeline_still_sees_what_its_scheduler_takes() -> None:
    """Without the generator a stochastic sampler would draw other noise."""
    scheduler, run = EulerAncestralDiscreteScheduler(), StockRun()
    scheduler.set_timesteps(2)
    before = inspect.signature(scheduler.step).parameters.keys()
    latent = torch.ones(1, 1, 2, 2)
    with _steps_seen(scheduler, run):
        assert inspect.signature(scheduler.step).parameters.keys() == before >= {"generator"}
        scaled = scheduler.scale_model_input(torch.cat([latent] * 2), scheduler.timesteps[0])
        generator = torch.Generator().manual_seed(1)
        scheduler.step(2 * latent, scheduler.timesteps[0], latent, generator=generator)
    assert inspect.signature(scheduler.step).parameters.keys() == before and "step" not in vars(scheduler)
    ((timestep, seen, prediction),) = run.steps
    assert timestep == float(scheduler.timesteps[0]) and np.array_equal(seen, scaled[1:].numpy())
    assert (prediction == 2).all()


def test_sides_that_do_not_go_together_are_refused(
    engines: Callable[[str], Bundle], backend: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = engines("variants")
    fewer = EngineSide(bundle, backend)
    fewer.rows = 3
    with pytest.raises(UserError, match=r"has 3 evaluations, \S+ on cpu has 6; give sides of the same sampler"):
        compared(bundle, fewer, backend)
    other = changed(bundle.path, tmp_path / "other", lambda manifest: manifest["model"].update(class_name="Other"))
    assert main(["--engine-dir", str(bundle.path), "--against", str(other)]) == 2
    assert f"--against {other}: its model is Other, that of {bundle.path} is DiT" in capsys.readouterr().err


def test_the_command(engines: Callable[[str], Bundle], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = engines("variants").path
    junit = tmp_path / "x.xml"
    assert main(["--engine-dir", str(path), "--against", "cpu", "--cross", "--json", "--junit", str(junit)]) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert facts["passed"] and facts["against"] == facts["reference"] == f"{path} on cpu"
    assert facts["models"]["against"] == facts["models"]["engine_dir"] and facts["tolerances"][0]["relative"] == 1e-4
    assert "inherited" in printed.err and junit.is_file()
    segments = engines("segments").path
    assert main(["--engine-dir", str(path), "--against", str(segments), "--tolerance", "0"]) == 1
    assert f"against {segments} on cpu, above 0" in capsys.readouterr().err
    for options, line in (
        (["--against", "nowhere"], "--against nowhere: no such folder; give model, stock, cpu, cuda"),
        (["--cross", "--variants-only"], "--variants-only: not with --against or --cross"),
        (["--against", "cpu", "--bisect", str(tmp_path / "new")], "--bisect goes with --against ENGINE_DIR only"),
    ):
        assert main(["--engine-dir", str(path), *options]) == 2
        assert line in capsys.readouterr().err


def test_conditions_are_the_reference_s(engines: Callable[[str], Bundle], backend: Backend) -> None:
    """What a directory makes itself is what the model in torch is given."""
    bundle = engines("variants")
    given = given_to(bundle, backend, labels=(2,), guidance_scale=3.0, seed=4)
    inputs = load_reference(bundle).inputs(bundle.manifest, labels=(2,), guidance_scale=3.0, seed=4)
    assert np.array_equal(given.latents, inputs.latents.numpy()) and given.guidance_scale == 3.0
    assert given.conditions.keys() == inputs.conditions.keys()
    for name, rows in given.conditions.items():
        assert np.array_equal(rows, inputs.conditions[name].numpy())
