"""The solver that a schedule carries: what it has to satisfy; documents with and without one are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Schedule, json_schema
from dipgo_deploy.schedule.solver import FittedTo, Solver

SOLVER: dict[str, Any] = {
    "timesteps": [901.0, 600.5, 300, 1],
    "rows": [[1.0, 0, 0, 0, 0], [2.0, -1.0, 0, 0, 0], [3.0, -1.0, -1.0, 0, 0], [4.0, -1.0, -1.0, -1.0, 0]],
    "final": [5.0, -1.0, -1.0, -1.0, -1.0],
    "provenance": {"images": 4},
}


def with_solver(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**document, "format_version": 2, "solver": {**SOLVER, **changes}}


def test_a_document_with_a_solver_is_read_and_written(document: dict[str, Any], tmp_path: Path) -> None:
    import jsonschema

    schedule = Schedule.from_json(json.dumps(with_solver(document)))
    assert schedule.solver is not None and schedule.solver.timesteps == (901.0, 600.5, 300.0, 1.0)
    schedule.save(tmp_path / "fitted.json")
    assert Schedule.load(tmp_path / "fitted.json") == schedule
    text = (tmp_path / "fitted.json").read_text()
    assert "[ 2.0, -1.0, 0.0, 0.0, 0.0 ]" in text  # a row of weights is one line
    jsonschema.validate(json.loads(text), json_schema())
    schedule.check_evaluations(50)  # the sampler's number does not count


def test_a_document_without_one_is_as_it_was(document: dict[str, Any]) -> None:
    text = Schedule.from_json(json.dumps(document)).to_json()
    assert "solver" not in text and json.loads(text)["format_version"] == 1


def test_it_is_put_in_and_taken_out(document: dict[str, Any]) -> None:
    plain = Schedule.from_json(json.dumps(document))
    fitted = Schedule.from_json(json.dumps(with_solver(document)))
    assert plain.with_solver(fitted.solver) == fitted and fitted.with_solver(None) == plain
    changed = {name for name in plain.diff(fitted).fields if name.startswith("solver")}
    assert {"solver.timesteps", "solver.rows", "solver.final"} <= changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": [901.0, 600.0, 300.0]}, "3 for 4 evaluations"),
        ({"timesteps": [901.0, 600.0, 300.0, -1.0]}, "-1 at evaluation 3 is no timestep"),
        ({"rows": SOLVER["rows"][:3]}, "3 rows for 4 evaluations"),
        ({"rows": [*SOLVER["rows"][:3], [4.0, -1.0]]}, "evaluation 3: 2 weights for 5 columns"),
        ({"rows": [*SOLVER["rows"][:3], [4.0, 0, 0, 0, 0.5]]}, "reads the prediction of evaluation 3, which does not"),
        ({"rows": [[1.0, 0.5, 0, 0, 0], *SOLVER["rows"][1:]]}, "evaluation 0 reads the prediction of evaluation 0"),
        ({"rows": [[0, 0, 0, 0, 0], *SOLVER["rows"][1:]]}, "evaluation 0 has no weight for the initial noise"),
        ({"final": [1e7, 0, 0, 0, 0]}, r"solver.final: the weight 1e\+07"),
        ({"final": [1.0, 0, 0]}, "solver.final: 3 weights for 5 columns"),
        ({"noises": 1}, "5 weights for 6 columns"),
        ({"noises": -1}, "solver.noises"),
        ({"final": ["1", 0, 0, 0, 0]}, "solver.final"),
        ({"other": 1}, "solver.other"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(document: dict[str, Any], changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule.from_json(json.dumps(with_solver(document, **changes)))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(document: dict[str, Any], number: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        Schedule.model_validate(with_solver(document, final=[number, 0, 0, 0, 0]))


def test_an_older_format_has_none(document: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="format_version: 1 has no solver"):
        Schedule.from_json(json.dumps({**with_solver(document), "format_version": 1}))


def fitted_to(**provenance: Any) -> FittedTo:
    return Solver.model_validate({**SOLVER, "provenance": provenance}).fitted_to


def test_what_it_was_fitted_to_is_said_where_a_run_is_beyond_it() -> None:
    known = fitted_to(guidance_scales=[4.0, 7.5], latent=[32, 24])
    assert known.beyond(5.0, (32, 24), lora=False) == known.beyond(None, (32, 24), lora=False) == ""
    assert known.beyond(8.0, (32, 24), lora=False, scale=8) == (
        "was fitted to guidance 4 to 7.5, 192x256 pixels; this run has guidance 8"
    )
    assert known.beyond(2.0, (32, 32), lora=True, scale=8) == (
        "was fitted to guidance 4 to 7.5, 192x256 pixels, no LoRA; "
        "this run has guidance 2 and 256x256 pixels and a LoRA"
    )


@pytest.mark.parametrize(
    "provenance", [{}, {"guidance_scales": "4", "latent": [32]}, {"guidance_scales": [True], "latent": [[1], 2]}]
)
def test_provenance_that_says_nothing_known_says_nothing(provenance: dict[str, Any]) -> None:
    assert fitted_to(**provenance).beyond(9.0, (1, 1), lora=False) == ""
