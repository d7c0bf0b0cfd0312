"""One engine directory with several schedules of a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from tiny_engines import changed, schedule_for, write

from dipgo_deploy.bundle.directory import Bundle, reseal
from dipgo_deploy.bundle.manifest import seal_of
from dipgo_deploy.cli.export import main as export_main
from dipgo_deploy.cli.inspect import main as inspect_main
from dipgo_deploy.cli.run import main as run_main
from dipgo_deploy.engine.build import graphs_of
from dipgo_deploy.engine.contents import contents
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.added import add_schedules
from dipgo_deploy.export.exporter import (
    ExportOptions,
    PlannedExport,
    export_bundle,
    publish,
    replan,
)
from dipgo_deploy.export.several import joined, read_schedules, shared_graphs
from dipgo_deploy.integrations.diffusers import load_engines
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.sampler import scheduler_of
from dipgo_deploy.schedule.document import Schedule, gate_rows

WithGates = Callable[[PlannedExport, list[list[bool]]], PlannedExport]
UNCHECKED = ExportOptions(check=False, components=False, self_test=False)


@pytest.fixture(scope="module")
def exports(planned_dit: PlannedExport, with_gates: WithGates) -> dict[str, PlannedExport]:
    """Full; pruned; and one of two steps, whose history is shorter."""
    steps, blocks = planned_dit.schedule.steps, len(planned_dit.schedule.blocks)
    pruned = [[place == 0 or step % 2 == 0 for place in range(blocks)] for step in range(steps)]
    found = {
        "full": planned_dit,
        "pruned": with_gates(planned_dit, pruned),
        "few": replan(planned_dit, _of_steps(planned_dit.schedule, 2)),
    }
    options = replace(planned_dit.options, self_test=False)
    return {name: replace(export, options=options) for name, export in found.items()}


@pytest.fixture(scope="module")
def together(exports: dict[str, PlannedExport], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together") / "engine"
    publish(joined(exports), folder)  # every schedule compared with the supernet
    return folder


def _of_steps(schedule: Schedule, steps: int) -> Schedule:
    """The full run of fewer steps."""
    document = json.loads(schedule.to_json())
    gates = [[True] * len(schedule.blocks)] * steps
    sampler = {**document["sampler"], "num_inference_steps": steps}
    return Schedule.model_validate({**document, "steps": steps, "keep": gate_rows(gates), "sampler": sampler})


def _draw(pipeline: Pipeline, label: int = 3) -> np.ndarray:
    return pipeline(class_labels=label, guidance_scale=2, seed=5, output_type="latent").latents


def test_each_schedule_draws_what_it_draws_alone(
    exports: dict[str, PlannedExport], together: Path, tmp_path: Path
) -> None:
    first = Pipeline.from_engine_dir(together)
    assert first.bundle.schedules == tuple(exports) and first.bundle.manifest.name == "full"
    for name, export in exports.items():
        alone = Pipeline.from_engine_dir(write(export, tmp_path / name))
        pipeline = Pipeline.from_engine_dir(together, schedule=name)
        np.testing.assert_allclose(_draw(pipeline), _draw(alone), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(_draw(first.with_schedule(name)), _draw(pipeline))
        launches = len(alone.bundle.manifest.plan.launched)
        (found,) = [name for name in exports if len(exports[name].plan.launches) == launches][:1]
        if sum(len(one.plan.launches) == launches for one in exports.values()) == 1:
            assert Bundle.open(together, launches=launches).manifest.name == found


def test_a_stock_pipeline_takes_each_schedule(dit_folder: Path, together: Path) -> None:
    """DiTPipeline, whose scheduler gets both halves of guidance."""
    torch.manual_seed(0)
    vae = AutoencoderKL(norm_num_groups=4, block_out_channels=(4,), latent_channels=4)
    transformer = DiTTransformer2DModel.from_pretrained(dit_folder)
    # The null class that the pipeline writes is that of 1000 classes.
    hook = transformer.register_forward_pre_hook(_with_null_10, with_kwargs=True)
    stock = DiTPipeline(transformer, vae, scheduler_of(Bundle.open(together).load_schedule()))
    stock.set_progress_bar_config(disable=True)
    steps = Bundle.open(together).manifest.sampler.num_inference_steps

    def drawn(scale: float, steps: int = steps) -> np.ndarray:
        generator = torch.Generator().manual_seed(5)
        call = {"generator": generator, "num_inference_steps": steps, "output_type": "np"}
        return np.asarray(stock([3, 1], guidance_scale=scale, **call).images)

    def ours(scale: float, **choice: Any) -> np.ndarray:
        pipeline = Pipeline.from_engine_dir(together, "cpu", threads=1, **choice)
        latents = pipeline(class_labels=[3, 1], guidance_scale=scale, seed=5, output_type="latent").latents
        with torch.no_grad():
            pictures = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample
        return (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    full = {scale: drawn(scale) for scale in (4.0, 1.0)}
    hook.remove()
    with load_engines(stock, together, "cpu", schedule="full", threads=1):
        for scale, wanted in full.items():
            assert np.abs(drawn(scale) - wanted).max() <= 1e-4
        with pytest.raises(UserError, match=r"num_inference_steps: 9, .* its schedules are full, pruned, few; give"):
            drawn(4.0, steps=9)
    with load_engines(stock, together, "cpu", schedule="pruned", threads=1):
        assert np.abs(drawn(4.0) - ours(4.0, schedule="pruned")).max() <= 1e-4
        assert np.abs(drawn(4.0) - full[4.0]).max() > 1e-3
    with load_engines(stock, together, "cpu", launches=2, threads=1):
        assert np.abs(drawn(4.0, steps=2) - ours(4.0, launches=2)).max() <= 1e-4
        stock.scheduler.set_timesteps(2)
        handed = {"timestep": torch.ones(2), "class_labels": torch.tensor([3, 10]), "mask": torch.ones(2, 1)}
        with pytest.raises(UserError, match="mask: is given to the denoiser, and this engine directory takes none"):
            stock.transformer(torch.zeros(2, 4, 8, 8), **handed)
    with pytest.raises(TypeError, match="mask"):
        stock.transformer(torch.zeros(2, 4, 8, 8), **handed)
    assert not hasattr(stock.scheduler, "call")


def _with_null_10(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    labels = kwargs["class_labels"]
    return args, {**kwargs, "class_labels": torch.where(labels == 1000, 10, labels)}


def test_graphs_and_weights_are_there_once(exports: dict[str, PlannedExport], together: Path) -> None:
    manifests = {one.manifest.name: one.manifest for one in Bundle.open(together).with_each()}
    files = {name: {v.graph.file for v in manifest.plan.variants} for name, manifest in manifests.items()}
    # The full evaluation is one graph of all three.
    assert files["full"] == files["full"] & files["pruned"] & files["few"]
    assert shared_graphs(joined(exports)) == sum(map(len, files.values())) - len(set().union(*files.values())) == 2
    graphs = {path.name for path in (together / "graphs").glob("*.onnx")}
    assert {f"graphs/{name}" for name in graphs} == set().union(*files.values())
    assert len(list(together.rglob("weights.bin"))) == 1
    assert len(graphs_of(*manifests.values())) == len(graphs)
    slots = {name: manifest.plan.slots for name, manifest in manifests.items()}
    assert set(slots.values()) == {7} and manifests["few"].plan.spare == 4 and not manifests["full"].plan.spare


def test_pipelines_of_one_directory_load_a_graph_once(together: Path) -> None:
    full = Pipeline.from_engine_dir(together)
    pruned = full.with_schedule("pruned")
    memory = pruned.memory()
    assert (memory["graphs_loaded"], memory["graphs"]) == (1, 2)  # the full evaluation is loaded
    before = _draw(full)
    _draw(pruned)
    np.testing.assert_array_equal(_draw(full), before)
    assert full._loaded.loop(full.bundle) is not pruned._loaded.loop(pruned.bundle)
    with pytest.raises(UserError, match=r"has no schedule other; it has full \(6 launches\), pruned"):
        full.with_schedule("other")


def test_what_a_directory_does_not_have_is_refused(together: Path, tmp_path: Path) -> None:
    for given, message in (
        ({"schedule": "five"}, r"has no schedule five; it has full \(6 launches\), pruned \(6 launches\), few \(2 l"),
        ({"launches": 9}, "has no schedule of 9 launches; it has"),
        ({"launches": 6}, "has more than one schedule of 6 launches; it has"),
        ({"launches": 6, "schedule": "full"}, "give one of the two"),
    ):
        with pytest.raises(UserError, match=message):
            Bundle.open(together, **given)
    # A manifest that is not the one that was exported with the first.
    folder = tmp_path / "changed"
    shutil.copytree(together, folder)
    path = folder / "schedules" / "few" / "manifest.json"
    document = json.loads(path.read_text())
    document["guidance_scale"] = 3.0
    path.write_text(json.dumps({**document, "seal": seal_of(document)}))
    with pytest.raises(UserError, match=r"few.manifest\.json: its sha256 differs"):
        Bundle.open(folder)
    reseal(folder)
    assert Bundle.open(folder, schedule="few").manifest.guidance_scale == 3
    with pytest.raises(UserError, match="'schedules/few/none.json' is not among"):
        Bundle.open(changed(together, tmp_path / "none", lambda m: m["others"].update(few="schedules/few/none.json")))
    with pytest.raises(UserError, match="2 of 7 slots are spare|said to be spare"):
        Bundle.open(changed(together, tmp_path / "spare", lambda m: m["plan"].update(spare=2)))


def test_schedules_by_name(planned_dit: PlannedExport) -> None:
    schedule = planned_dit.schedule
    assert read_schedules(schedule) == read_schedules({"one": schedule}) == {"": schedule}
    assert list(read_schedules({"one": schedule}, several=True)) == ["one"]
    for given, message in (
        ({}, "there is none"),
        ({"a/b": schedule}, "schedule name 'a/b': give letters"),
        ({1: schedule}, "schedule name 1"),
    ):
        with pytest.raises(UserError, match=message):
            read_schedules(given)


def test_adding_keeps_what_is_there(
    exports: dict[str, PlannedExport], dit_folder: Path, together: Path, tmp_path: Path, capsys
) -> None:
    """The graphs of before stay, and so do the engines; more predictions than before change the graphs, and it is
    said."""
    full = schedule_for(dit_folder)
    pruned = schedule_for(dit_folder, ratio=0.5)
    few = _of_steps(full, 2)
    folder = tmp_path / "engine"
    export_bundle(dit_folder, {"full": full, "few": few}, folder, UNCHECKED)
    (folder / "plans" / "made").mkdir(parents=True)
    (folder / "plans" / "made" / "v00.plan").write_bytes(b"an engine")
    before = Bundle.open(folder).manifest
    said: list[str] = []
    bundle = add_schedules(folder, {"pruned": pruned}, model=dit_folder, check=False, note=said.append)
    assert bundle.schedules == ("full", "few", "pruned") and not any("changed" in line for line in said)
    assert {name: bundle.manifest.files[name] for name in before.graph_files()} == {
        name: before.files[name] for name in before.graph_files()
    }
    assert (folder / "plans" / "made" / "v00.plan").read_bytes() == b"an engine"
    with pytest.raises(UserError, match="has a schedule few already"):
        add_schedules(folder, {"few": few})
    single = write(exports["few"], tmp_path / "single")
    file = tmp_path / "full.json"
    full.save(file)
    given = ["--model", str(dit_folder), "--schedule", str(file), "--engine-dir", str(single), "--add", "--no-check"]
    assert export_main(given) == 0
    assert "1 graphs changed (a longer history" in capsys.readouterr().out
    assert Bundle.open(single).schedules == ("default", "full")
    assert export_main([*given, "--batch", "2"]) == 2
    assert "--batch: with --add it is as the engine directory was exported" in capsys.readouterr().err


def test_another_model_is_not_added(dit_folder: Path, together: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(dit_folder, folder)
    torch.manual_seed(8)
    model = DiTTransformer2DModel.from_pretrained(folder)
    with torch.no_grad():
        model.proj_out_2.weight.add_(0.1)  # type: ignore[union-attr,operator]
    model.save_pretrained(folder)
    before = (together / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"is not the model that was exported, or an earlier .*; .*proj_out_2.*differs"):
        add_schedules(together, {"other": schedule_for(dit_folder)}, model=folder, check=False)
    assert (together / "manifest.json").read_bytes() == before


def test_the_commands_offer_them(together: Path, tmp_path: Path, capsys) -> None:
    assert (
        run_main(
            [
                "--engine-dir",
                str(together),
                "--class-labels",
                "3",
                "--guidance-scale",
                "2",
                "--launches",
                "2",
                "--output-type",
                "latent",
                "--output",
                str(tmp_path / "few.npy"),
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["schedule"] == "few"
    np.testing.assert_array_equal(
        np.load(tmp_path / "few.npy"),
        Pipeline.from_engine_dir(together, schedule="few")(
            class_labels=3, guidance_scale=2, output_type="latent"
        ).latents,
    )
    assert inspect_main([str(together), "--schedule", "pruned"]) == 0
    assert "full (6 launches), pruned (6 launches), few (2 launches); shown: pruned" in " ".join(
        capsys.readouterr().out.split()
    )
    assert [one["name"] for one in contents(Bundle.open(together))["schedules"]] == ["full", "pruned", "few"]
