"""What a schedule is said to be worth, against the samplers themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.sampler import make_scheduler, sampler_matrix
from dipgo_deploy.schedule import builders
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.worth import worth_of


def uniform(model: str, sampler: str, steps: int, interval: int) -> Schedule:
    target = schedule_target(model, sampler, steps)
    gates = builders.uniform(target.steps, len(target.blocks), interval)
    return target.schedule(gates, "uniform", {"interval": interval})


@pytest.mark.parametrize(("interval", "steps"), [(100, 1), (10, 5), (25, 2)])
def test_whole_evaluations_of_ddim_are_fewer_steps_of_it(interval: int, steps: int) -> None:
    worth = worth_of(uniform("fashion-sd", "ddim", 50, interval))
    assert worth.plain_steps == steps
    assert f"equals {steps} plain DDIM step" in worth.line
    assert worth.evaluations == pytest.approx(steps)


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_that_is_what_the_sampler_does(sampler: str) -> None:
    """With a repeated prediction the latent goes on along one line: the coefficients depend on the ends alone."""
    schedule = uniform("fashion-sd", sampler, 20, 5)
    assert worth_of(schedule).plain_steps == 4
    scheduler = make_scheduler(schedule.sampler.class_name, schedule.sampler.config)
    matrix = sampler_matrix(scheduler, 20, tuple(step // 5 for step in range(20)))
    scheduler.set_timesteps(20)
    if sampler == "ddim":
        alphas = scheduler.alphas_cumprod.double().numpy()[matrix.timesteps.astype(int)]
        alphas = np.append(alphas, float(scheduler.final_alpha_cumprod))
        sigmas = np.sqrt(1 / alphas - 1)
        scales = np.sqrt(alphas)
    else:
        sigmas = scheduler.sigmas.double().numpy()
        scales = np.ones_like(sigmas)
    ends = [0, 5, 10, 15, 20]
    steps = np.diff(sigmas[ends]) * scales[20]  # one long Euler step in the variable latent / scale each
    np.testing.assert_allclose(matrix.final[1:], steps, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "sampler", "words"),
    [
        ("fashion-sd", "pndm", "costs what 11 of 51 plain evaluations cost (PNDM makes something else"),
        ("fashion-sd", "dpm++2m", "costs what 10 of 50 plain evaluations cost (DPMSolverMultistep makes"),
        # The head of a transformer sees the timestep: an evaluation without a block is no repetition.
        ("fashion-dit", "ddim", "costs what about 10.0 of 50 plain evaluations cost; compare pictures"),
    ],
)
def test_other_schedules_are_no_fewer_steps(model: str, sampler: str, words: str) -> None:
    worth = worth_of(uniform(model, sampler, 50, 5))
    assert worth.plain_steps is None
    assert words in worth.line
    assert "\n" not in worth.line


def test_a_fitted_solver_costs_its_launches_and_is_not_the_full_run(document: dict[str, Any]) -> None:
    solver = {"timesteps": [900, 100], "rows": [[1, 0, 0], [1, 1, 0]], "final": [1, 1, 1]}
    changed = {**document, "format_version": 2, "steps": 2, "solver": solver}
    whole, partly = (worth_of(Schedule.model_validate({**changed, "keep": ["111", row]})) for row in ("111", "101"))
    assert whole.plain_steps is None and whole.evaluations == 2
    assert "costs what 2 plain evaluations cost, with weights fitted to a full run" in whole.line
    assert "costs what about 1.7 plain evaluations cost" in partly.line


def test_v_prediction_is_not_along_one_line(document: dict[str, Any]) -> None:
    document["keep"] = ["111", "000", "111", "000"]
    assert worth_of(Schedule.model_validate(document)).plain_steps == 2
    document["sampler"]["config"]["prediction_type"] = "v_prediction"
    assert worth_of(Schedule.model_validate(document)).plain_steps is None


def test_partial_and_full_runs(document: dict[str, Any]) -> None:
    assert "about 2.0 of 4 plain evaluations" in worth_of(Schedule.model_validate(document)).line
    full = Schedule.model_validate({**document, "keep": ["111"] * 4})
    assert worth_of(full).line == "worth: the full run, nothing is saved"
    # What the plan says goes before what the gates say.
    plan = worth_of(Schedule.model_validate({**document, "keep": ["111", "000", "000", "111"]}), without_launch=[2])
    assert plan.plain_steps is None
