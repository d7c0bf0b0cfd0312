"""The built-in models in segments: the commands work on them, and the pictures are those of the variants."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.cli import compare as compare_command
from dipgo_deploy.cli import run as run_command
from dipgo_deploy.export.exporter import PlannedExport, publish, replan
from dipgo_deploy.export.planning import in_layout
from dipgo_deploy.runtime.pipeline import Pipeline

ASKED = {"fashion_sd": {"prompt": "a sneaker"}, "fashion_dit": {"class_labels": 7}}
FLAGS = {"fashion_sd": ["--prompt", "a sneaker"], "fashion_dit": ["--class-labels", "7"]}


@pytest.fixture(scope="module")
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """A random schedule of a built-in model in both layouts."""
    made: dict[str, dict[str, Path]] = {}

    def get(model: str) -> dict[str, Path]:
        if model not in made:
            full: PlannedExport = request.getfixturevalue(model)
            source = random.Random(4)
            row = range(len(full.schedule.blocks))
            gates = [[step == 0 or source.random() < 0.5 for _ in row] for step in range(full.schedule.steps)]
            planned = replan(full, full.schedule.with_gates(gates))
            folder = tmp_path_factory.mktemp(model)
            publish(planned, folder / "variants")
            publish(in_layout(planned, "segments"), folder / "segments")
            made[model] = {layout: folder / layout for layout in ("variants", "segments")}
        return made[model]

    return get


@pytest.mark.parametrize("model", [pytest.param("fashion_sd", marks=pytest.mark.slow), "fashion_dit"])
def test_both_layouts_draw_the_same_picture(model: str, both) -> None:
    images = {}
    for layout, folder in both(model).items():
        pipeline = Pipeline.from_engine_dir(folder, "cpu", threads=1)
        seen: list[tuple[int, int]] = []
        result = pipeline(
            **ASKED[model], seed=3, output_type="np", callback=lambda done, of, seen=seen: seen.append((done, of))
        )
        launches = len(pipeline.bundle.manifest.plan.launches)
        assert seen == [(done, launches) for done in range(1, launches + 1)]
        memory = pipeline.memory()
        assert memory["graphs_loaded"] == memory["graphs"] == len(pipeline.bundle.manifest.plan.variants)
        images[layout] = result.images
    assert np.abs(images["segments"] - images["variants"]).max() < 1e-3
    assert np.ptp(images["segments"]) > 0.5


@pytest.mark.parametrize("model", [pytest.param("fashion_sd", marks=pytest.mark.slow), "fashion_dit"])
def test_the_commands_take_segments(model: str, both, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = both(model)["segments"]
    assert (
        run_command.main(
            ["--engine-dir", str(folder), *FLAGS[model], "--backend", "cpu", "-o", str(tmp_path / "a.png")]
        )
        == 0
    )
    capsys.readouterr()
    assert compare_command.main(["--engine-dir", str(folder), "--backend", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and report["tolerance"]["relative"] == 1e-4
    names = [variant.name for variant in Bundle.open(folder).manifest.plan.variants]
    assert {row["variant"] for row in report["variants"]} <= set(names)
    assert any(".." in str(row["variant"]) for row in report["loop"])
