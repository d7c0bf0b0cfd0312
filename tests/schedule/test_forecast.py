"""Forecasts: weights by rule against diffusers' TaylorSeer and HiCache's formula; what a document may say of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.polynomial.hermite import hermval

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Schedule, json_schema
from dipgo_deploy.schedule.forecast import FittedForecast, RuleForecast, reads, stored_before

# Block 0 is stored at 0, 2, 3 and 6, block 1 at 0 and 4.
GATES = [[True, True], [False, False], [True, False], [True, False], [False, True], [False, False], [True, False]]
GATES = [*GATES, [False, False]]


def with_forecast(document: dict[str, Any], **forecast: Any) -> dict[str, Any]:
    return {**document, "format_version": 3, "forecast": forecast}


@pytest.mark.parametrize("order", [1, 2])
def test_taylor_is_what_diffusers_predicts(order: int) -> None:
    """Its hook's state, fed with random features at uneven steps, in the order of its forward."""
    torch = pytest.importorskip("torch")
    from diffusers.hooks.taylorseer_cache import TaylorSeerState

    rule = RuleForecast(kind="taylor", order=order)
    generator = torch.Generator().manual_seed(0)
    for block in (0, 1):
        state = TaylorSeerState(taylor_factors_dtype=torch.float64, max_order=order)
        held: dict[int, Any] = {}
        compared = 0
        for step, (row, stored) in enumerate(zip(GATES, stored_before(GATES), strict=True)):
            state.current_step = step
            if row[block]:
                held[step] = torch.randn(4, generator=generator, dtype=torch.float64)
                state.update((held[step],))
                continue
            weights = rule.weights_of(step, block, stored[block])
            total = sum(weight * held[at] for weight, at in zip(weights, stored[block], strict=False))
            torch.testing.assert_close(total, state.predict()[0], rtol=1e-12, atol=1e-12)
            compared += 1
        assert compared > 2


def test_hermite_is_hicaches_formula() -> None:
    """Derivatives by backward differences, each with sigma^i H_i(sigma x) / i!."""
    sigma, stored, step = 0.7, (10, 6, 2), 13
    values = np.random.default_rng(0).standard_normal(3)
    first = [(values[0] - values[1]) / 4, (values[1] - values[2]) / 4]
    derivatives = [values[0], first[0], (first[0] - first[1]) / 4]
    expected = sum(
        derivative * sigma**i * hermval(sigma * (step - stored[0]), [0] * i + [1]) / math.factorial(i)
        for i, derivative in enumerate(derivatives)
    )
    weights = RuleForecast(kind="hermite", order=2, contraction=sigma).weights_of(step, 0, stored)
    assert np.dot(weights, values) == pytest.approx(expected, rel=1e-12)


def test_a_line_is_forecast_exactly_and_fewer_values_are_used_as_far_as_they_go() -> None:
    rule = RuleForecast(kind="taylor", order=2)
    table = list(reads(rule, GATES))
    assert table[1] == ((1.0,), (1.0,)) and table[5][1] == (1.25, -0.25) and table[0] == ((), ())
    assert len(table[7][0]) == 3
    for row, stored in zip(table, stored_before(GATES), strict=True):
        for weights, at in zip(row, stored, strict=True):
            assert not weights or sum(weights) == pytest.approx(1)
            assert len(weights) <= len(at)
    facts = rule.facts(GATES)
    assert facts == {"kind": "taylor", "order": 2, "reads": 10, "short_reads": 7}
    assert "7 come before enough values are stored" in rule.summary(GATES)


def test_positions_stand_for_the_evaluations() -> None:
    """What is left of a schedule is extrapolated on the same axis, and only distances count."""
    whole = RuleForecast(kind="taylor", order=1)
    part = whole.at([0, 2, 4, 7])
    assert part.weights_of(3, 0, (2, 0)) == whole.weights_of(7, 0, (4, 0))
    back = RuleForecast(kind="taylor", order=1, positions=(999.0, 777.0, 555.0, 222.0))
    assert back.weights_of(3, 0, (2, 0)) == pytest.approx(whole.weights_of(7, 0, (4, 0)))


def test_a_document_with_a_forecast_is_read_and_written(document: dict[str, Any], tmp_path: Path) -> None:
    weights = [[[], [], []], [[0.9], [], [1.0]], [[], [0.5, 0.25][:1], []], [[1.25, -0.25], [], [2, -1]]]
    for forecast in (
        {"kind": "taylor", "order": 2},
        {"kind": "hermite", "order": 1, "contraction": 0.5, "positions": [0, 2, 5, 6]},
        {"kind": "weights", "weights": weights, "provenance": {"images": 4}},
    ):
        schedule = Schedule.from_json(json.dumps(with_forecast(document, **forecast)))
        schedule.save(tmp_path / "s.json")
        assert Schedule.load(tmp_path / "s.json") == schedule
        text = (tmp_path / "s.json").read_text()
        jsonschema.validate(json.loads(text), json_schema())
        plain = schedule.with_forecast(None)
        assert json.loads(plain.to_json()) == json.loads(Schedule.from_json(json.dumps(document)).to_json())
        assert plain.with_forecast(schedule.forecast) == schedule
        assert {"format_version", "forecast.kind"} <= set(plain.diff(schedule).fields)
    with pytest.raises(UserError, match="evaluation 2, block down_blocks.0: reads the last 2 values, and 1"):
        schedule.at([0, 1, 3])  # what is read there would be gone
    assert "[ [ 1.25, -0.25 ], [], [ 2.0, -1.0 ] ]" in text  # an evaluation is one line
    assert schedule.at([0, 2, 3]).forecast.weights[2] == ((1.25, -0.25), (), (2.0, -1.0))


@pytest.mark.parametrize(
    ("forecast", "message"),
    [
        ({"kind": "taylor"}, "forecast.taylor.order"),
        ({"kind": "taylor", "order": 3}, "forecast.taylor.order"),
        ({"kind": "lagrange", "order": 1}, "forecast"),
        ({"kind": "taylor", "order": 1, "contraction": 0.5}, "forecast.contraction: belongs to the kind hermite"),
        ({"kind": "hermite", "order": 1}, "forecast.contraction"),
        ({"kind": "hermite", "order": 1, "contraction": 1.5}, "forecast.hermite.contraction"),
        ({"kind": "taylor", "order": 1, "positions": [0, 1, 2]}, "3 for 4 evaluations"),
        ({"kind": "taylor", "order": 1, "positions": [0, 2, 1, 3]}, "rise, or fall"),
        (
            {"kind": "taylor", "order": 1, "positions": [0, 1e-6, 1e-5, 9]},
            "block down_blocks.0: the weight .* beyond 1000",
        ),
        ({"kind": "weights", "weights": [[[]] * 3] * 3}, "3 rows for 4 evaluations"),
        ({"kind": "weights", "weights": [[[]] * 3] * 3 + [[[]] * 2]}, "evaluation 3 has 2 lists for 3 blocks"),
        ({"kind": "weights", "weights": [[[]] * 3] * 3 + [[[], [1], []]]}, "mid_block: is computed there"),
        (
            {"kind": "weights", "weights": [[[]] * 3, [[1, 2], [], []], *[[[]] * 3] * 2]},
            "evaluation 1, block down_blocks.0: reads the last 2 values, and 1 were stored",
        ),
        ({"kind": "weights", "weights": [[[]] * 3, [[1e4], [], []], *[[[]] * 3] * 2]}, "the weight 10000"),
        ({"kind": "weights", "weights": [[[]] * 3, [["1"], [], []], *[[[]] * 3] * 2]}, "not a number"),
        ({"kind": "weights", "weights": [[[]] * 3, [1, [], []], *[[[]] * 3] * 2]}, "not a list of weights"),
        ({"kind": "weights", "weights": [[[1] * 33]] * 4}, "more than the 32 values"),
        ({"kind": "weights", "weights": [[[]] * 9] * 4}, "forecast.weights.0: 9 entries"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(document: dict[str, Any], forecast: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Schedule.from_json(json.dumps(with_forecast(document, **forecast)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(number: float) -> None:
    gates = [[True], [False]]
    with pytest.raises(UserError, match="not finite"):
        FittedForecast(kind="weights", weights=[[[]], [[number]]]).check(gates, ["block"])


def test_an_older_version_has_none(document: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="format_version: 1 has no forecast; give 3"):
        Schedule.model_validate({**document, "forecast": {"kind": "taylor", "order": 1}})


def test_a_guided_evaluation_reads_what_was_stored_since_a_conditional_only_one(document: dict[str, Any]) -> None:
    gates = [[True], [True], [True], [True], [False], [False]]
    alone = [False, False, True, False, False, True]
    known = [values for (values,) in stored_before(gates, alone)]
    assert known == [(), (0,), (1, 0), (), (3,), (3, 2, 1, 0)]
    rule = RuleForecast(kind="taylor", order=1)
    assert [row[0] for row in reads(rule, gates, alone)][4:] == [(1.0,), (3.0, -2.0)]
    assert rule.facts(gates, alone)["short_reads"] == 1
    schedule = Schedule(**document)
    gates = [[True] * 3, [True] * 3, [True, False, True], [True, False, True]]
    guided = schedule.with_gates(gates).with_guidance([1, 1, 0, 0])
    assert guided.with_forecast(rule).forecast_line == "taylor, order 1, of 2 reads"
    fitted = FittedForecast(kind="weights", weights=[[[], [], []]] * 2 + [[[], [0.5, 0.5], []]] * 2)
    with pytest.raises(UserError, match="guidance: fitted weights of a forecast do not go with conditional-only"):
        guided.with_forecast(fitted)
