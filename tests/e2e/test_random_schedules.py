"""Random schedules on the trained models: the engine's loop is the supernet's, whatever is removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dipgo_deploy.compare.report import Report
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, publish, replan
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.schedule import builders

MODELS = (("fashion_sd", "fashion-sd", None), ("fashion_dit", "fashion-dit", None))
OUTPUT = ("fashion_dit_output", "fashion-dit", "output")


def _check(
    fixture: tuple[str, str, str | None],
    ratio: float,
    seed: int,
    request: pytest.FixtureRequest,
    folder: Path,
    compare: Callable[[Path], Report],
) -> None:
    name, model, cache = fixture
    traced: PlannedExport = request.getfixturevalue(name)
    target = schedule_target(model, "ddim", 10, "block", cache)  # type: ignore[arg-type]
    gates = builders.random(target.steps, len(target.blocks), ratio, seed)
    planned = replan(traced, target.schedule(gates, "random", {"ratio": ratio, "seed": seed}))
    publish(replace(planned, options=ExportOptions(layout="variants", check=False, components=False)), folder)
    report = compare(folder)
    assert report.first_failure() is None
    assert report.results is not None
    for tensor in (*(tensor for step in report.loop for tensor in step.tensors), *report.results.tensors):
        assert tensor.relative < 1e-4, tensor.name


@pytest.mark.parametrize(
    "fixture", [*MODELS, pytest.param(OUTPUT, marks=pytest.mark.slow)], ids=lambda fixture: fixture[0]
)
@pytest.mark.parametrize("ratio", [0.5])
def test_one_seed(
    fixture: tuple[str, str, str | None],
    ratio: float,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    compare_loop: Callable[[Path], Report],
) -> None:
    _check(fixture, ratio, 0, request, tmp_path / "x", compare_loop)


@pytest.mark.slow
@pytest.mark.parametrize("fixture", [*MODELS, OUTPUT], ids=lambda fixture: fixture[0])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(10))
def test_ten_seeds(
    fixture: tuple[str, str, str | None],
    ratio: float,
    seed: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    compare_loop: Callable[[Path], Report],
) -> None:
    _check(fixture, ratio, seed, request, tmp_path / "x", compare_loop)
