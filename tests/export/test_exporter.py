"""``export_bundle`` is ``dipgo-export``, and takes a pipeline that is in memory only."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import DiTPipeline
from family_checks import loop_report
from tiny_engines import save_dit_pipeline, schedule_for

from dipgo_deploy.bundle.files import hash_tree
from dipgo_deploy.bundle.shapes import Range
from dipgo_deploy.cli.export import main
from dipgo_deploy.errors import UserError
from dipgo_deploy.export import exporter
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, export_bundle, in_layout, publish, replan
from dipgo_deploy.plan.weigh import GraphCosts
from dipgo_deploy.schedule.document import Schedule

torch.set_num_threads(1)

# A graph costs more than anything that it saves.
DEAR = GraphCosts(1e15, 0.0, 1.0, 0.0, 0.0)
UNCHECKED = ExportOptions(check=False, components=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder."""
    return save_dit_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(whole: Path) -> Path:
    """Its denoiser, which is a model by itself."""
    return whole / "transformer"


@pytest.fixture(scope="module")
def many(model: Path) -> Schedule:
    """A schedule whose variants hold the weights more than four times: each evaluation removes another block."""
    schedule = schedule_for(model)
    blocks = len(schedule.blocks)
    return schedule.with_gates([[place != step - 1 for place in range(blocks)] for step in range(schedule.steps)])


@pytest.fixture(scope="module")
def file(many: Schedule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schedule") / "many.json"
    many.save(path)
    return path


def test_a_call_and_the_command_write_the_same(
    model: Path, many: Schedule, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With no option but the three that are needed: every default is decided in one place."""
    seen: list[PlannedExport] = []

    def planned(export: PlannedExport) -> None:
        assert not (tmp_path / "call").exists()
        seen.append(export)

    assert main(["--model", str(model), "--schedule", str(file), "--engine-dir", str(tmp_path / "command")]) == 0
    bundle = export_bundle(model, str(file), str(tmp_path / "call"), planned=planned)
    assert hash_tree(tmp_path / "call") == hash_tree(tmp_path / "command")
    (export,) = seen
    assert bundle.manifest.plan.layout == export.layout == "segments"  # what auto took, no default by chance
    assert export.copies is not None and export.copies > 4
    # Each schedule gets a layout of its own.
    full = replan(export, many.with_gates([[True] * len(many.blocks)] * many.steps))
    assert full.layout == "variants" and full.copies == pytest.approx(1)
    assert in_layout(export, "variants").layout == "variants" and in_layout(full, "segments").layout == "segments"
    # Where segments cannot be, or are not for this device, auto does not count copies.
    for change in ({"dtype": "fp16"}, {"max_variants": 9}):
        other = in_layout(replace(export, options=replace(export.options, **change)), "auto")
        assert other.layout == "variants" and other.copies is None
    # Where graphs are weighed, what becomes of the schedule is said, and stands in the directory.
    with caplog.at_level(logging.WARNING):
        weighed = replan(replace(export, options=replace(export.options, graph_costs=DEAR, layout="auto")), many)
    assert f"computed after all: 1 graph in the place of {len(export.units)}" in caplog.text
    made = publish(weighed, tmp_path / "weighed")
    assert len(made.manifest.plan.variants) == 1 and made.manifest.promoted == weighed.plan.promoted
    assert loop_report(made.path).first_failure() is None


def test_the_commands_options_are_the_calls(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def refuse(*arguments: Any, **hooks: Any) -> None:
        given[:] = arguments
        raise UserError("seen")

    monkeypatch.setattr(exporter, "export_bundle", refuse)
    needed = ["--model", "m", "--schedule", str(file), "--engine-dir", str(tmp_path / "x")]
    assert main(needed) == 2
    assert given[:4] == ["m", file, tmp_path / "x", ExportOptions()]
    words = "--dtype fp16 --batch 1:2:4 --height 64 --layout variants --max-variants 3 --strength 0.5 --no-guidance"
    flags = "--no-check --no-components --low-memory --allow-other-config --overwrite"
    assert main([*needed, *words.split(), *flags.split()]) == 2
    assert given[3] == ExportOptions(
        dtype="fp16",
        batch=Range(min=1, opt=2, max=4),
        height=64,
        layout="variants",
        max_variants=3,
        strength=0.5,
        guidance=False,
        check=False,
        components=False,
        low_memory=True,
        allow_other_config=True,
        overwrite=True,
    )


def test_a_pipeline_in_memory_is_exported_as_it_is(
    whole: Path, many: Schedule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = DiTPipeline.from_pretrained(whole)
    bias = pipeline.transformer.proj_out_2.bias
    with torch.no_grad():
        bias.add_(1.0)
    with caplog.at_level(logging.WARNING):
        bundle = export_bundle(pipeline, many, tmp_path / "engine", ExportOptions(dtype="bf16", components=False))
    assert "nothing was compared: bf16 graphs do not run on a CPU" in caplog.text  # nobody asked for notes
    assert bundle.manifest.model.name == str(whole)  # where it came from
    graphs = [onnx.load(bundle.path / entry.graph.file) for entry in bundle.manifest.plan.variants]
    (stored,) = {
        tensor.raw_data for graph in graphs for tensor in graph.graph.initializer if tensor.name == "proj_out_2.bias"
    }
    assert stored == bias.detach().bfloat16().view(torch.int16).numpy().tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_what_is_wrong_with_a_pipeline_does_not_name_a_folder_that_is_gone(
    whole: Path, many: Schedule, tmp_path: Path
) -> None:
    pipeline = DiTPipeline.from_pretrained(whole)
    wrong = many.model_copy(update={"model": many.model.model_copy(update={"config_hash": "0" * 64})})
    with pytest.raises(UserError) as error:
        export_bundle(pipeline, wrong, tmp_path / "x", UNCHECKED)
    assert str(tmp_path) not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_refused_export(model: Path, many: Schedule, tmp_path: Path) -> None:
    for options in (ExportOptions(layout="segments", max_variants=2), ExportOptions(height=17)):
        with pytest.raises(UserError):
            export_bundle(model, many, tmp_path / "a" / "b" / "engine", options)
    with pytest.raises(UserError, match="no.json"):
        export_bundle(model, tmp_path / "no.json", tmp_path / "a" / "engine")
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_exists_is_refused_before_the_model_is_read(many: Schedule, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("")
    with pytest.raises(UserError, match="exists; give another --engine-dir"):
        export_bundle("nowhere", many, tmp_path / "x")
