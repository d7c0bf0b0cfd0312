"""Forecasts from the document to the runtime: both layouts against the supernet, launch by launch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tiny_engines import changed, schedule_for, write

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import FORECAST_VERSION
from dipgo_deploy.bundle.names import FORECAST
from dipgo_deploy.compare.engine import compare_engine
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, in_layout, plan_export, replan
from dipgo_deploy.reference.load import load_reference
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.forecast import FittedForecast, RuleForecast, stored_before

# The same blocks are removed at three evaluations: before enough values are stored, and twice after.
GATES = [
    [True] * 4,
    [True, False, False, True],
    [True] * 4,
    *[[True, False, False, True]] * 2,
    [False, True, True, False],
]
TAYLOR = RuleForecast(kind="taylor", order=2)


def fitted(schedule: Schedule) -> FittedForecast:
    """Weights as a fit may give them: up to three, some reads plain."""
    rng = random.Random(0)
    rows = [
        [
            [] if kept or rng.random() < 0.2 else [round(rng.uniform(-0.3, 1.2), 3) for _ in values]
            for kept, values in zip(row, stored, strict=True)
        ]
        for row, stored in zip(schedule.gates, stored_before(schedule.gates), strict=True)
    ]
    return FittedForecast(kind="weights", weights=rows)


@pytest.fixture(scope="module")
def planned(dit_folder: Path) -> dict[str, PlannedExport]:
    """The transformer of whole blocks, by the kind of its caches."""
    return {
        cache: plan_export(
            str(dit_folder / "transformer"),
            schedule_for(dit_folder / "transformer", cache=cache).with_gates(GATES),
            ExportOptions(timestep_tables=False, layout="variants", guidance=False),
        )
        for cache in ("residual", "output")
    }


@pytest.fixture(scope="module")
def engines(planned: dict[str, PlannedExport], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """By kind of cache and layout: residual ones extrapolated, output ones with weights of their own."""
    folder = tmp_path_factory.mktemp("forecasts")
    made = {}
    for cache, export in planned.items():
        schedule = export.schedule
        forecast = TAYLOR if cache == "residual" else fitted(schedule)
        for layout in ("variants", "segments"):
            forecasting = in_layout(replan(export, schedule.with_forecast(forecast)), layout)
            made[cache, layout] = write(forecasting, folder / f"{cache}-{layout}")
    return made


@pytest.mark.parametrize("layout", ["variants", "segments"])
@pytest.mark.parametrize("cache", ["residual", "output"])
def test_an_engine_agrees_with_the_supernet(
    engines: dict[tuple[str, str], Path], cache: str, layout: str, backend: Any
) -> None:
    bundle = Bundle.open(engines[cache, layout])
    plan = bundle.manifest.plan
    assert json.loads((bundle.path / "manifest.json").read_text())["format_version"] == FORECAST_VERSION
    reference = load_reference(bundle)
    report = compare_engine(bundle, reference, reference.inputs(bundle.manifest), backend)
    assert report.passed and report.results is not None, report.first_failure()
    weighted = {v.name: v for v in plan.variants if FORECAST in {spec.name for spec in v.graph.inputs}}
    rows = [launch.forecast for launch in plan.launches if plan.variants[launch.variant].name in weighted]
    assert all(rows) and len(set(rows)) > len(weighted)  # launches with different weights share a graph
    assert {len(row) for row in rows} != {1}
    if layout == "variants":
        seen = {tensor.name for checked in report.loop for tensor in checked.tensors}
        assert any(name.endswith("@2") for name in seen)  # earlier stored values are compared, too


def test_plain_exports_are_as_they_were(planned: dict[str, PlannedExport], tmp_path: Path) -> None:
    text = (write(planned["residual"], tmp_path / "plain") / "manifest.json").read_text()
    assert '"forecast"' not in text and json.loads(text)["format_version"] == 4


@pytest.mark.parametrize("layout", ["variants", "segments"])
def test_a_wrong_weight_is_found(
    engines: dict[tuple[str, str], Path], layout: str, tmp_path: Path, backend: Any
) -> None:
    def change(document: dict[str, Any]) -> None:
        row = next(launch["forecast"] for launch in document["plan"]["launches"] if len(launch.get("forecast", ())) > 1)
        row[0] += 0.05

    bundle = Bundle.open(changed(engines["residual", layout], tmp_path / "bad", change))
    reference = load_reference(bundle)
    report = compare_engine(bundle, reference, reference.inputs(bundle.manifest), backend)
    assert not report.passed
    assert (FORECAST in report.first_failure()) == (layout == "variants")  # a segment's weights are seen in its result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop(), "weights for .* stored values"),
        (lambda row: row.append(1.0), "weights for .* stored values"),
        (lambda row: row.__setitem__(0, 1e7), "not finite or beyond"),
        (lambda row: row.clear(), "0 weights for"),
    ],
)
def test_a_launch_list_that_cannot_be_right_is_refused(
    engines: dict[tuple[str, str], Path], change: Any, message: str, tmp_path: Path
) -> None:
    def changes(document: dict[str, Any]) -> None:
        change(next(launch["forecast"] for launch in document["plan"]["launches"] if launch.get("forecast")))

    for layout in ("variants", "segments"):
        path = engines["output", layout]
        with pytest.raises(UserError, match=message):
            Bundle.open(changed(path, tmp_path / layout, changes))


def test_fitted_weights_do_not_go_with_a_limit_or_a_part_of_the_run(planned: dict[str, PlannedExport]) -> None:
    from dipgo_deploy.plan.compile import compile_plan
    from dipgo_deploy.schedule.image import image_run

    plain, graph = planned["output"].schedule, planned["output"].traced.graph
    schedule = plain.with_forecast(fitted(plain))
    with pytest.raises(UserError, match="were fitted without them"):
        compile_plan(graph, schedule.gates, max_variants=1, forecast=schedule.forecast)
    assert len(compile_plan(graph, schedule.gates, max_variants=1, forecast=TAYLOR).variants) == 1
    with pytest.raises(UserError, match="--strength: the weights"):
        image_run(schedule, 0.5, 3)
    part, _ = image_run(plain.with_forecast(TAYLOR), 0.5, 3)
    assert part.forecast.positions == (3.0, 4.0, 5.0)
