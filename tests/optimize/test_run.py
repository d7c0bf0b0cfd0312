"""One tiny model with classes and a VAE, from nothing to an engine directory that is judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from html_pages import Page
from shared_traces import shared_traces
from tiny_engines import save_dit_pipeline

from dipgo_deploy.backends.tensorrt_cuda import NoDeviceError
from dipgo_deploy.bench import graph_costs
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.cli.optimize import main
from dipgo_deploy.cli.schedule import main as schedule_main
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.options import ExportOptions
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.optimize import after, run, weighing
from dipgo_deploy.optimize.effort import Effort
from dipgo_deploy.optimize.weighing import Weighing, weighed
from dipgo_deploy.plan.weigh import GraphCosts
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.search.problem import Problem, ProblemOptions, load_problem

pytestmark = pytest.mark.usefixtures("traced_once")
DEAR = GraphCosts(1e15, 0.0, 1.0, 0.0, 0.0, pictures=1.0)
ARGUMENTS = ("--sampler", "ddim", "--steps", "8", "--class-labels", "0,1", "--minutes", "0.5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit") / "model"
    save_dit_pipeline(folder, layers=2)
    return folder


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same effort on every machine."""
    monkeypatch.setattr(run, "effort", lambda *given: Effort(12, 3, 2, 8, 0.1))


def test_launches_are_searched_fitted_exported_and_judged(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "three"
    assert main([str(model), *ARGUMENTS, "--launches", "3", "--json", "-o", str(target)]) == 0
    facts = json.loads(capsys.readouterr().out)
    bundle = Bundle.open(target)
    schedule = bundle.load_schedule()
    assert schedule.solver is not None and schedule.steps == 3
    assert facts["launches"] == len(bundle.manifest.plan.launches) == 3 and facts["evaluations"] == 8
    assert facts["quality_met"] is None  # none was asked for
    assert facts["quality"]["ssim"]["low"] <= facts["quality"]["ssim"]["value"] <= 1
    assert {"loading", "searching launches", "judging", "exporting"} <= facts["seconds"].keys()
    assert facts["graphs"] == 1 and facts["graph_costs"] is None
    assert facts["engines"] == [] and facts["report"] == str(target / "report.html")
    page = Page((target / "report.html").read_bytes())
    assert page.said("SSIM to the pictures of the full run (DDIMScheduler, 8 steps)") and "quality-0" in page.charts
    assert any("3 launches" in row and f"{facts['quality']['ssim']['value']:.4f}" in " ".join(row) for row in page.rows)
    # The schedule that came out, given: nothing is searched, and the same is judged.
    again = tmp_path / "again"
    given = ["--schedule", str(target / "schedule.json"), "--class-labels", "0,1", "--minutes", "9", "--no-check"]
    assert main([str(model), *given, "--no-report", "--json", "-o", str(again)]) == 0
    same = json.loads(capsys.readouterr().out)
    assert Bundle.open(again).load_schedule() == schedule and same["effort"] is None
    assert (same["launches"], same["evaluations"]) == (3, 8) and not (again / "report.html").exists()


def test_the_fewest_launches_of_a_quality(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "quality"
    arguments = [str(model), *ARGUMENTS, "--no-check", "-o", str(target)]
    assert main([*arguments, "--quality", "0.05", "--granularity", "layer", "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["launches"] == 2 and facts["quality_met"] is True
    assert Bundle.open(target).manifest.model.granularity == "layer"
    assert "2 launches: SSIM" in captured.err and "3 launches" not in captured.err
    # Nothing is written where no number of launches reaches it.
    other = tmp_path / "never"
    assert main([*arguments[:-1], str(other), "--quality", "0.9999999"]) == 2
    assert "launches reach" in capsys.readouterr().err and not other.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--launches", "3", "--speedup", "2"), "--launches and --speedup: give one of"),
        (("--launches", "8"), "--launches 8: not of a full run of 8 evaluations"),
        (("--schedule", "fashion-dit-ddim50"), "--sampler: the schedule that --schedule gives has its own"),
    ],
)
def test_what_cannot_be_is_one_line(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(run, "load_problem", lambda *given: pytest.fail("was loaded"))
    assert main([str(model), *ARGUMENTS, *arguments, "-o", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_model_without_a_vae_is_judged_by_no_quality(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_problem", lambda *given: pytest.fail("was loaded"))
    assert main([str(model / "transformer"), *ARGUMENTS, "-o", str(tmp_path / "x")]) == 2
    assert "has no VAE to judge pictures with; give --launches or --speedup" in capsys.readouterr().err


def test_engines_are_built_where_a_tensorrt_and_a_gpu_are(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(Path("engines/x"), Manifest.model_construct())
    found: set[str] = set()
    monkeypatch.setattr(after.importlib.util, "find_spec", lambda name: name if name in found else None)
    assert after.engines_for(bundle) == ((), "")

    def none() -> Any:
        raise NoDeviceError("no NVIDIA GPU here")

    monkeypatch.setattr(after, "find_device", none)
    found.add("tensorrt")
    assert after.engines_for(bundle) == ((), "no engines were built: no NVIDIA GPU here")
    found.add("tensorrt_rtx")
    backends, line = after.engines_for(bundle)
    assert not backends and line.endswith(
        "for other machines: dipgo-build --engine-dir engines/x --backend tensorrt-rtx"
    )
    monkeypatch.setattr(after, "find_device", lambda: "a GPU")
    assert after.engines_for(bundle) == (("tensorrt", "tensorrt-rtx"), "")


def test_a_directory_that_is_there_is_refused_before_the_model_is_loaded(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_problem", lambda *given: pytest.fail("was loaded"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    assert main([str(model), *ARGUMENTS, "--launches", "3", "-o", str(tmp_path / "there")]) == 2
    assert "there" in capsys.readouterr().err


@pytest.fixture(scope="module")
def two_graphs(model: Path) -> Schedule:
    """Every other evaluation skips the last block."""
    target = schedule_target(str(model), "ddim", 8, "block", "output")
    gates = [[True] * 2 if step % 2 == 0 else [True, False] for step in range(8)]
    return target.schedule(tuple(map(tuple, gates)), "by hand", {})


@pytest.fixture(scope="module")
def problem(model: Path, two_graphs: Schedule) -> Problem:
    with shared_traces():
        options = ProblemOptions(str(model), class_labels=(0,), guidance_scale=2.0)
        return load_problem(run.of_schedule(options, two_graphs))


def test_a_graph_that_costs_more_than_it_saves_goes_before_pictures_are_judged(
    model: Path, two_graphs: Schedule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_graphs.save(tmp_path / "two.json")
    (tmp_path / "costs.json").write_text(json.dumps({"costs": vars(DEAR)}))
    given = ["--schedule", str(tmp_path / "two.json"), "--class-labels", "0,1", "--minutes", "9", "--no-report"]
    line = [str(model), *given, "--graph-costs", str(tmp_path / "costs.json"), "--json", "--no-check"]
    assert main([*line, "-o", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    said = "graphs weighed for 1 pictures a process: 4 skipped blocks are computed after all: 1 graph in the place of 2"
    assert said in " ".join(captured.err.split())
    facts = json.loads(captured.out)
    assert facts["graphs"] == 1 and facts["graph_costs"] == vars(DEAR)
    bundle = Bundle.open(tmp_path / "out")
    schedule = bundle.load_schedule()
    # The gates are the weighed ones and nothing was re-enabled behind them; where they come from stands there.
    assert all(map(all, schedule.gates)) and bundle.manifest.promoted == ()
    assert schedule.provenance["method"] == "by hand"
    assert schedule.provenance["weighed"] == {"variants_before": 2, "costs": vars(DEAR)}
    assert main([*line, "--no-weigh", "-o", str(tmp_path / "other")]) == 2
    assert "--graph-costs: not with --no-weigh" in capsys.readouterr().err


def test_this_machine_is_measured_where_there_is_something_to_weigh(
    problem: Problem, two_graphs: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weighing, "_SECONDS", 0.0)
    stages: list[str] = []
    schedule, line, costs = weighed(
        problem, two_graphs, ExportOptions(), Weighing(pictures=3, threads=1), stages.append
    )
    assert stages == ["measuring what graphs cost"] and line.startswith("graphs weighed for 3 pictures a process: ")
    assert costs is not None and costs.pictures == 3 and 0 < costs.load_seconds_per_byte < 1
    assert 1e6 < costs.macs_per_second < 1e12
    assert (schedule == two_graphs) == line.endswith("as written")
    # Of a large model some parts stand for all, and of one whose blocks are too large chains of products do.
    everything = graph_costs._sample(problem.traced)
    assert everything == list(problem.traced.graph.values)
    total = sum(graph_costs._weight_bytes(problem.traced, name) for name in everything)
    monkeypatch.setattr(graph_costs, "_SAMPLE_BYTES", total // 2)
    some = graph_costs._sample(problem.traced)
    assert set(some) < set(everything)
    assert sum(graph_costs._weight_bytes(problem.traced, name) for name in some) <= total // 2
    monkeypatch.setattr(graph_costs, "_SAMPLE_BYTES", 8)
    assert graph_costs._sample(problem.traced) == []


def test_free_graphs_stay_and_what_is_not_weighed_says_why(
    problem: Problem, two_graphs: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*given: object, **settings: object) -> Any:
        raise UserError("ONNX Runtime is missing or broken")

    monkeypatch.setattr(graph_costs, "measure_graph_costs", measure)
    plain = ExportOptions()
    free = Weighing(GraphCosts(1.0, 0.0, 0.0, 0.0, 0.0))
    schedule, line, _ = weighed(problem, two_graphs, plain, free)
    assert schedule is two_graphs and line.endswith(": 2 graphs are worth what they cost; as written")
    whole = two_graphs.with_gates([[True] * 2] * 8)
    for given, options, reason in (
        (whole, plain, "one graph: nothing to weigh"),
        (two_graphs, plain, "graphs were not weighed: ONNX Runtime is missing or broken"),
        (two_graphs, replace(plain, dtype="fp16"), "not for --dtype fp16; give --graph-costs FILE"),
        (two_graphs, replace(plain, layout="segments"), "--layout segments has each weight once"),
        (two_graphs, replace(plain, max_variants=2), "--max-variants was given"),
        (two_graphs.with_guidance([1.0] * 6 + [0.0, 0.0]), plain, "dipgo-schedule weigh does"),
    ):
        schedule, line, costs = weighed(problem, given, options, Weighing())
        assert schedule is given and costs is None and reason in line and "\n" not in line
    with pytest.raises(UserError, match="--pictures 0: give a number"):
        Weighing(pictures=0).check()


def test_costs_go_into_the_weighing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="graph_costs: goes into weighing here"):
        run.optimize(ProblemOptions(str(model)), tmp_path / "x", export=ExportOptions(graph_costs=DEAR))


def test_a_schedule_file_is_weighed_by_itself(
    model: Path, two_graphs: Schedule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("written", "costs", "weighed", "whole", "same")}
    two_graphs.with_guidance([1.0] * 6 + [0.0, 0.0]).save(files["written"])
    files["costs"].write_text(json.dumps({"costs": vars(DEAR)}))
    given = ["--model", str(model), "--graph-costs", str(files["costs"])]
    line = ["weigh", str(files["written"]), *given, "--pictures", "2", "-o", str(files["weighed"]), "--json"]
    assert schedule_main(line) == 0
    facts = json.loads(capsys.readouterr().out)
    # Guided and conditional-only launches have a graph each, whatever it costs.
    assert "4 skipped blocks are computed after all: 2 graphs in the place of 4" in facts["weighed"]
    weighed = Schedule.load(files["weighed"])
    assert all(map(all, weighed.gates)) and weighed.guidance == (1.0,) * 6 + (0.0, 0.0)
    assert weighed.provenance["weighed"]["costs"] == {**vars(DEAR), "pictures": 2.0}
    # What has nothing to weigh is written as it is, and what was fitted is refused, without the model.
    two_graphs.with_gates([[True] * 2] * 8).save(files["whole"])
    assert schedule_main(["weigh", str(files["whole"]), *given, "-o", str(files["same"])]) == 0
    assert "one graph: nothing to weigh" in capsys.readouterr().out
    assert files["same"].read_bytes() == files["whole"].read_bytes()
    line = ["weigh", "fashion-sd-ddim50-7", "--model", "fashion-sd", "-o", str(tmp_path / "x.json")]
    assert schedule_main(line) == 2 and "rows were fitted to its gates" in capsys.readouterr().err
    assert schedule_main([*line, "--pictures", "inf"]) == 2 and "--pictures inf" in capsys.readouterr().err
