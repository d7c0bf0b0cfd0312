"""Calibration with engines: the torch fit to rounding, and a directory that equals an export of the new schedule."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dipgo_deploy.backends import create_backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.self_test import SELF_TEST_NAME, has_self_test
from dipgo_deploy.calibrate.core import CalibrationOptions
from dipgo_deploy.calibrate.engines import (
    Conditions,
    calibrate_engines,
    check_pair,
    launches_of,
    plan_with,
    with_solver,
)
from dipgo_deploy.calibrate.fit import calibrate
from dipgo_deploy.cli.calibrate import main
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, export_bundle
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.schedule import builders
from dipgo_deploy.schedule.document import Gates, Schedule
from dipgo_deploy.schedule.solver import Solver
from dipgo_deploy.search.problem import Problem, with_sampler

SMALL = CalibrationOptions(images=8, guidance_scales=(3.0,), held_aside=0.25, batch=3)
LABELS = Conditions(class_labels=(0, 2))
PARTLY = ((True,) * 3, (True, False, True), (False, True, True), (False, False, True), (True,) * 3)


def schedule_of(problem: Problem, gates: Gates) -> Schedule:
    return problem.target.schedule(gates, "by hand", {})


def uniform(problem: Problem, interval: int) -> Schedule:
    return schedule_of(problem, builders.uniform(problem.steps, len(problem.target.blocks), interval))


def export(folder: Path, schedule: Schedule, target: Path, **options: Any) -> Bundle:
    chosen: dict[str, Any] = {"layout": "variants", "check": False, "components": False, **options}
    return export_bundle(str(folder), schedule, target, ExportOptions(**chosen))


@pytest.fixture(scope="module")
def full(problem: Problem, dit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(dit_folder, uniform(problem, 1), tmp_path_factory.mktemp("full") / "engine", batch=2)


@pytest.fixture(scope="module")
def half_folder(problem: Problem, dit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(dit_folder, uniform(problem, 2), tmp_path_factory.mktemp("half") / "engine").path


@pytest.fixture
def half(half_folder: Path, tmp_path: Path) -> Bundle:
    """Every second evaluation whole, the others of caches alone; a directory of the test's own."""
    return Bundle.open(shutil.copytree(half_folder, tmp_path / "half"))


def fitted(bundle: Bundle, full: Bundle, **options: Any) -> Schedule:
    return calibrate_engines(bundle, full, create_backend("cpu", threads=1), LABELS, SMALL, **options)


def latents(bundle: Bundle) -> np.ndarray:
    pipeline = Pipeline(bundle, create_backend("cpu", threads=1))
    return pipeline(class_labels=[0, 2], seed=9, guidance_scale=3.0, output_type="latent").latents


@pytest.fixture(scope="module")
def torch_fit(problem: Problem) -> Schedule:
    return calibrate(problem, schedule_of(problem, PARTLY), SMALL)


@pytest.mark.parametrize("layout", ["variants", "segments"])
def test_it_is_the_fit_of_torch_and_the_directory_an_export_of_it(
    problem: Problem, dit_folder: Path, full: Bundle, torch_fit: Schedule, tmp_path: Path, layout: Any
) -> None:
    """Whole and partly run evaluations, caches that are read two launches later, groups that batches do not divide."""
    target = tmp_path / "engine"
    before = export(dit_folder, schedule_of(problem, PARTLY), target, layout=layout, batch=2, self_test=True)
    assert has_self_test(before.manifest)
    graphs = {path: path.stat().st_ino for path in target.rglob("*.onnx*")}
    (target / "plans").mkdir()
    (target / "plans" / "engine.plan").write_bytes(b"built")
    new = fitted(before, full)
    after = with_solver(before, new)

    assert new.solver is not None and torch_fit.solver is not None
    assert new.gates == torch_fit.gates and new.solver.timesteps == torch_fit.solver.timesteps
    ours, theirs = new.solver.provenance, torch_fit.solver.provenance
    for name in ("seeds", "conditions_sha256", "guidance_scales", "held_aside", "latent"):
        assert ours[name] == theirs[name]
    assert ours["backend"] == "cpu"
    np.testing.assert_allclose(ours["residuals"], theirs["residuals"], rtol=1e-2, atol=1e-5)

    assert after.load_schedule() == new
    assert not has_self_test(after.manifest) and not (target / SELF_TEST_NAME).exists()  # of another loop
    assert {path: path.stat().st_ino for path in target.rglob("*.onnx*")} == graphs  # not copied, not written
    assert (target / "plans" / "engine.plan").read_bytes() == b"built"
    with pytest.raises(UserError, match="was replaced while it was in use"):
        before.check_unchanged()
    plain = export(dit_folder, new, tmp_path / "plain", layout=layout, batch=2)
    assert after.manifest == plain.manifest  # digests and seal, too

    # Weights of columns that nearly cancel may differ in what makes no difference: what they draw is compared.
    one, other = latents(after), latents(with_solver(plain, torch_fit))
    assert np.linalg.norm(one - other) < 1e-3 * np.linalg.norm(one)


def test_evaluations_that_are_not_launched_are_gone(half: Bundle) -> None:
    """A launch list of the evaluations 0, 2 and 4, the second of which predicts nothing."""
    plan = half.manifest.plan
    whole = [launch for launch in plan.launches if launch.step in (0, 2, 4)]
    slots = (1, None, 2)
    launches = tuple(
        launch.model_copy(update={"slot": slot, "coefficients": (1.0, 0.5, 0.0)})
        for launch, slot in zip(whole, slots, strict=True)
    )
    skipping = plan.model_copy(update={"launches": launches, "slots": 3, "final": (1.0, 0.5, 0.2)})
    solver = Solver(
        timesteps=(900.0, 500.5, 100.0),
        rows=((1.0, 0.0, 0.0, 0.0), (0.5, -0.5, 0.0, 0.0), (0.4, -0.2, 0.0, 0.0)),
        final=(0.3, -0.1, 0.0, -0.6),
    )
    changed = plan_with(skipping, solver, [0, 2, 4], dropped=2)
    assert [launch.step for launch in changed.launches] == [0, 1, 2] and changed.evaluations == 3
    assert [launch.timestep for launch in changed.launches] == [900.0, 500.5, 100.0]
    assert [launch.slot for launch in changed.launches] == list(slots)
    assert changed.launches[2].coefficients == (0.4, -0.2, 0.0)  # the column of the second evaluation has no slot
    assert changed.final == (0.3, -0.1, -0.6)
    assert changed.macs_schedule == plan.macs_run
    assert [launch.predicts for launch in launches_of(skipping, plan)] == [True, False, True]


def test_it_comes_closer_to_the_full_run_and_can_be_done_again(full: Bundle, half: Bundle, half_folder: Path) -> None:
    def error(bundle: Bundle) -> float:
        wanted = latents(full)
        return float(np.linalg.norm(latents(bundle) - wanted) / np.linalg.norm(wanted))

    after = with_solver(half, fitted(half, full))
    assert error(after) < error(Bundle.open(half_folder))
    again = fitted(after, full)
    assert again.solver is not None and after.load_schedule().solver is not None
    assert again.solver.rows == after.load_schedule().solver.rows
    with pytest.raises(UserError, match="was fitted to another launch list"):
        with_solver(after, Schedule.model_validate(fitted(full, full)))


def test_noise_draws_are_columns(problem: Problem, dit_folder: Path, tmp_path: Path) -> None:
    stochastic = with_sampler(problem, "euler-a", 4)
    whole = export(dit_folder, uniform(stochastic, 1), tmp_path / "whole")
    new = fitted(whole, whole)
    assert new.solver is not None and new.solver.noises == stochastic.matrix.noises > 0
    assert max(new.solver.provenance["residuals"]) < 1e-4
    after = with_solver(whole, new)
    assert after.manifest.plan.noises == new.solver.noises


def test_half_precision_engines_are_fitted_to_what_they_predict(
    problem: Problem, dit_folder: Path, full: Bundle, tmp_path: Path
) -> None:
    bundle = export(dit_folder, uniform(problem, 2), tmp_path / "engine", dtype="fp16")
    new = fitted(bundle, full)
    assert new.solver is not None
    assert new.solver.provenance["dtype"] == "fp16" and new.solver.provenance["reference"]["dtype"] == "fp32"
    assert with_solver(bundle, new).manifest.dtype == "fp16"


def test_it_goes_on_after_an_interruption(full: Bundle, half: Bundle, tmp_path: Path) -> None:
    whole = fitted(half, full)

    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "full runs" and 0 < done < total:
            raise Stop

    with pytest.raises(Stop):
        fitted(half, full, folder=tmp_path / "work", report=stop)
    assert fitted(half, full, folder=tmp_path / "work", resume=True) == whole


def test_a_reference_with_a_guidance_of_its_own_is_refused(
    full: Bundle, half: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = full.load_schedule()
    monkeypatch.setattr(Bundle, "load_schedule", lambda _: schedule.with_guidance([0.5] * schedule.steps))
    with pytest.raises(UserError, match="its schedule has a guidance of its own; export a full one"):
        check_pair(half, full)


def test_directories_that_do_not_go_together_are_refused(full: Bundle, half: Bundle) -> None:
    def changed(bundle: Bundle, **changes: Any) -> Bundle:
        return replace(bundle, manifest=bundle.manifest.model_copy(update=changes))

    with pytest.raises(UserError, match="its schedule leaves blocks out"):
        check_pair(half, half)
    with pytest.raises(UserError, match="another noise draws"):
        check_pair(half, changed(full, plan=full.manifest.plan.model_copy(update={"noises": 3})))
    with pytest.raises(UserError, match="another guidance"):
        check_pair(half, changed(full, guidance=False))
    with pytest.raises(UserError, match="another size"):
        check_pair(half, changed(full, latent=full.manifest.latent.model_copy(update={"height": 16})))
    with pytest.raises(UserError, match="--engine-dir .* was exported with --strength"):
        check_pair(changed(half, plan=half.manifest.plan.model_copy(update={"image_slot": 4})), full)
    alone = changed(full, guidance=False)
    scaled = CalibrationOptions(images=8, guidance_scales=(2.0,))
    with pytest.raises(UserError, match="without guidance; leave it out"):
        calibrate_engines(alone, alone, create_backend("cpu"), LABELS, scaled)


def test_the_command_needs_no_torch(
    full: Bundle, half: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--engine-dir", str(half.path), "--reference-engine-dir", str(full.path), "--images", "6"]
    assert main([*args, "--device", "cpu"]) == 2
    assert "--device: means nothing with --engine-dir" in capsys.readouterr().err
    assert main(args[:2]) == 2
    assert "--reference-engine-dir: is missing" in capsys.readouterr().err
    assert main(["--model", "x", "--backend", "cpu"]) == 2
    assert "--backend: means nothing without --engine-dir" in capsys.readouterr().err
    assert main(["--schedule", "x.json"]) == 2
    assert "--model: is missing" in capsys.readouterr().err
    assert main(args) == 2  # an export without components names no classes
    assert "--class-labels: is missing" in capsys.readouterr().err
    (half.path / "notes.txt").write_text("mine")
    assert main(args) == 2  # it could not be replaced after the fit
    assert "did not write (notes.txt)" in capsys.readouterr().err
    (half.path / "notes.txt").unlink()
    script = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['diffusers'] = sys.modules['transformers'] = None\n"
        "from dipgo_deploy.cli.calibrate import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    more = [
        "--class-labels",
        "0,2",
        "--backend",
        "cpu",
        "--threads",
        "1",
        "--batch",
        "4",
        "-o",
        str(tmp_path / "s.json"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *args, *more], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
    changed = Bundle.open(half.path)
    assert changed.load_schedule() == Schedule.load(tmp_path / "s.json")
    solver = changed.load_schedule().solver
    assert solver is not None and solver.provenance["images"] == 6
