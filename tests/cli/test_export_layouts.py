"""``dipgo-export --plan-only`` on both layouts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shared_traces import shared_traces
from tiny_engines import save_dit_pipeline

from dipgo_deploy.cli.export import main
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.schedule import builders
from dipgo_deploy.schedule.document import Schedule

BUDGET = "200KiB"
PARTS = ("weight", "arena", "history", "beside")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with shared_traces():
        yield save_dit_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture
def schedule(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "random.json"
    saved(model, 6, path)
    return path


def saved(model: Path, steps: int, path: Path) -> None:
    """Half of all gates removed at random."""
    target = schedule_target(str(model), "ddim", steps, "block", None)
    gates = builders.random(target.steps, len(target.blocks), 0.5, seed=1)
    target.schedule(gates, "random", {}).save(path)


def test_both_layouts_are_shown_and_the_budget_chooses(
    model: Path, schedule: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model), "--schedule", str(schedule), "--plan-only", "--json", "--no-prologue"]
    assert main([*arguments, "--layout", "segments", "--memory-budget", BUDGET]) == 0
    shown = capsys.readouterr()
    facts = json.loads(shown.out)
    variants, segments = facts["layouts"]["variants"], facts["layouts"]["segments"]
    assert variants["weight_bytes"] > 200 * 2**10 > segments["total_bytes"]
    assert facts["weight_bytes"] <= segments["weight_bytes"] < 1.01 * facts["weight_bytes"]
    assert segments["launches"] > variants["launches"] == 6
    assert segments["total_bytes"] == sum(
        segments[f"{part}_bytes"] for part in ("weight", "arena", "history", "beside")
    )
    assert facts["advice"] == "segments" and "--layout segments" in shown.err
    assert facts["layout"] == "segments" and {row["name"] for row in facts["variants"]} >= {"s00", "sum2"}
    assert len(facts["variants"]) == segments["graphs"] and len(facts["launches"]) == segments["launches"]
    assert main([*arguments, "--memory-budget", "8GiB"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["advice"] == "variants" and facts["layout"] == "variants"
    assert len(facts["variants"]) == variants["graphs"]


def test_the_prologue_is_part_of_what_a_layout_takes(
    model: Path, schedule: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model), "--schedule", str(schedule), "--plan-only", "--json", "--prologue"]
    assert main(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    tables, prologue = facts["timestep_tables"], facts["prologue"]
    for row in facts["layouts"].values():
        assert row["beside_bytes"] == tables["bytes"] + prologue["bytes"] + prologue["weight_bytes_saved"]
        assert row["total_bytes"] == sum(row[f"{part}_bytes"] for part in PARTS)


def test_a_budget_without_plan_only_is_refused(schedule: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--model", "fashion-dit", "--schedule", str(schedule), "--memory-budget", "8GiB"]
    assert main([*arguments, "--engine-dir", str(tmp_path / "engine")]) == 2
    assert "--memory-budget goes with --plan-only" in capsys.readouterr().err
    assert main([*arguments[:-1], "lots", "--plan-only"]) == 2
    assert "--memory-budget lots" in capsys.readouterr().err


def test_auto_takes_segments_where_variants_would_hold_many_copies(
    model: Path, schedule: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = Schedule.load(schedule)
    many = tmp_path / "many.json"
    saved(model, 14, many)

    def planned(path: Path, *options: str) -> tuple[dict[str, Any], str]:
        assert main(["--model", str(model), "--schedule", str(path), "--plan-only", "--json", *options]) == 0
        shown = capsys.readouterr()
        return json.loads(shown.out), " ".join(shown.err.split())

    facts, text = planned(many)
    needs = facts["layouts"]
    assert facts["layout"] == "segments" and len(facts["variants"]) == needs["segments"]["graphs"]
    copies = needs["variants"]["weight_bytes"] / facts["weight_bytes"]
    assert copies > 4 and facts["weight_copies"] == pytest.approx(copies)
    assert f"auto is segments: the graphs of variants hold the weights {facts['weight_copies']:.1f} times" in text
    facts, text = planned(schedule)
    assert given.steps == 6 and facts["layout"] == "variants" and facts["weight_copies"] <= 4
    assert "auto is variants" in text
    facts, text = planned(many, "--layout", "variants")
    assert facts["layout"] == "variants" and "weight_copies" not in facts and "auto is" not in text


def test_open_sizes_are_planned_in_one_layout(model: Path, schedule: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(model), "--schedule", str(schedule), "--plan-only", "--batch", "1:2"]
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layout"] == "variants" and "layouts" not in facts and len(facts["launches"]) == 6
    assert main([*arguments, "--memory-budget", "8GiB"]) == 2
    assert "--memory-budget: not with ranges of sizes" in capsys.readouterr().err
