"""What depends on a class and the timestep, and not on the latent: once a run in a graph of its own, or for some
classes at export. A tiny DiT with two blocks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from family_checks import loop_report, with_gates
from lora_files import make_updates, save_lora
from seeded_defects import replaced
from tiny_engines import changed, save_dit_pipeline, schedule_for

from dipgo_deploy.backends.base import ChangedWeights
from dipgo_deploy.backends.onnxruntime import OnnxExecutable, OnnxRuntimeBackend
from dipgo_deploy.bundle.directory import Bundle, reseal
from dipgo_deploy.bundle.manifest import Graph
from dipgo_deploy.bundle.weights import WeightsIndex, weights_of
from dipgo_deploy.cli.inspect import command as inspect
from dipgo_deploy.compare.bisect import locate
from dipgo_deploy.compare.graphs import frugal_session
from dipgo_deploy.compare.metrics import Tolerance
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.again import options_of
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, publish
from dipgo_deploy.export.options import check_options
from dipgo_deploy.lora.file import LoraChoice
from dipgo_deploy.lora.merge import merge_loras
from dipgo_deploy.reference.load import load_reference
from dipgo_deploy.reference.recording import run_until_complete
from dipgo_deploy.reference.steps import recorder_for
from dipgo_deploy.runtime import run_rows
from dipgo_deploy.runtime.graphs import Graphs
from dipgo_deploy.runtime.loop import DenoisingLoop
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.runtime.run_rows import KeptRows, RunRows
from dipgo_deploy.supernet.load import load_denoiser

OTHER = "transformer_blocks.1.norm1.linear"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit_pipeline(tmp_path_factory.mktemp("prologue") / "model", layers=2)


def plan_with(model: Path, **options: Any) -> PlannedExport:
    settings = {"layout": "variants", "components": False, "check": False, **options}
    return plan_export(str(model), schedule_for(model), ExportOptions(**settings))


@pytest.fixture(scope="module")
def planned(model: Path) -> PlannedExport:
    return plan_with(model)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return publish(planned, tmp_path_factory.mktemp("with") / "engine")


@pytest.fixture(scope="module")
def two_classes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return publish(plan_with(model, class_labels=(2, 1)), tmp_path_factory.mktemp("classes") / "engine")


class Counting(OnnxRuntimeBackend):
    """Counts what is loaded and let go."""

    def __init__(self) -> None:
        super().__init__("cpu", threads=1)
        self.loaded: Counter[str] = Counter()
        self.released = 0

    def load(self, engine_dir: Path, graph: Graph, weights: ChangedWeights | None = None) -> OnnxExecutable:
        self.loaded[Path(graph.file).stem] += 1
        return super().load(engine_dir, graph, weights)

    def release(self, executable: OnnxExecutable) -> None:
        self.released += 1


def draw(pipeline: Pipeline, label: int = 1, guidance_scale: float = 3.0) -> np.ndarray:
    drawn = pipeline(class_labels=label, seed=1, guidance_scale=guidance_scale, output_type="latent")
    return drawn.latents


def stored_bytes(bundle: Bundle) -> int:
    return (bundle.path / "graphs/weights.bin").stat().st_size


def test_both_layouts_equal_the_supernet(planned: PlannedExport, engine: Bundle, tmp_path: Path):
    assert planned.options.prologue is True  # the default: it takes enough out here
    segments = with_gates(planned, planned.schedule, tmp_path / "segments", layout="segments")
    for bundle in (engine, segments):
        report = loop_report(bundle.path)
        assert report.first_failure() is None
        assert report.results is not None and report.results.tensors[0].relative < 1e-5
        assert bundle.manifest.format_version == 7
        assert bundle.manifest.plan.layout == ("segments" if bundle is segments else "variants")
        assert not bundle.manifest.plan.table_classes


def test_the_weights_are_in_the_prologue_alone(engine: Bundle):
    plan = engine.manifest.plan
    assert plan.prologue is not None
    assert [spec.name for spec in plan.prologue.inputs] == ["class_labels"]
    inside = set(weights_of(engine.path / plan.prologue.file))
    assert "transformer_blocks.0.norm1.linear.weight" in inside
    for variant in plan.variants:
        assert not inside & set(weights_of(engine.path / variant.graph.file))
        assert "class_labels" not in {spec.name for spec in variant.graph.inputs}


def test_all_timesteps_are_one_product(engine: Bundle):
    plan = engine.manifest.plan
    assert plan.prologue is not None
    count = len(plan.table_timesteps)
    assert count == len({launch.timestep for launch in plan.launches}) > 1
    (spec,) = {spec for spec in plan.prologue.outputs if spec.name == "run.transformer_blocks.0.norm1.linear"}
    assert spec.shape == (count, 2, 96)
    nodes = onnx.load(engine.path / plan.prologue.file, load_external_data=False).graph.node
    products = [node for node in nodes if node.op_type in ("Gemm", "MatMul")]
    assert len(products) == len(plan.prologue.outputs)


def test_rows_are_kept_while_the_conditions_are_the_same(engine: Bundle, model: Path):
    backend = Counting()
    pipeline = Pipeline(engine, backend)
    pipeline.load()
    first = draw(pipeline)
    assert backend.loaded["prologue"] == 1 and backend.released == 1  # its weights are out of memory
    np.testing.assert_array_equal(draw(pipeline), first)
    other = draw(pipeline, guidance_scale=2.0)  # not what the prologue reads
    assert np.abs(other - first).max() > 1e-3 and backend.loaded["prologue"] == 1
    assert np.abs(draw(pipeline, 2) - first).max() > 1e-3
    assert backend.loaded["prologue"] == 2
    np.testing.assert_array_equal(draw(pipeline), first)
    assert backend.loaded["prologue"] == 2 and backend.released == 1  # it stays: there are several conditions


@pytest.mark.parametrize("room", [2**27, 0])
def test_conditions_that_take_turns_make_their_rows_once(engine: Bundle, monkeypatch: pytest.MonkeyPatch, room: int):
    made: list[None] = []
    run = RunRows._run
    monkeypatch.setattr(run_rows, "KEPT_BYTES", room)
    monkeypatch.setattr(RunRows, "_run", lambda self, *given: (made.append(None), run(self, *given)))
    pipeline = Pipeline(engine, Counting())
    drawn = [draw(pipeline, label) for label in (1, 2, 1, 2, 2)]
    assert len(made) == (2 if room else 4)
    for before, again in zip(drawn, drawn[2:4], strict=False):
        np.testing.assert_array_equal(before, again)
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3


def test_prompts_that_all_differ_are_copied_no_more_when_the_room_is_full(
    engine: Bundle, monkeypatch: pytest.MonkeyPatch
):
    copied: list[None] = []
    made: list[None] = []
    copies, run = RunRows._copies, RunRows._run
    pipeline = Pipeline(engine, Counting())
    assert engine.manifest.plan.prologue is not None
    rows = sum(spec.nbytes for spec in engine.manifest.plan.prologue.outputs)
    monkeypatch.setattr(run_rows, "KEPT_BYTES", 2 * rows)
    monkeypatch.setattr(RunRows, "_copies", lambda self: (copied.append(None), copies(self))[1])
    monkeypatch.setattr(RunRows, "_run", lambda self, *given: (made.append(None), run(self, *given)))
    for label in range(8):
        draw(pipeline, label)
    assert (len(made), len(copied)) == (8, 2)
    for label in (3, 4, 3, 4, 3, 4):  # each once more, and then both are there
        draw(pipeline, label)
    assert (len(made), len(copied)) == (10, 4)


def test_the_oldest_rows_make_room_for_conditions_that_come_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_rows, "KEPT_BYTES", 2 * 12)
    kept = KeptRows()
    given = [{"ids": np.array([label])} for label in range(3)]
    rows = [{"a": np.full(3, label, np.float32)} for label in range(3)]
    for label in (0, 1):
        kept.keep(given[label], lambda label=label: rows[label], 12)  # type: ignore[misc]
    assert kept.of(given[0]) is rows[0]
    for label in range(2, 100):
        kept.keep({"ids": np.array([label])}, lambda: pytest.fail("copied for conditions seen once"), 12)
    assert [kept.of(one) for one in given] == [rows[0], rows[1], None]
    assert kept.of(given[0]) is rows[0]
    kept.keep(given[2], lambda: rows[2], 12)
    assert [kept.of(one) for one in given] == [rows[0], None, rows[2]]
    kept.keep({"ids": np.array([100])}, lambda: pytest.fail("copied without room"), 25)
    other = ({"ids": np.array([0], np.int32)}, {"ids": np.array([[0]])}, {"id": np.array([0])})
    assert not any(kept.of(one) for one in other)


def test_it_is_shared_and_goes_with_the_other_graphs(engine: Bundle, model: Path, tmp_path: Path):
    backend = Counting()
    graphs = Graphs(backend)
    loops = [DenoisingLoop(engine, backend, graphs=graphs) for _ in range(2)]
    noise = np.ones(loops[0].sample_shape, np.float32)
    first, other, again = (
        loop.run(noise, {"class_labels": np.array([10, label])}, guidance_scale=3.0)
        for loop, label in zip((loops[0], loops[1], loops[1]), (1, 2, 1), strict=True)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert backend.loaded["prologue"] == 2 and backend.released == 1  # not once a loop

    backend = Counting()
    pipeline = Pipeline(engine, backend)
    draw(pipeline)
    draw(pipeline, 2)
    file = save_lora(tmp_path / "lora.safetensors", make_updates(load_denoiser(str(model))[0], [OTHER]))
    loaded = backend.loaded.total()
    pipeline.load_lora(file)
    assert backend.released == loaded


def test_a_run_that_fails_leaves_no_rows_behind(engine: Bundle, monkeypatch: pytest.MonkeyPatch):
    pipeline = Pipeline(engine, Counting())
    first = draw(pipeline)
    with monkeypatch.context() as patch:
        patch.setattr(RunRows, "_run", lambda *_: (_ for _ in ()).throw(UserError("out of memory")))
        with pytest.raises(UserError, match="out of memory"):
            draw(pipeline, 2)
    np.testing.assert_array_equal(draw(pipeline), first)


def test_a_lora_changes_it(engine: Bundle, model: Path, tmp_path: Path):
    updates = make_updates(load_denoiser(str(model))[0], [OTHER])
    file = save_lora(tmp_path / "lora.safetensors", updates)
    plain, changed_weights = (
        draw(Pipeline.from_engine_dir(engine.path, "cpu", lora=loras)) for loras in ((), ((file, 1.0),))
    )
    assert np.abs(plain - changed_weights).max() > 1e-3
    merged = merge_loras(engine, [LoraChoice(file)])
    assert merged.reports[0].graphs["graphs/prologue.onnx"] == 1
    assert sum(merged.reports[0].graphs.values()) == 1


def test_classes_fixed_at_export_leave_the_disk(two_classes: Bundle, engine: Bundle):
    plan = two_classes.manifest.plan
    assert plan.table_classes == (2, 1, 10) and plan.prologue is None
    assert stored_bytes(two_classes) < 0.8 * stored_bytes(engine)
    index = WeightsIndex.load(two_classes.path / "graphs")
    assert OTHER + ".weight" in index.tabled
    assert not [s.parameter for s in index.tensors.values() if s.parameter and "norm1" in s.parameter]
    report = loop_report(two_classes.path)
    assert report.first_failure() is None
    assert report.results is not None and report.results.tensors[0].relative < 1e-5


def test_they_draw_what_any_class_draws(two_classes: Bundle, engine: Bundle):
    some, all_ = (Pipeline.from_engine_dir(bundle.path, "cpu") for bundle in (two_classes, engine))
    for label in (1, 2):
        expected = draw(all_, label)
        np.testing.assert_allclose(draw(some, label), expected, atol=1e-5 * np.abs(expected).max())


def test_another_class_is_refused_with_what_there_is(two_classes: Bundle):
    with pytest.raises(UserError, match=r"class_labels: class 3: .* was exported for 2, 1 alone"):
        draw(Pipeline.from_engine_dir(two_classes.path, "cpu", load="call"), 3)
    loop = DenoisingLoop(two_classes, Counting(), lazy=True)
    with pytest.raises(UserError, match="class 3: was exported for the classes 2, 1, 10 alone"):
        loop.run(np.zeros(loop.sample_shape, np.float32), {"class_labels": np.array([10, 3])})


def test_a_lora_on_what_is_of_the_classes_is_refused(two_classes: Bundle, model: Path, tmp_path: Path):
    file = save_lora(tmp_path / "lora.safetensors", make_updates(load_denoiser(str(model))[0], [OTHER]))
    with pytest.raises(UserError, match="became tables of timesteps at export .*without --class-labels"):
        merge_loras(two_classes, [LoraChoice(file)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": (11,)}, "--class-labels 11: the model has the classes 0 to 10"),
        ({"class_labels": (1,), "timestep_tables": False}, "--class-labels: not with --no-timestep-tables"),
        ({"prologue": True, "timestep_tables": False}, "--prologue: not with --no-timestep-tables"),
        ({"class_labels": (1,), "batch": "range"}, "--class-labels: not with a range for --batch"),
        ({"class_labels": ("a",)}, "class_labels"),
    ],
)
def test_options_that_cannot_be(model: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch):
    from dipgo_deploy.bundle.shapes import Range
    from dipgo_deploy.export import planning

    def loaded(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(planning, "load_source", loaded)
    if "batch" in options:
        options = options | {"batch": Range(min=1, opt=1, max=2)}
    with pytest.raises(UserError, match=message):
        plan_with(model, **options)


def _lost(plan: dict[str, Any]) -> None:
    del plan["prologue"]


def _twice(plan: dict[str, Any]) -> None:
    plan["table_classes"].append(1)


def _strange(plan: dict[str, Any]) -> None:
    plan["prologue"]["inputs"][0]["name"] = "latent"


def _shape(plan: dict[str, Any]) -> None:
    plan["prologue"]["outputs"][0]["shape"][0] += 1


def _type(plan: dict[str, Any]) -> None:
    plan["prologue"]["inputs"][0]["dtype"] = "float32"


def _elsewhere(plan: dict[str, Any]) -> None:
    spec = next(spec for spec in plan["variants"][1]["graph"]["inputs"] if spec["name"].startswith("run."))
    spec["shape"][-1] += 1


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_lost, "nothing fills its input run."),
        (_strange, "prologue: nothing fills its input latent"),
        (_shape, "prologue: run.* is float32"),
        (_type, "prologue: class_labels is not what the conditions say"),
        (_elsewhere, "run.* is not what it is elsewhere"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(
    engine: Bundle, tmp_path: Path, harm: Callable[[dict[str, Any]], None], message: str
):
    with pytest.raises(UserError, match=message):
        Bundle.open(changed(engine.path, tmp_path / "engine", lambda document: harm(document["plan"])))


def test_a_class_that_stands_twice_is_refused(two_classes: Bundle, tmp_path: Path):
    with pytest.raises(UserError, match="table_classes: a class stands twice"):
        Bundle.open(changed(two_classes.path, tmp_path / "engine", lambda document: _twice(document["plan"])))


def test_inspect_shows_it(engine: Bundle, two_classes: Bundle):
    shown = CliRunner().invoke(inspect, [str(engine.path)]).output
    assert "prologue" in shown and "values once a run of class_labels" in shown
    facts = json.loads(CliRunner().invoke(inspect, [str(two_classes.path), "--json"]).stdout)
    assert facts["table_classes"] == [2, 1, 10]
    assert facts["memory"]["run_rows"] == 4 * len(facts["launches"]) * sum(
        int(np.prod(spec["shape"])) for spec in facts["graphs"][0]["inputs"] if spec["name"].startswith("run.")
    )


@pytest.mark.slow
def test_half_precision(model: Path, tmp_path: Path):
    for name, options in {"any": {}, "some": {"class_labels": (1,)}}.items():
        bundle = publish(plan_with(model, dtype="fp16", **options), tmp_path / name)
        assert loop_report(bundle.path).first_failure() is None


@pytest.mark.parametrize("layout", ["variants", "segments"])
def test_a_node_of_it_that_is_wrong_is_found(planned: PlannedExport, engine: Bundle, tmp_path: Path, layout: str):
    sound = engine
    if layout == "segments":
        sound = with_gates(planned, planned.schedule, tmp_path / "sound", layout="segments")
    bad = replaced(tmp_path / "bad", sound.path)
    model = onnx.load(bad / "graphs/prologue.onnx", load_external_data=False)
    wrong = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    wrong.op_type = "Tanh"
    (bad / "graphs/prologue.onnx").unlink()  # it may be a link
    onnx.save(model, bad / "graphs/prologue.onnx")
    reference = load_reference(sound)
    inputs = reference.inputs(sound.manifest)
    recorder = recorder_for(sound, reference.schedule)
    run_until_complete(recorder, reference, inputs)
    found = locate(reseal(bad), recorder.recordings, frugal_session, lambda _: sound, Tolerance(1e-4))
    assert found is not None and found.graph == "prologue"
    assert [name for name, _ in found.nodes] == [wrong.name]


def test_it_is_exported_again_as_it_was(engine: Bundle, two_classes: Bundle):
    assert options_of(engine).prologue is True and options_of(engine).class_labels == ()
    again = options_of(two_classes)
    assert again.prologue is False and again.class_labels == two_classes.manifest.plan.table_classes
    check_options(again)
