"""Calibration: a full schedule gets its sampler's rows back, a pruned one comes closer to the full run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dipgo_deploy.bundle.shapes import Range
from dipgo_deploy.calibrate.fit import CalibrationOptions, calibrate
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, export_bundle
from dipgo_deploy.integrations.diffusers import load_engines
from dipgo_deploy.runtime.noise import TorchNoise
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.schedule import builders
from dipgo_deploy.schedule.document import Gates, Schedule
from dipgo_deploy.search.evaluate import full_latents, sample
from dipgo_deploy.search.problem import Pair, Problem, with_reference, with_sampler, with_schedule

SMALL = CalibrationOptions(images=8, held_aside=0.25, batch=3)
FRESH = [Pair(place % 2, 77_000 + place) for place in range(6)]


def schedule_of(problem: Problem, gates: Gates) -> Schedule:
    return problem.target.schedule(gates, "by hand", {})


def uniform(problem: Problem, interval: int) -> Schedule:
    return schedule_of(problem, builders.uniform(problem.steps, len(problem.target.blocks), interval))


def error(problem: Problem, schedule: Schedule) -> float:
    """Relative error of the final latents of fresh images to the full run's."""
    wanted = full_latents(problem, FRESH)
    got = sample(with_schedule(problem, schedule), schedule.gates, FRESH)
    return float((got - wanted).norm() / wanted.norm())


def test_a_full_schedule_gets_its_samplers_rows_back(problem: Problem) -> None:
    schedule = uniform(problem, 1)
    fitted = calibrate(problem, schedule, SMALL)
    assert fitted.solver is not None and fitted.gates == schedule.gates
    np.testing.assert_allclose(fitted.solver.timesteps, problem.matrix.timesteps)
    assert max(fitted.solver.provenance["residuals"]) < 1e-4
    assert error(problem, fitted) < 1e-4


def test_a_pruned_schedule_comes_closer_on_other_images(unet_problem: Problem) -> None:
    schedule = uniform(unet_problem, 2)
    fitted = calibrate(unet_problem, schedule, SMALL)
    assert fitted.keep == ("1" * 5,) * 3  # evaluations in which no block runs are gone
    assert error(unet_problem, fitted) < 0.7 * error(unet_problem, schedule)


def test_blocks_that_are_removed_are_read_from_caches(problem: Problem) -> None:
    schedule = schedule_of(problem, ((True,) * 3, (True, False, True), (False,) * 3, (False, False, True), (True,) * 3))
    fitted = calibrate(problem, schedule, SMALL)
    assert fitted.keep == ("111", "101", "001", "111")
    assert error(problem, fitted) < error(problem, schedule)


def test_a_schedule_is_fitted_with_its_guidance(problem: Problem) -> None:
    gates = ((True,) * 3, (True, False, True), (True,) * 3, (False,) * 3, (True,) * 3)
    schedule = schedule_of(problem, gates).with_guidance([1, 0, 0.5, 1, 0])
    fitted = calibrate(problem, schedule, SMALL)
    assert fitted.guidance == (1, 0, 0.5, 0)  # evaluations in which no block runs are gone
    assert error(problem, fitted) < error(problem, schedule)
    assert error(problem, fitted) != error(problem, fitted.with_guidance(None))
    at_work, whole = with_schedule(problem, schedule), problem.costs
    own = at_work.costs.analyse(gates).cost / whole.step_cost
    assert own == pytest.approx(whole.analyse(gates).cost / whole.step_cost - 0.5 - _part(problem) / 2)


def _part(problem: Problem) -> float:
    """Of an evaluation that leaves the second block out, as a share of a whole one."""
    return 1 - problem.costs.gamma[1]


def test_it_is_the_same_again_and_after_an_interruption(problem: Problem, tmp_path: Path) -> None:
    schedule = uniform(problem, 2)
    whole = calibrate(problem, schedule, SMALL)

    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "full runs" and 0 < done < total:
            raise Stop

    with pytest.raises(Stop):
        calibrate(problem, schedule, SMALL, folder=tmp_path, report=stop)
    with pytest.raises(UserError, match="give --resume"):
        calibrate(problem, schedule, SMALL, folder=tmp_path)
    with pytest.raises(UserError, match="was begun with seed 0, now it is 5"):
        other = CalibrationOptions(images=8, held_aside=0.25, batch=3, seed=5)
        calibrate(problem, schedule, other, folder=tmp_path, resume=True)
    stages: list[tuple[str, int]] = []
    again = calibrate(
        problem,
        schedule,
        SMALL,
        folder=tmp_path,
        resume=True,
        report=lambda stage, done, _: stages.append((stage, done)),
    )
    assert again == whole
    assert stages[0] == ("full runs", 3)  # the images that were done are not made again


def test_several_guidance_scales_are_fitted_together(problem: Problem) -> None:
    options = CalibrationOptions(images=8, held_aside=0.25, guidance_scales=(1.5, 3.0))
    fitted = calibrate(problem, uniform(problem, 2), options)
    assert fitted.solver is not None and fitted.solver.provenance["guidance_scales"] == (1.5, 3.0)


def test_noise_that_the_sampler_draws_is_a_column(problem: Problem) -> None:
    stochastic = with_sampler(problem, "euler-a", 4)
    fitted = calibrate(stochastic, uniform(stochastic, 1), SMALL)
    assert fitted.solver is not None and fitted.solver.noises == stochastic.matrix.noises > 0
    assert error(stochastic, fitted) < 1e-4


def test_a_finer_run_may_be_the_reference(problem: Problem) -> None:
    fitted = calibrate(with_reference(problem, "ddim", 20), uniform(problem, 2), SMALL)
    assert fitted.solver is not None
    assert fitted.solver.provenance["reference"]["num_inference_steps"] == 20


def test_too_few_images_are_refused(problem: Problem) -> None:
    with pytest.raises(UserError, match="--images 2"):
        calibrate(problem, uniform(problem, 2), CalibrationOptions(images=2))


def test_more_than_the_disk_has_is_refused_before_anything_is_written(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=8 * 4 * 256 * 10))
    with pytest.raises(UserError, match="8 images need .* GiB in files, and .* are free"):
        calibrate(problem, uniform(problem, 1), SMALL, folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def partly_fitted(problem: Problem) -> Schedule:
    gates = ((True,) * 3, (True, False, True), (False,) * 3, (False, False, True), (True,) * 3)
    return calibrate(problem, schedule_of(problem, gates), SMALL)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("variants", "fp32"),
        ("segments", "fp16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("variants", "fp16"), ("variants", "bf16"), ("segments", "fp32"), ("segments", "bf16")]
        ),
    ],
)
def test_an_export_of_it_is_its_supernets_loop(
    partly_fitted: Schedule, dit_folder: Path, tmp_path: Path, layout: Any, dtype: str
) -> None:
    from family_checks import loop_report

    options = ExportOptions(layout=layout, dtype=dtype, components=False, check=False)
    bundle = export_bundle(str(dit_folder), partly_fitted, tmp_path / "engine", options)
    plan, solver = bundle.manifest.plan, partly_fitted.solver
    assert plan.evaluations == 4 and solver is not None
    rows = {launch.step: launch.coefficients for launch in plan.launches if launch.coefficients}
    assert rows == dict(enumerate(solver.rows)) and plan.final == solver.final
    if dtype != "bf16":  # which ONNX Runtime's CPU provider cannot run
        report = loop_report(tmp_path / "engine")
        assert report.first_failure() is None and report.results is not None


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "dipgo_deploy.runtime.pipeline"]


def test_an_export_of_it_with_open_sizes_runs_at_all_of_them(
    partly_fitted: Schedule, dit_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond what it was fitted to it runs, and says so once; in a stock pipeline, too."""
    from diffusers import DiTPipeline

    options = ExportOptions(batch=Range(min=1, opt=2, max=3), check=False, components=False)
    bundle = export_bundle(str(dit_folder), partly_fitted, tmp_path / "engine", options)
    pipeline = Pipeline.from_engine_dir(bundle.path, "cpu", threads=1)
    three = pipeline(class_labels=[0, 2, 0], guidance_scale=3.0, output_type="latent", seed=5).latents
    assert not said(caplog)
    noise = TorchNoise(5).randn((3, *three.shape[1:]))
    one = pipeline(class_labels=2, guidance_scale=3.0, output_type="latent", latents=noise[1:2]).latents
    np.testing.assert_allclose(one, three[1:2], atol=1e-4)
    for _ in range(2):
        pipeline(class_labels=2, guidance_scale=5.0, output_type="latent")
    (line,) = said(caplog)
    assert "its solver was fitted to guidance 3, " in line and "this run has guidance 5: compare" in line
    caplog.clear()
    stock = DiTPipeline.from_pretrained(dit_folder)
    vae = stock.vae
    stock.set_progress_bar_config(disable=True)
    steps = partly_fitted.sampler.num_inference_steps
    with load_engines(stock, bundle.path, "cpu", threads=1):
        for scale in (3.0, 5.0):
            asked = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(5), "output_type": "pt"}
            drawn = stock([0, 2, 0], guidance_scale=scale, **asked).images
            latents = pipeline(class_labels=[0, 2, 0], guidance_scale=scale, output_type="latent", seed=5).latents
            with torch.no_grad():
                pictures = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample
            np.testing.assert_allclose(drawn, (pictures / 2 + 0.5).clamp(0, 1), atol=1e-4)
    assert said(caplog) == [line]


def test_a_lora_runs_on_it_and_is_said(
    partly_fitted: Schedule, dit_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As an export of the merged model under the same solver."""
    from diffusers import DiTPipeline
    from lora_files import diffusers_keys, make_updates, merge_into, save_lora

    options = ExportOptions(layout="variants", check=False, components=False)
    bundle = export_bundle(str(dit_folder), partly_fitted, tmp_path / "engine", options)
    stock = DiTPipeline.from_pretrained(dit_folder)
    updates = make_updates(stock.transformer, ["transformer_blocks.1.attn1.to_q", "transformer_blocks.2.ff.net.2"])
    file = save_lora(tmp_path / "lora.safetensors", updates, diffusers_keys("transformer."))
    merge_into(stock.transformer, updates, 0.5)
    stock.save_pretrained(tmp_path / "merged")
    merged = export_bundle(str(tmp_path / "merged"), partly_fitted, tmp_path / "other", options)
    asked: dict[str, Any] = {"class_labels": [0, 2], "guidance_scale": 3.0, "output_type": "latent"}
    plain = Pipeline.from_engine_dir(bundle.path, "cpu", threads=1)
    before = plain(**asked).latents
    assert not said(caplog)
    plain.load_lora(file, 0.5)
    wanted = Pipeline.from_engine_dir(merged.path, "cpu", threads=1)(**asked).latents
    got = plain(**asked).latents
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert np.abs(got - before).max() > 1e-3
    assert "no LoRA; this run has a LoRA" in said(caplog)[-1]


def test_it_is_refused_from_a_picture(partly_fitted: Schedule, dit_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--strength"):
        export_bundle(
            str(dit_folder), partly_fitted, tmp_path / "other", ExportOptions(layout="variants", strength=0.5)
        )
