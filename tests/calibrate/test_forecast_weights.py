"""Weights of stored values that are fitted to the schedule as it runs, and calibrated schedules with a forecast."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dipgo_deploy.calibrate.core import CalibrationOptions, Group, Launch
from dipgo_deploy.calibrate.fit import calibrate, launched
from dipgo_deploy.calibrate.forecast_weights import ReadWeights
from dipgo_deploy.cli.calibrate import main
from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.forecast import FittedForecast, RuleForecast
from dipgo_deploy.search.evaluate import full_latents, sample
from dipgo_deploy.search.problem import Pair, Problem, with_schedule

SMALL = CalibrationOptions(images=8, held_aside=0.25, batch=3)
GATES = ((True,) * 3, (True, False, True), (True,) * 3, (False,) * 3, (True, False, False))
LINE = RuleForecast(kind="taylor", order=1)


def schedule_of(problem: Problem) -> Schedule:
    return problem.target.schedule(GATES, "by hand", {}).with_forecast(LINE)


class Recorded:
    """Three values stored and what is computed, as a model of one block would give them."""

    def __init__(self, weights: tuple[float, ...], noise: float) -> None:
        rng = np.random.default_rng(0)
        self._stored = {
            row: [[torch.from_numpy(rng.standard_normal((2, 5)))] for _ in range(3)] for row in range(0, 40, 2)
        }
        self._weights, self._noise, self._rng = weights, noise, rng

    def removed(self, place: int) -> list[int]:
        return [4] if place == 1 else []

    def stored(self, place: int, group: Group) -> dict:
        return {4: self._stored[group.rows.start]}

    def computed(self, place: int, launch: Launch, group: Group, latents: np.ndarray) -> dict:
        values = [tensors[0] for tensors in self._stored[group.rows.start]]
        total = sum(weight * value for weight, value in zip(self._weights, values, strict=True))
        return {4: [total + self._noise * torch.from_numpy(self._rng.standard_normal(total.shape))]}


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-6), (0.05, 0.02)])
def test_weights_that_there_are_are_found(noise: float, tolerance: float) -> None:
    true = (1.5, -0.75, 0.25)
    weights = ReadWeights(3, 6)
    groups = [Group((), None, slice(row, row + 2), row >= 30) for row in range(0, 40, 2)]
    batches = [(group, np.zeros(0)) for group in groups]
    model, launch = Recorded(true, noise), Launch(1.0, 0, True)
    weights.fit(model, 0, launch, batches)  # type: ignore[arg-type]
    assert weights.weights_of(1, 4, (0,)) == (1.0,)  # until they are fitted
    weights.fit(model, 1, launch, batches)  # type: ignore[arg-type]
    np.testing.assert_allclose(weights.weights_of(1, 4, (0,)), true, atol=tolerance)
    made = weights.forecast({"images": 40})
    assert [len(cell) for cell in made.weights[1]] == [0, 0, 0, 0, 3, 0] and made.weights[0] == ((),) * 6
    assert made.provenance["mean_residual"] == pytest.approx(noise / 1.7, abs=0.02)


@pytest.mark.parametrize("fit", [False, True])
def test_a_calibrated_schedule_keeps_its_forecast(problem: Problem, fit: bool) -> None:
    schedule = schedule_of(problem)
    at_work = with_schedule(problem, schedule)
    fitted = calibrate(at_work, schedule, SMALL, fit_forecast=fit)
    # The evaluation of no block stays: its prediction is a new one.
    assert fitted.gates == GATES and fitted.format_version == 3
    if fit:
        assert isinstance(fitted.forecast, FittedForecast)
        assert [len(cell) for cell in fitted.forecast.weights[3]] == [2, 2, 2]
        assert fitted.forecast.provenance["images"] == 8
    else:
        assert fitted.forecast == LINE.at(range(5))
    pairs = [Pair(place % 2, 77_000 + place) for place in range(4)]
    wanted = full_latents(problem, pairs)
    got, before = (sample(with_schedule(problem, one), one.gates, pairs) for one in (fitted, schedule))
    assert (got - wanted).norm() < (before - wanted).norm()
    residual = fitted.solver.provenance["residuals"][-1]
    assert float((got - wanted).norm() / wanted.norm()) < 3 * residual + 1e-3


def test_without_a_rule_there_is_nothing_to_fit(problem: Problem) -> None:
    schedule = schedule_of(problem).with_forecast(None)
    with pytest.raises(UserError, match="no forecast by a rule"):
        calibrate(problem, schedule, SMALL, fit_forecast=True)


def test_conditional_only_evaluations_are_refused_before_anything_is_loaded(
    problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = schedule_of(problem).with_forecast(None).with_guidance([1, 1, 1, 1, 0])
    schedule.save(tmp_path / "schedule.json")
    given = ["--model", "nowhere", "--schedule", str(tmp_path / "schedule.json"), "--forecast", "weights"]
    assert main([*given, "-o", str(tmp_path / "fitted.json")]) == 2
    assert "fitted weights of a forecast do not go with conditional-only" in capsys.readouterr().err
    with pytest.raises(UserError, match="fitted weights of a forecast do not go with conditional-only"):
        launched(problem, schedule.with_forecast(LINE), fit_forecast=True)
